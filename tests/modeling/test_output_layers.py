"""Output layers of the ROI head and their losses, compared with loops over single numbers."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from locreweight.modeling import CornerBoxTransform, LocalizationAwareOutputLayers
from tests.modeling.output_layer_cases import (
    CODINGS,
    FEATURES,
    INFERENCE,
    LABELS,
    K,
    coded,
    count,
    cross_entropy_of,
    crowded_case,
    detect,
    each_coding,
    each_labels,
    each_normalizer,
    each_regression,
    four_of,
    make_predictions,
    make_predictor,
    make_proposals,
    predictor_of,
    rows_of,
    smooth_l1,
)
from tests.modeling.tiny_model import tiny_config


@pytest.fixture(autouse=True)
def _storage():
    with EventStorage():
        yield


# Layers


@each_regression
def test_log_variance_branch_is_one_linear_layer_of_the_size_of_the_box_branch(class_agnostic):
    predictor = make_predictor(class_agnostic=class_agnostic).state_dict()
    original = predictor_of(FastRCNNOutputLayers, class_agnostic=class_agnostic).state_dict()
    assert predictor.keys() - original.keys() == {"log_variance.weight", "log_variance.bias"}
    assert original.keys() <= predictor.keys()
    for kind in ("weight", "bias"):
        assert predictor[f"log_variance.{kind}"].shape == predictor[f"bbox_pred.{kind}"].shape


def test_all_branches_are_linear_in_the_same_features():
    predictor = make_predictor()
    x = torch.randn(5, FEATURES, 1, 1)
    scores, deltas, log_variance = predictor(x)
    for output, layer in (
        (scores, predictor.cls_score),
        (deltas, predictor.bbox_pred),
        (log_variance, predictor.log_variance),
    ):
        assert_close(output, x.flatten(1) @ layer.weight.T + layer.bias)


def test_log_variance_layer_is_initialized_with_small_normal_weights():
    layer = LocalizationAwareOutputLayers(
        ShapeSpec(channels=1024), box2box_transform=CODINGS["corners"], num_classes=20
    ).log_variance
    assert (layer.bias == 0).all()
    assert layer.weight.std().item() == pytest.approx(1e-4, rel=0.02)
    assert layer.weight.mean().item() == pytest.approx(0, abs=1e-6)


@each_coding
@each_regression
def test_box_loss_is_smooth_l1_at_initialization(coding, class_agnostic):
    predictor = make_predictor(coding, class_agnostic, normalize_by_sampled=True)
    reference = predictor_of(FastRCNNOutputLayers, coding, class_agnostic)
    labels = LABELS["mixed"]
    proposals = make_proposals(labels)
    predictions = predictor(torch.randn(count(labels), FEATURES))
    assert_close(
        predictions.log_variance.exp(), torch.ones_like(predictions.log_variance), rtol=0, atol=5e-3
    )
    loss = predictor.losses(predictions, proposals)["loss_box_reg"]
    expected = reference.losses(predictions[:2], proposals)["loss_box_reg"]
    assert_close(loss, expected, rtol=5e-3, atol=0)


@pytest.mark.parametrize(
    ("corner_coding", "expected"), [(True, CornerBoxTransform), (False, Box2BoxTransform)]
)
def test_coding_and_settings_follow_the_config(corner_coding, expected):
    cfg = tiny_config(
        {
            "MODEL.ROI_BOX_HEAD.CORNER_CODING": corner_coding,
            "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (8.0, 6.0, 4.0, 3.0),
            "MODEL.ROI_BOX_HEAD.LOG_VARIANCE_LIMIT": 5.0,
            "SEMI.QUALITY_SCALE": 1.5,
            "SEMI.NORMALIZE_BY_SAMPLED": True,
            "MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES": False,
            "MODEL.ROI_BOX_HEAD.FOCAL_GAMMA": 1.5,
        }
    )
    predictor = LocalizationAwareOutputLayers(cfg, ShapeSpec(channels=FEATURES))
    coding = predictor.box2box_transform
    # Detectron2's class is scripted, so isinstance does not work with it.
    assert isinstance(coding, CornerBoxTransform) == (expected is CornerBoxTransform)
    weights = (8.0, 6.0, 8.0, 6.0) if corner_coding else (8.0, 6.0, 4.0, 3.0)
    assert tuple(coding.weights) == weights
    assert predictor.log_variance_limit == 5.0
    assert predictor.quality_scale == 1.5
    assert predictor.normalize_by_sampled
    assert not predictor.gaussian_boxes
    assert predictor.focal_gamma == 1.5
    assert predictor.smooth_l1_beta == 1.0


# Supervised losses


@each_coding
@each_regression
@each_normalizer
@each_labels
def test_supervised_box_loss_matches_equation_10(coding, class_agnostic, by_sampled, labels):
    predictor = make_predictor(coding, class_agnostic, normalize_by_sampled=by_sampled)
    proposals = make_proposals(labels)
    predictions = make_predictions(count(labels), class_agnostic)

    total, foreground = 0.0, 0
    for row, (label, proposal, target) in enumerate(rows_of(proposals)):
        if label == K:
            continue
        foreground += 1
        for value, target_value, log_variance in zip(
            four_of(predictions.deltas, row, label, class_agnostic),
            coded(coding, proposal, target),
            four_of(predictions.log_variance, row, label, class_agnostic),
            strict=True,
        ):
            total += math.exp(-log_variance) * smooth_l1(value - target_value) + log_variance / 2
    expected = total / max(count(labels) if by_sampled else foreground, 1)
    loss = predictor.losses(predictions, proposals)["loss_box_reg"]
    assert_close(loss, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@each_labels
def test_supervised_classification_loss_equals_detectron2(labels):
    proposals, predictions = make_proposals(labels), make_predictions(count(labels))
    loss = make_predictor().losses(predictions, proposals)["loss_cls"]
    original = predictor_of(FastRCNNOutputLayers).losses(predictions[:2], proposals)["loss_cls"]
    assert torch.equal(loss, original)


@each_coding
@each_regression
@each_labels
def test_supervised_losses_with_variance_1_equal_detectron2(coding, class_agnostic, labels):
    """Both divide by the number of all sampled proposals."""
    proposals = make_proposals(labels)
    predictions = make_predictions(count(labels), class_agnostic)
    predictions = predictions._replace(log_variance=torch.zeros_like(predictions.log_variance))
    predictor = make_predictor(coding, class_agnostic, normalize_by_sampled=True)
    original = predictor_of(FastRCNNOutputLayers, coding, class_agnostic)
    assert_close(
        predictor.losses(predictions, proposals), original.losses(predictions[:2], proposals)
    )


@each_coding
@each_regression
@each_labels
def test_supervised_losses_without_gaussian_boxes_equal_detectron2(coding, class_agnostic, labels):
    proposals, predictions = make_proposals(labels), make_predictions(count(labels), class_agnostic)
    settings = {"normalize_by_sampled": True, "smooth_l1_beta": 0.7}
    predictor = make_predictor(coding, class_agnostic, gaussian_boxes=False, **settings)
    original = predictor_of(FastRCNNOutputLayers, coding, class_agnostic, smooth_l1_beta=0.7)
    assert_close(
        predictor.losses(predictions, proposals), original.losses(predictions[:2], proposals)
    )
    assert not any(p.requires_grad for p in predictor.log_variance.parameters())


def test_focal_gamma_replaces_cross_entropy_by_focal_loss():
    proposals, predictions = make_proposals(LABELS["mixed"]), make_predictions(7)
    loss = make_predictor(focal_gamma=1.5).losses(predictions, proposals)["loss_cls"]
    labels = torch.cat([p.gt_classes for p in proposals]).tolist()
    losses = [
        cross_entropy_of(logits, label)
        for logits, label in zip(predictions.scores.tolist(), labels, strict=True)
    ]
    expected = sum((1 - math.exp(-x)) ** 1.5 * x for x in losses) / 7
    assert_close(loss, torch.tensor(expected))


def test_supervised_losses_are_multiplied_by_the_loss_weights():
    labels = LABELS["mixed"]
    proposals, predictions = make_proposals(labels), make_predictions(count(labels))
    once = make_predictor().losses(predictions, proposals)
    weighted = make_predictor(loss_weight={"loss_box_reg": 3.0}).losses(predictions, proposals)
    assert_close(weighted["loss_box_reg"], 3 * once["loss_box_reg"])
    assert_close(weighted["loss_cls"], once["loss_cls"])


def test_supervised_loss_clamps_the_log_variance():
    labels = LABELS["all foreground"]
    proposals, predictions = make_proposals(labels), make_predictions(count(labels))
    predictor = make_predictor(log_variance_limit=2.0)
    extreme = predictions._replace(log_variance=predictions.log_variance.detach() * 1e4)
    clamped = extreme._replace(log_variance=extreme.log_variance.clamp(-2, 2))
    loss = predictor.losses(extreme, proposals)["loss_box_reg"]
    assert_close(loss, predictor.losses(clamped, proposals)["loss_box_reg"])
    assert loss.isfinite()


# Inference


def quality_of_detections(predictor, predictions, proposals, detections, class_agnostic):
    """Localization quality at the proposal and class that a detection's box and score are from."""
    probabilities = predictor.predict_probs(predictions, proposals)
    boxes = predictor.predict_boxes(predictions, proposals)
    first_row, qualities = 0, []
    for image, instances in enumerate(detections):
        image_boxes = boxes[image].unflatten(1, (-1, 4)).clamp(0, 48)
        image_qualities = []
        for box, score, label in zip(
            instances.pred_boxes.tensor, instances.scores, instances.pred_classes, strict=True
        ):
            column = 0 if class_agnostic else int(label)
            matching = (probabilities[image][:, label] == score) & (
                image_boxes[:, column] == box
            ).all(dim=1)
            (row,) = matching.nonzero().flatten().tolist()
            values = four_of(predictions.log_variance, first_row + row, int(label), class_agnostic)
            mean = sum(math.exp(min(max(v, -1.5), 1.5)) for v in values) / 4
            image_qualities.append(1 - 1 / (1 + math.exp(-mean)))
        qualities.append(torch.tensor(image_qualities))
        first_row += len(image_boxes)
    return qualities


@each_coding
@each_regression
def test_inference_returns_the_detections_of_detectron2(coding, class_agnostic):
    predictor = make_predictor(coding, class_agnostic, **INFERENCE)
    original = predictor_of(FastRCNNOutputLayers, coding, class_agnostic, **INFERENCE)
    original.load_state_dict(predictor.state_dict(), strict=False)
    proposals, _ = crowded_case(class_agnostic)
    x = torch.randn(50, FEATURES) * 10
    detections, rows = detect(predictor, predictor(x), proposals)
    expected, expected_rows = detect(original, original(x), proposals)
    for a, b, c, d in zip(detections, expected, rows, expected_rows, strict=True):
        assert len(a) > 0
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.pred_classes, b.pred_classes)
        assert torch.equal(c, d)


@each_coding
@each_regression
def test_detection_has_the_quality_of_the_proposal_that_nms_kept(coding, class_agnostic):
    predictor = make_predictor(coding, class_agnostic, log_variance_limit=1.5, **INFERENCE)
    proposals, predictions = crowded_case(class_agnostic)
    detections, _ = detect(predictor, predictions, proposals)
    expected = quality_of_detections(predictor, predictions, proposals, detections, class_agnostic)
    for instances, qualities in zip(detections, expected, strict=True):
        assert 0 < len(instances) <= 12
        assert_close(instances.localization_quality, qualities)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["scores", "deltas"])
@each_regression
def test_non_finite_rows_do_not_shift_the_qualities_of_other_rows(value, where, class_agnostic):
    predictor = make_predictor(class_agnostic=class_agnostic, log_variance_limit=1.5, **INFERENCE)
    proposals, predictions = crowded_case(class_agnostic)
    broken = predictions._replace(**{where: getattr(predictions, where).detach().clone()})
    getattr(broken, where)[[0, 5, 31]] = value
    detections, _ = detect(predictor, broken, proposals)
    expected = quality_of_detections(predictor, broken, proposals, detections, class_agnostic)
    for instances, qualities in zip(detections, expected, strict=True):
        assert len(instances) > 0
        assert_close(instances.localization_quality, qualities)


def test_quality_scale_multiplies_the_quality():
    proposals, predictions = crowded_case(False)
    once, twice = (
        detect(make_predictor(quality_scale=scale, **INFERENCE), predictions, proposals)[0][0]
        for scale in (1.0, 2.0)
    )
    assert_close(twice.localization_quality, 2 * once.localization_quality)


def test_image_without_detections_has_an_empty_quality():
    predictor = make_predictor(test_score_thresh=1.0)
    proposals, predictions = crowded_case(False)
    for instances in detect(predictor, predictions, proposals)[0]:
        assert instances.localization_quality.shape == (0,)


def test_boxes_for_ground_truth_classes_equal_detectron2():
    """Detectron2 uses them if TRAIN_ON_PRED_BOXES is set."""
    labels = LABELS["mixed"]
    proposals, predictions = make_proposals(labels), make_predictions(count(labels))
    boxes = make_predictor().predict_boxes_for_gt_classes(predictions, proposals)
    original = predictor_of(FastRCNNOutputLayers)
    for a, b in zip(
        boxes, original.predict_boxes_for_gt_classes(predictions[:2], proposals), strict=True
    ):
        assert torch.equal(a, b)
