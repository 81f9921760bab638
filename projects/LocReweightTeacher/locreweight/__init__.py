"""Semi-supervised object detection via dynamic reweighting of localization error.

:mod:`~locreweight.losses`, :mod:`~locreweight.ema` and :mod:`~locreweight.geometry` implement the
paper's equations and need only PyTorch. The other modules use Detectron2. Importing this package
needs only the standard library.
"""
