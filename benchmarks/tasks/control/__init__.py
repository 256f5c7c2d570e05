"""Agents that learn to control an environment of gymnax, by PPO."""
