"""Control the scale of gradients between backpropagation and the optimizer."""

__version__ = "0.1.0"
