"""Burn-in, mutual learning, and everything around the step."""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.engine import TrainerBase, create_ddp_model, default_writers, hooks
from detectron2.engine.hooks import HookBase
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils import comm
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..config import check_supported, scale_to_world_size
from ..data.mapper import ViewMapper
from ..data.streams import Batch, BatchSchedule, StreamDataset, build_loader
from ..data.training_sets import TrainingSets, load_training_sets
from ..data.unreadable import UnreadableImages
from ..errors import UsageError
from ..method.teacher import keep_rate, update_teacher
from ..modeling.detector import SemiSupervisedRCNN
from .checkpoint import TeacherCheckpointer, need_weights
from .checkpoint_description import CheckpointDescription
from .evaluation import evaluate_both, main_metric, write_ground_truth
from .hooks import PseudoLabelPrinter, PseudoLabelWatch, ResumableBestCheckpointer
from .panels import PseudoLabelPanels
from .step import HIGHEST_SCORE, StepResult, StepSettings, training_step
from .writers import LenientWriter

logger = logging.getLogger(__name__)


class SemiSupervisedTrainer(TrainerBase):
    """Trains a student on labeled and unlabeled images, and its teacher with it.

    Attributes:
        cfg: the effective config, scaled to the number of GPUs.
        student: the module that is optimized.
        model: the same, wrapped for several GPUs if there are any.
        teacher: the moving average of the student, which is the result.
        labeler: makes the pseudo-labels: the teacher itself, or, for methods that freeze it, a copy
            from the end of burn-in.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: its data sets registered by :func:`.data.training_sets.register_datasets`.

        Raises:
            UsageError: for anything in the config or the data that the user has to put right.
        """
        super().__init__()
        check_supported(cfg)
        self.cfg = cfg = scale_to_world_size(cfg, comm.get_world_size())
        need_weights(cfg.MODEL.WEIGHTS)
        self.settings = StepSettings.from_config(cfg)
        self.sets = load_training_sets(cfg)
        self.unreadable = UnreadableImages(cfg.DATASETS.MAX_UNREADABLE_SHARE)

        self.student: SemiSupervisedRCNN = build_model(cfg)
        self.model = _distributed(self.student).train()
        # Copied only now that all processes have the same student.
        self.teacher: SemiSupervisedRCNN = build_model(cfg).eval()
        update_teacher(self.teacher, self.student, keep_rate=0.0)
        self.labeler, frozen = self.teacher, {}
        if self.settings.strategy.frozen_labeler:
            self.labeler = build_model(cfg).eval()
            frozen = {"labeler": self.labeler}
        self.optimizer = build_optimizer(cfg, self.student)
        self._amp_dtype = _amp_dtype(cfg)
        # bfloat16 has the range of float32; only float16 needs its gradients scaled.
        self.grad_scaler = torch.amp.GradScaler(
            self.device.type,
            enabled=cfg.SOLVER.AMP.ENABLED and self._amp_dtype is torch.float16,
        )
        self.checkpointer = TeacherCheckpointer(
            self.teacher,
            cfg.OUTPUT_DIR,
            description=CheckpointDescription(cfg.dump(), self.sets.class_names),
            trusted=cfg.MODEL.TRUST_WEIGHTS,
            keep=cfg.SOLVER.KEEP_CHECKPOINTS,
            student=self.student,
            trainer=weakref.proxy(self),
            **frozen,
        )
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self._seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self._batches: Iterator[Batch] | None = None
        self.register_hooks(self.build_hooks())
        _log_effective_values(cfg, self.sets)

    @property
    def device(self) -> torch.device:
        return self.student.device

    # -- from start to end ------------------------------------------------------------------------

    def resume_or_load(self, resume: bool) -> None:
        """Go on from the last checkpoint in ``OUTPUT_DIR``, or start from ``MODEL.WEIGHTS``."""
        resumed = resume and self.checkpointer.has_checkpoint()
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resumed:
            self.start_iter = self.iter + 1
            logger.info("resumed after iteration %d", self.iter)
        else:
            for module in (self.student, self.labeler):
                module.load_state_dict(self.teacher.state_dict())
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise UsageError(
                f"the processes would start at different iterations, {starts}: OUTPUT_DIR has to "
                "lie on a disk that all machines share"
            )

    def train(self) -> dict[str, float]:
        """Train to the end; returns the latest results on the main process, by name."""
        if self.start_iter >= self.max_iter:
            logger.info("this run has already reached SOLVER.MAX_ITER = %d", self.max_iter)
            return {}
        super().train(self.start_iter, self.max_iter)
        latest = self.storage.latest()
        return {name: value for name, (value, _) in latest.items() if "bbox/" in name}

    def before_train(self) -> None:
        # The loader begins where training does, which is known only now.
        self._batches = iter(self._build_loader())
        super().before_train()

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks in Detectron2's order, and those of this project."""
        cfg = self.cfg
        main = comm.is_main_process()
        built: list[HookBase | None] = [
            hooks.IterationTimer(),
            hooks.LRScheduler(self.optimizer, build_lr_scheduler(cfg, self.optimizer)),
            PseudoLabelWatch(cfg.SEMI.PSEUDO_LABEL_THRESHOLD) if main else None,
            hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
            if main
            else None,
        ]
        if cfg.DATASETS.TEST:
            write_ground_truth(cfg)
            period = cfg.TEST.EVAL_PERIOD
            built.append(hooks.EvalHook(period, self._evaluate))
            if main:
                built.append(ResumableBestCheckpointer(period, self.checkpointer, main_metric(cfg)))
        if main and self.sets.watched:
            built.append(
                PseudoLabelPanels.from_config(cfg, self.labeler, self.sets, self._amp_dtype)
            )
        if main:
            writers = [*default_writers(cfg.OUTPUT_DIR, self.max_iter), PseudoLabelPrinter()]
            built.append(hooks.PeriodicWriter([LenientWriter(w) for w in writers], period=20))
        return [hook for hook in built if hook is not None]

    # -- one iteration ----------------------------------------------------------------------------

    def run_step(self) -> None:
        assert self._batches is not None
        start = time.perf_counter()
        batch = next(self._batches)
        data_time = time.perf_counter() - start

        autocast = self.cfg.SOLVER.AMP.ENABLED
        with torch.autocast(self.device.type, dtype=self._amp_dtype, enabled=autocast):
            result = training_step(self.model, self.labeler, batch, self.settings)
        self._log(result, batch, data_time)

        self.optimizer.zero_grad()
        self.grad_scaler.scale(result.total).backward()
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        self._update_teacher()

    def _update_teacher(self) -> None:
        _share_running_statistics(self.student)
        # In burn-in the step stays 0, whose keep rate is 0: the teacher is the student, and so it
        # is when mutual learning begins.
        step = max(0, self.iter + 1 - self.cfg.SEMI.BURN_IN_ITERS)
        rate = keep_rate(step, self.cfg.SEMI.EMA_KEEP_RATE)
        update_teacher(self.teacher, self.student, rate)
        if step == 0 and self.labeler is not self.teacher:
            update_teacher(self.labeler, self.student, keep_rate=0.0)

    def _log(self, result: StepResult, batch: Batch, data_time: float) -> None:
        """Write what all processes measured, averaged; all of them stop at a loss gone wrong."""
        names = [*result.losses, *result.metrics]
        measured = [value.detach() for value in (result.losses | result.metrics).values()]
        # One transfer from the device for all of them.
        values = torch.stack([v.to(self.device, torch.float32) for v in measured]).tolist()
        mine = dict(zip(names, values, strict=True))
        everyone = comm.all_gather({"data_time": data_time, "values": mine, "unread": batch.unread})
        self.unreadable.update([e["unread"] for e in everyone], read=len(batch.unlabeled))
        self.storage.put_scalar("data/unreadable", self.unreadable.files, smoothing_hint=False)
        if not all(math.isfinite(e["values"][name]) for e in everyone for name in result.losses):
            raise FloatingPointError(
                f"a loss became infinite or NaN in iteration {self.iter}; no weight was changed. "
                f"Losses here: {mine}. Images here: {batch.file_names}"
            )
        averages = {name: _mean([e["values"][name] for e in everyone]) for name in names}
        if HIGHEST_SCORE in names:
            averages[HIGHEST_SCORE] = max(e["values"][HIGHEST_SCORE] for e in everyone)
        total = sum(averages[name] for name in result.losses)
        known = {name: value for name, value in averages.items() if not math.isnan(value)}
        slowest = max(e["data_time"] for e in everyone)
        self.storage.put_scalars(data_time=slowest, total_loss=total, **known)

    # -- parts ------------------------------------------------------------------------------------

    def _build_loader(self) -> torch.utils.data.DataLoader:
        cfg = self.cfg
        mapper = ViewMapper(cfg)
        dataset = StreamDataset(self.sets.labeled, self.sets.unlabeled, mapper, self._seed)
        schedule = BatchSchedule(
            labeled_batch=cfg.SOLVER.IMS_PER_BATCH,
            unlabeled_batch=cfg.SOLVER.IMS_PER_BATCH_UNLABELED,
            burn_in=cfg.SEMI.BURN_IN_ITERS,
            start=self.start_iter,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
        )
        return build_loader(dataset, schedule, cfg.DATALOADER.NUM_WORKERS)

    def _evaluate(self) -> dict:
        done = min(self.iter + 1, self.max_iter)  # at the end of training iter is max_iter
        burning_in = done <= self.cfg.SEMI.BURN_IN_ITERS
        return evaluate_both(self.cfg, self.teacher, self.student, alike=burning_in)

    def state_dict(self) -> dict:
        """What resuming needs beside the weights of student and teacher."""
        return super().state_dict() | {
            # The last iteration done: Detectron2 counts on once training is over, which is when
            # the last evaluation saves its teacher if it is the best.
            "iteration": min(self.iter, self.max_iter - 1),
            "seed": self._seed,
            "data": self.sets.fingerprint,
            "optimizer": self.optimizer.state_dict(),
            "grad_scaler": self.grad_scaler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        self.sets.check_same(state_dict.get("data", {}), self.cfg.DATASETS.ALLOW_CHANGED)
        super().load_state_dict(state_dict)
        self._seed = state_dict["seed"]
        self.optimizer.load_state_dict(state_dict["optimizer"])
        if self.grad_scaler.is_enabled() and state_dict["grad_scaler"]:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _amp_dtype(cfg: CfgNode) -> torch.dtype:
    known = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    if cfg.SOLVER.AMP.DTYPE not in known:
        raise UsageError(f"SOLVER.AMP.DTYPE is {cfg.SOLVER.AMP.DTYPE!r}; choose of {list(known)}")
    return known[cfg.SOLVER.AMP.DTYPE]


def _distributed(student: SemiSupervisedRCNN) -> nn.Module:
    on_gpu = student.device.type == "cuda"
    return create_ddp_model(
        student, broadcast_buffers=False, device_ids=[comm.get_local_rank()] if on_gpu else None
    )


@torch.no_grad()
def _share_running_statistics(student: nn.Module) -> None:
    """Gives all processes the first one's batch norm statistics; without, teachers would differ."""
    if comm.get_world_size() == 1:
        return
    for module in student.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            for statistics in module.buffers(recurse=False):
                torch.distributed.broadcast(statistics, src=0)


def _mean(values: list[float]) -> float:
    """Mean of what was measured; NaN if no process measured anything."""
    measured = [value for value in values if not math.isnan(value)]
    return sum(measured) / len(measured) if measured else math.nan


def _log_effective_values(cfg: CfgNode, sets: TrainingSets) -> None:
    world_size = comm.get_world_size()
    labeled, unlabeled = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH_UNLABELED
    mutual = max(0, cfg.SOLVER.MAX_ITER - cfg.SEMI.BURN_IN_ITERS)
    epochs = mutual * unlabeled / len(sets.unlabeled) if sets.unlabeled else 0.0
    logger.info(
        "Effective values on %d process(es): %d labeled + %d unlabeled images an iteration "
        "(%d + %d each), learning rate %g, %d iterations of which %d burn-in; "
        "%.1f epochs of %d labeled and %.1f epochs of %d unlabeled images",
        world_size,
        labeled,
        unlabeled,
        labeled // world_size,
        unlabeled // world_size,
        cfg.SOLVER.BASE_LR,
        cfg.SOLVER.MAX_ITER,
        min(cfg.SEMI.BURN_IN_ITERS, cfg.SOLVER.MAX_ITER),
        cfg.SOLVER.MAX_ITER * labeled / len(sets.labeled),
        len(sets.labeled),
        epochs,
        len(sets.unlabeled),
    )
