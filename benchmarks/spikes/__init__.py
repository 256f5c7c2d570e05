"""Spikes, low precision and weight decay: what GradientStabilizer is for."""
