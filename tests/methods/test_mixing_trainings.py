"""Short trainings of the methods that mix images, through the real trainer."""

import pytest
import torch

from locreweight.config import load_config
from locreweight.methods import StudentImage
from locreweight.methods.instant_teaching import mixup
from locreweight.methods.mum import TileMixing
from tests.engine.tiny_training import recorded_training, same

SETTINGS = {
    "SEMI.BURN_IN_ITERS": 0,
    "SOLVER.IMS_PER_BATCH_UNLABELED": 4,
    "SOLVER.MAX_ITER": 5,
    "SOLVER.CHECKPOINT_PERIOD": 3,
}

THRESHOLD = 0.26


def settings_of(method):
    """The keys that the method's config sets."""
    cfg = load_config("", [], method)
    keys = ["SEMI.METHOD", "SEMI.EMA_KEEP_RATE", "SEMI.NORMALIZE_BY_SAMPLED", "SEMI.RPN_BOX_LOSS"]
    keys += ["MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES", "MODEL.ROI_BOX_HEAD.FOCAL_GAMMA"]
    keys += ["INPUT.AUGMENTATION_POLICY"]
    nodes = {key: cfg for key in keys}
    for key in keys:
        for name in key.split("."):
            nodes[key] = nodes[key][name]
    if method == "loc_reweight_mix":
        # The tiny detector has scores on both sides of it.
        nodes["SEMI.PSEUDO_LABEL_THRESHOLD"] = THRESHOLD
    return nodes | SETTINGS


ADDS_MOSAIC = ["mixpl", "loc_reweight_mix"]
METHODS = pytest.mark.parametrize("method", ["mum", "instant_teaching", *ADDS_MOSAIC])


@METHODS
def test_resumed_run_equals_uninterrupted_run(make_trainer, method, tmp_path):
    """The cache of MixPL is full after two of the five steps."""
    whole = recorded_training(make_trainer(settings_of(method)))
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    resumed = make_trainer(settings_of(method), resume=True)
    assert resumed.start_iter == 3
    record = recorded_training(resumed)
    assert record.images == whole.images[3:]
    assert all(same(a, b) for a, b in zip(record.students, whole.students[3:], strict=True))
    assert all(same(a, b) for a, b in zip(record.teachers, whole.teachers[3:], strict=True))
    assert not same(whole.students[-1], whole.students[-2])


@METHODS
def test_student_trains_on_mixed_images(make_trainer, method):
    """Compared with the same training without mixing."""
    record = recorded_training(make_trainer(settings_of(method)))
    trainer = make_trainer(settings_of(method))
    trainer.settings.method.compose = lambda images, labeled: images
    trainer.settings.method.backbone_mixing = lambda count: None
    plain = recorded_training(trainer)
    assert not same(plain.students[-1], record.students[-1])
    # MixPL adds the mosaic once its cache is full.
    added = [len(a) - len(b) for a, b in zip(record.images, plain.images, strict=True)]
    assert added == ([0, 0, 1, 1, 1] if method in ADDS_MOSAIC else [0] * 5)


def test_rpn_of_loc_reweight_mix_learns_labels_above_the_threshold_only(make_trainer):
    trainer = make_trainer(settings_of("loc_reweight_mix"))
    rpn_labels = trainer.settings.method.rpn_labels
    scores = []

    def record(labels):
        kept = rpn_labels(labels)
        assert torch.equal(kept.gt_score, labels.gt_score[labels.gt_score > THRESHOLD])
        scores.append(labels.gt_score)
        return kept

    trainer.settings.method.rpn_labels = record
    recorded_training(trainer)
    confident = torch.cat(scores) > THRESHOLD
    assert 0 < confident.sum() < len(confident)


@METHODS
def test_mixed_step_is_skipped_if_it_is_not_finite(make_trainer, method, monkeypatch):
    trainer = make_trainer(settings_of(method) | {"SOLVER.MAX_ITER": 4})
    losses = trainer.settings.method.losses

    def with_nan(proposals):
        factor = torch.nan if trainer.iter == 3 else 1.0
        return {name: factor * loss for name, loss in losses(proposals).items()}

    monkeypatch.setattr(trainer.settings.method, "losses", with_nan)
    record = recorded_training(trainer)
    assert same(record.students[-1], record.students[-2])


def test_mixup_with_a_ratio_of_one_equals_the_unmixed_step(make_trainer):
    """Bit for bit."""
    students = []
    for mixed in (True, False):
        trainer = make_trainer(settings_of("instant_teaching") | {"SOLVER.MAX_ITER": 3})
        method = trainer.settings.method
        method.mixing_probability = 0.0
        compose = method.compose

        def compose_all(images, labeled, mixed=mixed, compose=compose, mean=method.pixel_mean):
            images = compose(images, labeled)
            if not mixed:
                return images
            others = [StudentImage(255 - x.image, x.pseudo_labels, None) for x in images]
            return [mixup(*pair, 1.0, mean) for pair in zip(images, others, strict=True)]

        method.compose = compose_all
        students.append(recorded_training(trainer).students)
    assert all(same(a, b) for a, b in zip(*students, strict=True))


def test_one_tile_and_the_identity_equal_unbiased_teacher(make_trainer):
    """Bit for bit."""
    base = recorded_training(make_trainer(settings_of("unbiased_teacher")))
    trainer = make_trainer(settings_of("mum"))
    identity = TileMixing(torch.zeros(4, 1, 1, 1, dtype=torch.int64))
    trainer.settings.method.backbone_mixing = lambda num_images: identity
    mixed = recorded_training(trainer)
    assert all(same(a, b) for a, b in zip(mixed.students, base.students, strict=True))
