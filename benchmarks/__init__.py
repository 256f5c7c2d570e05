"""Experiments that show where each method helps, does nothing, or hurts."""
