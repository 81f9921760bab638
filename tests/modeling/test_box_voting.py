"""Variance voting: compared with loops over numbers, and in the inference of the output layers."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes
from torch.testing import assert_close

from locreweight.errors import UsageError
from locreweight.modeling import LocalizationAwareOutputLayers
from locreweight.modeling.box_voting import Candidates, vote
from tests.modeling.output_layer_cases import (
    FEATURES,
    INFERENCE,
    K,
    crowded_case,
    detect,
    each_regression,
    make_predictor,
)
from tests.modeling.tiny_model import tiny_config

SIGMA = 0.05


def iou_of(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return width * height / (sum(areas) - width * height)


def voted(box, others, variances, scores, sigma=SIGMA):
    """Reference for one detection; ``others`` and ``variances`` are lists of four numbers."""
    result = []
    for j in range(4):
        above = below = 0.0
        for other, variance, score in zip(others, variances, scores, strict=True):
            overlap = iou_of(box, other)
            if overlap >= 0.5:
                weight = score * math.exp(-((1 - overlap) ** 2) / sigma) / variance[j]
                above, below = above + weight * other[j], below + weight
        result.append(above / below)
    return result


def test_two_boxes_of_known_overlap():
    first, second = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 8.0]  # IoU 0.8
    candidates = Candidates(
        torch.tensor([[first], [second], [[20.0, 20.0, 30.0, 30.0]]]),
        torch.tensor([[[1.0] * 4], [[1.0, 1.0, 1.0, 0.25]], [[1e-6] * 4]]),
        torch.tensor([[0.9], [0.3], [1.0]]),
    )
    (box,) = vote(Boxes(torch.tensor([first])), torch.tensor([0]), candidates, SIGMA).tensor
    weight = 0.3 * math.exp(-(0.2**2) / SIGMA) / 0.25
    assert_close(box, torch.tensor([0.0, 0.0, 10.0, (0.9 * 10 + weight * 8) / (0.9 + weight)]))


def test_box_without_other_candidates_is_unchanged():
    box = torch.tensor([[3.0, 4.0, 9.0, 12.0]])
    alone = Candidates(box[:, None], torch.full((1, 1, 4), 0.1), torch.tensor([[0.5]]))
    assert_close(vote(Boxes(box), torch.tensor([0]), alone, SIGMA).tensor, box)


def test_box_without_area_is_unchanged():
    box = torch.tensor([[3.0, 4.0, 3.0, 12.0]])
    alone = Candidates(box[:, None], torch.ones(1, 1, 4), torch.ones(1, 1))
    assert torch.equal(vote(Boxes(box), torch.tensor([0]), alone, SIGMA).tensor, box)


def test_small_proposals_far_from_the_object_have_no_effect():
    box = torch.tensor([[0.0, 0.0, 600.0, 600.0]])
    sliver = torch.tensor([[0.0, 100.0, 0.01, 500.0]])
    candidates = Candidates(
        torch.stack([box, sliver]),
        torch.tensor([[[3600.0] * 4], [[1e-6, 1600.0, 1e-6, 1600.0]]]),
        torch.tensor([[0.9], [0.9]]),
    )
    assert_close(vote(Boxes(box), torch.tensor([0]), candidates, 0.5).tensor, box)


@pytest.mark.parametrize("sigma", [0.05, 10.0])
def test_corners_keep_their_order(sigma):
    boxes = torch.tensor([0.0, 0.0, 50.0, 50.0]) + torch.randn(2000, 1, 4) * 20
    boxes = torch.cat([boxes[..., :2], boxes[..., 2:].maximum(boxes[..., :2])], dim=-1)
    candidates = Candidates(boxes, (torch.rand(2000, 1, 4) * 14 - 7).exp(), torch.rand(2000, 1))
    result = vote(Boxes(boxes[:, 0]), torch.zeros(2000, dtype=torch.int64), candidates, sigma)
    assert (result.tensor[:, :2] <= result.tensor[:, 2:]).all()


@pytest.mark.parametrize("variance", [math.nan, 0.0])
def test_candidate_with_unusable_variance_is_ignored(variance):
    boxes = torch.tensor(
        [[[0.0, 0.0, 10.0, 10.0]], [[0.0, 0.0, 10.0, 9.0]], [[0.0, 0.0, 9.0, 10.0]]]
    )
    variances = torch.ones(3, 1, 4)
    scores = torch.tensor([[0.9], [0.5], [0.5]])
    without = Candidates(boxes[:2], variances[:2], scores[:2])
    variances[2] = variance
    broken = Candidates(boxes, variances, scores)
    detected, classes = Boxes(boxes[0]), torch.tensor([0])
    expected = vote(detected, classes, without, SIGMA).tensor
    assert_close(vote(detected, classes, broken, SIGMA).tensor, expected)
    assert not torch.equal(expected, boxes[0])


def test_no_detections():
    candidates = Candidates(torch.rand(5, 2, 4), torch.ones(5, 2, 4), torch.rand(5, 2))
    none = vote(Boxes(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.int64), candidates, SIGMA)
    assert none.tensor.shape == (0, 4)


def test_small_sigma_changes_nothing():
    proposals, predictions = crowded_case(False)
    plain, sharp = (
        detect(make_predictor(voting_sigma=sigma, **INFERENCE), predictions, proposals)[0]
        for sigma in (0.0, 1e-9)
    )
    for a, b in zip(plain, sharp, strict=True):
        assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)


@torch.no_grad()
@each_regression
@pytest.mark.parametrize("broken", [False, True], ids=["finite", "with non-finite rows"])
def test_inference_averages_the_boxes_of_all_proposals(class_agnostic, broken):
    settings = {"class_agnostic": class_agnostic, "log_variance_limit": 1.5} | INFERENCE
    proposals, predictions = crowded_case(class_agnostic)
    if broken:
        deltas = predictions.deltas.detach().clone()
        deltas[[0, 5, 31]] = math.nan
        predictions = predictions._replace(deltas=deltas)
    plain_predictor = make_predictor(**settings)
    plain, rows = detect(plain_predictor, predictions, proposals)
    voting = make_predictor(voting_sigma=SIGMA, **settings)
    detections, voted_rows = detect(voting, predictions, proposals)
    boxes = plain_predictor.predict_boxes(predictions, proposals)
    probabilities = plain_predictor.predict_probs(predictions, proposals)
    first, moved = 0, 0
    for i, (old, new) in enumerate(zip(plain, detections, strict=True)):
        assert torch.equal(rows[i], voted_rows[i])
        for name in ("scores", "pred_classes", "log_variance", "localization_quality"):
            assert torch.equal(old.get(name), new.get(name))
        for box, label, result in zip(
            old.pred_boxes.tensor.tolist(), old.pred_classes.tolist(), new.pred_boxes, strict=True
        ):
            column = 0 if class_agnostic else label
            others, variances, scores = [], [], []
            for row in range(len(proposals[i])):
                if boxes[i][row].isfinite().all():
                    others.append(boxes[i][row].view(-1, 4)[column].clamp(0, 48).tolist())
                    x1, y1, x2, y2 = proposals[i].proposal_boxes.tensor[row].tolist()
                    unit = [(x2 - x1) / 10, (y2 - y1) / 10] * 2
                    values = predictions.log_variance[first + row].view(-1, 4)[column].tolist()
                    variances.append(
                        [
                            math.exp(min(max(v, -1.5), 1.5)) * u**2
                            for v, u in zip(values, unit, strict=True)
                        ]
                    )
                    scores.append(float(probabilities[i][row, label]))
            assert_close(result, torch.tensor(voted(box, others, variances, scores)))
            moved += not torch.allclose(result, torch.tensor(box))
        first += len(proposals[i])
    assert moved > 5


def test_image_without_detections():
    proposals, predictions = crowded_case(False)
    predictor = make_predictor(voting_sigma=SIGMA, test_score_thresh=1.0)
    for instances in detect(predictor, predictions, proposals)[0]:
        assert instances.pred_boxes.tensor.shape == (0, 4)


def test_voting_follows_the_config():
    cfg = tiny_config({"MODEL.ROI_BOX_HEAD.VOTING_SIGMA": 0.02})
    assert LocalizationAwareOutputLayers(cfg, ShapeSpec(channels=FEATURES)).voting_sigma == 0.02


def test_voting_without_corners_is_an_error():
    cfg = tiny_config(
        {"MODEL.ROI_BOX_HEAD.VOTING_SIGMA": 0.02, "MODEL.ROI_BOX_HEAD.CORNER_CODING": False}
    )
    with pytest.raises(UsageError, match="CORNER_CODING True"):
        LocalizationAwareOutputLayers(cfg, ShapeSpec(channels=FEATURES))


def test_variance_in_pixels_scales_with_the_square_of_the_proposal():
    coding = make_predictor().box2box_transform
    boxes = torch.tensor([[0.0, 0.0, 20.0, 40.0]])
    log_variance = torch.full((1, K, 4), math.log(3.0))
    expected = torch.tensor([3 * 2.0**2, 3 * 4.0**2] * 2).expand(1, K, 4)
    assert_close(coding.variance_in_pixels(log_variance, boxes), expected)
