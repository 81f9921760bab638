"""Random inputs for the output layers, with three classes, and reference computations in loops."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances

from locreweight.modeling import BoxPredictions, CornerBoxTransform, LocalizationAwareOutputLayers

K = 3
FEATURES = 16
CODINGS = {
    "corners": CornerBoxTransform((10.0, 10.0)),
    "xywh": Box2BoxTransform((10.0, 10.0, 5.0, 5.0)),
}

each_coding = pytest.mark.parametrize("coding", CODINGS.keys())
each_regression = pytest.mark.parametrize("class_agnostic", [False, True])
each_normalizer = pytest.mark.parametrize("by_sampled", [False, True])

# Labels of the proposals of each image. An image without foreground has no pseudo-labels.
LABELS = {
    "mixed": [[0, K, 2, K], [1, 1, K]],
    "no foreground": [[K, K], [K, K, K]],
    "all foreground": [[0, 1, 2], [2, 2]],
    "one image without labels": [[K, K, K], [0, K, 2]],
}
each_labels = pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())


def predictor_of(cls, coding="corners", class_agnostic=False, **kwargs):
    return cls(
        ShapeSpec(channels=FEATURES),
        box2box_transform=CODINGS[coding],
        num_classes=K,
        cls_agnostic_bbox_reg=class_agnostic,
        **{"smooth_l1_beta": 1.0} | kwargs,
    )


def make_predictor(coding="corners", class_agnostic=False, **kwargs):
    return predictor_of(LocalizationAwareOutputLayers, coding, class_agnostic, **kwargs)


def random_boxes(count):
    corner = torch.rand(count, 2) * 30
    return torch.cat([corner, corner + 8 + torch.rand(count, 2) * 20], dim=1)


def make_proposals(labels):
    """Proposals with these labels in each image, and ground truth near the foreground ones."""
    proposals = []
    for image_labels in labels:
        boxes = random_boxes(len(image_labels))
        instances = Instances((64, 64), proposal_boxes=Boxes(boxes))
        instances.gt_classes = torch.tensor(image_labels)
        if any(label < K for label in image_labels):
            instances.gt_boxes = Boxes(boxes + torch.randn(len(boxes), 4))
        proposals.append(instances)
    return proposals


def make_predictions(rows, class_agnostic=False):
    columns = 4 if class_agnostic else 4 * K
    return BoxPredictions(
        torch.randn(rows, K + 1, requires_grad=True),
        torch.randn(rows, columns, requires_grad=True),
        torch.randn(rows, columns, requires_grad=True),
    )


INFERENCE = {"test_score_thresh": 0.05, "test_nms_thresh": 0.5, "test_topk_per_image": 12}


def detect(predictor, predictions, proposals):
    with torch.no_grad():
        return predictor.inference(predictions, proposals)


def crowded_case(class_agnostic):
    """Predictions for two images with overlapping proposals, so that NMS removes some."""
    proposals = []
    for rows in (30, 20):
        boxes = torch.tensor([10.0, 10.0, 40.0, 40.0]) + torch.randn(rows, 4) * 6
        proposals.append(Instances((48, 48), proposal_boxes=Boxes(boxes)))
    predictions = make_predictions(50, class_agnostic)
    # Scaled, so that some values are outside of the limit.
    return proposals, predictions._replace(log_variance=predictions.log_variance * 2)


def count(labels):
    return sum(len(image_labels) for image_labels in labels)


# Reference computations on single numbers


def coded(coding, proposal, target):
    """Coded offsets of one box from its proposal."""
    (x1, y1, x2, y2), (u1, v1, u2, v2) = proposal, target
    width, height = x2 - x1, y2 - y1
    if coding == "corners":
        return [
            10 * (u1 - x1) / width,
            10 * (v1 - y1) / height,
            10 * (u2 - x2) / width,
            10 * (v2 - y2) / height,
        ]
    return [
        10 * ((u1 + u2) - (x1 + x2)) / 2 / width,
        10 * ((v1 + v2) - (y1 + y2)) / 2 / height,
        5 * math.log((u2 - u1) / width),
        5 * math.log((v2 - v1) / height),
    ]


def smooth_l1(error, beta=1.0):
    return 0.5 * error**2 / beta if abs(error) < beta else abs(error) - 0.5 * beta


def rows_of(proposals):
    """Yield label, proposal and ground truth of every row, in the order of the images."""
    for x in proposals:
        for i, label in enumerate(x.gt_classes.tolist()):
            target = x.gt_boxes.tensor[i].tolist() if label < K else None
            yield label, x.proposal_boxes.tensor[i].tolist(), target


def four_of(values, row, label, class_agnostic):
    """Select the four numbers of a row's class."""
    first = 0 if class_agnostic else 4 * label
    return values[row, first : first + 4].tolist()


def cross_entropy_of(logits, label):
    return math.log(sum(math.exp(v) for v in logits)) - logits[label]
