"""Datasets, augmentations and data loading, built on Detectron2's data package."""
