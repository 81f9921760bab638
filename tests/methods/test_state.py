"""State of a method over iterations: saved, restored, and used."""

import pytest
import torch
from detectron2.config import configurable

from locreweight.methods import METHOD_REGISTRY, SemiSupervisedMethod
from tests.engine.tiny_training import recorded_training, same


@pytest.fixture(autouse=True)
def _stateful_method():
    class MeanThreshold(SemiSupervisedMethod):
        """The threshold is the mean of the highest scores in all steps so far."""

        @configurable
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.highest = [self.pseudo_label_threshold]
            self.used = []

        def select_pseudo_labels(self, inputs):
            self.pseudo_label_threshold = sum(self.highest) / len(self.highest)
            self.used.append(self.pseudo_label_threshold)
            return super().select_pseudo_labels(inputs)

        def observe(self, inputs, pseudo_labels):
            if len(inputs.samples) == 1:
                return None
            return max(x.scores.max().item() for x in inputs.output.detections)

        def update_state(self, observations):
            self.highest += observations

        def state_dict(self):
            return {"highest": torch.tensor(self.highest, dtype=torch.float64)}

        def load_state_dict(self, state_dict):
            self.highest = state_dict["highest"].tolist()

    METHOD_REGISTRY.register(MeanThreshold)
    yield
    del METHOD_REGISTRY._obj_map["MeanThreshold"]


SETTINGS = {
    "SEMI.METHOD": "MeanThreshold",
    "SEMI.BURN_IN_ITERS": 1,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.CHECKPOINT_PERIOD": 2,
}


def test_state_is_updated_once_per_step_and_restored_exactly(make_trainer, tmp_path):
    trainer = make_trainer(SETTINGS)
    whole = recorded_training(trainer)
    method = trainer.settings.method
    assert len(method.highest) == 1 + 3  # no update in burn-in
    assert len(set(method.used)) == 3

    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    resumed = make_trainer(SETTINGS, resume=True)
    assert resumed.start_iter == 2 and resumed.settings.method.highest == method.highest[:2]
    record = recorded_training(resumed)
    assert resumed.settings.method.used == method.used[1:]
    assert all(same(a, b) for a, b in zip(record.students, whole.students[2:], strict=True))


def test_state_is_not_updated_without_an_observation(make_trainer):
    trainer = make_trainer(SETTINGS | {"SOLVER.IMS_PER_BATCH_UNLABELED": 1})
    recorded_training(trainer)
    assert len(trainer.settings.method.highest) == 1


def test_failed_step_does_not_update_the_state(make_trainer, monkeypatch):
    trainer = make_trainer(SETTINGS | {"SOLVER.MAX_ITER": 3})
    proposals = trainer.student.roi_heads.label_and_sample_proposals

    def fail_once(*arguments):
        if trainer.iter == 1 and arguments[1][0].has("gt_score"):
            raise FloatingPointError("not finite")
        return proposals(*arguments)

    monkeypatch.setattr(trainer.student.roi_heads, "label_and_sample_proposals", fail_once)
    recorded_training(trainer)
    assert len(trainer.settings.method.highest) == 1 + 1


def test_state_of_another_method_is_not_loaded(make_trainer):
    recorded_training(make_trainer(SETTINGS))
    other = SETTINGS | {"SEMI.METHOD": "UnbiasedTeacher", "SOLVER.MAX_ITER": 5}
    recorded_training(make_trainer(other, resume=True))
    again = make_trainer(SETTINGS | {"SOLVER.MAX_ITER": 6}, resume=True)
    assert again.start_iter == 5
    assert again.settings.method.highest == [again.cfg.SEMI.PSEUDO_LABEL_THRESHOLD]


def test_methods_have_no_state_by_default(make_trainer):
    trainer = make_trainer({"SOLVER.MAX_ITER": 3})
    recorded_training(trainer)
    assert trainer.settings.method.state_dict() == {}
