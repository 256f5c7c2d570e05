"""The engine: arms, grids, the training loop, what is said about finished runs."""
