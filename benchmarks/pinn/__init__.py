"""Physics-informed networks: problems, networks, arms and training."""
