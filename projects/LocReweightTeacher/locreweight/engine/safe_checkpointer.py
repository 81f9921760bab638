"""Detectron2's checkpointer, whose files are written whole and whose reading runs no code."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import Tensor, nn

from ..errors import UsageError
from . import checkpoint_files as files
from .safe_reading import in_few_words, read_weights

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
            files.write_whole(folder / file, lambda opened: torch.save(content, opened))
            self.tag_last_checkpoint(file)
        except OSError as error:
            self._report(folder / file, error)
            return False
        logger.info("saved %s", folder / file)
        files.prune(folder, file, self._keep)
        return True

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        files.write_whole(
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
        return files.last_checkpoint(folder) is not None or bool(files.checkpoints_of(folder))

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
                f"or with another optimizer or model ({in_few_words(error)}). Resume it with those "
                "it was started with, or start anew in another OUTPUT_DIR with MODEL.WEIGHTS "
                f"{newest}"
            ) from error

    def _agree_on_newest(self) -> Path | None:
        found: Path | UsageError | None = None
        if comm.is_main_process():
            try:
                parts = ("model", *self.checkpointables)
                found = files.find_whole_checkpoint(Path(self.save_dir), parts)
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
            raise UsageError(f"{filename} is not a checkpoint: {in_few_words(error)}") from error
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
