#!/usr/bin/env python
"""Train a detector on labeled and unlabeled images, resume training, or evaluate a checkpoint.

The command line is Detectron2's (see ``--help``) plus ``--method``, ``--overwrite``, ``--verbose``
and ``--timeout``. Flags and KEY VALUE pairs can be given in any order:

    python train_net.py --num-gpus 2 --config-file configs/quickstart.yaml
    python train_net.py --num-gpus 2 --config-file configs/quickstart.yaml --method soft_teacher
    python train_net.py --num-gpus 2 --config-file configs/quickstart.yaml --resume
    python train_net.py --config-file configs/quickstart.yaml --eval-only MODEL.WEIGHTS model.pth

Training never replaces a run. If OUTPUT_DIR holds one, add ``--resume``, use another OUTPUT_DIR,
or add ``--overwrite``, which renames the folder of the old run. ``--eval-only`` writes to
OUTPUT_DIR/evaluation.

It can also be started by torchrun, without ``--num-gpus``. docs/reliability.md describes stops and
restarts.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from locreweight.checkpoint.files import choose_checkpoint
from locreweight.config import load_config
from locreweight.config_checks import check_supported
from locreweight.config_scaling import scale_to_world_size
from locreweight.data.training_sets import register_datasets
from locreweight.engine import (
    SemiSupervisedTrainer,
    argument_parser,
    check_device,
    check_evaluation,
    evaluate,
    launch,
    load_for_evaluation,
)
from locreweight.engine.agreement import (
    check_same_setup,
    check_shared_folder,
    raised_everywhere,
)
from locreweight.engine.console import CONSOLE, LOG_FILE, log_setup, setup_logging
from locreweight.engine.evaluation import results_table
from locreweight.engine.output_folder import prepare_output_dir
from locreweight.engine.run_record import write_run_record
from locreweight.errors import UsageError
from locreweight.installed_detectron2 import describe_detectron2
from locreweight.modeling import build_detector
from locreweight.run_files import EVALUATION_FOLDER


def setup(args: argparse.Namespace) -> CfgNode:
    """Load the config and set up loggers, seeds and data sets; returns the frozen config."""
    with raised_everywhere():
        cfg = _load_config(args)
        check_device(cfg.MODEL.DEVICE)
        register_datasets(cfg, training=not args.eval_only)
    check_same_setup(cfg, args)
    moved = None
    try:
        if not args.eval_only:
            moved = prepare_output_dir(
                Path(cfg.OUTPUT_DIR),
                resume=args.resume,
                overwrite=getattr(args, "overwrite", False),
                used_files=_used_files(args, cfg),
            )
            check_shared_folder(Path(cfg.OUTPUT_DIR))
        setup_logging(cfg.OUTPUT_DIR, verbose=getattr(args, "verbose", False))
        log_setup(cfg, args)
    except OSError as error:
        raise UsageError(f"cannot write to OUTPUT_DIR {cfg.OUTPUT_DIR!r}: {error}") from error
    logger = logging.getLogger("locreweight")
    logger.info("Detectron2 %s", describe_detectron2())
    CONSOLE.info("log: %s", Path(cfg.OUTPUT_DIR, LOG_FILE))
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    if not args.eval_only:  # benchmarks of cuDNN take longer than the evaluation of a small set
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    if moved:
        logger.warning("moved the earlier run in OUTPUT_DIR %s to %s", cfg.OUTPUT_DIR, moved)
    return cfg


def _load_config(args: argparse.Namespace) -> CfgNode:
    # Other programs may use Detectron2's argument parser, which lacks our flags.
    cfg = load_config(args.config_file, args.opts, getattr(args, "method", ""))
    if cfg.MODEL.WEIGHTS and Path(cfg.MODEL.WEIGHTS).is_dir():
        cfg.MODEL.WEIGHTS = str(choose_checkpoint(Path(cfg.MODEL.WEIGHTS)))
    check_supported(cfg, training=not args.eval_only)
    if args.eval_only:
        if getattr(args, "overwrite", False):
            raise UsageError("--overwrite is for training: remove it, or remove --eval-only")
        cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR, EVALUATION_FOLDER))  # a run's record stays as is
    else:
        cfg = scale_to_world_size(cfg, comm.get_world_size())
    cfg.freeze()
    return cfg


def _used_files(args: argparse.Namespace, cfg: CfgNode) -> list[str]:
    """Local files that training reads after the config."""
    files = [args.config_file, cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED]
    files.append(cfg.DATASETS.SPLIT_FILE)
    return [file for file in files if file and "://" not in file]


def main(args: argparse.Namespace) -> dict:
    """Train or evaluate in one process; returns the results."""
    cfg = setup(args)
    if args.eval_only:
        check_evaluation(cfg)
        model = build_detector(cfg)
        contents = load_for_evaluation(cfg, model)
        CONSOLE.info("evaluating %s of %s", contents.value, cfg.MODEL.WEIGHTS)
        results = evaluate(cfg, model, model_name=contents.value, show_progress=True)
        if comm.is_main_process():
            CONSOLE.info("%s", results_table(results))
        return results
    trainer = SemiSupervisedTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    starts = trainer.start_iter < trainer.max_iter and not trainer.is_finished
    if comm.is_main_process() and starts:
        write_run_record(Path(cfg.OUTPUT_DIR), sys.argv, comm.get_world_size())
    return trainer.train()


if __name__ == "__main__":
    launch(main, argument_parser().parse_args())
