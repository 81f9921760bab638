"""SemiSupervisedTrainer: burn-in, teacher, logged metrics, mixed precision, clipping."""

import json
from pathlib import Path

import pytest
import torch

from locreweight.engine import trainer as trainer_module
from locreweight.engine.training_step import training_step
from tests.engine.tiny_training import (
    build_trainer,
    copy_of,
    recorded_training,
    same,
    training_config,
)
from tests.modeling.tiny_model import BACKBONES

SUPERVISED = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
UNLABELED = {f"{name}_unlabeled" for name in SUPERVISED}
BURN_IN, MAX_ITER, KEEP_RATE = 2, 6, 0.6


@pytest.fixture(scope="module")
def run(datasets, tmp_path_factory):
    """Trainer and record of a training with two evaluations."""
    settings = {
        "DATASETS.TEST": datasets["DATASETS.TEST"],
        "SEMI.BURN_IN_ITERS": BURN_IN,
        "SEMI.EMA_KEEP_RATE": KEEP_RATE,
        "SOLVER.MAX_ITER": MAX_ITER,
        "TEST.EVAL_PERIOD": 3,
    }
    trainer = build_trainer(training_config(datasets, tmp_path_factory.mktemp("run"), settings))
    return trainer, recorded_training(trainer)


# --- the teacher ----------------------------------------------------------------------------------


def test_teacher_equals_student_until_burn_in_ends(run):
    _, record = run
    for student, teacher in zip(record.students[:BURN_IN], record.teachers, strict=False):
        assert same(student, teacher)
    assert not same(record.students[0], record.students[1])


def test_teacher_is_the_moving_average_after_burn_in(run):
    """The keep rate is 1/2, then 0.6, because the ramp's 2/3 and 3/4 are above it."""
    _, record = run
    expected = {name: value.double() for name, value in record.teachers[BURN_IN - 1].items()}
    rates = [1 / 2, 0.6, 0.6, 0.6]
    for rate, student, teacher in zip(
        rates, record.students[BURN_IN:], record.teachers[BURN_IN:], strict=True
    ):
        for name, value in student.items():
            if value.is_floating_point():
                expected[name] = rate * expected[name] + (1 - rate) * value.double()
                torch.testing.assert_close(
                    teacher[name].double(), expected[name], rtol=1e-5, atol=1e-7, msg=name
                )
            else:
                assert torch.equal(teacher[name], value), name
        assert not same(student, teacher)


def test_teacher_stays_in_evaluation_mode_without_gradients(run):
    trainer, _ = run
    assert not any(module.training for module in trainer.teacher.modules())
    assert all(not p.requires_grad and p.grad is None for p in trainer.teacher.parameters())
    assert trainer.student.training


def test_unlabeled_images_are_used_after_burn_in(run):
    _, record = run
    assert [len(images) for images in record.images] == [2] * BURN_IN + [4] * (MAX_ITER - BURN_IN)


def test_without_burn_in_all_iterations_use_unlabeled_images(make_trainer):
    trainer = make_trainer({"SEMI.BURN_IN_ITERS": 0, "SOLVER.MAX_ITER": 2})
    start = copy_of(trainer.student)
    assert same(start, copy_of(trainer.teacher))
    record = recorded_training(trainer)
    assert [len(images) for images in record.images] == [4] * 2
    # The first keep rate is 1/2.
    name = "roi_heads.box_predictor.cls_score.weight"
    torch.testing.assert_close(
        record.teachers[0][name], (start[name] + record.students[0][name]) / 2
    )


@pytest.mark.parametrize("burn_in", [2, 5])
def test_burn_in_to_the_end_is_supervised_training(make_trainer, burn_in):
    trainer = make_trainer(
        {"SEMI.BURN_IN_ITERS": burn_in, "SOLVER.MAX_ITER": 2, "DATASETS.UNLABELED": ()}
    )
    record = recorded_training(trainer)
    assert [len(images) for images in record.images] == [2, 2]
    assert same(record.students[-1], record.teachers[-1])
    logged = set(trainer.storage.latest())
    assert logged >= SUPERVISED
    assert not any("unlabeled" in name or "pseudo" in name for name in logged)


def test_policy_may_make_two_views_of_each_labeled_image(make_trainer):
    trainer = make_trainer(
        {
            "INPUT.AUGMENTATION_POLICY": "UnbiasedTeacherPolicy",
            "SEMI.BURN_IN_ITERS": 0,
            "SOLVER.MAX_ITER": 1,
        }
    )
    assert [len(images) for images in recorded_training(trainer).images] == [4 + 2]


# --- metrics --------------------------------------------------------------------------------------


def metrics_of(trainer):
    lines = Path(trainer.cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_names_of_metrics(run):
    trainer, _ = run
    names = set().union(*metrics_of(trainer))
    expected = {
        *SUPERVISED,
        *UNLABELED,
        "total_loss",
        "skipped_steps",
        "pseudo_labels/per_image",
        "pseudo_labels/images_without",
        "pseudo_labels/localization_quality",
        "pseudo_labels/highest_score",
        "proposals/reliability_foreground",
        "proposals/reliability_background",
        "proposals/foreground_per_image",
        "data/unreadable",
        "data_time",
        "time",
        "eta_seconds",
        "lr",
        "iteration",
        "bbox/AP",
        "bbox/AP50",
        "bbox/AP75",
        "student/bbox/AP",
        "student/bbox/AP50",
    }
    assert names >= expected
    prefixes_of_detectron2 = ("fast_rcnn/", "roi_head/", "rpn/", "unlabeled/")
    others = {n for n in names - expected if not n.startswith(prefixes_of_detectron2)}
    assert {n.removeprefix("student/").split("-")[0] for n in others} <= {
        *("bbox/AP", "bbox/AP50", "bbox/AP75", "bbox/APs", "bbox/APm", "bbox/APl"),
    }


def history(trainer, name):
    return {int(at): value for value, at in trainer.storage.history(name).values()}


def test_total_loss_is_the_sum_of_all_losses(run):
    trainer, _ = run
    total = history(trainer, "total_loss")
    parts = [history(trainer, name) for name in SUPERVISED | UNLABELED]
    assert list(total) == list(range(MAX_ITER))
    for at, value in total.items():
        assert value == pytest.approx(sum(part.get(at, 0.0) for part in parts), rel=1e-6)


def test_losses_on_unlabeled_images_are_logged_after_burn_in(run):
    trainer, _ = run
    for name in [*UNLABELED, "pseudo_labels/per_image"]:
        assert list(history(trainer, name)) == list(range(BURN_IN, MAX_ITER))
    assert history(trainer, "pseudo_labels/per_image")[MAX_ITER - 1] > 0


def test_teacher_and_student_are_evaluated_periodically_and_at_the_end(run):
    trainer, _ = run
    for name in ("bbox/AP", "student/bbox/AP"):
        assert list(history(trainer, name)) == [2, MAX_ITER - 1]


@pytest.mark.parametrize(("burn_in", "expected"), [(0, [False, False]), (1, [True, False])])
def test_equal_models_are_evaluated_once_during_burn_in(
    datasets, make_trainer, monkeypatch, burn_in, expected
):
    calls = []

    def evaluate_teacher_and_student(*_, iteration, identical):
        assert iteration == len(calls) + 1
        calls.append(identical)
        return {"bbox": {"AP": 1.0}, "student": {"bbox": {"AP": 1.0}}}

    monkeypatch.setattr(
        trainer_module, "evaluate_teacher_and_student", evaluate_teacher_and_student
    )
    make_trainer(
        {
            "DATASETS.TEST": datasets["DATASETS.TEST"],
            "TEST.EVAL_PERIOD": 1,
            "SEMI.BURN_IN_ITERS": burn_in,
            "SOLVER.MAX_ITER": 2,
        }
    ).train()
    assert calls == expected


def test_train_returns_the_latest_results(run):
    assert {"bbox/AP", "bbox/AP50", "student/bbox/AP"} <= set(run[1].results)


# --- mixed precision ------------------------------------------------------------------------------


@pytest.fixture
def results(monkeypatch):
    """The results of all training steps."""
    step_results = []

    def keep(*arguments):
        step_results.append(training_step(*arguments))
        return step_results[-1]

    monkeypatch.setattr(trainer_module, "training_step", keep)
    return step_results


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.float32),
        ({"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": "bfloat16"}, torch.bfloat16),
        ({"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": "float16"}, torch.float16),
    ],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else "",
)
@pytest.mark.parametrize("backbone", ["resnet", "timm_efficientnet", "timm_convnext"])
def test_backbones_compute_in_the_configured_precision(
    make_trainer, results, settings, dtype, backbone
):
    steps = {"SEMI.BURN_IN_ITERS": 1, "SOLVER.MAX_ITER": 2, "VIS_PERIOD": 2}
    trainer = make_trainer(steps | settings | BACKBONES[backbone])
    dtypes = {"student": set(), "teacher": set()}
    for name, found in dtypes.items():
        getattr(trainer, name).backbone.fpn_lateral3.register_forward_hook(
            lambda _, inputs, out, found=found: found.add(out.dtype)
        )
    trainer.train()
    assert dtypes == {"student": {dtype}, "teacher": {dtype}}
    assert len(results) == 2
    for result in results:
        for name, loss in result.losses.items():
            assert loss.dtype == torch.float32, name
            assert loss.isfinite(), name
    for module in (trainer.student, trainer.teacher):
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in module.parameters())
    # Only float16 needs a scale above 1; with other types the scaler only skips steps.
    assert (trainer.optimizer.grad_scaler.get_scale() > 1) == (dtype == torch.float16)
    logged = "loss_scale" in trainer.storage.histories()
    assert logged == (dtype == torch.float16)


# --- the optimizer --------------------------------------------------------------------------------


def largest_change(trainer):
    """Largest L2 norm of the change of a parameter in one iteration at learning rate 1."""
    before = {name: p.detach().clone() for name, p in trainer.student.named_parameters()}
    trainer.train()
    after = trainer.student.named_parameters()
    return max((p.detach() - before[name]).norm().item() for name, p in after)


ONE_STEP = {
    "SOLVER.MAX_ITER": 1,
    "SOLVER.BASE_LR": 1.0,
    "SOLVER.WEIGHT_DECAY": 0.0,
    "SOLVER.WEIGHT_DECAY_NORM": 0.0,
}
CLIPPING = {
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.01,
}


@pytest.mark.parametrize("amp", [False, True])
def test_gradients_are_clipped_as_configured(make_trainer, amp):
    """With mixed precision, the unscaled gradient is clipped."""
    mixed = {"SOLVER.AMP.ENABLED": amp, "SOLVER.AMP.DTYPE": "float16"}
    trainer = make_trainer(ONE_STEP | CLIPPING | mixed)
    if amp:  # the default scale would need some iterations to decrease to the range of float16
        trainer.optimizer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    assert largest_change(trainer) == pytest.approx(0.01, rel=1e-3)


def test_gradients_are_not_clipped_by_default(make_trainer):
    assert largest_change(make_trainer(ONE_STEP)) > 0.1


def test_unknown_metrics_are_not_logged(make_trainer):
    """Without pseudo-labels, their quality is NaN."""
    trainer = make_trainer({"SEMI.PSEUDO_LABEL_THRESHOLD": 0.9999})
    recorded_training(trainer)
    latest = trainer.storage.latest()
    assert latest["pseudo_labels/per_image"][0] == 0
    assert "pseudo_labels/localization_quality" not in latest
