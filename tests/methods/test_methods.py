"""What each method does with pseudo-labels, against its formula in loops over single numbers."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.layers import cat
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

import locreweight
from locreweight.errors import UsageError
from locreweight.losses import reweighting
from locreweight.methods import (
    METHOD_REGISTRY,
    SampledProposals,
    SemiSupervisedMethod,
    build_method,
)
from locreweight.methods.base import unweighted_box_loss, unweighted_classification_loss
from locreweight.methods.loc_reweight import ler, prc
from locreweight.methods.shuffled_loc_reweight import shuffled
from locreweight.methods.soft_teacher import SoftTeacherParts, refine
from tests.modeling.output_layer_cases import (
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
from tests.modeling.tiny_model import random_image, tiny_config, tiny_model


@pytest.fixture(autouse=True)
def _storage():
    with EventStorage():
        yield


def never_asked():
    pytest.fail("the teacher was asked in vain")


def sample(labels, predictor=None, *, class_agnostic=False, teacher=None, **fields):
    """Proposals of images with these labels; ``gt_`` fields, one number a proposal, as given."""
    proposals = make_proposals(labels)
    for name, values in fields.items():
        parts = values.split([len(p) for p in proposals])
        for found, part in zip(proposals, parts, strict=True):
            if found.has("gt_boxes"):  # an image without pseudo-labels has no such field
                found.set(name, part)
    return SampledProposals(
        proposals,
        make_predictions(count(labels), class_agnostic),
        predictor or make_predictor(class_agnostic=class_agnostic),
        predict_rois=never_asked if teacher is None else lambda: teacher,
    )


def box_terms(sampled, coding, class_agnostic, beta):
    """Row and summed smooth L1 of every foreground proposal."""
    for row, (label, proposal, target) in enumerate(rows_of(sampled.proposals)):
        if label < K:
            said = four_of(sampled.predictions.deltas, row, label, class_agnostic)
            wanted = coded(coding, proposal, target)
            yield row, sum(smooth_l1(a - b, beta) for a, b in zip(said, wanted, strict=True))


# --- the paper's ----------------------------------------------------------------------------------


@each_coding
@each_regression
@each_normalizer
@each_labels
@pytest.mark.parametrize("weighted", [True, False])
def test_the_box_loss_is_equation_11(coding, class_agnostic, by_sampled, labels, weighted):
    predictor = make_predictor(
        coding, class_agnostic, normalize_by_sampled=by_sampled, smooth_l1_beta=0.7
    )
    quality = torch.rand(count(labels)) / 2
    sampled = sample(
        labels, predictor, class_agnostic=class_agnostic, gt_localization_quality=quality
    )
    terms = list(box_terms(sampled, coding, class_agnostic, beta=0.7))
    total = sum(loss * (quality[row].item() if weighted else 1.0) for row, loss in terms)
    expected = total / max(count(labels) if by_sampled else len(terms), 1)
    loss = (ler if weighted else unweighted_box_loss)(sampled)
    assert_close(loss, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@each_normalizer
@each_labels
def test_the_classification_loss_is_equation_14(by_sampled, labels):
    predictor = make_predictor(normalize_by_sampled=by_sampled)
    teacher = make_predictions(count(labels))
    sampled = sample(labels, predictor, teacher=teacher)
    reliability = predictor.reliability(teacher, sampled.labels)

    sums, numbers = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for row, (label, _, _) in enumerate(rows_of(sampled.proposals)):
        of_scores = cross_entropy_of(sampled.predictions.scores[row].tolist(), label)
        sums[label < K] += reliability[row].item() * of_scores
        numbers[label < K] += 1
    if by_sampled:
        expected = (sums[True] + sums[False]) / count(labels)
    else:
        expected = sum(sums[kind] / max(numbers[kind], 1) for kind in sums)
    assert_close(prc(sampled), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@each_normalizer
@each_labels
def test_without_weights_the_classification_loss_is_detectron2s(by_sampled, labels):
    sampled = sample(labels, make_predictor(normalize_by_sampled=by_sampled))
    theirs = predictor_of(FastRCNNOutputLayers).losses(sampled.predictions[:2], sampled.proposals)
    assert torch.equal(unweighted_classification_loss(sampled), theirs["loss_cls"])


@pytest.mark.parametrize("regress", [ler, unweighted_box_loss])
@pytest.mark.parametrize("classify", [prc, unweighted_classification_loss])
@each_labels
def test_losses_are_finite_and_pass_gradients_to_all_but_the_variance(regress, classify, labels):
    quality = torch.rand(count(labels), requires_grad=True)
    teacher = make_predictions(count(labels))
    sampled = sample(labels, teacher=teacher, gt_localization_quality=quality)
    total = regress(sampled) + classify(sampled)
    assert total.isfinite()
    total.backward()
    predictions = sampled.predictions
    assert predictions.scores.grad.abs().sum() > 0
    assert predictions.deltas.grad is not None
    assert (predictions.deltas.grad != 0).any() == any(k < K for image in labels for k in image)
    assert predictions.log_variance.grad is None or not predictions.log_variance.grad.any()
    assert all(x.grad is None for x in (quality, *teacher))


# --- its control ----------------------------------------------------------------------------------


def test_the_control_deals_each_kind_its_own_weights_and_each_place_any_of_them():
    weights = torch.arange(1.0, 8.0)
    foreground = torch.tensor([0, 1, 1, 0, 1, 0, 0]).bool()
    torch.manual_seed(0)
    draws = torch.stack([shuffled(weights, foreground) for _ in range(2000)])
    for kind in (foreground, ~foreground):
        own = weights[kind]
        assert torch.equal(draws[:, kind].sort(dim=1).values, own.expand(2000, -1))
        share = (draws[:, kind][..., None] == own).float().mean(dim=0)
        assert_close(share, torch.full_like(share, 1 / len(own)), rtol=0, atol=0.06)


@pytest.mark.parametrize("kind", [True, False], ids=["foreground", "background"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_control_works_with_one_kind_and_with_none(kind, dtype):
    weights = torch.rand(5, dtype=dtype)
    dealt = shuffled(weights, torch.full((5,), kind))
    assert dealt.dtype == dtype and torch.equal(dealt.sort().values, weights.sort().values)
    assert shuffled(weights[:0], torch.zeros(0).bool()).shape == (0,)


@each_normalizer
@each_labels
def test_the_control_has_the_papers_losses_with_its_own_weights(by_sampled, labels):
    predictor = make_predictor(normalize_by_sampled=by_sampled)
    teacher = make_predictions(count(labels))
    quality = torch.rand(count(labels)) / 2
    sampled = sample(labels, predictor, teacher=teacher, gt_localization_quality=quality)
    torch.manual_seed(0)
    losses = strategy_of("ShuffledLocReweight").losses(sampled)

    torch.manual_seed(0)
    reliability = predictor.reliability(teacher, sampled.labels)
    reliability = shuffled(reliability, sampled.is_foreground)
    dealt = shuffled(
        sampled.matched_gt_field("gt_localization_quality"), sampled.is_foreground
    ).tolist()
    boxes = [(row, loss * dealt[row]) for row, loss in box_terms(sampled, "corners", False, 1.0)]
    expected = sum(loss for _, loss in boxes) / max(count(labels) if by_sampled else len(boxes), 1)
    assert_close(losses["loss_box_reg"], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    weighted = reweighting.reliability_weighted_cross_entropy(
        sampled.predictions.scores, sampled.labels, reliability, per_sampled_proposal=by_sampled
    )
    assert_close(losses["loss_cls"], weighted)


# --- Soft Teacher ---------------------------------------------------------------------------------

PARTS = SoftTeacherParts(class_threshold=0.9)


def test_soft_teachers_classification_weighs_background_by_its_share_of_the_teachers_scores():
    labels = [[0, K, 2, K], [1, 1, K]]
    scores = torch.tensor([0.95, 0.95, 0.6, 0.95, 0.99, 0.91, 0.3])  # of the pseudo-labels
    teacher = make_predictions(7)
    sampled = sample(labels, teacher=teacher, gt_score=scores)
    # Row 2 is matched to a candidate that is no object: for classification it is background.
    objects = {0: 0, 4: 1, 5: 1}
    background = teacher.scores.softmax(dim=1)[:, K].tolist()
    others = [row for row in range(7) if row not in objects]
    shares = {row: background[row] / sum(background[r] for r in others) for row in others}
    logits = sampled.predictions.scores.tolist()
    expected = sum(cross_entropy_of(logits[row], label) for row, label in objects.items()) / 3
    expected += sum(share * cross_entropy_of(logits[row], K) for row, share in shares.items())
    assert_close(PARTS.classify(sampled), torch.tensor(expected))


@each_coding
@pytest.mark.parametrize("by_sampled", [False, True])
def test_soft_teacher_regresses_to_boxes_that_the_teacher_agrees_on_and_no_others(
    coding, by_sampled
):
    labels = [[0, K, 2, K], [1, 1, K]]
    variance = torch.tensor([0.01, 0.0, 0.03, 0.0, 0.019, 0.021, 0.0])
    score = torch.tensor([0.6, 0.6, 0.95, 0.6, 0.95, 0.95, 0.6])
    predictor = make_predictor(coding, normalize_by_sampled=by_sampled)
    sampled = sample(labels, predictor, gt_variance=variance, gt_score=score)
    terms = dict(box_terms(sampled, coding, False, beta=1.0))
    expected = (terms[0] + terms[4]) / (7 if by_sampled else 2)
    assert_close(PARTS.regress_boxes(sampled), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
@pytest.mark.parametrize("variance", [0.0, 1.0], ids=["agreed", "disagreed"])
def test_soft_teachers_losses_are_finite_whatever_is_missing(labels, variance):
    fields = {
        "gt_variance": torch.full((count(labels),), variance),
        "gt_score": torch.full((count(labels),), 0.95),
    }
    sampled = sample(labels, teacher=make_predictions(count(labels)), **fields)
    box_loss = PARTS.regress_boxes(sampled)
    (box_loss + PARTS.classify(sampled)).backward()
    assert sampled.predictions.deltas.grad.isfinite().all()
    assert sampled.predictions.scores.grad.abs().sum() > 0
    foreground = any(k < K for image in labels for k in image)
    assert (box_loss > 0) == (foreground and variance < 0.02)


@pytest.fixture(scope="module")
def teacher():
    return tiny_model().eval()


def test_candidates_are_the_detections_above_the_lower_threshold_with_their_variance(teacher):
    seen = teacher.detect([{"image": random_image(seed=i)} for i in range(2)])
    scores = cat([found.scores for found in seen.detections])
    low = scores.median().item()
    parts = SoftTeacherParts(class_threshold=scores.max().item() - 1e-6, box_threshold=low)
    found = parts.candidates(teacher, seen)
    for candidates, detections in zip(found, seen.detections, strict=True):
        assert len(candidates) == (detections.scores > low).sum()
        assert (candidates.gt_variance > 0).all() and candidates.gt_variance.isfinite().all()
    assert sum(len(parts.objects(candidates)) for candidates in found) == 1


def test_without_candidates_there_is_nothing_to_refine(teacher):
    seen = teacher.detect([{"image": random_image()}])
    (found,) = SoftTeacherParts(class_threshold=1.0, box_threshold=1.0).candidates(teacher, seen)
    assert len(found) == 0 and found.gt_variance.shape == (0,)


def test_refined_boxes_are_the_teachers_of_the_asked_class(teacher):
    seen = teacher.detect([{"image": random_image(seed=i)} for i in range(2)])
    boxes = [torch.tensor([[4.0, 4, 30, 40], [10, 10, 60, 60]]), torch.tensor([[0.0, 0, 50, 64]])]
    classes = [torch.tensor([0, 2]), torch.tensor([1])]
    refined = refine(teacher, seen, boxes, classes)
    assert [len(x) for x in refined] == [2, 1]
    predictor = teacher.roi_heads.box_predictor
    deltas = teacher.predict_rois(seen, boxes).deltas
    for row, (box, label) in enumerate(zip(torch.cat(boxes), torch.cat(classes), strict=True)):
        moved = predictor.box2box_transform.apply_deltas(deltas[row : row + 1], box[None])[0]
        assert_close(torch.cat(refined)[row], moved[4 * label : 4 * label + 4])


# --- all of them ----------------------------------------------------------------------------------


def strategy_of(name, **settings):
    return build_method(tiny_config({"SEMI.METHOD": name} | settings))


def test_the_config_names_the_method_and_its_parts():
    both = strategy_of("LocReweight")
    assert (both.classify, both.regress_boxes) == (prc, ler)
    neither = strategy_of("LocReweight", **{"SEMI.LER": False, "SEMI.PRC": False})
    assert (neither.classify, neither.regress_boxes) == (
        unweighted_classification_loss,
        unweighted_box_loss,
    )
    without = strategy_of("ShuffledLocReweight", **{"SEMI.LER": False, "SEMI.PRC": False})
    assert (without.classify, without.regress_boxes) == (
        unweighted_classification_loss,
        unweighted_box_loss,
    )
    stac = strategy_of("Stac")
    assert stac.frozen_pseudo_labeler and stac.regress_boxes is unweighted_box_loss
    assert strategy_of("UnbiasedTeacher").regress_boxes is None
    assert not both.frozen_pseudo_labeler


def test_an_unknown_method_is_an_error_that_names_the_known():
    with pytest.raises(UsageError, match=r"SEMI.METHOD 'Unbiased'.*LocReweight.*SoftTeacher"):
        strategy_of("Unbiased")


@pytest.mark.parametrize("name", ["LocReweight", "Stac", "UnbiasedTeacher"])
def test_the_threshold_is_the_configs(name):
    found = Instances(
        (8, 8), pred_boxes=Boxes(torch.rand(3, 4)), scores=torch.tensor([0.9, 0.7, 0.6])
    )
    found.pred_classes, found.localization_quality = torch.arange(3), torch.rand(3)
    strategy = strategy_of(name, **{"SEMI.PSEUDO_LABEL_THRESHOLD": 0.65})
    (chosen,) = strategy.choose_pseudo_labels(None, SimpleNamespace(detections=[found]))
    assert chosen.gt_score.tolist() == pytest.approx([0.9, 0.7])


def test_the_method_that_the_readme_adds_works_as_it_stands():
    readme = Path(locreweight.__file__).parents[1] / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "def OnlyConfident" in block]
    package = "locreweight.methods"
    try:
        exec(code, {"__name__": f"{package}.only_confident", "__package__": package})
        strategy = strategy_of("OnlyConfident")
    finally:
        METHOD_REGISTRY._obj_map.pop("OnlyConfident", None)
    labels = [[0, K, 2, K], [1, 1, K]]
    score = torch.rand(7)
    sampled = sample(labels, gt_score=score)
    terms = list(box_terms(sampled, "corners", False, 1.0))
    expected = sum(loss * score[row].item() ** 2 for row, loss in terms) / len(terms)
    losses = strategy.losses(sampled)
    assert_close(losses["loss_box_reg"], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert_close(losses["loss_cls"], unweighted_classification_loss(sampled))


def test_a_method_can_be_added_from_outside():
    def Mine(cfg) -> SemiSupervisedMethod:
        return SemiSupervisedMethod(lambda *_: [], lambda s: s.labels.sum() * 0.0, None)

    METHOD_REGISTRY.register(Mine)
    try:
        losses = strategy_of("Mine").losses(sample([[0, K]]))
    finally:
        del METHOD_REGISTRY._obj_map["Mine"]
    assert set(losses) == {"loss_cls"} and math.isclose(losses["loss_cls"], 0)
