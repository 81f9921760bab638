"""Burn-in, mutual learning, and everything around the step."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace

import torch
from detectron2.config import CfgNode
from detectron2.engine import create_ddp_model, hooks
from detectron2.engine.hooks import HookBase
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from torch import nn

from ..checkpoint.checkpointer import (
    CheckpointDescription,
    TeacherCheckpointer,
    check_weights_exist,
)
from ..config import check_supported, scale_to_world_size
from ..data.loader import Batch, BatchSchedule, StreamDataset, UnreadableImages, build_loader
from ..data.mapper import ViewMapper
from ..data.training_sets import load_training_sets
from ..ema import MovingAverage, keep_rate, update_teacher
from ..errors import UsageError
from ..modeling.meta_arch import SemiSupervisedRCNN
from .effective_values import amp_dtype, check_burn_in, log_effective_values
from .evaluation import evaluate_teacher_and_student, main_metric, write_ground_truth
from .hooks import (
    FinalCheckpoint,
    NoPseudoLabelWarning,
    PeriodicCheckpoint,
    PeriodicEvaluation,
    PreemptionCheckpoint,
    ResumableBestCheckpointer,
)
from .optimizer import RunningStatistics, SkipNonFiniteOptimizer
from .panels import PseudoLabelPanels
from .preemption import STOP_REQUEST, leave_signals_to_trainer
from .resumable_trainer import ResumableTrainer
from .skipped_steps import SkippedSteps
from .step_metrics import DeferredMetrics, StepReport, average_metrics, describe_problems
from .training_step import StepResult, StepSettings, training_step
from .writers import ResumableWriter, truncate_after

logger = logging.getLogger(__name__)


class SemiSupervisedTrainer(ResumableTrainer):
    """Trains a student on labeled and unlabeled images, and its teacher with it.

    Attributes:
        cfg: the effective config, scaled to the number of GPUs.
        student: the module that is optimized.
        model: the same, wrapped for several GPUs if there are any.
        teacher: the moving average of the student, which is the result.
        pseudo_labeler: makes the pseudo-labels: the teacher itself, or, for methods that freeze it, a copy
            from the end of burn-in.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: its data sets registered by :func:`.data.training_sets.register_datasets`.

        Raises:
            UsageError: for anything in the config or the data that the user has to put right.
        """
        check_supported(cfg)
        self.cfg = cfg = scale_to_world_size(cfg, comm.get_world_size())
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        super().__init__(seed, start_iter=0, max_iter=cfg.SOLVER.MAX_ITER)
        check_weights_exist(cfg.MODEL.WEIGHTS)
        self.settings = StepSettings.from_config(cfg)
        self.sets = load_training_sets(cfg)
        self.unreadable = UnreadableImages(cfg.DATASETS.CHECKS.MAX_UNREADABLE_SHARE)

        self.student: SemiSupervisedRCNN = build_model(cfg)
        self.model = _distributed(self.student).train()
        # Copied only now that all processes have the same student.
        self.teacher: SemiSupervisedRCNN = build_model(cfg).eval()
        self._average = MovingAverage(self.teacher, self.student)
        self._average.update(keep_rate=0.0)
        self.pseudo_labeler, frozen = self.teacher, {}
        if self.settings.method.frozen_pseudo_labeler:
            self.pseudo_labeler = build_model(cfg).eval()
            frozen = {"pseudo_labeler": self.pseudo_labeler}
        self._amp_dtype = amp_dtype(cfg)
        self.optimizer = SkipNonFiniteOptimizer(cfg, self.student, self._amp_dtype)
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
        self._statistics = RunningStatistics(self.student)
        self._skipped = SkippedSteps(cfg.OUTPUT_DIR, cfg.SOLVER.MAX_SKIPPED_STEPS)
        self._deferred_metrics = DeferredMetrics()
        self._batches: Iterator[Batch] | None = None
        self._writer = ResumableWriter(cfg.OUTPUT_DIR)
        self.register_lasting_hooks(self.build_hooks())
        log_effective_values(cfg, self.sets)

    @property
    def device(self) -> torch.device:
        return self.student.device

    # -- from start to end ------------------------------------------------------------------------

    def resume_or_load(self, resume: bool) -> None:
        """Go on from the last checkpoint in ``OUTPUT_DIR``, or start from ``MODEL.WEIGHTS``."""
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.start_iter > 0:
            logger.info("resumed after iteration %d", self.iter)
        else:
            for module in (self.student, self.pseudo_labeler):
                module.load_state_dict(self.teacher.state_dict())
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise UsageError(
                f"the processes would start at different iterations, {starts}: OUTPUT_DIR has to "
                "lie on a disk that all machines share"
            )
        self._writer.truncate_on_resume = resume
        if resume and comm.is_main_process():
            truncate_after(self._skipped.file, self.start_iter - 1)

    def train(self) -> dict[str, float]:
        """Train to the end; returns the latest results on the main process, by name."""
        if self.is_finished:
            logger.info("this run has already reached SOLVER.MAX_ITER = %d", self.max_iter)
            return {}
        self.run_loop()
        latest = self.storage.latest()
        return {name: value for name, (value, _) in latest.items() if "bbox/" in name}

    def before_train(self) -> None:
        super().before_train()
        # The loader begins where training does, which is known only now.
        if self.start_iter < self.max_iter:
            self._batches = iter(self._build_loader())

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks and those of this project, alike in all processes.

        Only the main process writes files. From the safe point on their order is that in which an
        iteration that was stopped is finished.
        """
        cfg, optimizer = self.cfg, self.optimizer.optimizer
        built: list[HookBase] = [
            hooks.IterationTimer(),
            hooks.LRScheduler(optimizer, build_lr_scheduler(cfg, optimizer)),
            NoPseudoLabelWarning(cfg.SEMI.PSEUDO_LABEL_THRESHOLD),
        ]
        evaluation = PeriodicEvaluation(cfg.TEST.EVAL_PERIOD, self._evaluate)
        built.append(
            PreemptionCheckpoint(self.checkpointer, evaluation if cfg.DATASETS.TEST else None)
        )
        if cfg.DATASETS.TEST:
            write_ground_truth(cfg)
            best = ResumableBestCheckpointer(
                cfg.TEST.EVAL_PERIOD, self.checkpointer, main_metric(cfg)
            )
            built += [evaluation, best]
        if comm.is_main_process() and self.sets.monitored:
            built.append(
                PseudoLabelPanels.from_config(cfg, self.pseudo_labeler, self.sets, self._amp_dtype)
            )
        periodic = PeriodicCheckpoint(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
        return [*built, self._writer, periodic, FinalCheckpoint(self.checkpointer)]

    # -- one iteration ----------------------------------------------------------------------------

    def run_step(self) -> None:
        assert self._batches is not None
        start = time.perf_counter()
        batch = next(self._batches).to(self.device)
        data_time = time.perf_counter() - start

        self._statistics.keep()
        result, report = self._losses(batch, data_time)
        reports = comm.all_gather(report)
        self.stop_agreed = any(report.stop for report in reports)
        self.unreadable.update([report.unread for report in reports], read=len(batch.unlabeled))
        if result is None or any(report.failure for report in reports):
            self._statistics.restore()
            self._deferred_metrics.add(self.iter, reports)
        else:
            self._update(result, reports)
        self.storage.put_scalar("data/unreadable", self.unreadable.files, smoothing_hint=False)
        if self._is_looked_at():
            self._log_deferred_metrics()

    def _losses(self, batch: Batch, data_time: float) -> tuple[StepResult | None, StepReport]:
        """The losses, if the step got so far, and what this process has to tell the others."""
        report = StepReport(batch.file_names, data_time, STOP_REQUEST.received, batch.unread)
        autocast = self.cfg.SOLVER.AMP.ENABLED
        try:
            with torch.autocast(self.device.type, dtype=self._amp_dtype, enabled=autocast):
                return training_step(self.model, self.pseudo_labeler, batch, self.settings), report
        except FloatingPointError as error:  # Detectron2's, of proposals that are not finite
            return None, replace(report, failure=str(error))

    def _update(self, result: StepResult, reports: list[StepReport]) -> None:
        """The student by its losses, the teacher by the student; the host does not wait for it."""
        largest = self.optimizer.step(result.total)
        self._statistics.restore(unless=torch.stack(list(largest.values())).isfinite().all())
        self._statistics.share()
        # In burn-in the step stays 0, whose keep rate is 0: the teacher is the student, and so it
        # is when mutual learning begins.
        step = max(0, self.iter + 1 - self.cfg.SEMI.BURN_IN_ITERS)
        rate = keep_rate(step, self.cfg.SEMI.EMA_KEEP_RATE)
        self._average.update(rate)
        if step == 0 and self.pseudo_labeler is not self.teacher:
            update_teacher(self.pseudo_labeler, self.student, keep_rate=0.0)
        measured = replace(result, metrics=result.metrics | self.optimizer.loss_scale)
        self._deferred_metrics.add(self.iter, reports, measured, {"gradients": largest})

    def _is_looked_at(self) -> bool:
        """Whether somebody asks for what was measured: a log, or a checkpoint, which holds it."""
        cfg, done = self.cfg, self.iter + 1
        periods = self._writer.period, cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD
        is_last = done >= self.max_iter
        return self.stop_agreed or is_last or any(p > 0 and done % p == 0 for p in periods)

    def _log_deferred_metrics(self) -> None:
        """Write what all processes measured, and which steps were left out.

        Raises:
            UsageError: if these were too many in a row.
        """
        for iteration, reports in self._deferred_metrics.fetch():
            problem = describe_problems(reports)
            if not problem:
                self.storage.put_scalars(**average_metrics(reports), cur_iter=iteration)
            self._skipped.judge(iteration, problem, reports)
            self.storage.put_scalar(
                "skipped_steps", self._skipped.total, smoothing_hint=False, cur_iter=iteration
            )

    # -- parts ------------------------------------------------------------------------------------

    def _build_loader(self) -> torch.utils.data.DataLoader:
        cfg = self.cfg
        mapper = ViewMapper(cfg)
        dataset = StreamDataset(self.sets.labeled, self.sets.unlabeled, mapper, self.seed)
        schedule = BatchSchedule(
            labeled_batch=cfg.SOLVER.IMS_PER_BATCH,
            unlabeled_batch=cfg.SOLVER.IMS_PER_BATCH_UNLABELED,
            burn_in=cfg.SEMI.BURN_IN_ITERS,
            start=self.start_iter,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
        )
        return build_loader(
            dataset,
            schedule,
            cfg.DATALOADER.NUM_WORKERS,
            begin_worker=leave_signals_to_trainer,
            pin_memory=self.device.type == "cuda",
        )

    def _evaluate(self) -> dict:
        burning_in = self.iter + 1 <= self.cfg.SEMI.BURN_IN_ITERS
        with STOP_REQUEST.released():  # the safe point is just behind
            return evaluate_teacher_and_student(
                self.cfg, self.teacher, self.student, alike=burning_in
            )

    def state_dict(self) -> dict:
        """What resuming needs beside the weights of student and teacher."""
        return super().state_dict() | {
            "data": self.sets.fingerprint,
            "burn_in": self.cfg.SEMI.BURN_IN_ITERS,
            **self.optimizer.state_dict(),
            "skipped_steps": self._skipped.state_dict(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        self.sets.check_same(state_dict.get("data", {}), self.cfg.DATASETS.CHECKS.ALLOW_CHANGED)
        check_burn_in(self.cfg, before=state_dict["burn_in"], done=state_dict["iteration"] + 1)
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict)
        self._skipped.load_state_dict(state_dict["skipped_steps"])


def _distributed(student: SemiSupervisedRCNN) -> nn.Module:
    on_gpu = student.device.type == "cuda"
    return create_ddp_model(
        student, broadcast_buffers=False, device_ids=[comm.get_local_rank()] if on_gpu else None
    )
