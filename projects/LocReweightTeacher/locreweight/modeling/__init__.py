"""Detectron2 model parts. Importing this package registers them."""

from . import backbones  # registers them
from .box_coding import CornerBoxTransform
from .building import build_detector, use_project_classes
from .committee import Committee, members_of
from .meta_arch import SemiSupervisedRCNN, TeacherOutput, UnlabeledOutput
from .output_layers import BoxPredictions, LocalizationAwareOutputLayers
from .roi_heads import LocalizationAwareROIHeads

__all__ = [
    "BoxPredictions",
    "Committee",
    "CornerBoxTransform",
    "LocalizationAwareOutputLayers",
    "LocalizationAwareROIHeads",
    "SemiSupervisedRCNN",
    "TeacherOutput",
    "UnlabeledOutput",
    "backbones",
    "build_detector",
    "members_of",
    "use_project_classes",
]
