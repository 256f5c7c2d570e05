"""Image classification without BatchNorm, and what optimizers make of it."""
