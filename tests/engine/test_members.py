"""Trainings with several students and teachers, and of the methods that keep class statistics."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from torch import nn

from locreweight.data.mapper import ViewMapper
from locreweight.engine.memory_estimate import estimate_memory
from locreweight.methods import METHOD_REGISTRY, SemiSupervisedMethod, build_members, build_method
from locreweight.modeling import build_detector
from locreweight.modeling.committee import members_of
from locreweight.modeling.meta_arch import SemiSupervisedRCNN
from tests.engine.tiny_training import copy_of, recorded_training, same
from tests.methods.test_mixing_trainings import settings_of
from tests.modeling.tiny_model import tiny_config

WITH_MEMBERS = ["cst", "ismt", "instant_teaching_star"]
METHODS = [*WITH_MEMBERS, "labelmatch", "rpl", "unbiased_teacher_v2"]
SETTINGS = {
    "SEMI.BURN_IN_ITERS": 1,
    "SEMI.LABEL_MATCH.IMAGES": 4,
    "SEMI.RPL.MIN_QUALITY": 0.1,
    "SOLVER.IMS_PER_BATCH_UNLABELED": 2,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.CHECKPOINT_PERIOD": 2,
}


def settings_for(method, **settings):
    return settings_of(method) | SETTINGS | settings


class CommitteeRecorder(HookBase):
    """Records the weights of all members after each step."""

    def __init__(self):
        self.students, self.teachers = [], []

    def after_step(self):
        self.students.append(copy_of(self.trainer.models.students))
        self.teachers.append(copy_of(self.trainer.models.teachers))


def trained(trainer):
    recorder = CommitteeRecorder()
    trainer.register_hooks([recorder])
    recorded_training(trainer)
    return recorder


def equal(first, second):
    """Bitwise equality of nested states."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_equals_uninterrupted_run(make_trainer, method, tmp_path):
    trainer = make_trainer(settings_for(method))
    whole = trained(trainer)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    resumed = make_trainer(settings_for(method), resume=True)
    assert resumed.start_iter == 2
    record = trained(resumed)
    assert all(same(a, b) for a, b in zip(record.students, whole.students[2:], strict=True))
    assert all(same(a, b) for a, b in zip(record.teachers, whole.teachers[2:], strict=True))
    assert not same(whole.students[-1], whole.students[-2])
    states = [x.settings.method.state_dict() for x in (trainer, resumed)]
    assert equal(*states)


@pytest.mark.parametrize("method", WITH_MEMBERS)
def test_members_start_with_different_weights_and_are_all_trained(make_trainer, method):
    trainer = make_trainer(settings_for(method))
    students, teachers = members_of(trainer.models.students), members_of(trainer.models.teachers)
    assert students[0] is trainer.student and teachers[0] is trainer.teacher
    start = [copy_of(x) for x in students]
    assert not same(*start)
    assert same(copy_of(trainer.models.students), copy_of(trainer.models.teachers))
    record = trained(trainer)
    assert same(record.students[0], record.teachers[0])  # burn-in
    for before, student in zip(start, students, strict=True):
        after = copy_of(student)
        head = [name for name in after if "box_head" in name or "box_predictor" in name]
        trained_head = [name for name in head if "log_variance" not in name]
        assert all(not torch.equal(before[name], after[name]) for name in trained_head)
    latest = trainer.storage.latest()
    losses = {name for name in latest if name.startswith("loss_") and name != "loss_scale"}
    assert {"loss_cls", "loss_cls_2", "loss_cls_unlabeled", "loss_cls_unlabeled_2"} <= losses
    total = sum(latest[name][0] for name in losses)
    assert latest["total_loss"][0] == pytest.approx(total, rel=1e-5)


def test_each_teacher_averages_its_own_student(make_trainer):
    trainer = make_trainer(settings_for("cst"))
    before = copy_of(trainer.models.teachers)
    with torch.no_grad():
        members_of(trainer.models.students)[0].roi_heads.box_predictor.cls_score.weight += 1
    trainer.models.average.update(0.5)
    changed = {
        name for name, x in copy_of(trainer.models.teachers).items() if not x.equal(before[name])
    }
    assert changed == {"members.0.roi_heads.box_predictor.cls_score.weight"}


def test_skipped_step_changes_no_student(make_trainer, monkeypatch):
    trainer = make_trainer(settings_for("cst"))
    losses = trainer.settings.method.losses
    calls = []

    def second_is_nan(proposals):
        calls.append(proposals)
        factor = torch.nan if trainer.iter == 3 and len(calls) % 2 == 0 else 1.0
        return {name: factor * loss for name, loss in losses(proposals).items()}

    monkeypatch.setattr(trainer.settings.method, "losses", second_is_nan)
    record = trained(trainer)
    assert same(record.students[-1], record.students[-2])
    assert not same(record.students[-2], record.students[-3])


def test_checkpoint_has_the_first_teacher_and_student_as_models(make_trainer, tmp_path):
    trainer = make_trainer(settings_for("ismt"))
    recorded_training(trainer)
    checkpoint = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert same(checkpoint["model"], copy_of(trainer.teacher))
    assert same(checkpoint["student"], copy_of(trainer.student))
    others = nn.ModuleList(members_of(trainer.models.teachers)[1:])
    assert same(checkpoint["further_teachers"], copy_of(others))
    # Shared modules are stored once.
    saved = {x.untyped_storage().data_ptr() for x in checkpoint["further_teachers"].values()}
    first = {x.untyped_storage().data_ptr() for x in checkpoint["model"].values()}
    assert saved & first


def test_pretrained_weights_are_copied_to_all_members_except_random_layers(make_trainer, tmp_path):
    source = build_detector(tiny_config({"MODEL.RESNETS.NORM": "BN"}))
    backbone = {k: v for k, v in source.state_dict().items() if k.startswith("backbone.bottom_up")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    trainer = make_trainer(settings_for("cst") | {"MODEL.WEIGHTS": str(tmp_path / "backbone.pth")})
    first, second = (copy_of(x) for x in members_of(trainer.models.students))
    for name in first:
        if name in backbone:
            assert torch.equal(first[name], backbone[name]) and torch.equal(
                first[name], second[name]
            )
    head = "roi_heads.box_predictor.cls_score.weight"
    assert not torch.equal(first[head], second[head])
    assert same(copy_of(trainer.models.students), copy_of(trainer.models.teachers))


@pytest.fixture
def _two_baselines():
    class TwoBaselines(SemiSupervisedMethod):
        num_members = 2

    METHOD_REGISTRY.register(TwoBaselines)
    yield
    del METHOD_REGISTRY._obj_map["TwoBaselines"]


@pytest.mark.usefixtures("_two_baselines")
def test_members_learn_from_their_own_teacher_by_default(make_trainer):
    trainer = make_trainer(SETTINGS | {"SEMI.METHOD": "TwoBaselines", "SOLVER.MAX_ITER": 3})
    teachers = []
    select = trainer.settings.method.select_pseudo_labels

    def recorded(inputs):
        teachers.append((inputs.member, inputs.teacher))
        return select(inputs)

    trainer.settings.method.select_pseudo_labels = recorded
    recorded_training(trainer)
    assert teachers == list(enumerate(members_of(trainer.models.teachers))) * 2


def test_one_member_is_a_plain_detector():
    cfg = tiny_config()
    model = build_members(cfg, build_method(cfg))
    assert isinstance(model, SemiSupervisedRCNN) and members_of(model) == [model]


def test_members_with_their_own_strong_views_get_different_ones(datasets):
    cfg = tiny_config()
    folder = datasets["DATASETS.UNLABELED"][0].partition(":")[2]
    record = {"file_name": str(next(Path(folder).iterdir()))}
    samples = []
    for count in (1, 3):
        np.random.seed(0)
        samples.append(ViewMapper(cfg, strong_views=count).unlabeled(record))
    one, three = samples
    assert one.further_strong == () and len(three.further_strong) == 2
    # The first strong view is the same as without further ones.
    assert torch.equal(one.weak.image, three.weak.image)
    assert torch.equal(one.strong.image, three.strong.image)
    views = [three.for_student(i) for i in range(3)]
    assert len({x.strong.image.sum().item() for x in views}) == 3
    assert views[0] is three and all(x.weak is three.weak for x in views)
    assert one.for_student(2) is one


def test_memory_estimate_counts_all_members():
    base = estimate_memory(tiny_config({"SEMI.METHOD": "UnbiasedTeacher"}), [(64, 64)], num_gpus=1)
    cst = estimate_memory(tiny_config({"SEMI.METHOD": "CST"}), [(64, 64)], num_gpus=1)
    ismt = estimate_memory(tiny_config({"SEMI.METHOD": "ISMT"}), [(64, 64)], num_gpus=1)
    assert cst.models == 2 * base.models and cst.images == 2 * base.images
    assert base.models < ismt.models < cst.models
