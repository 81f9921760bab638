"""Unbiased Teacher: classification only, as scores say nothing of where a box lies.

Liu et al., "Unbiased Teacher for Semi-Supervised Object Detection" (2021). There is no box loss on
unlabeled images, neither here nor in the RPN (``SEMI.RPN_BOX_LOSS False``). Its focal loss, on
labeled images too, is ``MODEL.ROI_BOX_HEAD.FOCAL_GAMMA``; its views are those of ``INPUT.AUGMENTATION_POLICY
UnbiasedTeacherPolicy``.

Differences, all but the last for the sake of a comparison in which methods alone differ: the moving
average begins with a ramp, where the authors' has its final rate at once; up to a half of the RPN's
sampled anchors are positive, and not a quarter; boxes of labeled images have smooth L1, and not L1
(``MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA 0.0``); sizes of images are the config's, and not 640 to 800
pixels in training, 600 in testing on VOC. Erased patches have the mean color, and not noise.
"""

from __future__ import annotations

from detectron2.config import CfgNode

from .base import (
    METHOD_REGISTRY,
    AboveThreshold,
    SemiSupervisedMethod,
    unweighted_classification_loss,
)


@METHOD_REGISTRY.register()
def UnbiasedTeacher(cfg: CfgNode) -> SemiSupervisedMethod:
    return SemiSupervisedMethod(
        choose_pseudo_labels=AboveThreshold(cfg.SEMI.PSEUDO_LABEL_THRESHOLD),
        classify=unweighted_classification_loss,
        regress_boxes=None,
    )
