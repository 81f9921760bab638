"""Stages, bar and lines of the progress of a training, on a simulated clock."""

import io
import logging
import sys
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage

from locreweight.engine.progress import LINE_SECONDS, Progress
from locreweight.engine.remaining_time import RemainingTime, Schedule, Work

AMOUNT = {Work.BURN_IN: 2.0, Work.MUTUAL: 6.0, Work.EVALUATION: 0.0}


@pytest.fixture
def progress_of(caplog, monkeypatch):
    """Runs the hook with given seconds per iteration; returns its messages and the bar's text."""

    def run(seconds, burn_in=4, start=0, terminal=False):
        clock = SimpleNamespace(now=100.0)
        plan = Schedule(start + len(seconds), min(burn_in, start + len(seconds)), 0, AMOUNT)
        screen = io.StringIO()
        screen.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stdout", screen)
        hook = Progress(RemainingTime(plan), clock=lambda: clock.now)
        caplog.clear()
        with caplog.at_level(logging.INFO, "locreweight.console"), EventStorage(start) as storage:
            hook.trainer = SimpleNamespace(
                start_iter=start, max_iter=plan.max_iter, iter=start, storage=storage
            )
            hook.before_train()
            for i, duration in enumerate(seconds, start):
                hook.trainer.iter = storage.iter = i
                hook.before_step()
                clock.now += duration
                storage.put_scalar("total_loss", 1.5)
                if i >= burn_in:
                    storage.put_scalar("pseudo_labels/per_image", 2.0)
                hook.after_step()
            hook.after_train()
        assert hook.duration
        return [record.getMessage() for record in caplog.records], screen.getvalue()

    return run


def test_stages_are_named_once(progress_of):
    messages, screen = progress_of([1.0] * 6)
    assert messages == [
        "burn-in: iterations 1 to 4, on labeled images",
        "mutual learning: iterations 5 to 6, on labeled and unlabeled images",
    ]
    assert screen == ""


def test_training_without_unlabeled_images_is_one_stage(progress_of):
    messages, _ = progress_of([1.0] * 3)
    assert messages == ["supervised training: iterations 1 to 3, on labeled images"]


def test_resumed_run_names_its_stage(progress_of):
    messages, _ = progress_of([1.0] * 3, start=5)
    assert messages == ["mutual learning: iterations 6 to 8, on labeled and unlabeled images"]


def test_lines_where_there_is_no_terminal(progress_of):
    step = LINE_SECONDS / 2
    messages, screen = progress_of([step] * 6)
    left = [m for m in messages if m.startswith("iter ")]
    assert left == [
        # 2 of burn-in and 2 of mutual learning, which has three times the work
        "iter 2 of 6: about 4:00 left, 30 s/iter, loss 1.50",
        "iter 4 of 6: about 3:00 left, 30 s/iter, loss 1.50",
    ], "none for the last iteration"
    assert screen == "", "no bar and no escape codes"


def test_bar_on_a_terminal(progress_of, monkeypatch):
    monkeypatch.setattr("locreweight.engine.progress._BAR", "{desc}|{n_fmt}/{total_fmt}{postfix}")
    messages, screen = progress_of([LINE_SECONDS] * 6, terminal=True)
    assert len(messages) == 2, "the bar replaces the lines"
    bars = [part.strip() for part in screen.split("\r")]
    assert "mutual learning|6/6, 0:00 left, 60 s/iter, loss 1.50, 2.0 pseudo-labels per image" in (
        bars
    )


def test_evaluation_is_shown_on_the_bar(progress_of, monkeypatch):
    hook = Progress(RemainingTime(Schedule(1, 0, 0, AMOUNT)))
    hook.show_evaluation()  # in other than the main process there is no bar
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    hook.trainer = SimpleNamespace(start_iter=0, max_iter=1)
    hook.before_train()
    hook.show_evaluation()
    hook.after_train()
    assert "evaluating" in screen.getvalue()
