"""Tasks: what is trained, without an optimizer or a loop."""
