"""What one step of an optimizer costs with a transformation before it."""
