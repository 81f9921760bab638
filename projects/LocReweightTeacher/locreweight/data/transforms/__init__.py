"""Augmentations, augmentation policies and views."""
