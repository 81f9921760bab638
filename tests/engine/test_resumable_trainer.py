"""Named hooks of the resumable training loop, without a model."""

import logging

import pytest
from detectron2.engine import HookBase

from locreweight.engine import resumable_trainer
from locreweight.engine.resumable_trainer import ResumableTrainer


class Trainer(ResumableTrainer):
    def run_step(self):
        pass


class Log(HookBase):
    """Logs its name and the iteration; one of them saves the state of the trainer."""

    def __init__(self, name, log, saved=None):
        self.name, self.log, self.saved = name, log, saved

    def after_step(self):
        self.log.append((self.name, self.trainer.iter))
        if self.saved is not None:
            self.saved.append(self.trainer.state_dict())

    def state_dict(self):
        return {"name": self.name}

    def load_state_dict(self, state):
        assert state == self.state_dict()


@pytest.fixture
def train():
    """Trains with hooks of these names; returns their log and the states that "saver" has saved."""

    def run(names, max_iter, resume_from=None):
        log, saved = [], []
        trainer = Trainer(seed=1, start_iter=0, max_iter=max_iter)
        trainer.register_named_hooks(
            {name: Log(name, log, saved if name == "saver" else None) for name in names}
        )
        if resume_from:
            trainer.load_state_dict(resume_from)
        trainer.run_loop()
        return log, saved

    return run


@pytest.mark.parametrize("iteration", [0, 1])
def test_hooks_after_the_one_that_saved_run_first(train, iteration):
    _, saved = train(["a", "saver", "b", "c"], 2)
    log, _ = train(["a", "saver", "b", "c"], 2, resume_from=saved[iteration])
    later = [(name, i) for i in range(iteration + 1, 2) for name in ("a", "saver", "b", "c")]
    assert log == [("b", iteration), ("c", iteration), *later]


def test_unfinished_hooks_are_found_by_name_and_run_in_the_new_order(train):
    _, saved = train(["a", "saver", "b", "c"], 1)
    log, _ = train(["c", "b", "saver", "a"], 1, resume_from=saved[0])
    assert log == [("c", 0), ("b", 0)]


def test_new_hook_has_nothing_to_catch_up_on(train):
    _, saved = train(["saver", "b"], 1)
    log, _ = train(["saver", "new", "b"], 2, resume_from=saved[0])
    assert log == [("b", 0), ("saver", 1), ("new", 1), ("b", 1)]


def test_state_of_a_removed_hook_is_reported(train, caplog):
    _, saved = train(["a", "saver"], 1)
    with caplog.at_level(logging.WARNING):
        train(["saver"], 2, resume_from=saved[0])
    assert "the state of a hook 'a', which is unused" in caplog.text


def test_trainer_is_finished_after_all_hooks(train):
    _, saved = train(["saver", "b"], 1)
    trainer = Trainer(seed=1, start_iter=0, max_iter=1)
    trainer.register_named_hooks({"saver": Log("saver", [], []), "b": Log("b", [])})
    assert not trainer.is_finished
    trainer.load_state_dict(saved[0])
    assert not trainer.is_finished
    trainer.run_loop()
    assert trainer.is_finished


def test_only_the_newest_metrics_stay_in_memory(monkeypatch):
    monkeypatch.setattr(resumable_trainer, "HISTORY_LENGTH", 3)

    class Logging(ResumableTrainer):
        def run_step(self):
            self.storage.put_scalar("loss", self.iter)

    trainer = Logging(seed=1, start_iter=0, max_iter=5)
    trainer.run_loop()
    history = trainer.storage.history("loss")
    assert history.values() == [(2.0, 2), (3.0, 3), (4.0, 4)]
    assert history.global_avg() == 2.0
