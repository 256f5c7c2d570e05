"""Physics-informed networks: their derivatives, problems and reference solutions."""
