"""The cost of a step of an optimizer with a gradient transformation."""
