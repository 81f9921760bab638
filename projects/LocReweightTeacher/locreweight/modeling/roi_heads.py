"""Detectron2's standard ROI heads with the localization-aware box predictor."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.structures import Boxes
from torch import Tensor

from .output_layers import BoxPredictions, LocalizationAwareOutputLayers


@ROI_HEADS_REGISTRY.register()
class LocalizationAwareROIHeads(StandardROIHeads):
    """Training on labeled images and inference are Detectron2's own; see its ``ROIHeads``."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        parts = super()._init_box_head(cfg, input_shape)
        box_features = parts["box_head"].output_shape
        return parts | {"box_predictor": LocalizationAwareOutputLayers(cfg, box_features)}

    def predict(self, features: dict[str, Tensor], boxes: list[Boxes]) -> BoxPredictions:
        """Predictions for given boxes: the student's on its proposals, the teacher's on the same.

        Args:
            features: feature maps of N images.
            boxes: per image, xyxy, absolute pixels of the view that the features are of.

        Returns:
            predictions of all boxes, image after image.
        """
        pooled = self.box_pooler([features[name] for name in self.box_in_features], boxes)
        return self.box_predictor(self.box_head(pooled))
