"""Instant-Teaching*: Instant-Teaching with two models that correct each other's pseudo-labels.

Zhou et al., "Instant-Teaching: An End-to-End Semi-Supervised Object Detection Framework" (2021),
"co-rectification". Two models with different initial weights and strong views are trained at the
same time. The detections of both are pooled, and each model scores and regresses the boxes of the
pool again. The pseudo-labels of a model are the pool after a further correction by the other model.

The differences from the paper are those of :mod:`.instant_teaching`. The models differ only in the
layers that ``MODEL.WEIGHTS`` does not have. A step takes about twice the time and the memory of
Instant-Teaching.

This is the correction that the paper describes. The authors' code also averages the probabilities
of the other classes, so that a correction can change the class, regresses the box of the most
probable class, and weights it in the second correction by the average of both scores.
"""

from __future__ import annotations

from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances

from .base import METHOD_REGISTRY, LabelingInputs
from .instant_teaching import InstantTeaching


@METHOD_REGISTRY.register()
class InstantTeachingStar(InstantTeaching):
    """Instant-Teaching* with its published values.

    Attributes:
        nms_iou: boxes of a class that overlap more than this are the same object.
    """

    num_members = 2
    own_strong_views = True
    nms_iou: float = 0.5

    def select_for_members(self, inputs: list[LabelingInputs]) -> list[list[Instances]]:
        """Correct the pooled detections of both models twice, the second time by the other one."""
        detected = [self.select_pseudo_labels(x) for x in inputs]
        originals = _unite(detected)
        pool = _unite([*(rectify(originals, x) for x in inputs), originals])
        first, second = inputs
        return [self._select(rectify(pool, second)), self._select(rectify(pool, first))]

    def _select(self, labels: list[Instances]) -> list[Instances]:
        selected = []
        for x in labels:
            above = x[(x.gt_score > self.pseudo_label_threshold).nonzero().squeeze(1)]
            selected.append(
                above[
                    batched_nms(
                        above.gt_boxes.tensor, above.gt_score, above.gt_classes, self.nms_iou
                    )
                ]
            )
        return selected


def rectify(labels: list[Instances], inputs: LabelingInputs) -> list[Instances]:
    """Correct pseudo-labels by a model's prediction at their boxes.

    With the score ``s`` and the box ``b`` of a pseudo-label, and the probability ``t`` of its class
    and the regressed box ``c`` of the model, the corrected box is ``(s * b + t * c) / (s + t)`` and
    the corrected score is ``(s + t) / 2``.

    Args:
        labels: pseudo-labels of each image, weak view.
        inputs: the model, and its features of the weak views.

    Returns:
        Pseudo-labels with the same classes and other fields.
    """
    teacher = inputs.teacher
    predictions = teacher.predict_rois(inputs.output, [x.gt_boxes.tensor for x in labels])
    proposals = [
        Instances(x.image_size, proposal_boxes=x.gt_boxes, gt_classes=x.gt_classes) for x in labels
    ]
    box_predictor = teacher.roi_heads.box_predictor
    regressed = box_predictor.predict_boxes_for_gt_classes(predictions, proposals)
    probabilities = predictions.probabilities.split([len(x) for x in labels])
    rectified = []
    for x, probability, new_boxes in zip(labels, probabilities, regressed, strict=True):
        old = x.gt_score
        new = probability.gather(1, x.gt_classes[:, None]).squeeze(1)
        share = (old / (old + new))[:, None]
        corrected = Instances(x.image_size, **x.get_fields())
        corrected.gt_boxes = Boxes(share * x.gt_boxes.tensor + (1 - share) * new_boxes)
        corrected.gt_boxes.clip(x.image_size)
        corrected.gt_score = (old + new) / 2
        rectified.append(corrected)
    return rectified


def _unite(parts: list[list[Instances]]) -> list[Instances]:
    """Unite several lists of pseudo-labels, image by image."""
    return [Instances.cat(list(images)) for images in zip(*parts, strict=True)]
