"""Binding of the method to Detectron2's Faster R-CNN. Importing it registers the model's parts."""

from .box_coding import CornerBoxTransform
from .detector import SemiSupervisedRCNN, TeacherView, UnlabeledOutput
from .predictor import BoxPredictions, LocalizationAwareOutputLayers
from .roi_heads import LocalizationAwareROIHeads

__all__ = [
    "BoxPredictions",
    "CornerBoxTransform",
    "LocalizationAwareOutputLayers",
    "LocalizationAwareROIHeads",
    "SemiSupervisedRCNN",
    "TeacherView",
    "UnlabeledOutput",
]
