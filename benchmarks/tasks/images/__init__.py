"""Image classifiers with BatchNorm and without, and the images."""
