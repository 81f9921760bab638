"""The training step: coordinate frames, the weight of each loss, gradients and metrics."""

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from detectron2.layers import cat
from detectron2.utils.events import EventStorage
from torch.nn import functional as F
from torch.testing import assert_close

from locreweight.data.loader import Batch
from locreweight.data.transforms.views import UnlabeledSample, View, project_to_strong_view
from locreweight.ema import update_teacher
from locreweight.engine.training_step import (
    StepSettings,
    predict_student_rois,
    training_step,
)
from locreweight.errors import UsageError
from locreweight.losses.reweighting import proposal_reliability
from locreweight.methods import SampledProposals, SemiSupervisedMethod, build_method
from locreweight.methods.base import to_pseudo_labels
from locreweight.methods.unbiased_teacher import UnbiasedTeacher
from tests.modeling.tiny_model import (
    NUM_CLASSES,
    SIZE,
    ground_truth,
    labeled_inputs,
    random_image,
    tiny_config,
    tiny_model,
)

IDENTITY = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
FLIP = [[-1, 0, SIZE], [0, 1, 0], [0, 0, 1]]
SHIFT = [[1, 0, 10], [0, 1, -6], [0, 0, 1]]

SUPERVISED = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
UNLABELED = {f"{name}_unlabeled" for name in SUPERVISED}
THRESHOLD = 0.4


def make_method(threshold=THRESHOLD, ler=True, prc=True, name="LocReweight"):
    keys = {"PSEUDO_LABEL_THRESHOLD": threshold, "LER": ler, "PRC": prc, "METHOD": name}
    return build_method(tiny_config({f"SEMI.{key}": value for key, value in keys.items()}))


def view(image, matrix):
    return View(image, torch.tensor(matrix, dtype=torch.float64))


def make_sample(strong=FLIP, weak=IDENTITY, size=(SIZE, SIZE), strong_size=None, seed=0):
    image = random_image(size, seed)
    strong_image = image.flip(2) if strong is FLIP else random_image(strong_size or size, seed + 1)
    return UnlabeledSample(f"unlabeled_{seed}.png", view(image, weak), view(strong_image, strong))


def make_batch(labeled=None, seeds=(20, 30, 40)):
    geometry = (FLIP, SHIFT, IDENTITY)
    samples = [make_sample(strong, seed=s) for strong, s in zip(geometry, seeds, strict=True)]
    return Batch(labeled_inputs() if labeled is None else labeled, samples)


@pytest.fixture(scope="module")
def _models():
    """A student, and a teacher with other weights: different scores, boxes and variances."""
    student = tiny_model()
    other = copy.deepcopy(student)
    predictor = other.roi_heads.box_predictor
    with torch.no_grad():
        predictor.cls_score.weight *= 20
        predictor.bbox_pred.weight *= 20
        predictor.log_variance.weight *= 3000
    teacher = tiny_model().eval()
    update_teacher(teacher, other, keep_rate=0.0)
    return student, teacher


@pytest.fixture
def student(_models):
    _models[0].zero_grad(set_to_none=True)
    return _models[0].train()


@pytest.fixture
def teacher(_models):
    return _models[1]


def step(student, teacher, batch=None, beta=1.0, loss_weights=None, **parts):
    """A step that always samples the same anchors and proposals."""
    settings = StepSettings(make_method(**parts), beta, loss_weights or {})
    torch.manual_seed(5)
    with EventStorage():
        return training_step(student, teacher, batch or make_batch(), settings)


@contextmanager
def recorded(module):
    """Record the arguments and the output of every call of a module."""
    calls = []
    hook = module.register_forward_hook(lambda _, arguments, out: calls.append((arguments, out)))
    yield calls
    hook.remove()


def weak_images(batch):
    return [{"image": sample.weak.image} for sample in batch.unlabeled]


# Settings


@pytest.mark.parametrize(("objectness", "box"), [(True, True), (True, False), (False, True)])
def test_settings_follow_the_config(objectness, box):
    cfg = tiny_config(
        {
            "SEMI.UNSUPERVISED_WEIGHT": 2.5,
            "SEMI.METHOD": "UnbiasedTeacher",
            "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": 3.0,
            "SEMI.RPN_OBJECTNESS_LOSS": objectness,
            "SEMI.RPN_BOX_LOSS": box,
        }
    )
    settings = StepSettings.from_config(cfg)
    assert type(settings.method) is UnbiasedTeacher
    assert {name: settings.weight_of(name) for name in [*SUPERVISED, "loss_of_a_new_method"]} == {
        "loss_cls": 2.5,
        "loss_box_reg": 7.5,
        "loss_rpn_cls": 2.5 if objectness else 0,
        "loss_rpn_loc": 2.5 if box else 0,
        "loss_of_a_new_method": 2.5,
    }


# Projection to the strong view

FLIP_AND_DOUBLE = [[-2, 0, 2 * SIZE], [0, 2, 0], [0, 0, 1]]
HALF = [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 1]]
QUARTER_TURN = [[0, -1, SIZE], [1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("weak", "strong", "strong_size", "box", "expected"),
    [
        (IDENTITY, FLIP_AND_DOUBLE, (128, 128), [10, 5, 30, 25], [68, 10, 108, 50]),
        (IDENTITY, SHIFT, (64, 64), [10, 10, 20, 30], [20, 4, 30, 24]),
        (IDENTITY, SHIFT, (64, 64), [40, 2, 60, 30], [50, 0, 64, 24]),  # clipped on two sides
        (HALF, IDENTITY, (64, 64), [5, 4, 20, 10], [10, 8, 40, 20]),
        (FLIP, FLIP, (64, 64), [5, 4, 20, 10], [5, 4, 20, 10]),
        (FLIP, HALF, (32, 32), [4, 8, 24, 16], [20, 4, 30, 8]),
        (IDENTITY, QUARTER_TURN, (64, 64), [10, 5, 30, 25], [39, 10, 59, 30]),
    ],
)
def test_pseudo_labels_are_projected_to_the_strong_view(weak, strong, strong_size, box, expected):
    sample = make_sample(strong, weak, strong_size=strong_size)
    labels = ground_truth([box], [1], gt_localization_quality=torch.tensor([0.3]))
    projected = project_to_strong_view(labels, sample)
    assert projected.image_size == sample.strong.image_size
    assert_close(projected.gt_boxes.tensor, torch.tensor([expected], dtype=torch.float32))
    assert projected.gt_classes.tolist() == [1]
    assert projected.gt_localization_quality.tolist() == pytest.approx([0.3])


def test_pseudo_labels_outside_of_the_strong_view_are_dropped():
    sample = make_sample(SHIFT)  # by 10 to the right and 6 up
    boxes = [[55, 10, 64, 20], [10, 10, 20, 20], [10, 0, 20, 6], [53.5, 10, 64, 20]]
    labels = ground_truth(boxes, [0, 1, 2, 0], gt_localization_quality=torch.arange(4) / 10)
    projected = project_to_strong_view(labels, sample)
    assert projected.gt_classes.tolist() == [1]
    assert projected.gt_localization_quality.tolist() == pytest.approx([0.1])
    assert len(labels) == 4  # unchanged


def test_student_gets_the_strong_views_with_projected_pseudo_labels(student, teacher):
    with recorded(student) as calls:
        batch = make_batch()
        step(student, teacher, batch)
    ((labeled, strong_views, _), _) = calls[0]
    assert [x["file_name"] for x in labeled] == [x["file_name"] for x in batch.labeled]
    all_detections = teacher.detect(weak_images(batch)).detections
    for x, sample, detections in zip(strong_views, batch.unlabeled, all_detections, strict=True):
        assert torch.equal(x["image"], sample.strong.image)
        expected = project_to_strong_view(to_pseudo_labels(detections, THRESHOLD), sample)
        assert torch.equal(x["instances"].gt_boxes.tensor, expected.gt_boxes.tensor)
    assert len(strong_views[0]["instances"]) > 0


# Forward passes


@pytest.mark.parametrize(
    ("parts", "head_calls"),
    [({}, 2), ({"prc": False}, 1), ({"name": "UnbiasedTeacher"}, 1), ({"name": "SoftTeacher"}, 3)],
)
def test_backbones_run_once_and_the_teacher_head_only_as_often_as_needed(
    student, teacher, parts, head_calls
):
    with (
        recorded(teacher.backbone) as teacher_backbone,
        recorded(student.backbone) as student_backbone,
        recorded(teacher.roi_heads.box_head) as teacher_head,
    ):
        step(student, teacher, **parts)
    assert [len(x[0]) for x, _ in teacher_backbone] == [3]
    assert [len(x[0]) for x, _ in student_backbone] == [2 + 3]
    assert len(teacher_head) == head_calls


def test_burn_in_does_not_run_the_teacher(student, teacher):
    with recorded(teacher.backbone) as calls:
        result = step(student, teacher, Batch(labeled_inputs(), []))
    assert not calls
    assert result.losses.keys() == SUPERVISED
    assert result.metrics == {}


# Teacher predictions for the student's proposals


def flipped(boxes):
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return torch.stack([SIZE - x2, y1, SIZE - x1, y2], dim=1)


def test_teacher_predicts_at_the_proposals_projected_to_the_weak_view(student, teacher):
    """The strong view is the flipped weak view, so the proposals have to be flipped back."""
    batch = Batch(labeled_inputs(), [make_sample(FLIP, seed=20)])
    with recorded(student) as calls:
        step(student, teacher, batch)
    proposals = calls[0][1][1].proposals
    teacher_output = teacher.detect(weak_images(batch))
    found = predict_student_rois(teacher, teacher_output, proposals, batch.unlabeled).probabilities

    boxes = proposals[0].proposal_boxes.tensor
    assert_close(found, teacher.predict_rois(teacher_output, [flipped(boxes)]).probabilities)
    unaligned = teacher.predict_rois(teacher_output, [boxes]).probabilities
    assert (found - unaligned).abs().max() > 0.01


@pytest.mark.parametrize(
    ("strong", "strong_size", "inverse"),
    [
        (SHIFT, (64, 64), lambda b: b - torch.tensor([10.0, -6.0, 10.0, -6.0])),
        (FLIP_AND_DOUBLE, (128, 128), lambda b: flipped(b / 2)),
    ],
    ids=["shift", "flip and scale"],
)
def test_step_projects_proposals_back_to_the_weak_view(
    student, teacher, monkeypatch, strong, strong_size, inverse
):
    requested = []
    predict_rois = teacher.predict_rois

    def record(teacher_output, boxes):
        requested.extend(boxes)
        return predict_rois(teacher_output, boxes)

    monkeypatch.setattr(teacher, "predict_rois", record)
    sample = make_sample(strong, strong_size=strong_size, seed=20)
    with recorded(student) as calls:
        step(student, teacher, Batch(labeled_inputs(), [sample]))
    (proposals,) = calls[0][1][1].proposals
    expected = inverse(proposals.proposal_boxes.tensor).clamp(0, SIZE)
    assert_close(requested[0], expected, rtol=1e-5, atol=1e-4)


# Losses and their weights


def test_step_returns_all_losses(student, teacher):
    losses = step(student, teacher).losses
    assert losses.keys() == SUPERVISED | UNLABELED
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    assert all(loss != 0 for loss in losses.values())


def test_beta_weights_the_unlabeled_losses_only(student, teacher):
    once = step(student, teacher).losses
    thrice = step(student, teacher, beta=3.0).losses
    for name in SUPERVISED:
        assert_close(thrice[name], once[name])
    for name in UNLABELED:
        assert_close(thrice[name], 3 * once[name])


def test_total_is_supervised_plus_beta_times_unsupervised(student, teacher):
    """Each loss is computed again from the student's output."""
    with recorded(student) as calls:
        result = step(student, teacher, beta=3.0)
    supervised, output = calls[0][1]
    supervised = {name: supervised[name] for name in SUPERVISED}  # the step adds to this dictionary
    batch = make_batch()
    teacher_output = teacher.detect(weak_images(batch))
    proposals = SampledProposals(
        output.proposals,
        output.predictions,
        student.roi_heads.box_predictor,
        predict_rois=lambda: predict_student_rois(
            teacher, teacher_output, output.proposals, batch.unlabeled
        ),
    )
    unsupervised = make_method().losses(proposals) | output.rpn_losses
    assert_close(result.total, sum(supervised.values()) + 3 * sum(unsupervised.values()))


@pytest.mark.parametrize("name", ["loss_rpn_cls", "loss_rpn_loc"])
def test_weight_of_zero_turns_off_one_rpn_loss(student, teacher, name):
    on = step(student, teacher).losses
    off = step(student, teacher, loss_weights={name: 0.0}).losses
    assert off[f"{name}_unlabeled"] == 0
    for other in set(on) - {f"{name}_unlabeled"}:
        assert_close(off[other], on[other])


def foreground_box_losses(output, student):
    """``(F, 4)`` smooth L1 losses of the foreground proposals, and their rows."""
    predictor = student.roi_heads.box_predictor
    labels = cat([p.gt_classes for p in output.proposals])
    rows = (labels < NUM_CLASSES).nonzero().flatten()
    with_labels = [p for p in output.proposals if p.has("gt_boxes")]
    proposals = cat([p.proposal_boxes.tensor for p in with_labels])
    boxes = cat([p.gt_boxes.tensor for p in with_labels])
    foreground = cat([p.gt_classes for p in with_labels]) < NUM_CLASSES
    target = predictor.box2box_transform.get_deltas(proposals[foreground], boxes[foreground])
    predicted = output.predictions.deltas.unflatten(1, (NUM_CLASSES, 4))[rows, labels[rows]]
    return F.smooth_l1_loss(predicted, target, reduction="none", beta=1.0), rows


def test_without_ler_and_prc_losses_are_unweighted(student, teacher):
    with recorded(student) as calls:
        losses = step(student, teacher, ler=False, prc=False).losses
    output = calls[0][1][1]
    labels = cat([p.gt_classes for p in output.proposals])
    box_losses, rows = foreground_box_losses(output, student)
    assert len(rows) > 0
    assert_close(losses["loss_box_reg_unlabeled"], box_losses.sum() / len(rows))
    assert_close(losses["loss_cls_unlabeled"], F.cross_entropy(output.predictions.scores, labels))


def test_ler_and_prc_change_one_loss_each(student, teacher):
    both, no_ler, no_prc, neither = (
        step(student, teacher, ler=ler, prc=prc).losses
        for ler, prc in ((True, True), (False, True), (True, False), (False, False))
    )
    for name in (SUPERVISED | UNLABELED) - {"loss_cls_unlabeled", "loss_box_reg_unlabeled"}:
        assert_close(both[name], neither[name])
    for name, on, off in (
        ("loss_box_reg_unlabeled", (both, no_prc), (no_ler, neither)),
        ("loss_cls_unlabeled", (both, no_ler), (no_prc, neither)),
    ):
        assert_close(on[0][name], on[1][name])
        assert_close(off[0][name], off[1][name])
        assert on[0][name] < 0.9 * off[0][name]


def test_ler_weights_each_proposal_by_the_quality_from_the_teacher(student, teacher):
    batch = make_batch()
    with recorded(student) as calls:
        losses = step(student, teacher, batch).losses
    output = calls[0][1][1]
    all_detections = teacher.detect(weak_images(batch)).detections
    # The projected box identifies the detection that a proposal is matched to.
    qualities = []
    for proposals, sample, detections in zip(
        output.proposals, batch.unlabeled, all_detections, strict=True
    ):
        labels = project_to_strong_view(to_pseudo_labels(detections, THRESHOLD), sample)
        for i in (proposals.gt_classes < NUM_CLASSES).nonzero().flatten().tolist():
            matched = (labels.gt_boxes.tensor == proposals.gt_boxes.tensor[i]).all(dim=1)
            qualities.append(labels.gt_localization_quality[matched][0])
    box_losses, rows = foreground_box_losses(output, student)
    expected = (torch.stack(qualities)[:, None] * box_losses).sum() / len(rows)
    assert_close(losses["loss_box_reg_unlabeled"], expected)


# Images and losses of a method


def custom_step(student, teacher, method_class, batch=None, beta=1.0):
    settings = StepSettings(method_class(pseudo_label_threshold=THRESHOLD), beta, {})
    torch.manual_seed(5)
    with EventStorage():
        return training_step(student, teacher, batch or make_batch(), settings)


class Composing(SemiSupervisedMethod):
    """Inverts the first image, drops its labels, and repeats the second as a mixed image."""

    def compose(self, images, labeled):
        assert [x["file_name"] for x in labeled] == ["labeled_0.png", "labeled_1.png"]
        first, second, third = images
        inverted = replace(
            first, image=255.0 - first.image, pseudo_labels=first.pseudo_labels[:0], sample=None
        )
        return [inverted, second, third, replace(second, sample=None)]


def test_student_gets_the_composed_images(student, teacher):
    batch = make_batch()
    with recorded(student) as calls:
        result = custom_step(student, teacher, Composing, batch)
    ((_, images, _), (_, output)) = calls[0]
    strong = [sample.strong.image for sample in batch.unlabeled]
    expected = [255.0 - strong[0], strong[1], strong[2], strong[1]]
    assert all(torch.equal(x["image"], e) for x, e in zip(images, expected, strict=True))
    assert len(images[0]["instances"]) == 0
    assert torch.equal(images[1]["instances"].gt_score, images[3]["instances"].gt_score)
    assert len(output.proposals) == 4
    # The first metric counts the teacher's labels, the second the student's images.
    labels = cat([p.gt_classes for p in output.proposals])
    foreground = (labels < NUM_CLASSES).sum().item()
    assert result.metrics["proposals/foreground_per_image"].item() == foreground / 4
    assert result.metrics["pseudo_labels/images_without"] == 0


def test_weights_of_images_apply_to_the_rpn_and_are_known_to_the_losses(student, teacher):
    seen = []

    class Doubled(SemiSupervisedMethod):
        def compose(self, images, labeled):
            return [replace(x, loss_weight=2.0) for x in images]

        def losses(self, proposals):
            seen.append(proposals.image_weight)
            return super().losses(proposals)

    once = custom_step(student, teacher, SemiSupervisedMethod).losses
    twice = custom_step(student, teacher, Doubled).losses
    for name in UNLABELED:
        assert_close(twice[name], (2 if "rpn" in name else 1) * once[name])
    assert (seen[0] == 2).all() and len(seen[0]) > 0


def test_teacher_cannot_predict_for_proposals_in_mixed_images(student, teacher):
    class WithTeacher(Composing):
        def classification_loss(self, proposals):
            return proposals.teacher_predictions.scores.sum()

    with pytest.raises(UsageError, match=r"SEMI.METHOD mixes images .* no weak view"):
        custom_step(student, teacher, WithTeacher)


def test_further_losses_are_multiplied_by_beta_and_returned_by_name(student, teacher):
    class Further(SemiSupervisedMethod):
        def losses(self, proposals):
            further = {"loss_logits": proposals.predictions.scores.square().mean()}
            return super().losses(proposals) | further

    with recorded(student) as calls:
        losses = custom_step(student, teacher, Further, beta=3.0).losses
    scores = calls[0][1][1].predictions.scores
    assert_close(losses["loss_logits_unlabeled"], 3 * scores.square().mean())
    assert losses.keys() == SUPERVISED | UNLABELED | {"loss_logits_unlabeled"}


# Gradients


def test_teacher_gets_no_gradient(student, teacher):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    step(student, teacher).total.backward()
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[name], v) for name, v in teacher.state_dict().items())


@pytest.mark.parametrize("ler", [True, False])
def test_log_variance_layer_is_trained_on_labeled_images_only(student, teacher, ler):
    losses = step(student, teacher, ler=ler).losses
    layer = student.roi_heads.box_predictor.log_variance
    sum(losses[name] for name in UNLABELED).backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())
    sum(losses[name] for name in SUPERVISED).backward()
    assert all(p.grad.any() for p in layer.parameters())


EMPTY = [{"image": random_image(), "instances": ground_truth([], []), "file_name": "empty.png"}]
CASES = {
    "burn-in": (Batch(labeled_inputs(), []), {}),
    "burn-in without ground truth": (Batch(EMPTY, []), {}),
    "mutual learning": (make_batch(), {}),
    "neither LER nor PRC": (make_batch(), {"ler": False, "prc": False}),
    "Unbiased Teacher": (make_batch(), {"name": "UnbiasedTeacher"}),
    "Soft Teacher": (make_batch(), {"name": "SoftTeacher"}),
    "Soft Teacher without pseudo-labels": (make_batch(), {"name": "SoftTeacher", "threshold": 1.0}),
    "without pseudo-labels": (make_batch(), {"threshold": 1.0}),
    "without ground truth": (make_batch(labeled=EMPTY), {}),
    "without any object": (make_batch(labeled=EMPTY), {"threshold": 1.0}),
    "RPN box loss off": (make_batch(labeled=EMPTY), {"loss_weights": {"loss_rpn_loc": 0.0}}),
}


@pytest.mark.parametrize(("batch", "settings"), CASES.values(), ids=CASES.keys())
def test_every_parameter_gets_a_gradient(student, teacher, batch, settings):
    """Otherwise DistributedDataParallel would wait for the gradients of one process."""
    losses = step(student, teacher, batch, **settings).losses
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    without = [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.requires_grad)


def test_without_pseudo_labels_only_the_classification_losses_are_positive(student, teacher):
    losses = step(student, teacher, threshold=1.0).losses
    assert losses["loss_box_reg_unlabeled"] == losses["loss_rpn_loc_unlabeled"] == 0
    assert losses["loss_cls_unlabeled"] > 0


# Metrics


def test_metrics_describe_the_pseudo_labels_and_proposals(student, teacher):
    batch = make_batch()
    with recorded(student) as calls:
        metrics = step(student, teacher, batch).metrics
    (_, strong_views, _), (_, output) = calls[0]
    labels = [x["instances"] for x in strong_views]
    counts = [len(x) for x in labels]
    assert metrics["pseudo_labels/per_image"].item() == pytest.approx(sum(counts) / 3)
    assert metrics["pseudo_labels/images_without"].item() == pytest.approx(counts.count(0) / 3)
    assert_close(
        metrics["pseudo_labels/localization_quality"],
        torch.cat([x.gt_localization_quality for x in labels]).mean(),
    )
    teacher_output = teacher.detect(weak_images(batch))
    highest = max(x.scores.max() for x in teacher_output.detections)
    assert metrics["pseudo_labels/highest_score"] == highest

    classes = cat([p.gt_classes for p in output.proposals])
    predictions = predict_student_rois(teacher, teacher_output, output.proposals, batch.unlabeled)
    reliability = proposal_reliability(
        predictions.probabilities, predictions.log_variance.unflatten(1, (-1, 4)), classes
    )
    foreground = classes < NUM_CLASSES
    assert 0 < foreground.sum() < len(classes)
    assert_close(metrics["proposals/reliability_foreground"], reliability[foreground].mean())
    assert_close(metrics["proposals/reliability_background"], reliability[~foreground].mean())
    assert_close(metrics["proposals/foreground_per_image"], foreground.sum() / 3)


def test_metrics_without_pseudo_labels_are_nan_and_not_zero(student, teacher):
    metrics = step(student, teacher, threshold=1.0).metrics
    assert metrics["pseudo_labels/per_image"] == 0
    assert metrics["pseudo_labels/images_without"] == 1
    assert metrics["pseudo_labels/localization_quality"].isnan()
    assert metrics["proposals/reliability_foreground"].isnan()
    assert metrics["proposals/reliability_background"].isfinite()
    assert metrics["pseudo_labels/highest_score"] > 0
