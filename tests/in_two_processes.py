"""Run a function in two processes with Gloo on the CPU."""

import os
from collections.abc import Callable
from datetime import timedelta

import pytest
from detectron2.engine import launch


def run_in_two_processes(function: Callable, *arguments: object) -> None:
    """Run ``function(*arguments)`` in two new processes, which can import it by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        launch(
            _run,
            2,
            dist_url="auto",
            args=(function, arguments),
            timeout=timedelta(minutes=10),
        )


def _run(function: Callable, arguments: tuple) -> None:
    function(*arguments)
    # PyTorch can abort at a normal exit, see locreweight.engine.launch.
    os._exit(0)
