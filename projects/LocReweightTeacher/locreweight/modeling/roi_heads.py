"""Detectron2's standard ROI heads with the localization-aware output layers."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.structures import Boxes
from torch import Tensor

from .output_layers import BoxPredictions, LocalizationAwareOutputLayers
from .roi_align import parallelize_roi_align


@ROI_HEADS_REGISTRY.register()
class LocalizationAwareROIHeads(StandardROIHeads):
    """``StandardROIHeads`` with :class:`LocalizationAwareOutputLayers` as the box predictor."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        parts = super()._init_box_head(cfg, input_shape)
        pooler = parts["box_pooler"]
        pooler.level_poolers = parallelize_roi_align(pooler.level_poolers)
        box_features = parts["box_head"].output_shape
        return parts | {"box_predictor": LocalizationAwareOutputLayers(cfg, box_features)}

    def predict(self, features: dict[str, Tensor], boxes: list[Boxes]) -> BoxPredictions:
        """Predict for given boxes, without losses or NMS.

        Args:
            features: feature maps of N images.
            boxes: boxes of each image, xyxy, absolute pixels of the view that the features are of.

        Returns:
            Predictions for the boxes of all images, in their order.
        """
        pooled = self.box_pooler([features[name] for name in self.box_in_features], boxes)
        return self.box_predictor(self.box_head(pooled))
