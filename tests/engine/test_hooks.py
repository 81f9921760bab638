"""The warning that unlabeled images teach nothing."""

import logging
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage

from locreweight.engine import hooks as hooks_module
from locreweight.engine.hooks import NoPseudoLabelWarning

PATIENCE = 5


@pytest.fixture
def warnings_of(caplog):
    """The warnings of a training with so many pseudo-labels an iteration; None is burn-in."""

    def watch(per_image, highest=(0.3,)):
        caplog.clear()
        hook = NoPseudoLabelWarning(0.8, patience=PATIENCE)
        with caplog.at_level(logging.WARNING, logger=hooks_module.__name__), EventStorage() as s:
            hook.trainer = SimpleNamespace(iter=0, storage=s)
            for i, found in enumerate(per_image):
                hook.trainer.iter = s.iter = i
                if found is not None:
                    s.put_scalars(
                        **{
                            "pseudo_labels/per_image": found,
                            "pseudo_labels/highest_score": highest[i % len(highest)],
                        }
                    )
                hook.after_step()
        return [record.getMessage() for record in caplog.records]

    return watch


@pytest.mark.parametrize("iterations", [PATIENCE, PATIENCE + 1, 4 * PATIENCE])
def test_without_pseudo_labels_it_warns_once(warnings_of, iterations):
    assert len(warnings_of([0.0] * iterations)) == 1


def test_it_is_patient(warnings_of):
    assert not warnings_of([0.0] * (PATIENCE - 1))


def test_burn_in_does_not_count(warnings_of):
    assert not warnings_of([None] * 20 + [0.0] * (PATIENCE - 1))
    assert len(warnings_of([None] * 20 + [0.0] * PATIENCE)) == 1


@pytest.mark.parametrize("per_image", [[0.5] * 20, [0.0, 0.0, 0.25] * 10, [1.0] + [0.0] * 4])
def test_with_pseudo_labels_now_and_then_it_is_silent(warnings_of, per_image):
    assert not warnings_of(per_image)


def test_pseudo_labels_that_cease_are_noticed(warnings_of):
    assert len(warnings_of([1.0] * 10 + [0.0] * PATIENCE)) == 1


def test_the_warning_names_the_highest_score_the_threshold_and_the_way_out(warnings_of):
    (text,) = warnings_of([0.0] * PATIENCE, highest=(0.3, 0.612, 0.5))
    for part in (
        "0.612",
        "0.80",
        f"{PATIENCE} iterations",
        "SEMI.PSEUDO_LABEL_THRESHOLD",
        "SEMI.BURN_IN_ITERS",
    ):
        assert part in text


def test_a_resumed_run_goes_on_waiting(warnings_of, monkeypatch):
    """The warning comes as late, and as seldom, as without the stop."""
    states = []

    class Resumed(NoPseudoLabelWarning):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            if states:
                self.load_state_dict(states[-1])

        def after_step(self):
            super().after_step()
            states.append(self.state_dict())

    monkeypatch.setattr(f"{__name__}.NoPseudoLabelWarning", Resumed)
    assert not warnings_of([0.0] * (PATIENCE - 1), highest=(0.7,))
    (text,) = warnings_of([0.0], highest=(0.1,))
    assert "0.700" in text
    assert not warnings_of([0.0] * 3 * PATIENCE)
