"""Image augmentations, augmentation policies and augmented views."""
