"""Detectron2's checkpointer, whose files are written whole and whose reading runs no code."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from ..errors import UsageError
from ..modeling.box_coding import CornerBoxTransform
from ..modeling.meta_arch import SemiSupervisedRCNN
from . import files as files
from .conversion import not_loaded, teacher_of
from .safe_loading import read_weights, short_reason

logger = logging.getLogger(__name__)

FINAL = "model_final"  # as Detectron2 names the last file of a training


class SafeCheckpointer(DetectionCheckpointer):
    """Loses no checkpoint to a full disk, a kill or a damaged file, and trusts no file."""

    resumes = False  # whether what is loaded goes on with a run: all of it is needed then

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
            model: whose weights are the file's ``model``.
            save_dir: folder of the checkpoints.
            trusted: unpickle whatever a file of weights holds, which can run code.
            keep: number of periodic checkpoints that stay; 0 keeps all.
            kwargs: those of Detectron2's ``DetectionCheckpointer``.

        Raises:
            UsageError: if files in the folder could not be found again, or the number is negative.
        """
        super().__init__(model, save_dir, **kwargs)
        if "://" in save_dir:
            raise UsageError(
                f"OUTPUT_DIR {save_dir!r} has to be a folder of this machine: only there can a "
                "checkpoint be written so that none is ever lost"
            )
        if "?" in save_dir:
            raise UsageError(
                f"OUTPUT_DIR {save_dir!r} has a '?' in it, which Detectron2 takes for the end of a "
                "file's name: it could not be resumed"
            )
        if keep < 0:
            raise UsageError(f"SOLVER.KEEP_CHECKPOINTS is {keep}; give a number, or 0 to keep all")
        self._trusted, self._keep = trusted, keep

    # -- writing ----------------------------------------------------------------------------------

    def save(self, name: str, **kwargs: Any) -> bool:
        """Write a checkpoint and name it in ``last_checkpoint``, then delete old ones.

        Returns:
            whether there is a new file. On a full disk there is none: what was there before stays,
            the error is logged, and training can go on.

        Raises:
            UsageError: if the last file of a training cannot be written.
        """
        if not self.save_dir or not self.save_to_disk:
            return False
        folder, file = Path(self.save_dir), f"{name}.pth"
        states = {key: part.state_dict() for key, part in self.checkpointables.items()}
        content = {"model": self.model.state_dict()} | states | kwargs
        try:
            files.atomic_write(folder / file, lambda opened: torch.save(content, opened))
            self.tag_last_checkpoint(file)
        except OSError as error:
            self._report(folder / file, error)
            return False
        logger.info("saved %s", folder / file)
        files.prune(folder, file, self._keep)
        return True

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        files.atomic_write(
            Path(self.save_dir, files.LAST_CHECKPOINT),
            lambda opened: opened.write(last_filename_basename.encode()),
        )

    def _report(self, path: Path, error: OSError) -> None:
        reason = f"{path} could not be saved: {error.strerror}; {files.free_space(path.parent)}"
        last = files.last_checkpoint(path.parent)
        newest = f"the newest checkpoint is {last}" if last else "there is no checkpoint yet"
        if path.stem == FINAL:
            raise UsageError(
                f"{reason}. Training reached its end, but {newest}: make room, then give the same "
                "command with --resume"
            ) from error
        logger.error("%s. Training goes on and will try again; until then %s", reason, newest)

    # -- resuming ---------------------------------------------------------------------------------

    def has_checkpoint(self) -> bool:
        """Whether the folder holds any, or did: a damaged one is not the same as none."""
        folder = Path(self.save_dir)
        return files.last_checkpoint(folder) is not None or bool(files.list_checkpoints(folder))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the newest whole checkpoint of the folder with all its states, or else weights.

        To be called on all processes, which load the same file.

        Raises:
            UsageError: if there are checkpoints and none is whole, not all processes see it, or it
                is of another version or optimizer.
        """
        if self.save_dir and self.save_to_disk:
            files.remove_partial_files(Path(self.save_dir))
        newest = self._agree_on_newest() if resume else None
        self.resumes = newest is not None
        if newest is None:
            return self.load(path, checkpointables=[])
        try:
            return self.load(str(newest))
        except UsageError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"cannot go on from {newest}: it was written by another version of this project, "
                f"or with another optimizer or model ({short_reason(error)}). Resume it with those "
                "it was started with, or start anew in another OUTPUT_DIR with MODEL.WEIGHTS "
                f"{newest}"
            ) from error

    def _agree_on_newest(self) -> Path | None:
        found: Path | UsageError | None = None
        if comm.is_main_process():
            try:
                parts = ("model", *self.checkpointables)
                found = files.find_intact_checkpoint(Path(self.save_dir), parts)
            except UsageError as error:
                found = error
        found = comm.all_gather(found)[0]
        if isinstance(found, UsageError):
            raise found
        if found and not all(comm.all_gather(found.is_file())):
            raise UsageError(
                f"not all processes see {found}: OUTPUT_DIR has to lie on a disk that all machines "
                "share"
            )
        return found

    # -- reading ----------------------------------------------------------------------------------

    def _load_file(self, filename: str) -> dict:
        try:
            checkpoint = self._read(filename)
        except UsageError:
            raise
        except Exception as error:  # whatever a file that is no checkpoint makes it raise
            raise UsageError(f"{filename} is not a checkpoint: {short_reason(error)}") from error
        if not (isinstance(checkpoint, dict) and _are_weights(checkpoint.get("model"))):
            raise UsageError(f"{filename} holds no weights of a model")
        return checkpoint

    def _read(self, filename: str) -> Any:
        if filename.endswith(".pkl"):
            return _from_zoo(read_weights(filename, trusted=self._trusted))
        if filename.endswith(".pyth"):
            self._torch_load(filename)  # Detectron2 reads these in its own way: look first
        return super()._load_file(filename)

    def _torch_load(self, f: str) -> Any:
        return read_weights(f, trusted=self._trusted)


def _from_zoo(content: dict) -> dict:
    """A zoo's pickle as a checkpoint. Detectron1 and Caffe2 name weights in their own ways."""
    if {"model", "__author__"} <= content.keys():
        return content
    blobs = content.get("blobs", content)
    weights = {name: array for name, array in blobs.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _are_weights(weights: object) -> bool:
    return isinstance(weights, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor | np.ndarray)
        for name, value in weights.items()
    )


# --------------------------------------------------------------------------------------------------
# Checkpoints: what a file holds, and files that others made.
#
# A checkpoint of ours is a Detectron2 checkpoint whose ``model`` is the **teacher**, which is the
# result of training: any tool that reads Detectron2's files gets the right one of the two. Beside it
# are ``student`` and ``trainer`` (iteration, optimizer, schedule), which resuming needs.


PLAIN_DETECTOR = "a plain Detectron2 detector"
_PREDICTOR = "roi_heads.box_predictor."
_VARIANCE_KEY = _PREDICTOR + "log_variance.weight"
_BOX_KEY = _PREDICTOR + "bbox_pred."


class TeacherCheckpointer(SafeCheckpointer):
    """Reads ours and plain Detectron2 detectors; the latter's box branch is translated.

    A detector without the localization-aware branch predicts ``(dx, dy, dw, dh)``. To be trained on
    in corner coding, its box branch is rewritten to predict corners: exactly for shifts, to first
    order for changes of size.
    """

    held = ""  # what the last file that was read holds, in words
    unfit: tuple[str, ...] = ()  # names of weights that it lacks, or has in another shape

    def __init__(
        self,
        model: SemiSupervisedRCNN,
        save_dir: str = "",
        *,
        translate: bool = True,
        description: CheckpointDescription | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            model: the teacher.
            save_dir: folder of the checkpoints.
            translate: rewrite the box branch of a plain detector, as described above.
            description: what is written beside the weights, so that a file can be used by itself.
            kwargs: those of :class:`SafeCheckpointer`.
        """
        super().__init__(model, save_dir, **kwargs)
        self._translates = translate
        self._description = description

    def save(self, name: str, **kwargs: Any) -> bool:
        described = self._description.as_fields() if self._description else {}
        return super().save(name, corner_coding=self._codes_corners, **described, **kwargs)

    @property
    def _codes_corners(self) -> bool:
        coding = self.model.roi_heads.box_predictor.box2box_transform
        return isinstance(coding, CornerBoxTransform)

    def _load_model(self, checkpoint: dict) -> Any:
        weights = checkpoint["model"] = teacher_of(checkpoint["model"])
        corners = checkpoint.get("corner_coding", self._codes_corners)
        if corners != self._codes_corners:
            raise UsageError(
                f"the checkpoint was trained with MODEL.ROI_BOX_HEAD.CORNER_CODING {corners}; "
                "set it alike"
            )
        detector = any(_BOX_KEY in key for key in weights)
        if _holds_variance(weights):
            self.held = "the teacher" if "student" in checkpoint else "a detector of this project"
        else:
            self.held = PLAIN_DETECTOR if detector else "a backbone"
        if self.held == PLAIN_DETECTOR and self._translates:
            self._translate(weights)
        incompatible = super()._load_model(checkpoint)
        wrong_shapes = [name for name, *_ in incompatible.incorrect_shapes]
        self.unfit = (*incompatible.missing_keys, *wrong_shapes)
        if self.resumes and self.unfit:
            raise UsageError(
                f"the run in {self.save_dir} has another model than the config: "
                f"{_some_of(self.unfit)}; use the config it was started with"
            )
        if self._translates and self.unfit:
            logger.warning(not_loaded(incompatible.missing_keys, wrong_shapes))
        return incompatible

    def _translate(self, weights: dict) -> None:
        if self._codes_corners:
            # Names may have a prefix ("module."), which is only stripped later.
            for name in [name for name in weights if _BOX_KEY in name]:
                weights[name] = corners_from_centers(torch.as_tensor(weights[name]))
            logger.info("rewrote the box branch from (dx, dy, dw, dh) to corners")


def corners_from_centers(weights: Tensor) -> Tensor:
    """A box branch for ``(dx, dy, dw, dh)``, coded by (10, 10, 5, 5), as one for corners by 10.

    ``x1 = dx - w/2`` and ``w`` grows by ``exp(dw) ~ 1 + dw``; with these factors
    the coded corner offsets are ``dx - dw, dy - dh, dx + dw, dy + dh``.

    Args:
        weights: ``(C*4, ...)`` rows of a linear layer, or its bias.
    """
    dx, dy, dw, dh = weights.unflatten(0, (-1, 4)).unbind(dim=1)
    return torch.stack([dx - dw, dy - dh, dx + dw, dy + dh], dim=1).flatten(0, 1)


def load_for_evaluation(cfg: CfgNode, model: SemiSupervisedRCNN) -> str:
    """Load ``MODEL.WEIGHTS`` to evaluate it as it was trained.

    A plain Detectron2 detector is evaluated in its own box coding, which the model is switched to.

    Returns:
        what was loaded, in words.

    Raises:
        UsageError: if the file is not there, holds no detector, or one of another architecture.
    """
    path = cfg.MODEL.WEIGHTS
    if not path:
        raise UsageError(
            "--eval-only needs MODEL.WEIGHTS: a checkpoint, or the zoo's address of one"
        )
    check_weights_exist(path)
    checkpointer = TeacherCheckpointer(
        model, save_to_disk=False, translate=False, trusted=cfg.MODEL.TRUST_WEIGHTS
    )
    checkpointer.load(path)
    if checkpointer.held == "a backbone":
        raise UsageError(f"{path} holds a backbone, not a detector: there is nothing to evaluate")
    unfit = checkpointer.unfit
    if checkpointer.held == PLAIN_DETECTOR:
        weights = cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS
        model.roi_heads.box_predictor.box2box_transform = Box2BoxTransform(weights)
        unfit = tuple(name for name in unfit if ".log_variance." not in name)
    if unfit:
        raise UsageError(
            f"{path} does not fit the model of the config: {_some_of(unfit)}; use the config it "
            "was trained with"
        )
    return checkpointer.held


def check_weights_exist(path: str) -> None:
    """Raises UsageError if these weights cannot be had; an empty path means random weights."""
    if not path:
        return
    try:
        found = os.path.isfile(PathManager.get_local_path(path))
    except Exception as error:
        raise UsageError(f"MODEL.WEIGHTS {path!r} cannot be fetched: {error}") from error
    if not found:
        raise UsageError(
            f"MODEL.WEIGHTS {path!r} does not exist; name a checkpoint, an address of Detectron2's "
            "zoo (detectron2://...), or '' to start from random weights"
        )


def _some_of(unfit: Sequence[str]) -> str:
    names = ", ".join(unfit[:3])
    return f"{len(unfit)} weights are missing or of another shape, such as {names}"


def _holds_variance(weights: Mapping[str, object]) -> bool:
    return any(key.endswith(_VARIANCE_KEY) for key in weights)


# --------------------------------------------------------------------------------------------------
# What a checkpoint says of itself beside its weights, so that it can be used without its config.
#
# Plain text only: checkpoints are read without running anything that is in them.


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
