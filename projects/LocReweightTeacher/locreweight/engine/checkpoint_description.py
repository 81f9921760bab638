"""What a checkpoint says of itself beside its weights, so that it can be used without its config.

Plain text only: checkpoints are read without running anything that is in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONFIG_FIELD = "config"
CLASSES_FIELD = "class_names"


@dataclass(frozen=True)
class CheckpointDescription:
    """
    Attributes:
        config: the effective config, as YAML.
        class_names: in the order of the model's classes.
    """

    config: str
    class_names: list[str]

    def as_fields(self) -> dict[str, str | list[str]]:
        """What is saved in the file."""
        return {CONFIG_FIELD: self.config, CLASSES_FIELD: list(self.class_names)}

    @classmethod
    def from_fields(cls, checkpoint: Mapping[str, Any]) -> CheckpointDescription | None:
        """What a file says; None if it is of another maker, or older than this."""
        if CONFIG_FIELD not in checkpoint or CLASSES_FIELD not in checkpoint:
            return None
        return cls(str(checkpoint[CONFIG_FIELD]), [str(n) for n in checkpoint[CLASSES_FIELD]])
