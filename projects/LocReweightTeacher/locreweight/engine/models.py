"""The students and teachers of a training run."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from torch import nn

from ..checkpoint.timm_weights import load_pretrained
from ..ema import MovingAverage, update_teacher
from ..methods import SemiSupervisedMethod, build_members
from ..modeling.committee import members_of


class Models:
    """Builds the models of a method, and updates its teachers.

    Attributes:
        students: the models that are optimized: a detector, or a committee of several.
        teachers: the moving averages of the students, with the same structure.
        pseudo_labelers: the models that make pseudo-labels: the teachers, or, for methods that
            freeze them, copies from the end of burn-in.
        trained: the students, wrapped in DistributedDataParallel if there are several processes.
        average: updates the teachers.
    """

    def __init__(self, cfg: CfgNode, method: SemiSupervisedMethod) -> None:
        """
        Args:
            cfg: the effective config.
            method: decides how many students there are, and prepares them.

        Raises:
            UsageError: if the config does not describe a detector.
        """
        self._cfg = cfg
        self.students = build_members(cfg, method)
        self.trained = _distributed(self.students).train()
        # DDP has copied the first process's students to all processes; the teachers copy them now.
        self.teachers = build_members(cfg, method).eval()
        self.average = MovingAverage(self.teachers, self.students)
        self.average.update(keep_rate=0.0)
        self.pseudo_labelers = self.teachers
        if method.frozen_pseudo_labeler:
            self.pseudo_labelers = build_members(cfg, method).eval()

    @property
    def further_parts(self) -> dict[str, Any]:
        """What checkpoints contain besides the first student and teacher, by name."""
        parts: dict[str, Any] = {}
        if self.pseudo_labelers is not self.teachers:
            parts["pseudo_labeler"] = self.pseudo_labelers
        for name, models in (("students", self.students), ("teachers", self.teachers)):
            if further := members_of(models)[1:]:
                parts[f"further_{name}"] = nn.ModuleList(further)
        return parts

    def copy_loaded_weights(self, random: Collection[str] | None) -> None:
        """Copy the weights of ``MODEL.WEIGHTS``, which the first teacher has, to all models.

        Layers that the file does not have stay different in each member. Without the file, the
        backbone of each member starts from ``MODEL.TIMM.PRETRAINED``.

        Args:
            random: names of the weights that the file does not have; None if there is no file.
        """
        teacher = members_of(self.teachers)[0].state_dict()
        student, *further_students = members_of(self.students)
        student.load_state_dict(teacher)
        for model in (student, *further_students):
            load_pretrained(self._cfg, model)
        if random is not None:
            loaded = {name: value for name, value in teacher.items() if name not in random}
            for model in further_students:
                model.load_state_dict(loaded, strict=False)
        for models in (self.teachers, self.pseudo_labelers):
            models.load_state_dict(self.students.state_dict())

    def update_teachers(self, keep_rate: float, *, burning_in: bool) -> None:
        """Update the teachers by the students, and pseudo-labelers only during burn-in."""
        self.average.update(keep_rate)
        if burning_in and self.pseudo_labelers is not self.teachers:
            update_teacher(self.pseudo_labelers, self.students, keep_rate=0.0)


def _distributed(students: nn.Module) -> nn.Module:
    is_gpu = members_of(students)[0].device.type == "cuda"
    return create_ddp_model(
        students, broadcast_buffers=False, device_ids=[comm.get_local_rank()] if is_gpu else None
    )
