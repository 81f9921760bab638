"""Trainings with a frozen pseudo-labeler (STAC)."""

import torch

from tests.engine.tiny_training import copy_of, recorded_training, same

STAC = {
    "SEMI.METHOD": "STAC",
    "SEMI.EMA_KEEP_RATE": 0.0,
    "INPUT.AUGMENTATION_POLICY": "STACPolicy",
    "SEMI.BURN_IN_ITERS": 2,
    "SOLVER.MAX_ITER": 5,
    "SOLVER.CHECKPOINT_PERIOD": 4,
}


def test_pseudo_labeler_is_frozen_at_the_end_of_burn_in_and_kept_by_a_resume(make_trainer):
    trainer = make_trainer(STAC)
    record = recorded_training(trainer)
    assert same(copy_of(trainer.pseudo_labeler), record.students[1])
    assert not same(record.students[1], record.students[2])
    # With a keep rate of 0 the teacher, which is the result, equals the student.
    assert all(same(a, b) for a, b in zip(record.students, record.teachers, strict=True))

    resumed = make_trainer(STAC | {"SOLVER.MAX_ITER": 6}, resume=True)
    assert same(copy_of(resumed.pseudo_labeler), copy_of(trainer.pseudo_labeler))
    assert not same(copy_of(resumed.pseudo_labeler), copy_of(resumed.student))


def test_pseudo_labeler_without_burn_in_has_the_initial_weights(make_trainer, tmp_path):
    source = recorded_training(make_trainer({"SEMI.BURN_IN_ITERS": 4})).students[-1]
    torch.save({"model": source}, tmp_path / "start.pth")
    trainer = make_trainer(
        STAC | {"SEMI.BURN_IN_ITERS": 0, "MODEL.WEIGHTS": str(tmp_path / "start.pth")}
    )
    record = recorded_training(trainer)
    assert same(copy_of(trainer.pseudo_labeler), source)
    assert not same(record.students[-1], source)


def test_other_methods_use_the_teacher_as_pseudo_labeler(make_trainer):
    trainer = make_trainer({})
    assert trainer.pseudo_labeler is trainer.teacher
