"""Losses and pseudo-labels of each method, compared with loops over single numbers."""

from __future__ import annotations

import inspect
import math
import re
import textwrap
from pathlib import Path

import pytest
import torch
from detectron2.layers import cat
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

import locreweight
from locreweight import methods
from locreweight.errors import UsageError
from locreweight.losses import reweighting
from locreweight.methods import (
    METHOD_REGISTRY,
    LabelingInputs,
    SampledProposals,
    SemiSupervisedMethod,
    build_method,
)
from locreweight.methods.base import to_pseudo_labels
from locreweight.methods.loc_reweight import LocReweight
from locreweight.methods.mean_loc_reweight import mean_within_groups
from locreweight.methods.shuffled_loc_reweight import shuffle_within_groups
from locreweight.methods.soft_teacher import SoftTeacher, regress_boxes
from locreweight.modeling.meta_arch import TeacherOutput
from tests.modeling.output_layer_cases import (
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
from tests.modeling.tiny_model import random_image, tiny_config, tiny_model

PAPER = LocReweight(pseudo_label_threshold=0.8, ler=True, prc=True)
BASELINE = LocReweight(pseudo_label_threshold=0.8, ler=False, prc=False)
SOFT_TEACHER = SoftTeacher(pseudo_label_threshold=0.9)


@pytest.fixture(autouse=True)
def _storage():
    with EventStorage():
        yield


def fail_if_called():
    pytest.fail("the teacher's predictions are not needed")


def sample(labels, predictor=None, *, class_agnostic=False, teacher=None, **fields):
    """Proposals with these labels for each image; ``gt_`` fields have one number per proposal."""
    instances = make_proposals(labels)
    for name, values in fields.items():
        parts = values.split([len(x) for x in instances])
        for x, part in zip(instances, parts, strict=True):
            if x.has("gt_boxes"):  # absent in an image without pseudo-labels
                x.set(name, part)
    return SampledProposals(
        instances,
        make_predictions(count(labels), class_agnostic),
        predictor or make_predictor(class_agnostic=class_agnostic),
        predict_rois=fail_if_called if teacher is None else lambda: teacher,
    )


def expected_box_losses(proposals, coding, class_agnostic, beta):
    """Yield the row and the summed smooth L1 loss of every foreground proposal."""
    for row, (label, proposal, target) in enumerate(rows_of(proposals.instances)):
        if label < K:
            predicted = four_of(proposals.predictions.deltas, row, label, class_agnostic)
            expected = coded(coding, proposal, target)
            pairs = zip(predicted, expected, strict=True)
            yield row, sum(smooth_l1(a - b, beta) for a, b in pairs)


# Parts that methods share


def detections_with(scores):
    count = len(scores)
    boxes = [[float(i), 0, i + 10, 10] for i in range(count)]
    return Instances(
        (64, 64),
        pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
        scores=torch.tensor(scores),
        pred_classes=torch.arange(count) % K,
        localization_quality=torch.arange(count) / 100,
    )


def test_pseudo_labels_have_scores_above_the_threshold_and_not_equal_to_it():
    labels = to_pseudo_labels(detections_with([0.81, 0.8, 0.79, 0.9]), 0.8)
    assert labels.gt_classes.tolist() == [0, 0]
    assert labels.gt_boxes.tensor[:, 0].tolist() == [0.0, 3.0]
    assert_close(labels.gt_localization_quality, torch.tensor([0.0, 0.03]))
    assert_close(labels.gt_score, torch.tensor([0.81, 0.9]))
    assert labels.get_fields().keys() == {
        *("gt_boxes", "gt_classes", "gt_localization_quality", "gt_score")
    }


@pytest.mark.parametrize("scores", [[0.5, 0.2], []])
def test_pseudo_labels_can_be_empty(scores):
    assert len(to_pseudo_labels(detections_with(scores), 0.8)) == 0


def test_matched_gt_field_is_zero_in_an_image_without_pseudo_labels():
    with_labels = Instances((8, 8), gt_classes=torch.tensor([0, 1]))
    with_labels.gt_localization_quality = torch.tensor([0.1, 0.4])
    without = Instances((8, 8), gt_classes=torch.tensor([K]))
    proposals = SampledProposals([with_labels, without], None, None, None)
    quality = proposals.matched_gt_field("gt_localization_quality")
    assert_close(quality, torch.tensor([0.1, 0.4, 0.0]))


# LER and PRC


@each_coding
@each_regression
@each_normalizer
@each_labels
@pytest.mark.parametrize("method", [PAPER, BASELINE], ids=["LER", "unweighted"])
def test_box_loss_matches_equation_11(coding, class_agnostic, by_sampled, labels, method):
    predictor = make_predictor(
        coding, class_agnostic, normalize_by_sampled=by_sampled, smooth_l1_beta=0.7
    )
    quality = torch.rand(count(labels)) / 2
    proposals = sample(
        labels, predictor, class_agnostic=class_agnostic, gt_localization_quality=quality
    )
    losses = list(expected_box_losses(proposals, coding, class_agnostic, beta=0.7))
    total = sum(loss * (quality[row].item() if method is PAPER else 1.0) for row, loss in losses)
    expected = total / max(count(labels) if by_sampled else len(losses), 1)
    assert_close(method.box_loss(proposals), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@each_regression
def test_reliability_matches_equations_12_and_13(class_agnostic):
    predictor = make_predictor(class_agnostic=class_agnostic, quality_scale=1.5)
    labels = [0, 2, K, K, 1]
    teacher = make_predictions(len(labels), class_agnostic)
    expected = []
    for row, label in enumerate(labels):
        probabilities = teacher.scores[row].softmax(dim=0).tolist()
        best = max(range(K), key=lambda k: probabilities[k])
        variances = [math.exp(v) for v in four_of(teacher.log_variance, row, best, class_agnostic)]
        quality = 1.5 * (1 - 1 / (1 + math.exp(-sum(variances) / 4)))
        expected.append(probabilities[best] * quality if label < K else probabilities[K])
    proposals = sample([labels], predictor, class_agnostic=class_agnostic, teacher=teacher)
    assert_close(PAPER.reliability(proposals), torch.tensor(expected))


@each_normalizer
@each_labels
def test_classification_loss_matches_equation_14(by_sampled, labels):
    predictor = make_predictor(normalize_by_sampled=by_sampled)
    proposals = sample(labels, predictor, teacher=make_predictions(count(labels)))
    reliability = PAPER.reliability(proposals)

    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for row, (label, _, _) in enumerate(rows_of(proposals.instances)):
        loss = cross_entropy_of(proposals.predictions.scores[row].tolist(), label)
        sums[label < K] += reliability[row].item() * loss
        counts[label < K] += 1
    if by_sampled:
        expected = (sums[True] + sums[False]) / count(labels)
    else:
        expected = sum(sums[group] / max(counts[group], 1) for group in sums)
    loss = PAPER.classification_loss(proposals)
    assert_close(loss, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@each_normalizer
@each_labels
def test_unweighted_classification_loss_equals_detectron2(by_sampled, labels):
    proposals = sample(labels, make_predictor(normalize_by_sampled=by_sampled))
    detectron2 = predictor_of(FastRCNNOutputLayers)
    expected = detectron2.losses(proposals.predictions[:2], proposals.instances)["loss_cls"]
    assert torch.equal(BASELINE.classification_loss(proposals), expected)


@pytest.mark.parametrize("ler", [True, False])
@pytest.mark.parametrize("prc", [True, False])
@each_labels
def test_losses_are_finite_and_have_no_gradient_for_variances_and_weights(ler, prc, labels):
    quality = torch.rand(count(labels), requires_grad=True)
    teacher = make_predictions(count(labels))
    proposals = sample(labels, teacher=teacher, gt_localization_quality=quality)
    method = LocReweight(pseudo_label_threshold=0.8, ler=ler, prc=prc)
    total = sum(method.losses(proposals).values())
    assert total.isfinite()
    total.backward()
    predictions = proposals.predictions
    assert predictions.scores.grad.abs().sum() > 0
    assert predictions.deltas.grad is not None
    assert (predictions.deltas.grad != 0).any() == any(k < K for image in labels for k in image)
    assert predictions.log_variance.grad is None or not predictions.log_variance.grad.any()
    assert all(x.grad is None for x in (quality, *teacher))


# Shuffled control


def test_shuffle_assigns_each_weight_of_a_group_to_each_place_equally_often():
    weights = torch.arange(1.0, 8.0)
    is_foreground = torch.tensor([0, 1, 1, 0, 1, 0, 0]).bool()
    torch.manual_seed(0)
    draws = torch.stack([shuffle_within_groups(weights, is_foreground) for _ in range(2000)])
    for group in (is_foreground, ~is_foreground):
        expected = weights[group]
        assert torch.equal(draws[:, group].sort(dim=1).values, expected.expand(2000, -1))
        frequency = (draws[:, group][..., None] == expected).float().mean(dim=0)
        uniform = torch.full_like(frequency, 1 / len(expected))
        assert_close(frequency, uniform, rtol=0, atol=0.06)


@pytest.mark.parametrize("is_foreground", [True, False], ids=["foreground", "background"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_shuffle_works_with_one_group_and_with_no_proposal(is_foreground, dtype):
    weights = torch.rand(5, dtype=dtype)
    shuffled = shuffle_within_groups(weights, torch.full((5,), is_foreground))
    assert shuffled.dtype == dtype and torch.equal(shuffled.sort().values, weights.sort().values)
    assert shuffle_within_groups(weights[:0], torch.zeros(0).bool()).shape == (0,)


@each_normalizer
@each_labels
def test_shuffled_control_computes_the_paper_losses_with_shuffled_weights(by_sampled, labels):
    predictor = make_predictor(normalize_by_sampled=by_sampled)
    quality = torch.rand(count(labels)) / 2
    proposals = sample(
        labels,
        predictor,
        teacher=make_predictions(count(labels)),
        gt_localization_quality=quality,
    )
    torch.manual_seed(0)
    losses = make_method("ShuffledLocReweight").losses(proposals)

    torch.manual_seed(0)
    reliability = shuffle_within_groups(PAPER.reliability(proposals), proposals.is_foreground)
    quality = PAPER.localization_quality(proposals)
    shuffled = shuffle_within_groups(quality, proposals.is_foreground).tolist()
    boxes = [
        loss * shuffled[row] for row, loss in expected_box_losses(proposals, "corners", False, 1.0)
    ]
    expected = sum(boxes) / max(count(labels) if by_sampled else len(boxes), 1)
    assert_close(losses["loss_box_reg"], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    weighted = reweighting.reliability_weighted_cross_entropy(
        proposals.predictions.scores,
        proposals.labels,
        reliability,
        per_sampled_proposal=by_sampled,
    )
    assert_close(losses["loss_cls"], weighted)


# Mean control


def test_mean_replaces_the_weights_of_each_group():
    weights = torch.tensor([1.0, 2.0, 4.0, 6.0, 8.0])
    is_foreground = torch.tensor([0, 1, 1, 0, 1]).bool()
    expected = torch.tensor([3.5, 14 / 3, 14 / 3, 3.5, 14 / 3])
    assert_close(mean_within_groups(weights, is_foreground), expected)


@pytest.mark.parametrize("is_foreground", [True, False], ids=["foreground", "background"])
def test_mean_works_with_one_group_and_with_no_proposal(is_foreground):
    weights = torch.rand(5)
    mask = torch.full((5,), is_foreground)
    assert_close(mean_within_groups(weights, mask), weights.mean().expand(5))
    assert mean_within_groups(weights[:0], mask[:0]).shape == (0,)


@each_normalizer
@each_labels
def test_mean_control_computes_the_paper_losses_with_mean_weights(by_sampled, labels):
    proposals = sample(
        labels,
        make_predictor(normalize_by_sampled=by_sampled),
        teacher=make_predictions(count(labels)),
        gt_localization_quality=torch.rand(count(labels)) / 2,
    )
    losses = make_method("MeanLocReweight").losses(proposals)
    is_foreground = proposals.is_foreground
    quality = PAPER.localization_quality(proposals)[is_foreground].mean().item()
    boxes = [loss for _, loss in expected_box_losses(proposals, "corners", False, 1.0)]
    expected = quality * sum(boxes) / max(count(labels) if by_sampled else len(boxes), 1)
    expected = torch.tensor(expected if boxes else 0.0)
    assert_close(losses["loss_box_reg"], expected, rtol=1e-4, atol=1e-5)
    weighted = reweighting.reliability_weighted_cross_entropy(
        proposals.predictions.scores,
        proposals.labels,
        mean_within_groups(PAPER.reliability(proposals), is_foreground),
        per_sampled_proposal=by_sampled,
    )
    assert_close(losses["loss_cls"], weighted)


# Soft Teacher


def test_soft_teacher_weights_background_by_its_share_of_the_teacher_scores():
    labels = [[0, K, 2, K], [1, 1, K]]
    scores = torch.tensor([0.95, 0.95, 0.6, 0.95, 0.99, 0.91, 0.3])  # of the pseudo-labels
    teacher = make_predictions(7)
    proposals = sample(labels, teacher=teacher, gt_score=scores)
    # Row 2 is matched to a candidate that is not an object, so it is background.
    objects = {0: 0, 4: 1, 5: 1}
    background = teacher.scores.softmax(dim=1)[:, K].tolist()
    others = [row for row in range(7) if row not in objects]
    shares = {row: background[row] / sum(background[r] for r in others) for row in others}
    logits = proposals.predictions.scores.tolist()
    expected = sum(cross_entropy_of(logits[row], label) for row, label in objects.items()) / 3
    expected += sum(share * cross_entropy_of(logits[row], K) for row, share in shares.items())
    assert_close(SOFT_TEACHER.classification_loss(proposals), torch.tensor(expected))


@each_coding
@each_normalizer
def test_soft_teacher_regresses_only_to_boxes_with_low_variance(coding, by_sampled):
    labels = [[0, K, 2, K], [1, 1, K]]
    variance = torch.tensor([0.01, 0.0, 0.03, 0.0, 0.019, 0.021, 0.0])
    score = torch.tensor([0.6, 0.6, 0.95, 0.6, 0.95, 0.95, 0.6])
    predictor = make_predictor(coding, normalize_by_sampled=by_sampled)
    proposals = sample(labels, predictor, gt_variance=variance, gt_score=score)
    losses = dict(expected_box_losses(proposals, coding, False, beta=1.0))
    expected = (losses[0] + losses[4]) / (7 if by_sampled else 2)
    loss = SOFT_TEACHER.box_loss(proposals)
    assert_close(loss, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@each_labels
@pytest.mark.parametrize("variance", [0.0, 1.0], ids=["low variance", "high variance"])
def test_soft_teacher_losses_are_finite_without_foreground_or_targets(labels, variance):
    fields = {
        "gt_variance": torch.full((count(labels),), variance),
        "gt_score": torch.full((count(labels),), 0.95),
    }
    proposals = sample(labels, teacher=make_predictions(count(labels)), **fields)
    box_loss = SOFT_TEACHER.box_loss(proposals)
    (box_loss + SOFT_TEACHER.classification_loss(proposals)).backward()
    assert proposals.predictions.deltas.grad.isfinite().all()
    assert proposals.predictions.scores.grad.abs().sum() > 0
    foreground = any(k < K for image in labels for k in image)
    assert (box_loss > 0) == (foreground and variance < 0.02)


@pytest.fixture(scope="module")
def teacher():
    return tiny_model().eval()


def test_soft_teacher_candidates_are_the_detections_above_the_lower_threshold(teacher):
    output = teacher.detect([{"image": random_image(seed=i)} for i in range(2)])
    scores = cat([x.scores for x in output.detections])
    method = SoftTeacher(pseudo_label_threshold=scores.max().item() - 1e-6)
    method.candidate_threshold = low = scores.median().item()
    candidates = method.select_pseudo_labels(LabelingInputs(teacher, output, []))
    for labels, detections in zip(candidates, output.detections, strict=True):
        assert len(labels) == (detections.scores > low).sum()
        assert (labels.gt_variance > 0).all() and labels.gt_variance.isfinite().all()
    assert sum(len(method.rpn_labels(labels)) for labels in candidates) == 1


def test_soft_teacher_without_candidates_has_no_pseudo_labels(teacher):
    output = teacher.detect([{"image": random_image()}])
    method = SoftTeacher(pseudo_label_threshold=1.0)
    method.candidate_threshold = 1.0
    (labels,) = method.select_pseudo_labels(LabelingInputs(teacher, output, []))
    assert len(labels) == 0 and labels.gt_variance.shape == (0,)


def test_regress_boxes_uses_the_regressor_of_the_given_class(teacher):
    output = teacher.detect([{"image": random_image(seed=i)} for i in range(2)])
    boxes = [torch.tensor([[4.0, 4, 30, 40], [10, 10, 60, 60]]), torch.tensor([[0.0, 0, 50, 64]])]
    classes = [torch.tensor([0, 2]), torch.tensor([1])]
    regressed = regress_boxes(teacher, output, boxes, classes)
    assert [len(x) for x in regressed] == [2, 1]
    predictor = teacher.roi_heads.box_predictor
    deltas = teacher.predict_rois(output, boxes).deltas
    for row, (box, label) in enumerate(zip(torch.cat(boxes), torch.cat(classes), strict=True)):
        expected = predictor.box2box_transform.apply_deltas(deltas[row : row + 1], box[None])[0]
        assert_close(torch.cat(regressed)[row], expected[4 * label : 4 * label + 4])


# All methods


def make_method(name, **settings):
    return build_method(tiny_config({"SEMI.METHOD": name} | settings))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "LocReweight",
            "ShuffledLocReweight",
            "MeanLocReweight",
            "STAC",
            "UnbiasedTeacher",
            "SoftTeacher",
        ),
        *("MUM", "InstantTeaching", "InstantTeachingStar", "MixPL", "LocReweightMix"),
        *("UnbiasedTeacherV2", "LabelMatch", "RPL", "CST", "ISMT"),
    ],
)
def test_build_method_reads_the_config(name):
    parts = {"SEMI.PRC": False} if name.endswith("LocReweight") else {}
    method = make_method(name, **parts | {"SEMI.PSEUDO_LABEL_THRESHOLD": 0.65})
    assert type(method).__name__ == name
    assert method.pseudo_label_threshold == 0.65
    assert method.frozen_pseudo_labeler == (name == "STAC")
    assert method.num_members == (2 if name in ("InstantTeachingStar", "CST", "ISMT") else 1)
    if isinstance(method, LocReweight):
        assert method.ler and not method.prc


def test_build_method_lists_the_known_names():
    with pytest.raises(UsageError, match=r"SEMI.METHOD 'Unbiased'.*LocReweight.*SoftTeacher"):
        make_method("Unbiased")


@pytest.mark.parametrize("key", ["SEMI.LER", "SEMI.PRC"])
def test_reweighting_is_turned_off_only_where_there_is_one(key):
    for name in ("STAC", "LocReweightMix"):
        with pytest.raises(UsageError, match=f"{key} False has no effect with SEMI.METHOD {name}"):
            make_method(name, **{key: False})
    make_method("MeanLocReweight", **{key: False})


def test_reweighting_needs_variances():
    smooth_l1 = {"MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES": False}
    for part in ({}, {"SEMI.LER": False}, {"SEMI.PRC": False}):
        with pytest.raises(UsageError, match="GAUSSIAN_BOXES True, or SEMI.LER False"):
            make_method("LocReweight", **smooth_l1 | part)
    make_method("LocReweight", **smooth_l1 | {"SEMI.LER": False, "SEMI.PRC": False})
    # A supervised training uses no pseudo-labels.
    make_method("LocReweight", **smooth_l1 | {"SEMI.BURN_IN_ITERS": 10**9})


@pytest.mark.parametrize("name", ["LocReweight", "STAC", "UnbiasedTeacher"])
def test_pseudo_labels_are_the_detections_above_the_threshold(name):
    detections = detections_with([0.9, 0.7, 0.6])
    method = make_method(name, **{"SEMI.PSEUDO_LABEL_THRESHOLD": 0.65})
    output = TeacherOutput({}, [detections])
    (labels,) = method.select_pseudo_labels(LabelingInputs(None, output, []))
    assert labels.gt_score.tolist() == pytest.approx([0.9, 0.7])
    assert method.rpn_labels(labels) is labels


def test_unbiased_teacher_has_no_box_loss():
    losses = make_method("UnbiasedTeacher").losses(sample([[0, K, 2], [K]]))
    assert losses.keys() == {"loss_cls"}


def example_in_docstring():
    return textwrap.dedent(inspect.getdoc(methods).split(".. code-block:: python\n")[1])


def example_in_readme():
    readme = (Path(locreweight.__file__).parents[1] / "README.md").read_text()
    (block,) = re.findall(r"```python\n([^`]*METHOD_REGISTRY.*?)```", readme, re.DOTALL)
    return block


@pytest.mark.parametrize("example", [example_in_docstring, example_in_readme])
def test_documented_example_of_a_new_method_works(example):
    """Run the example as a module of the package."""
    package = methods.__name__
    names = {"__name__": f"{package}.score_weighted", "__package__": package}
    try:
        exec(example(), names)
        method = make_method("ScoreWeighted")
    finally:
        METHOD_REGISTRY._obj_map.pop("ScoreWeighted", None)
    score = torch.rand(7)
    proposals = sample([[0, K, 2, K], [1, 1, K]], gt_score=score)
    losses = list(expected_box_losses(proposals, "corners", False, 1.0))
    expected = sum(loss * score[row].item() ** 2 for row, loss in losses) / len(losses)
    found = method.losses(proposals)
    assert_close(found["loss_box_reg"], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert_close(found["loss_cls"], BASELINE.classification_loss(proposals))


def test_a_method_can_be_registered_from_outside_and_add_a_loss():
    class Extended(SemiSupervisedMethod):
        def losses(self, proposals):
            return super().losses(proposals) | {"loss_extra": proposals.labels.sum() * 0.0}

    METHOD_REGISTRY.register(Extended)
    try:
        losses = make_method("Extended").losses(sample([[0, K]]))
    finally:
        del METHOD_REGISTRY._obj_map["Extended"]
    assert losses.keys() == {"loss_cls", "loss_box_reg", "loss_extra"}
