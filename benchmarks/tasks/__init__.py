"""What is trained, and nothing of how."""
