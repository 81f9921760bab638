"""Instant-Teaching*: correction of pseudo-labels by another model."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch.testing import assert_close

from locreweight.methods import LabelingInputs, build_method
from locreweight.methods.instant_teaching_star import rectify
from locreweight.modeling import BoxPredictions
from locreweight.modeling.meta_arch import TeacherOutput
from tests.modeling.output_layer_cases import K, make_predictor
from tests.modeling.tiny_model import tiny_config

SIZE = (100, 100)


class Model:
    """A model that predicts given probabilities, and shifts all boxes by a number of pixels."""

    def __init__(self, probabilities, shift=0.0):
        self.logits = torch.tensor(probabilities).log()
        self.shift = shift
        self.roi_heads = SimpleNamespace(box_predictor=make_predictor("corners"))

    def predict_rois(self, output, boxes):
        boxes = torch.cat(boxes)
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        deltas = (10 * self.shift / sides).repeat(1, K)
        return BoxPredictions(self.logits.expand(len(boxes), -1), deltas, torch.zeros_like(deltas))


def labels_with(boxes, scores, classes=None):
    return Instances(
        SIZE,
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        gt_classes=torch.tensor(classes or [0] * len(scores), dtype=torch.int64),
        gt_score=torch.tensor(scores),
        gt_localization_quality=torch.full((len(scores),), 0.3),
    )


def inputs_of(model, labels, member=0):
    detections = Instances(
        SIZE,
        pred_boxes=labels.gt_boxes,
        scores=labels.gt_score,
        pred_classes=labels.gt_classes,
        localization_quality=labels.gt_localization_quality,
    )
    return LabelingInputs(model, TeacherOutput({}, [detections]), [], member=member)


def make_method(threshold=0.5):
    keys = {"SEMI.METHOD": "InstantTeachingStar", "SEMI.PSEUDO_LABEL_THRESHOLD": threshold}
    return build_method(tiny_config(keys))


def test_correction_averages_boxes_by_score_and_scores_equally():
    model = Model([0.2, 0.6, 0.1, 0.1], shift=8.0)
    labels = labels_with([[10, 20, 50, 60]], [0.9], [1])
    (corrected,) = rectify([labels], inputs_of(model, labels))
    # (0.9 * b + 0.6 * (b + 8)) / 1.5 = b + 3.2
    assert_close(corrected.gt_boxes.tensor, torch.tensor([[13.2, 23.2, 53.2, 63.2]]))
    assert_close(corrected.gt_score, torch.tensor([0.75]))
    assert corrected.gt_classes.tolist() == [1]
    assert corrected.gt_localization_quality.tolist() == [pytest.approx(0.3)]
    assert labels.gt_boxes.tensor.tolist() == [[10, 20, 50, 60]]  # not changed


def test_corrected_boxes_stay_in_the_image():
    model = Model([0.7, 0.1, 0.1, 0.1], shift=60.0)
    labels = labels_with([[50, 50, 90, 90]], [0.7])
    (corrected,) = rectify([labels], inputs_of(model, labels))
    assert_close(corrected.gt_boxes.tensor, torch.tensor([[80.0, 80, 100, 100]]))


def test_nothing_to_correct():
    labels = labels_with([], [])
    (corrected,) = rectify([labels], inputs_of(Model([0.7, 0.1, 0.1, 0.1]), labels))
    assert len(corrected) == 0


def test_identical_models_that_reproduce_their_boxes_are_a_fixed_point():
    model = Model([0.8, 0.1, 0.05, 0.05])
    labels = labels_with([[10, 10, 40, 40], [60, 60, 90, 90]], [0.8, 0.8])
    selected = make_method().select_for_members([inputs_of(model, labels, i) for i in range(2)])
    for (x,) in selected:
        assert_close(x.gt_boxes.tensor.sort(dim=0).values, labels.gt_boxes.tensor)
        assert_close(x.gt_score, labels.gt_score)


def test_labels_of_each_model_are_the_pool_corrected_by_the_other():
    """One object that only the first model finds; the second one believes in it less."""
    first, second = Model([0.9, 0.04, 0.03, 0.03]), Model([0.5, 0.2, 0.2, 0.1], shift=4.0)
    found, nothing = labels_with([[20, 20, 60, 60]], [0.9]), labels_with([], [])
    inputs = [inputs_of(first, found, 0), inputs_of(second, nothing, 1)]
    labels = make_method(0.6).select_for_members(inputs)
    # The pool: 0.9 at b (the original, and corrected by the first); 0.7 at b + 4 * 0.5 / 1.4.
    # Corrected by the second: 0.7 at b + 4 * 0.5 / 1.4. Of equal scores NMS keeps one.
    ((one,), (other,)) = labels
    assert_close(one.gt_score, torch.tensor([0.7]))
    assert_close(one.gt_boxes.tensor, found.gt_boxes.tensor + 4 * 0.5 / 1.4)
    # Corrected by the first: 0.9 at b.
    assert_close(other.gt_score, torch.tensor([0.9]))
    assert_close(other.gt_boxes.tensor, found.gt_boxes.tensor)
    # Below the threshold after the correction:
    assert [len(x) for (x,) in make_method(0.8).select_for_members(inputs)] == [0, 1]


def test_swapping_the_models_swaps_the_labels():
    models = Model([0.9, 0.04, 0.03, 0.03], 1.0), Model([0.7, 0.1, 0.1, 0.1], -2.0)
    found = labels_with([[20, 20, 60, 60]], [0.9]), labels_with([[22, 20, 60, 61]], [0.8])
    pairs = list(zip(models, found, strict=True))
    first, second = make_method().select_for_members([inputs_of(*pair) for pair in pairs])
    swapped = make_method().select_for_members([inputs_of(*pair) for pair in pairs[::-1]])
    for a, b in zip((first, second), swapped[::-1], strict=True):
        assert_close(a[0].gt_boxes.tensor, b[0].gt_boxes.tensor)
        assert_close(a[0].gt_score, b[0].gt_score)
