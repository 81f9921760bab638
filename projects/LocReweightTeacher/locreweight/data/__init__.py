"""Binding of the data to Detectron2: data sets, augmented views, and the two endless streams."""
