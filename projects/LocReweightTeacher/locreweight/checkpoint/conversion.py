"""Weights as other projects name them, and what a model did not find in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_TEACHER = "modelTeacher."  # Unbiased Teacher and its descendants keep both models in one file


def teacher_of(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's weights where a file holds two models; all weights otherwise."""
    of_teacher = {name: value for name, value in weights.items() if name.startswith(_TEACHER)}
    named = of_teacher or weights
    return {name.removeprefix(_TEACHER): value for name, value in named.items()}


def not_loaded(missing: Iterable[str], wrong_shapes: Iterable[str]) -> str:
    """One line on the layers of a model that a file has no fitting weights for.

    Args:
        missing: names of weights that are not in the file.
        wrong_shapes: names of those that it has in another shape.
    """
    parts = [
        f"{words} {', '.join(layers)}"
        for words, layers in (
            ("not in the file:", _layers(missing)),
            ("of another shape there:", _layers(wrong_shapes)),
        )
        if layers
    ]
    return f"layers that start anew, not from MODEL.WEIGHTS; {'; '.join(parts)}"


def _layers(weights: Iterable[str]) -> list[str]:
    """``a.weight`` and ``a.bias`` are of one layer."""
    return sorted({name.rpartition(".")[0] or name for name in weights})
