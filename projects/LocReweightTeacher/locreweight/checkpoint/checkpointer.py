"""Checkpoints of training: written atomically, resumed exactly, read without executing code.

A checkpoint is a Detectron2 checkpoint whose ``model`` is the teacher, the result of training, so
that every tool that reads Detectron2 checkpoints gets the right one of the two models. For resuming
it also has ``student`` and ``trainer`` (iteration, optimizer, schedule, hooks).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import Tensor, nn

from ..errors import UsageError
from ..file_io import atomic_write
from ..modeling.box_coding import CornerBoxTransform
from ..modeling.meta_arch import SemiSupervisedRCNN
from . import files
from .conversion import corners_from_centers, describe_random_layers, select_teacher
from .safe_loading import read_weights, short_reason

logger = logging.getLogger(__name__)

FINAL = "model_final"  # Detectron2's name for the last checkpoint of a training run
CONFIG_FIELD = "config"
CLASSES_FIELD = "class_names"
THRESHOLD_FIELD = "score_threshold"

_VARIANCE_WEIGHT = "roi_heads.box_predictor.log_variance.weight"
_BOX_BRANCH = "roi_heads.box_predictor.bbox_pred."


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with atomic writes and safe reading.

    A full disk, a kill or a damaged file costs at most the checkpoint that is being written.
    """

    resumes = False  # whether the loaded checkpoint continues a run, which needs all its parts

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        trusted: bool = False,
        keep: int = 0,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            model: the model that is saved as ``model``.
            save_dir: folder of the checkpoints.
            trusted: unpickle every object in weight files, which can run arbitrary code.
            keep: number of periodic checkpoints to keep; 0 keeps all.
            kwargs: arguments of Detectron2's ``DetectionCheckpointer``.

        Raises:
            UsageError: if checkpoints could not be found again in ``save_dir``, or ``keep`` is
                negative.
        """
        super().__init__(model, save_dir, **kwargs)
        if "://" in save_dir:
            raise UsageError(
                f"OUTPUT_DIR {save_dir!r} must be a local folder: checkpoints cannot be written "
                "atomically elsewhere"
            )
        if "?" in save_dir:
            raise UsageError(
                f"OUTPUT_DIR {save_dir!r} must not contain '?', which Detectron2 takes for the end "
                "of a file name: the run could not be resumed"
            )
        if keep < 0:
            raise UsageError(
                f"SOLVER.KEEP_CHECKPOINTS is {keep}; set a number, or 0 to keep all checkpoints"
            )
        self._trusted, self._keep = trusted, keep

    # -- writing ----------------------------------------------------------------------------------

    def save(self, name: str, **kwargs: Any) -> bool:
        """Write a checkpoint, update ``last_checkpoint``, then delete old checkpoints.

        Returns:
            whether the checkpoint was written. On a full disk it is not: the error is logged,
            earlier checkpoints stay, and training continues.

        Raises:
            UsageError: if the last checkpoint of a training run cannot be written.
        """
        if not self.save_dir or not self.save_to_disk:
            return False
        folder, file = Path(self.save_dir), f"{name}.pth"
        states = {key: part.state_dict() for key, part in self.checkpointables.items()}
        content = {"model": self.model.state_dict()} | states | kwargs
        try:
            atomic_write(folder / file, lambda stream: torch.save(content, stream))
            self.tag_last_checkpoint(file)
        except OSError as error:
            self._report_failure(folder / file, error)
            return False
        logger.info("saved %s", folder / file)
        files.prune(folder, file, self._keep)
        return True

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        atomic_write(
            Path(self.save_dir, files.LAST_CHECKPOINT),
            lambda stream: stream.write(last_filename_basename.encode()),
        )

    def _report_failure(self, path: Path, error: OSError) -> None:
        reason = f"{path} could not be saved: {error.strerror}; {files.free_space(path.parent)}"
        last = files.last_checkpoint(path.parent)
        newest = f"the newest checkpoint is {last}" if last else "there is no checkpoint yet"
        if path.stem == FINAL:
            raise UsageError(
                f"{reason}. Training is complete, but {newest}: free some space, then run the same "
                "command with --resume"
            ) from error
        logger.error("%s. Training continues and will try again; until then %s", reason, newest)

    # -- resuming ---------------------------------------------------------------------------------

    def has_checkpoint(self) -> bool:
        """Whether the folder has or had checkpoints, intact or damaged."""
        folder = Path(self.save_dir)
        return files.last_checkpoint(folder) is not None or bool(files.list_checkpoints(folder))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the newest intact checkpoint of the folder with all states, otherwise weights.

        Must be called on all processes, which load the same file.

        Raises:
            UsageError: if there are checkpoints but none is intact, if not all processes see the
                file, or if it belongs to another version of the project or another optimizer.
        """
        if self.save_dir and self.save_to_disk:
            files.remove_partial_files(Path(self.save_dir))
        newest = self._find_newest_on_all_processes() if resume else None
        self.resumes = newest is not None
        if newest is None:
            return self.load(path, checkpointables=[])
        try:
            return self.load(str(newest))
        except UsageError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"cannot resume from {newest}: it was written by another version of this project, "
                f"or with another optimizer or model ({short_reason(error)}). Resume with the "
                "version and config that wrote it, or start a new run in another OUTPUT_DIR with "
                f"MODEL.WEIGHTS {newest}"
            ) from error

    def _find_newest_on_all_processes(self) -> Path | None:
        newest: Path | UsageError | None = None
        if comm.is_main_process():
            try:
                parts = ("model", *self.checkpointables)
                newest = files.find_intact_checkpoint(Path(self.save_dir), parts)
            except UsageError as error:
                newest = error
        newest = comm.all_gather(newest)[0]
        if isinstance(newest, UsageError):
            raise newest
        if newest and not all(comm.all_gather(newest.is_file())):
            raise UsageError(
                f"not all processes see {newest}: OUTPUT_DIR must be on a disk that all machines "
                "share"
            )
        return newest

    # -- reading ----------------------------------------------------------------------------------

    def _load_file(self, filename: str) -> dict:
        try:
            checkpoint = self._read(filename)
        except UsageError:
            raise
        except Exception as error:  # a file that is not a checkpoint can raise almost anything
            raise UsageError(f"{filename} is not a checkpoint: {short_reason(error)}") from error
        if not (isinstance(checkpoint, dict) and _is_state_dict(checkpoint.get("model"))):
            raise UsageError(f"{filename} holds no weights of a model")
        return checkpoint

    def _read(self, filename: str) -> Any:
        if filename.endswith(".pkl"):
            return _from_model_zoo(read_weights(filename, trusted=self._trusted))
        if filename.endswith(".pyth"):
            self._torch_load(filename)  # rejects unsafe files before Detectron2 unpickles them
        return super()._load_file(filename)

    def _torch_load(self, f: str) -> Any:
        return read_weights(f, trusted=self._trusted)


class CheckpointContents(Enum):
    """Kind of model that a checkpoint holds; the value is its name in messages."""

    TEACHER = "the teacher"
    DETECTOR = "a detector of this project"
    PLAIN_DETECTOR = "a plain Detectron2 detector"
    BACKBONE = "a backbone"


@dataclass(frozen=True)
class CheckpointDescription:
    """What is saved in a checkpoint so that it can be used without other files.

    Attributes:
        config: the effective config, as YAML.
        class_names: in the order of the model's classes.
        score_threshold: the score threshold with the best F1 on the test set; None if the model was
            not evaluated.
    """

    config: str
    class_names: list[str]
    score_threshold: float | None = None

    def to_fields(self) -> dict[str, Any]:
        """Entries of the checkpoint."""
        fields = {CONFIG_FIELD: self.config, CLASSES_FIELD: list(self.class_names)}
        if self.score_threshold is None:
            return fields
        return {**fields, THRESHOLD_FIELD: self.score_threshold}

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any]) -> CheckpointDescription | None:
        """Read the description; None for checkpoints of other projects."""
        if CONFIG_FIELD not in checkpoint or CLASSES_FIELD not in checkpoint:
            return None
        threshold = checkpoint.get(THRESHOLD_FIELD)
        return cls(
            str(checkpoint[CONFIG_FIELD]),
            [str(name) for name in checkpoint[CLASSES_FIELD]],
            None if threshold is None else float(threshold),
        )


class TeacherCheckpointer(SafeCheckpointer):
    """Checkpointer of the teacher, which can also start from plain Detectron2 detectors.

    A detector without the localization-aware branch predicts ``(dx, dy, dw, dh)``. Its box branch
    is converted to corner coding if the model uses that: exactly for shifts, and to first order for
    changes of size (:func:`.conversion.corners_from_centers`).

    Attributes:
        contents: kind of model in the last file that was loaded.
        mismatched_weights: names of weights that the file lacks or has in another shape.
    """

    contents: CheckpointContents | None = None
    mismatched_weights: tuple[str, ...] = ()

    def __init__(
        self,
        model: SemiSupervisedRCNN,
        save_dir: str = "",
        *,
        convert: bool = True,
        description: CheckpointDescription | None = None,
        score_threshold: Callable[[], float | None] = lambda: None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            model: the teacher.
            save_dir: folder of the checkpoints.
            convert: convert the box branch of a plain detector to corner coding.
            description: saved beside the weights.
            score_threshold: returns the threshold of the description when a checkpoint is saved.
            kwargs: arguments of :class:`SafeCheckpointer`.
        """
        super().__init__(model, save_dir, **kwargs)
        self._convert = convert
        self._description = description
        self._score_threshold = score_threshold

    def save(self, name: str, **kwargs: Any) -> bool:
        fields = {}
        if self._description:
            described = replace(self._description, score_threshold=self._score_threshold())
            fields = described.to_fields()
        return super().save(name, corner_coding=self._has_corner_coding, **fields, **kwargs)

    @property
    def _has_corner_coding(self) -> bool:
        coding = self.model.roi_heads.box_predictor.box2box_transform
        return isinstance(coding, CornerBoxTransform)

    def _load_model(self, checkpoint: dict) -> Any:
        weights = checkpoint["model"] = select_teacher(checkpoint["model"])
        corners = checkpoint.get("corner_coding", self._has_corner_coding)
        if corners != self._has_corner_coding:
            raise UsageError(
                f"the checkpoint was trained with MODEL.ROI_BOX_HEAD.CORNER_CODING {corners}; set "
                "the same value"
            )
        self.contents = _contents_of(checkpoint)
        if self.contents is CheckpointContents.PLAIN_DETECTOR and self._convert:
            self._convert_box_branch(weights)
        incompatible = super()._load_model(checkpoint)
        wrong_shapes = [name for name, *_ in incompatible.incorrect_shapes]
        self.mismatched_weights = (*incompatible.missing_keys, *wrong_shapes)
        if self.resumes and self.mismatched_weights:
            raise UsageError(
                f"the run in {self.save_dir} has another model than the config: "
                f"{describe_mismatch(self.mismatched_weights)}; use the config of that run"
            )
        if self._convert and self.mismatched_weights:
            logger.warning(describe_random_layers(incompatible.missing_keys, wrong_shapes))
        return incompatible

    def _convert_box_branch(self, weights: dict) -> None:
        if self._has_corner_coding:
            # Names can have a prefix such as "module.", which Detectron2 removes later.
            for name in [name for name in weights if _BOX_BRANCH in name]:
                weights[name] = corners_from_centers(torch.as_tensor(weights[name]))
            logger.info("converted the box branch from (dx, dy, dw, dh) to corners")


def describe_mismatch(weights: Sequence[str]) -> str:
    """Number and examples of weights that are missing or have another shape."""
    names = ", ".join(weights[:3])
    return f"{len(weights)} weights are missing or have another shape, such as {names}"


def _contents_of(checkpoint: Mapping[str, Any]) -> CheckpointContents:
    names = list(checkpoint["model"])
    if any(name.endswith(_VARIANCE_WEIGHT) for name in names):
        trained_here = "student" in checkpoint
        return CheckpointContents.TEACHER if trained_here else CheckpointContents.DETECTOR
    if any(_BOX_BRANCH in name for name in names):
        return CheckpointContents.PLAIN_DETECTOR
    return CheckpointContents.BACKBONE


def _from_model_zoo(content: dict) -> dict:
    """Convert a ``.pkl`` of the model zoo to a checkpoint; Caffe2 files use other names."""
    if {"model", "__author__"} <= content.keys():
        return content
    blobs = content.get("blobs", content)
    weights = {name: array for name, array in blobs.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _is_state_dict(weights: object) -> bool:
    return isinstance(weights, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor | np.ndarray)
        for name, value in weights.items()
    )
