"""Trainer for semi-supervised detectors: burn-in on labeled images, then teacher and student."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.engine.hooks import HookBase
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm

from ..checkpoint.checkpointer import (
    FINAL,
    CheckpointContents,
    CheckpointDescription,
    TeacherCheckpointer,
)
from ..checkpoint.files import list_checkpoints
from ..checkpoint.loading import check_weights_exist
from ..checkpoint.timm_weights import find_pretrained
from ..config_checks import check_supported
from ..config_scaling import scale_to_world_size
from ..data.loader import Batch, StreamDataset, TwoStreamBatchSampler, build_loader
from ..data.mapper import ViewMapper
from ..data.training_sets import load_training_sets
from ..data.unreadable import UnreadableImageCounter
from ..ema import keep_rate
from ..errors import UsageError
from ..modeling.committee import members_of
from ..run_files import METRICS_FILE
from .agreement import check_same_data
from .console import CONSOLE
from .evaluation import (
    count_test_images,
    describe_results,
    evaluate_teacher_and_student,
    main_metric,
    threshold_metric,
    write_ground_truth,
)
from .hooks import (
    EarlyStopping,
    FinalCheckpoint,
    NoPseudoLabelWarning,
    PeriodicCheckpoint,
    PeriodicEvaluation,
    PreemptionCheckpoint,
    ResumableBestCheckpointer,
)
from .models import Models
from .optimizer import RunningStatistics, SkipNonFiniteOptimizer, amp_dtype
from .panels import PseudoLabelPanels
from .preemption import STOP_REQUEST, leave_signals_to_trainer
from .process_change import ProcessChange
from .progress import Progress
from .remaining_time import RemainingTime, Schedule
from .resumable_trainer import ResumableTrainer
from .skipped_steps import SkippedSteps
from .startup_checks import check_burn_in, log_effective_values
from .step_metrics import DeferredMetrics, StepReport, average_metrics, describe_problems
from .training_step import StepResult, StepSettings, training_step
from .writers import ResumableWriter, truncate_after

logger = logging.getLogger(__name__)


class SemiSupervisedTrainer(ResumableTrainer):
    """Trains a student on labeled and unlabeled images, and its EMA teacher.

    Attributes:
        cfg: the effective config, scaled to the number of GPUs.
        student: the model that is optimized.
        teacher: the moving average of the student, which is the result of training.
        pseudo_labeler: the model that makes pseudo-labels. It is the teacher itself, or, for
            methods that freeze it, a copy from the end of burn-in.
        models: all students and teachers. The three above are the first ones.
        model: the students, wrapped in DistributedDataParallel if there are several processes.
        optimizer: updates the students.
        sets: the training images.
    """

    # -- build ------------------------------------------------------------------------------------

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: its data sets are registered by :func:`.data.training_sets.register_datasets`.

        Raises:
            UsageError: for any mistake in the config or the data.
        """
        check_supported(cfg)
        self.cfg = cfg = scale_to_world_size(cfg, comm.get_world_size())
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        super().__init__(seed, start_iter=0, max_iter=cfg.SOLVER.MAX_ITER)
        check_weights_exist(cfg.MODEL.WEIGHTS)
        if not list_checkpoints(Path(cfg.OUTPUT_DIR)):  # a resumed run does not need them
            find_pretrained(cfg)
        self.settings = StepSettings.from_config(cfg)
        self.sets = load_training_sets(cfg)
        check_same_data(cfg, self.sets)
        self.unreadable = UnreadableImageCounter(cfg.DATASETS.CHECKS.MAX_UNREADABLE_SHARE)

        self.models = models = Models(cfg, self.settings.method)
        self.student = members_of(models.students)[0]
        self.teacher = members_of(models.teachers)[0]
        self.pseudo_labeler = members_of(models.pseudo_labelers)[0]
        self.model = models.trained

        self._amp_dtype = amp_dtype(cfg)
        self.optimizer = SkipNonFiniteOptimizer(cfg, models.students, self._amp_dtype)
        self._statistics = RunningStatistics(models.students)
        self._skipped = SkippedSteps(cfg.OUTPUT_DIR, cfg.SOLVER.MAX_SKIPPED_STEPS)
        self._deferred_metrics = DeferredMetrics()
        self._batches: Iterator[Batch] | None = None
        write_ground_truth(cfg)
        remaining_time = RemainingTime(Schedule.from_config(cfg, count_test_images(cfg)))
        self._writer = ResumableWriter(cfg.OUTPUT_DIR, remaining_time)
        self._progress = Progress(remaining_time)
        self._process_change: ProcessChange | None = None
        self._best_model: ResumableBestCheckpointer | None = None
        self._early_stopping: EarlyStopping | None = None
        this = weakref.proxy(self)
        self.checkpointer = TeacherCheckpointer(
            self.teacher,
            cfg.OUTPUT_DIR,
            description=CheckpointDescription(cfg.dump(), self.sets.class_names),
            trusted=cfg.MODEL.TRUST_WEIGHTS,
            keep=cfg.SOLVER.KEEP_CHECKPOINTS,
            score_threshold=lambda: this._best_threshold(),
            student=self.student,
            trainer=this,
            **models.further_parts,
        )
        self.register_named_hooks(self.build_hooks())
        if comm.is_main_process():
            self.register_hooks([self._progress])
        log_effective_values(cfg, self.sets)

    def build_hooks(self) -> dict[str, HookBase]:
        """Build the hooks, in the order in which they run after each step.

        All processes have the same hooks, except that only the main process draws panels.

        Returns:
            name -> hook. Checkpoints refer to hooks by these names, so they must not change.
        """
        cfg, optimizer = self.cfg, self.optimizer.torch_optimizer
        evaluation = PeriodicEvaluation(cfg.TEST.EVAL_PERIOD, self._evaluate)
        has_test_set = bool(cfg.DATASETS.TEST)
        named_hooks: dict[str, HookBase] = {
            "iteration_timer": hooks.IterationTimer(),
            "lr_schedule": hooks.LRScheduler(optimizer, build_lr_scheduler(cfg, optimizer)),
            "no_pseudo_label_warning": NoPseudoLabelWarning(cfg.SEMI.PSEUDO_LABEL_THRESHOLD),
            # A requested stop ends the process in this hook. A resumed run first runs the hooks
            # after it.
            "preemption_checkpoint": PreemptionCheckpoint(
                self.checkpointer, evaluation if has_test_set else None
            ),
        }
        if has_test_set:
            named_hooks["evaluation"] = evaluation
            self._best_model = named_hooks["best_model"] = ResumableBestCheckpointer(
                cfg.TEST.EVAL_PERIOD, self.checkpointer, main_metric(cfg)
            )
            is_supervised = cfg.SEMI.BURN_IN_ITERS >= cfg.SOLVER.MAX_ITER
            self._early_stopping = named_hooks["early_stopping"] = EarlyStopping(
                self._best_model,
                patience=cfg.SOLVER.EARLY_STOPPING_PATIENCE,
                eval_period=cfg.TEST.EVAL_PERIOD,
                burn_in=0 if is_supervised else cfg.SEMI.BURN_IN_ITERS,
            )
        if comm.is_main_process() and self.sets.monitored:
            named_hooks["panels"] = PseudoLabelPanels.from_config(
                cfg, self.pseudo_labeler, self.sets, self._amp_dtype
            )
        named_hooks["metrics"] = self._writer
        named_hooks["periodic_checkpoint"] = PeriodicCheckpoint(
            self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD
        )
        named_hooks["final_checkpoint"] = FinalCheckpoint(self.checkpointer)
        return named_hooks

    def _evaluate(self) -> dict:
        burning_in = self.iter + 1 <= self.cfg.SEMI.BURN_IN_ITERS
        self._progress.show_evaluation()
        with STOP_REQUEST.released():  # a checkpoint was just saved, so nothing would be lost
            results = evaluate_teacher_and_student(
                self.cfg,
                self.teacher,
                self.student,
                iteration=self.iter + 1,
                identical=burning_in,
            )
        if comm.is_main_process():
            assert self._best_model is not None
            best = self._best_model.best_metric
            text = describe_results(results, main_metric(self.cfg), best, identical=burning_in)
            CONSOLE.info("iter %d: %s", self.iter + 1, text)
        return results

    def ends_early(self, done: int) -> bool:
        return self._early_stopping is not None and self._early_stopping.is_due(done)

    @property
    def is_finished(self) -> bool:
        ended_early = self.ends_early(self.start_iter) and not self._unfinished_hooks()
        final_file = Path(self.cfg.OUTPUT_DIR, f"{FINAL}.pth")
        return super().is_finished or (ended_early and final_file.is_file())

    def _best_threshold(self) -> float | None:
        """Score threshold with the best F1 of the current teacher; None if it is not evaluated."""
        if not (self.cfg.DATASETS.TEST and hasattr(self, "storage")):  # before training
            return None
        unknown = (None, -1)
        value, iteration = self.storage.latest().get(threshold_metric(self.cfg), unknown)
        return value if iteration == self.iter else None

    def _build_loader(self) -> torch.utils.data.DataLoader:
        cfg = self.cfg
        method = self.settings.method
        mapper = ViewMapper(cfg, strong_views=method.num_members if method.own_strong_views else 1)
        dataset = StreamDataset(self.sets.labeled, self.sets.unlabeled, mapper, self.seed)
        batch_sampler = TwoStreamBatchSampler(
            labeled_batch=cfg.SOLVER.IMS_PER_BATCH,
            unlabeled_batch=cfg.SOLVER.IMS_PER_BATCH_UNLABELED,
            burn_in=cfg.SEMI.BURN_IN_ITERS,
            start=self.start_iter,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
        )
        return build_loader(
            dataset,
            batch_sampler,
            cfg.DATALOADER.NUM_WORKERS,
            worker_init_fn=leave_signals_to_trainer,
            pin_memory=self.device.type == "cuda",
        )

    @property
    def device(self) -> torch.device:
        return self.student.device

    # -- resume -----------------------------------------------------------------------------------

    def resume_or_load(self, resume: bool) -> None:
        """Resume from the last checkpoint in ``OUTPUT_DIR``, or start from ``MODEL.WEIGHTS``.

        Args:
            resume: whether to use the checkpoints in ``OUTPUT_DIR``. If there are none, training
                starts from ``MODEL.WEIGHTS``.

        Raises:
            UsageError: if a checkpoint does not fit this run.
        """
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.start_iter > 0:
            CONSOLE.info("resumed after iteration %d", self.start_iter)
            if self._process_change:
                self._convert_files(self._process_change)
        else:
            if resume:
                self._warn_of_weights_of_run()
            has_weights = self.checkpointer.contents is not None
            random = self.checkpointer.mismatched_weights if has_weights else None
            self.models.copy_loaded_weights(random)
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise UsageError(
                f"the processes would start at different iterations, {starts}: OUTPUT_DIR must be "
                "on a disk that all machines share"
            )
        self._writer.truncate_on_resume = resume
        if resume and comm.is_main_process():
            truncate_after(self._skipped.file, self.start_iter - 1)

    def _warn_of_weights_of_run(self) -> None:
        if self.checkpointer.contents is CheckpointContents.TEACHER:
            logger.warning(
                "NOTHING TO RESUME: there is no checkpoint in OUTPUT_DIR %r, so a new run starts "
                "at iteration 0, from the teacher's weights in %s. To continue the run that wrote "
                "that checkpoint, stop this one and set OUTPUT_DIR to the folder of that run",
                self.cfg.OUTPUT_DIR,
                self.cfg.MODEL.WEIGHTS,
            )

    def state_dict(self) -> dict:
        """State for resuming, except the weights of student and teacher."""
        return super().state_dict() | {
            "data": self.sets.fingerprint,
            "burn_in": self.cfg.SEMI.BURN_IN_ITERS,
            "processes": comm.get_world_size(),
            **self.optimizer.state_dict(),
            "skipped_steps": self._skipped.state_dict(),
            "method": {self.cfg.SEMI.METHOD: self.settings.method.state_dict()},
        }

    def load_state_dict(self, state_dict: dict) -> None:
        self.sets.check_same(state_dict.get("data", {}), self.cfg.DATASETS.CHECKS.ALLOW_CHANGED)
        change = ProcessChange.between(state_dict, self.cfg, comm.get_world_size())
        if change:
            state_dict = change.convert_state(state_dict)
        self._process_change = change
        check_burn_in(
            previous=state_dict["burn_in"],
            current=self.cfg.SEMI.BURN_IN_ITERS,
            done=state_dict["iteration"] + 1,
        )
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict)
        if change:
            schedule = self._named_hooks["lr_schedule"].scheduler
            groups = self.optimizer.torch_optimizer.param_groups
            for group, rate in zip(groups, schedule.get_lr(), strict=True):
                group["lr"] = rate
        self._skipped.load_state_dict(state_dict["skipped_steps"])
        # Checkpoints of version 0.1.0 have no such state, and those of another method another one.
        if state := state_dict.get("method", {}).get(self.cfg.SEMI.METHOD):
            self.settings.method.load_state_dict(state)

    def _convert_files(self, change: ProcessChange) -> None:
        """Convert the files of a run that had another number of processes."""
        CONSOLE.info("%s", change.describe(self.cfg))
        # Without this checkpoint, the next start would convert the files again.
        saved = self.checkpointer.save(PreemptionCheckpoint.NAME)
        if not comm.is_main_process():
            return
        if not saved:
            folder = self.cfg.OUTPUT_DIR
            raise UsageError(f"no checkpoint could be saved to {folder!r}: free space on the disk")
        change.convert_lines(Path(self.cfg.OUTPUT_DIR, METRICS_FILE))
        change.convert_lines(self._skipped.file)

    # -- train ------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Train to the last iteration.

        Returns:
            name -> latest result of the evaluation, on the main process; elsewhere empty.
        """
        folder = self.cfg.OUTPUT_DIR
        if self.is_finished:
            text = f"this run has already reached SOLVER.MAX_ITER = {self.max_iter}"
            if self.start_iter < self.max_iter:
                text = f"this run has already ended early, after {self.start_iter} iterations"
            CONSOLE.info("%s; its results are in %s", text, folder)
            return {}
        self.run_loop()
        if comm.is_main_process():
            ended_early = self.iter < self.max_iter
            reason = "; ended early because the teacher does not get better" if ended_early else ""
            done = self.iter + 1 if ended_early else self.max_iter
            first, duration = self.start_iter + 1, self._progress.duration
            CONSOLE.info("trained iterations %d to %d in %s%s", first, done, duration, reason)
            CONSOLE.info("the trained model is %s", Path(folder, f"{FINAL}.pth"))
        latest = self.storage.latest()
        return {name: value for name, (value, _) in latest.items() if "bbox/" in name}

    def before_train(self) -> None:
        super().before_train()
        # Not earlier: the loader begins at the iteration that the run is resumed from.
        if self.start_iter < self.max_iter:
            self._batches = iter(self._build_loader())

    # -- one iteration ----------------------------------------------------------------------------

    def run_step(self) -> None:
        assert self._batches is not None
        start = time.perf_counter()
        batch = next(self._batches).to(self.device)
        data_time = time.perf_counter() - start

        self._statistics.backup()
        result, report = self._compute_losses(batch, data_time)
        gathered = comm.all_gather((report, result.observations if result else []))
        reports = [report for report, _ in gathered]
        observations = [x for _, observed in gathered for x in observed]
        self.stop_agreed = any(report.stop for report in reports)
        self.unreadable.update([report.unread for report in reports], read=len(batch.unlabeled))
        if result is None or any(report.failure for report in reports):
            self._statistics.restore()
            self._deferred_metrics.add(self.iter, reports)
        else:
            self._update(result, reports)
            if known := [x for x in observations if x is not None]:
                self.settings.method.update_state(known)
        self.storage.put_scalar("data/unreadable", self.unreadable.files, smoothing_hint=False)
        if self._metrics_are_due():
            self._log_deferred_metrics()

    def _compute_losses(
        self, batch: Batch, data_time: float
    ) -> tuple[StepResult | None, StepReport]:
        """The losses (None if the forward pass failed), and the report for the other processes."""
        report = StepReport(batch.file_names, data_time, STOP_REQUEST.received, batch.read_errors)
        autocast = self.cfg.SOLVER.AMP.ENABLED
        try:
            with torch.autocast(self.device.type, dtype=self._amp_dtype, enabled=autocast):
                return training_step(
                    self.model, self.models.pseudo_labelers, batch, self.settings
                ), report
        except FloatingPointError as error:  # Detectron2 raises it for non-finite proposals
            return None, replace(report, failure=str(error))

    def _update(self, result: StepResult, reports: list[StepReport]) -> None:
        """Update the students by their losses and the teachers by the students.

        Nothing here waits for the device.
        """
        largest = self.optimizer.step(result.total)
        self._statistics.restore(unless=torch.stack(list(largest.values())).isfinite().all())
        self._statistics.broadcast()
        # During burn-in the EMA step and keep rate are 0, so the teacher equals the student.
        step = max(0, self.iter + 1 - self.cfg.SEMI.BURN_IN_ITERS)
        rate = keep_rate(step, self.cfg.SEMI.EMA_KEEP_RATE)
        self.models.update_teachers(rate, burning_in=step == 0)
        result = replace(result, metrics=result.metrics | self.optimizer.loss_scale)
        self._deferred_metrics.add(self.iter, reports, result, {"gradients": largest})

    def _metrics_are_due(self) -> bool:
        """Whether metrics are logged, evaluated or saved in a checkpoint after this iteration."""
        cfg, done = self.cfg, self.iter + 1
        periods = self._writer.period, cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD
        is_last = done >= self.max_iter
        return self.stop_agreed or is_last or any(p > 0 and done % p == 0 for p in periods)

    def _log_deferred_metrics(self) -> None:
        """Log the metrics of all processes, and the skipped steps.

        Raises:
            UsageError: if too many steps in a row were skipped.
        """
        for iteration, reports in self._deferred_metrics.fetch():
            if not describe_problems(reports):
                self.storage.put_scalars(**average_metrics(reports), cur_iter=iteration)
            self._skipped.update(iteration, reports)
            self.storage.put_scalar(
                "skipped_steps", self._skipped.total, smoothing_hint=False, cur_iter=iteration
            )
