"""One training step: who looks at what, in which frame, and what each loss is weighted with."""

import copy
from contextlib import contextmanager

import pytest
import torch
from detectron2.layers import cat
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.nn import functional as F
from torch.testing import assert_close

from locreweight.data.loader import Batch
from locreweight.data.transforms.views import UnlabeledSample, View
from locreweight.ema import update_teacher
from locreweight.engine.training_step import (
    StepSettings,
    predict_student_rois,
    project_to_strong_view,
    training_step,
)
from locreweight.methods import SampledProposals, build_method
from locreweight.methods.base import AboveThreshold, select_pseudo_labels
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


def strategy(threshold=THRESHOLD, ler=True, prc=True, name="LocReweight"):
    keys = {"PSEUDO_LABEL_THRESHOLD": threshold, "LER": ler, "PRC": prc, "METHOD": name}
    return build_method(tiny_config({f"SEMI.{key}": value for key, value in keys.items()}))


SETTINGS = StepSettings(strategy(), loss_weights=dict.fromkeys(UNLABELED, 1.0))


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
    """A teacher that is not the student, with opinions: spread scores, boxes and variances."""
    student = tiny_model()
    opinionated = copy.deepcopy(student)
    predictor = opinionated.roi_heads.box_predictor
    with torch.no_grad():
        predictor.cls_score.weight *= 20
        predictor.bbox_pred.weight *= 20
        predictor.log_variance.weight *= 3000
    teacher = tiny_model().eval()
    update_teacher(teacher, opinionated, keep_rate=0.0)
    return student, teacher


@pytest.fixture
def student(_models):
    _models[0].zero_grad(set_to_none=True)
    return _models[0].train()


@pytest.fixture
def teacher(_models):
    return _models[1]


def step(student, teacher, batch=None, loss_weights=SETTINGS.loss_weights, **parts):
    """A step whose draws of anchors and proposals are always the same."""
    settings = StepSettings(strategy(**parts), loss_weights)
    torch.manual_seed(5)
    with EventStorage():
        return training_step(student, teacher, batch or make_batch(), settings)


@contextmanager
def recorded(module):
    """Arguments and output of every call of a module."""
    calls = []
    hook = module.register_forward_hook(lambda _, arguments, out: calls.append((arguments, out)))
    yield calls
    hook.remove()


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objectness", "box"), [(True, True), (True, False), (False, True)])
def test_settings_follow_the_config(objectness, box):
    cfg = tiny_config(
        {
            "SEMI.UNSUPERVISED_WEIGHT": 2.5,
            "SEMI.PSEUDO_LABEL_THRESHOLD": 0.6,
            "SEMI.LER": objectness,
            "SEMI.PRC": box,
            "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": 3.0,
            "SEMI.RPN_OBJECTNESS_LOSS": objectness,
            "SEMI.RPN_BOX_LOSS": box,
        }
    )
    settings = StepSettings.from_config(cfg)
    assert settings.strategy.choose_pseudo_labels == AboveThreshold(0.6)
    assert settings.strategy == strategy(0.6, ler=objectness, prc=box)
    assert settings.loss_weights == {
        "loss_cls_unlabeled": 2.5,
        "loss_box_reg_unlabeled": 7.5,
        "loss_rpn_cls_unlabeled": 2.5 if objectness else 0,
        "loss_rpn_loc_unlabeled": 2.5 if box else 0,
    }


# --- pseudo-labels --------------------------------------------------------------------------------


def detections(scores, boxes=None):
    count = len(scores)
    boxes = [[float(i), 0, i + 10, 10] for i in range(count)] if boxes is None else boxes
    return Instances(
        (SIZE, SIZE),
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.tensor(scores),
        pred_classes=torch.arange(count) % NUM_CLASSES,
        localization_quality=torch.arange(count) / 100,
    )


def test_a_pseudo_label_has_a_score_above_the_threshold_not_at_it():
    chosen = select_pseudo_labels(detections([0.81, 0.8, 0.79, 0.9]), 0.8)
    assert chosen.gt_classes.tolist() == [0, 0]
    assert chosen.gt_boxes.tensor[:, 0].tolist() == [0.0, 3.0]
    assert_close(chosen.gt_localization_quality, torch.tensor([0.0, 0.03]))
    assert set(chosen.get_fields()) == {
        "gt_boxes",
        "gt_classes",
        "gt_localization_quality",
        "gt_score",
    }
    assert_close(chosen.gt_score, torch.tensor([0.81, 0.9]))


def test_there_may_be_no_pseudo_label():
    assert len(select_pseudo_labels(detections([0.5, 0.2]), 0.8)) == 0
    assert len(select_pseudo_labels(detections([]), 0.8)) == 0


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
def test_pseudo_labels_are_carried_from_the_weak_to_the_strong_view(
    weak, strong, strong_size, box, expected
):
    sample = make_sample(strong, weak, strong_size=strong_size)
    labels = ground_truth([box], [1], gt_localization_quality=torch.tensor([0.3]))
    carried = project_to_strong_view(labels, sample)
    assert carried.image_size == sample.strong.image_size
    assert_close(carried.gt_boxes.tensor, torch.tensor([expected], dtype=torch.float32))
    assert carried.gt_classes.tolist() == [1]
    assert carried.gt_localization_quality.tolist() == pytest.approx([0.3])


def test_pseudo_labels_out_of_sight_of_the_strong_view_are_dropped():
    sample = make_sample(SHIFT)  # 10 to the right, 6 up
    boxes = [[55, 10, 64, 20], [10, 10, 20, 20], [10, 0, 20, 6], [53.5, 10, 64, 20]]
    labels = ground_truth(boxes, [0, 1, 2, 0], gt_localization_quality=torch.arange(4) / 10)
    carried = project_to_strong_view(labels, sample)
    assert carried.gt_classes.tolist() == [1]
    assert carried.gt_localization_quality.tolist() == pytest.approx([0.1])
    assert len(labels) == 4  # the weak view keeps its own


def test_pseudo_labels_reach_the_student_with_its_view(student, teacher):
    with recorded(student) as calls:
        batch = make_batch()
        step(student, teacher, batch)
    ((labeled, strong_views), _) = calls[0]
    assert [x["file_name"] for x in labeled] == [x["file_name"] for x in batch.labeled]
    seen = teacher.detect([{"image": s.weak.image} for s in batch.unlabeled])
    for x, sample, found in zip(strong_views, batch.unlabeled, seen.detections, strict=True):
        assert torch.equal(x["image"], sample.strong.image)
        expected = project_to_strong_view(select_pseudo_labels(found, THRESHOLD), sample)
        assert torch.equal(x["instances"].gt_boxes.tensor, expected.gt_boxes.tensor)
    assert len(strong_views[0]["instances"]) > 0


# --- who looks how often --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "looks"),
    [({}, 2), ({"prc": False}, 1), ({"name": "UnbiasedTeacher"}, 1), ({"name": "SoftTeacher"}, 3)],
)
def test_each_backbone_runs_once_a_step_and_the_teachers_head_where_it_is_asked(
    student, teacher, parts, looks
):
    with (
        recorded(teacher.backbone) as teachers,
        recorded(student.backbone) as students,
        recorded(teacher.roi_heads.box_head) as heads,
    ):
        step(student, teacher, **parts)
    assert [len(x[0]) for x, _ in teachers] == [3]
    assert [len(x[0]) for x, _ in students] == [2 + 3]
    assert len(heads) == looks


def test_in_burn_in_the_teacher_does_not_look(student, teacher):
    with recorded(teacher.backbone) as teachers:
        result = step(student, teacher, Batch(labeled_inputs(), []))
    assert not teachers
    assert set(result.losses) == SUPERVISED
    assert result.metrics == {}


# --- the second look ------------------------------------------------------------------------------


def flipped(boxes):
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return torch.stack([SIZE - x2, y1, SIZE - x1, y2], dim=1)


def test_proposals_are_judged_at_their_place_in_the_weak_view(student, teacher):
    """The strong view is the weak one flipped: the teacher must judge the boxes flipped back."""
    batch = Batch(labeled_inputs(), [make_sample(FLIP, seed=20)])
    with recorded(student) as calls:
        step(student, teacher, batch)
    output = calls[0][1][1]
    seen = teacher.detect([{"image": batch.unlabeled[0].weak.image}])
    found = predict_student_rois(teacher, seen, output, batch.unlabeled).scores.softmax(dim=1)

    boxes = output.proposals[0].proposal_boxes.tensor
    expected = teacher.predict_rois(seen, [flipped(boxes)]).scores.softmax(dim=1)
    assert_close(found, expected)
    unaligned = teacher.predict_rois(seen, [boxes]).scores.softmax(dim=1)
    assert (found - unaligned).abs().max() > 0.01


@pytest.mark.parametrize(
    ("strong", "strong_size", "back"),
    [
        (SHIFT, (64, 64), lambda b: b - torch.tensor([10.0, -6.0, 10.0, -6.0])),
        (FLIP_AND_DOUBLE, (128, 128), lambda b: flipped(b / 2)),
    ],
)
def test_the_second_look_undoes_shifts_and_scales(
    student, teacher, monkeypatch, strong, strong_size, back
):
    looked_at = []
    original = teacher.predict_rois

    def spy(view, boxes):
        looked_at.extend(boxes)
        return original(view, boxes)

    monkeypatch.setattr(teacher, "predict_rois", spy)
    sample = make_sample(strong, strong_size=strong_size, seed=20)
    with recorded(student) as calls:
        step(student, teacher, Batch(labeled_inputs(), [sample]))
    (proposals,) = calls[0][1][1].proposals
    expected = back(proposals.proposal_boxes.tensor).clamp(0, SIZE)
    assert_close(looked_at[0], expected, rtol=1e-5, atol=1e-4)


# --- losses and their weights ---------------------------------------------------------------------


def test_all_losses_are_there_by_their_names(student, teacher):
    losses = step(student, teacher).losses
    assert set(losses) == SUPERVISED | UNLABELED
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    assert all(losses[name] != 0 for name in losses)


def test_beta_weighs_each_unlabeled_loss_once_and_no_other(student, teacher):
    once = step(student, teacher).losses
    thrice = step(student, teacher, loss_weights=dict.fromkeys(UNLABELED, 3.0)).losses
    for name in SUPERVISED:
        assert_close(thrice[name], once[name])
    for name in UNLABELED:
        assert_close(thrice[name], 3 * once[name])


def test_the_total_is_supervised_plus_beta_times_unsupervised(student, teacher):
    """Each loss recomputed from what the student said, for beta = 3."""
    with recorded(student) as calls:
        result = step(student, teacher, loss_weights=dict.fromkeys(UNLABELED, 3.0))
    supervised, output = calls[0][1]
    supervised = {name: supervised[name] for name in SUPERVISED}  # the step adds to this dictionary
    batch = make_batch()
    seen = teacher.detect([{"image": s.weak.image} for s in batch.unlabeled])
    unsupervised = strategy().losses(
        SampledProposals(
            output.proposals,
            output.predictions,
            student.roi_heads.box_predictor,
            predict_rois=lambda: predict_student_rois(teacher, seen, output, batch.unlabeled),
        )
    )
    expected = sum(supervised.values()) + 3 * sum((unsupervised | output.rpn_losses).values())
    assert_close(sum(result.losses.values()), expected)


@pytest.mark.parametrize("name", ["loss_rpn_cls_unlabeled", "loss_rpn_loc_unlabeled"])
def test_a_switch_turns_its_rpn_loss_off_and_no_other(student, teacher, name):
    on = step(student, teacher).losses
    off = step(student, teacher, loss_weights=SETTINGS.loss_weights | {name: 0.0}).losses
    assert off[name] == 0
    for other in set(on) - {name}:
        assert_close(off[other], on[other])


def foreground_box_losses(output, student):
    """``(F, 4)`` smooth L1 losses and the rows that they are of."""
    predictor = student.roi_heads.box_predictor
    labels = cat([p.gt_classes for p in output.proposals])
    rows = (labels < NUM_CLASSES).nonzero().flatten()
    with_labels = [p for p in output.proposals if p.has("gt_boxes")]
    proposals = cat([p.proposal_boxes.tensor for p in with_labels])
    targets = cat([p.gt_boxes.tensor for p in with_labels])
    foreground = cat([p.gt_classes for p in with_labels]) < NUM_CLASSES
    wanted = predictor.box2box_transform.get_deltas(proposals[foreground], targets[foreground])
    said = output.predictions.deltas.unflatten(1, (NUM_CLASSES, 4))[rows, labels[rows]]
    return F.smooth_l1_loss(said, wanted, reduction="none", beta=1.0), rows


def test_without_ler_and_prc_the_losses_are_the_baselines(student, teacher):
    with recorded(student) as calls:
        losses = step(student, teacher, ler=False, prc=False).losses
    output = calls[0][1][1]
    labels = cat([p.gt_classes for p in output.proposals])
    box_losses, rows = foreground_box_losses(output, student)
    assert len(rows) > 0
    assert_close(losses["loss_box_reg_unlabeled"], box_losses.sum() / len(rows))
    assert_close(losses["loss_cls_unlabeled"], F.cross_entropy(output.predictions.scores, labels))


def test_ler_and_prc_act_on_their_own_loss_alone(student, teacher):
    both, no_ler, no_prc, neither = (
        step(student, teacher, ler=ler, prc=prc).losses
        for ler, prc in ((True, True), (False, True), (True, False), (False, False))
    )
    for name in (SUPERVISED | UNLABELED) - {"loss_cls_unlabeled", "loss_box_reg_unlabeled"}:
        assert_close(both[name], neither[name])
    for name, with_it, without_it in (
        ("loss_box_reg_unlabeled", (both, no_prc), (no_ler, neither)),
        ("loss_cls_unlabeled", (both, no_ler), (no_prc, neither)),
    ):
        assert_close(with_it[0][name], with_it[1][name])
        assert_close(without_it[0][name], without_it[1][name])
        assert with_it[0][name] < 0.9 * without_it[0][name]


def test_ler_weighs_each_proposal_with_the_quality_that_the_teacher_gave(student, teacher):
    batch = make_batch()
    with recorded(student) as calls:
        losses = step(student, teacher, batch).losses
    output = calls[0][1][1]
    seen = teacher.detect([{"image": s.weak.image} for s in batch.unlabeled])
    # Which detection a proposal is matched to can be told from the box that was carried over.
    qualities = []
    for proposals, sample, found in zip(
        output.proposals, batch.unlabeled, seen.detections, strict=True
    ):
        labels = project_to_strong_view(select_pseudo_labels(found, THRESHOLD), sample)
        for i in (proposals.gt_classes < NUM_CLASSES).nonzero().flatten().tolist():
            same = (labels.gt_boxes.tensor == proposals.gt_boxes.tensor[i]).all(dim=1)
            qualities.append(labels.gt_localization_quality[same][0])
    box_losses, rows = foreground_box_losses(output, student)
    expected = (torch.stack(qualities)[:, None] * box_losses).sum() / len(rows)
    assert_close(losses["loss_box_reg_unlabeled"], expected)


def test_a_field_of_pseudo_labels_is_zero_where_an_image_has_none():
    labeled = Instances((8, 8), gt_classes=torch.tensor([0, 1]))
    labeled.gt_localization_quality = torch.tensor([0.1, 0.4])
    without = Instances((8, 8), gt_classes=torch.tensor([NUM_CLASSES]))
    sampled = SampledProposals([labeled, without], None, None, None)
    found = sampled.matched_gt_field("gt_localization_quality")
    assert_close(found, torch.tensor([0.1, 0.4, 0.0]))


# --- gradients ------------------------------------------------------------------------------------


def test_no_gradient_reaches_the_teacher(student, teacher):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    sum(step(student, teacher).losses.values()).backward()
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[name], v) for name, v in teacher.state_dict().items())


@pytest.mark.parametrize("ler", [True, False])
def test_unlabeled_images_do_not_train_the_localization_aware_branch(student, teacher, ler):
    losses = step(student, teacher, ler=ler).losses
    layer = student.roi_heads.box_predictor.log_variance
    sum(losses[name] for name in UNLABELED).backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())
    sum(losses[name] for name in SUPERVISED).backward()
    assert all(p.grad.any() for p in layer.parameters())


NOTHING = [{"image": random_image(), "instances": ground_truth([], []), "file_name": "empty.png"}]
CASES = {
    "burn-in": (Batch(labeled_inputs(), []), {}),
    "burn-in without ground truth": (Batch(NOTHING, []), {}),
    "mutual": (make_batch(), {}),
    "neither LER nor PRC": (make_batch(), {"ler": False, "prc": False}),
    "Unbiased Teacher": (make_batch(), {"name": "UnbiasedTeacher"}),
    "Soft Teacher": (make_batch(), {"name": "SoftTeacher"}),
    "Soft Teacher without pseudo-labels": (make_batch(), {"name": "SoftTeacher", "threshold": 1.0}),
    "without pseudo-labels": (make_batch(), {"threshold": 1.0}),
    "without ground truth": (make_batch(labeled=NOTHING), {}),
    "without any object": (make_batch(labeled=NOTHING), {"threshold": 1.0}),
    "RPN losses off": (
        make_batch(labeled=NOTHING),
        {"loss_weights": dict.fromkeys(UNLABELED, 1.0) | {"loss_rpn_loc_unlabeled": 0.0}},
    ),
}


@pytest.mark.parametrize(("batch", "settings"), CASES.values(), ids=CASES.keys())
def test_every_parameter_gets_a_gradient(student, teacher, batch, settings):
    """Else a process without objects would leave the others waiting for its gradient."""
    losses = step(student, teacher, batch, **settings).losses
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    without = [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.requires_grad)


def test_without_pseudo_labels_unlabeled_images_teach_background_alone(student, teacher):
    losses = step(student, teacher, threshold=1.0).losses
    assert losses["loss_box_reg_unlabeled"] == losses["loss_rpn_loc_unlabeled"] == 0
    assert losses["loss_cls_unlabeled"] > 0


# --- what is measured -----------------------------------------------------------------------------


def test_metrics_are_of_the_pseudo_labels_and_proposals(student, teacher):
    batch = make_batch()
    with recorded(student) as calls:
        metrics = step(student, teacher, batch).metrics
    (_, strong_views), (_, output) = calls[0]
    labels = [x["instances"] for x in strong_views]
    counts = [len(x) for x in labels]
    assert metrics["pseudo_labels/per_image"].item() == pytest.approx(sum(counts) / 3)
    assert metrics["pseudo_labels/images_without"].item() == pytest.approx(counts.count(0) / 3)
    assert_close(
        metrics["pseudo_labels/localization_quality"],
        torch.cat([x.gt_localization_quality for x in labels]).mean(),
    )
    seen = teacher.detect([{"image": s.weak.image} for s in batch.unlabeled])
    highest = max(found.scores.max() for found in seen.detections)
    assert metrics["pseudo_labels/highest_score"] == highest

    classes = cat([p.gt_classes for p in output.proposals])
    predictions = predict_student_rois(teacher, seen, output, batch.unlabeled)
    reliability = student.roi_heads.box_predictor.reliability(predictions, classes)
    foreground = classes < NUM_CLASSES
    assert 0 < foreground.sum() < len(classes)
    assert_close(metrics["proposals/reliability_foreground"], reliability[foreground].mean())
    assert_close(metrics["proposals/reliability_background"], reliability[~foreground].mean())
    assert_close(metrics["proposals/foreground_per_image"], foreground.sum() / 3)


def test_metrics_of_nothing_are_unknown_and_not_zero(student, teacher):
    metrics = step(student, teacher, threshold=1.0).metrics
    assert metrics["pseudo_labels/per_image"] == 0
    assert metrics["pseudo_labels/images_without"] == 1
    assert metrics["pseudo_labels/localization_quality"].isnan()
    assert metrics["proposals/reliability_foreground"].isnan()
    assert metrics["proposals/reliability_background"].isfinite()
    assert metrics["pseudo_labels/highest_score"] > 0
