"""NoPseudoLabelWarning."""

import logging
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage

from locreweight.engine import hooks as hooks_module
from locreweight.engine.hooks import NoPseudoLabelWarning

PATIENCE = 5


@pytest.fixture
def warnings_of(caplog):
    """Warnings for given numbers of pseudo-labels per image; None is an iteration of burn-in."""

    def run(per_image, highest=(0.3,)):
        caplog.clear()
        hook = NoPseudoLabelWarning(0.8, patience=PATIENCE)
        with caplog.at_level(logging.WARNING, logger=hooks_module.__name__), EventStorage() as s:
            hook.trainer = SimpleNamespace(iter=0, storage=s)
            for i, count in enumerate(per_image):
                hook.trainer.iter = s.iter = i
                if count is not None:
                    s.put_scalars(
                        **{
                            "pseudo_labels/per_image": count,
                            "pseudo_labels/highest_score": highest[i % len(highest)],
                        }
                    )
                hook.after_step()
        return [record.getMessage() for record in caplog.records]

    return run


@pytest.mark.parametrize("iterations", [PATIENCE, PATIENCE + 1, 4 * PATIENCE])
def test_warns_once_without_pseudo_labels(warnings_of, iterations):
    assert len(warnings_of([0.0] * iterations)) == 1


def test_no_warning_before_its_patience_ends(warnings_of):
    assert not warnings_of([0.0] * (PATIENCE - 1))


def test_burn_in_does_not_count(warnings_of):
    assert not warnings_of([None] * 20 + [0.0] * (PATIENCE - 1))
    assert len(warnings_of([None] * 20 + [0.0] * PATIENCE)) == 1


@pytest.mark.parametrize("per_image", [[0.5] * 20, [0.0, 0.0, 0.25] * 10, [1.0] + [0.0] * 4])
def test_no_warning_with_occasional_pseudo_labels(warnings_of, per_image):
    assert not warnings_of(per_image)


def test_warns_when_pseudo_labels_stop(warnings_of):
    assert len(warnings_of([1.0] * 10 + [0.0] * PATIENCE)) == 1


def test_warning_names_score_threshold_and_keys(warnings_of):
    (text,) = warnings_of([0.0] * PATIENCE, highest=(0.3, 0.612, 0.5))
    for part in (
        "0.612",
        "0.80",
        f"{PATIENCE} iterations",
        "SEMI.PSEUDO_LABEL_THRESHOLD",
        "SEMI.BURN_IN_ITERS",
    ):
        assert part in text


def test_resumed_run_warns_as_an_uninterrupted_one(warnings_of, monkeypatch):
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
