"""The ROI head's outputs and the losses on them, against loops over single numbers."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from locreweight.modeling import CornerBoxTransform, LocalizationAwareOutputLayers
from tests.modeling.output_layer_cases import (
    CODINGS,
    FEATURES,
    LABELS,
    K,
    coded,
    count,
    cross_entropy_of,
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


# --- the layers -----------------------------------------------------------------------------------


@each_regression
def test_the_localization_aware_branch_is_one_linear_layer_beside_the_box_branch(class_agnostic):
    ours = make_predictor(class_agnostic=class_agnostic).state_dict()
    theirs = predictor_of(FastRCNNOutputLayers, class_agnostic=class_agnostic).state_dict()
    assert ours.keys() - theirs.keys() == {"log_variance.weight", "log_variance.bias"}
    assert theirs.keys() <= ours.keys()
    for kind in ("weight", "bias"):
        assert ours[f"log_variance.{kind}"].shape == ours[f"bbox_pred.{kind}"].shape


def test_all_branches_read_the_same_features():
    predictor = make_predictor()
    x = torch.randn(5, FEATURES, 1, 1)
    scores, deltas, log_variance = predictor(x)
    for found, layer in (
        (scores, predictor.cls_score),
        (deltas, predictor.bbox_pred),
        (log_variance, predictor.log_variance),
    ):
        assert_close(found, x.flatten(1) @ layer.weight.T + layer.bias)


def test_the_variance_layer_starts_with_zero_bias_and_small_normal_weights():
    layer = LocalizationAwareOutputLayers(
        ShapeSpec(channels=1024), box2box_transform=CODINGS["corners"], num_classes=20
    ).log_variance
    assert (layer.bias == 0).all()
    assert layer.weight.std().item() == pytest.approx(1e-4, rel=0.02)
    assert layer.weight.mean().item() == pytest.approx(0, abs=1e-6)


@each_coding
@each_regression
def test_the_box_loss_starts_as_smooth_l1(coding, class_agnostic):
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
def test_the_config_decides_the_coding_and_the_settings(corner_coding, expected):
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
    # Detectron2's is scripted, so that its type cannot be asked for.
    assert isinstance(coding, CornerBoxTransform) == (expected is CornerBoxTransform)
    weights = (8.0, 6.0, 8.0, 6.0) if corner_coding else (8.0, 6.0, 4.0, 3.0)
    assert tuple(coding.weights) == weights
    assert predictor.log_variance_limit == 5.0
    assert predictor.quality_scale == 1.5
    assert predictor.normalize_by_sampled
    assert not predictor.gaussian_boxes
    assert predictor.focal_gamma == 1.5
    assert predictor.smooth_l1_beta == 1.0


# --- labeled images -------------------------------------------------------------------------------


@each_coding
@each_regression
@each_normalizer
@each_labels
def test_the_supervised_box_loss_is_equation_10(coding, class_agnostic, by_sampled, labels):
    predictor = make_predictor(coding, class_agnostic, normalize_by_sampled=by_sampled)
    proposals = make_proposals(labels)
    predictions = make_predictions(count(labels), class_agnostic)

    total, foreground = 0.0, 0
    for row, (label, proposal, target) in enumerate(rows_of(proposals)):
        if label == K:
            continue
        foreground += 1
        for value, wanted, log_variance in zip(
            four_of(predictions.deltas, row, label, class_agnostic),
            coded(coding, proposal, target),
            four_of(predictions.log_variance, row, label, class_agnostic),
            strict=True,
        ):
            total += math.exp(-log_variance) * smooth_l1(value - wanted) + log_variance / 2
    expected = total / max(count(labels) if by_sampled else foreground, 1)
    loss = predictor.losses(predictions, proposals)["loss_box_reg"]
    assert_close(loss, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@each_labels
def test_the_supervised_classification_loss_is_detectron2s(labels):
    proposals, predictions = make_proposals(labels), make_predictions(count(labels))
    ours = make_predictor().losses(predictions, proposals)["loss_cls"]
    theirs = predictor_of(FastRCNNOutputLayers).losses(predictions[:2], proposals)["loss_cls"]
    assert torch.equal(ours, theirs)


@each_coding
@each_regression
@each_labels
def test_with_variance_one_all_supervised_losses_are_detectron2s(coding, class_agnostic, labels):
    """As Detectron2 divides, by all sampled proposals."""
    proposals = make_proposals(labels)
    predictions = make_predictions(count(labels), class_agnostic)
    predictions = predictions._replace(log_variance=torch.zeros_like(predictions.log_variance))
    ours = make_predictor(coding, class_agnostic, normalize_by_sampled=True)
    theirs = predictor_of(FastRCNNOutputLayers, coding, class_agnostic)
    assert_close(ours.losses(predictions, proposals), theirs.losses(predictions[:2], proposals))


@each_coding
@each_regression
@each_labels
def test_without_gaussian_boxes_all_supervised_losses_are_detectron2s(
    coding, class_agnostic, labels
):
    proposals, predictions = make_proposals(labels), make_predictions(count(labels), class_agnostic)
    settings = {"normalize_by_sampled": True, "smooth_l1_beta": 0.7}
    ours = make_predictor(coding, class_agnostic, gaussian_boxes=False, **settings)
    theirs = predictor_of(FastRCNNOutputLayers, coding, class_agnostic, smooth_l1_beta=0.7)
    assert_close(ours.losses(predictions, proposals), theirs.losses(predictions[:2], proposals))
    assert not any(p.requires_grad for p in ours.log_variance.parameters())


def test_focal_loss_takes_the_place_of_cross_entropy():
    proposals, predictions = make_proposals(LABELS["mixed"]), make_predictions(7)
    found = make_predictor(focal_gamma=1.5).losses(predictions, proposals)["loss_cls"]
    labels = torch.cat([p.gt_classes for p in proposals]).tolist()
    losses = [
        cross_entropy_of(logits, label)
        for logits, label in zip(predictions.scores.tolist(), labels, strict=True)
    ]
    expected = sum((1 - math.exp(-loss)) ** 1.5 * loss for loss in losses) / 7
    assert_close(found, torch.tensor(expected))


def test_supervised_losses_take_detectron2s_weights():
    labels = LABELS["mixed"]
    proposals, predictions = make_proposals(labels), make_predictions(count(labels))
    once = make_predictor().losses(predictions, proposals)
    weighted = make_predictor(loss_weight={"loss_box_reg": 3.0}).losses(predictions, proposals)
    assert_close(weighted["loss_box_reg"], 3 * once["loss_box_reg"])
    assert_close(weighted["loss_cls"], once["loss_cls"])


def test_the_log_variance_is_bounded_in_the_supervised_loss():
    labels = LABELS["all foreground"]
    proposals, predictions = make_proposals(labels), make_predictions(count(labels))
    predictor = make_predictor(log_variance_limit=2.0)
    wild = predictions._replace(log_variance=predictions.log_variance.detach() * 1e4)
    bounded = wild._replace(log_variance=wild.log_variance.clamp(-2, 2))
    found = predictor.losses(wild, proposals)["loss_box_reg"]
    assert_close(found, predictor.losses(bounded, proposals)["loss_box_reg"])
    assert found.isfinite()


@each_regression
def test_reliability_is_that_of_equations_12_and_13(class_agnostic):
    predictor = make_predictor(class_agnostic=class_agnostic, quality_scale=1.5)
    labels = [0, 2, K, K, 1]
    predictions = make_predictions(len(labels), class_agnostic)
    expected = []
    for row, label in enumerate(labels):
        probabilities = predictions.scores[row].softmax(dim=0).tolist()
        best = max(range(K), key=lambda k: probabilities[k])
        variances = [
            math.exp(v) for v in four_of(predictions.log_variance, row, best, class_agnostic)
        ]
        quality = 1.5 * (1 - 1 / (1 + math.exp(-sum(variances) / 4)))
        expected.append(probabilities[best] * quality if label < K else probabilities[K])
    found = predictor.reliability(predictions, torch.tensor(labels))
    assert_close(found, torch.tensor(expected))


# --- inference ------------------------------------------------------------------------------------


def detect(predictor, predictions, proposals):
    with torch.no_grad():
        return predictor.inference(predictions, proposals)


def crowded_case(class_agnostic):
    """Predictions for overlapping proposals of two images; NMS has something to do."""
    proposals = []
    for rows in (30, 20):
        boxes = torch.tensor([10.0, 10.0, 40.0, 40.0]) + torch.randn(rows, 4) * 6
        proposals.append(Instances((48, 48), proposal_boxes=Boxes(boxes)))
    predictions = make_predictions(50, class_agnostic)
    # What lies outside of the bound shows whether it is kept.
    return proposals, predictions._replace(log_variance=predictions.log_variance * 2)


def quality_of_detections(predictor, predictions, proposals, found, class_agnostic):
    """For each detection the ROI and class of that very box and score, and the quality there."""
    probabilities = predictor.predict_probs(predictions, proposals)
    boxes = predictor.predict_boxes(predictions, proposals)
    first_row, qualities = 0, []
    for image, instances in enumerate(found):
        image_boxes = boxes[image].unflatten(1, (-1, 4)).clamp(0, 48)
        of_image = []
        for box, score, label in zip(
            instances.pred_boxes.tensor, instances.scores, instances.pred_classes, strict=True
        ):
            column = 0 if class_agnostic else int(label)
            same = (probabilities[image][:, label] == score) & (image_boxes[:, column] == box).all(
                dim=1
            )
            (row,) = same.nonzero().flatten().tolist()
            values = four_of(predictions.log_variance, first_row + row, int(label), class_agnostic)
            mean = sum(math.exp(min(max(v, -1.5), 1.5)) for v in values) / 4
            of_image.append(1 - 1 / (1 + math.exp(-mean)))
        qualities.append(torch.tensor(of_image))
        first_row += len(image_boxes)
    return qualities


INFERENCE = {"test_score_thresh": 0.05, "test_nms_thresh": 0.5, "test_topk_per_image": 12}


@each_coding
@each_regression
def test_boxes_scores_and_classes_are_detectron2s(coding, class_agnostic):
    ours = make_predictor(coding, class_agnostic, **INFERENCE)
    theirs = predictor_of(FastRCNNOutputLayers, coding, class_agnostic, **INFERENCE)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    proposals, _ = crowded_case(class_agnostic)
    x = torch.randn(50, FEATURES) * 10
    mine, my_rows = detect(ours, ours(x), proposals)
    reference, their_rows = detect(theirs, theirs(x), proposals)
    for a, b, rows, other_rows in zip(mine, reference, my_rows, their_rows, strict=True):
        assert len(a) > 0
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.pred_classes, b.pred_classes)
        assert torch.equal(rows, other_rows)


@each_coding
@each_regression
def test_a_detection_has_the_quality_of_the_roi_that_nms_kept(coding, class_agnostic):
    predictor = make_predictor(coding, class_agnostic, log_variance_limit=1.5, **INFERENCE)
    proposals, predictions = crowded_case(class_agnostic)
    found, _ = detect(predictor, predictions, proposals)
    expected = quality_of_detections(predictor, predictions, proposals, found, class_agnostic)
    for instances, qualities in zip(found, expected, strict=True):
        assert 0 < len(instances) <= 12
        assert_close(instances.localization_quality, qualities)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["scores", "deltas"])
@each_regression
def test_rows_gone_wrong_do_not_shift_the_qualities_of_others(value, where, class_agnostic):
    predictor = make_predictor(class_agnostic=class_agnostic, log_variance_limit=1.5, **INFERENCE)
    proposals, predictions = crowded_case(class_agnostic)
    broken = predictions._replace(**{where: getattr(predictions, where).detach().clone()})
    getattr(broken, where)[[0, 5, 31]] = value
    found, _ = detect(predictor, broken, proposals)
    expected = quality_of_detections(predictor, broken, proposals, found, class_agnostic)
    for instances, qualities in zip(found, expected, strict=True):
        assert len(instances) > 0
        assert_close(instances.localization_quality, qualities)


def test_the_quality_scale_scales_the_quality():
    proposals, predictions = crowded_case(False)
    once, twice = (
        detect(make_predictor(quality_scale=scale, **INFERENCE), predictions, proposals)[0][0]
        for scale in (1.0, 2.0)
    )
    assert_close(twice.localization_quality, 2 * once.localization_quality)


def test_an_image_without_detections_has_an_empty_quality():
    predictor = make_predictor(test_score_thresh=1.0)
    proposals, predictions = crowded_case(False)
    for instances in detect(predictor, predictions, proposals)[0]:
        assert instances.localization_quality.shape == (0,)


def test_boxes_for_the_true_classes_are_detectron2s():
    """Detectron2 asks for them with TRAIN_ON_PRED_BOXES."""
    labels = LABELS["mixed"]
    proposals, predictions = make_proposals(labels), make_predictions(count(labels))
    mine = make_predictor().predict_boxes_for_gt_classes(predictions, proposals)
    theirs = predictor_of(FastRCNNOutputLayers)
    for a, b in zip(
        mine, theirs.predict_boxes_for_gt_classes(predictions[:2], proposals), strict=True
    ):
        assert torch.equal(a, b)
