#!/usr/bin/env python
"""Train a detector on labeled and unlabeled images, resume training, or evaluate a checkpoint.

The command line is Detectron2's (see ``--help``) plus ``--method`` and ``--timeout``:

    python train_net.py --num-gpus 2 --config-file configs/quickstart.yaml
    python train_net.py --num-gpus 2 --config-file configs/quickstart.yaml --method soft_teacher
    python train_net.py --num-gpus 2 --config-file configs/quickstart.yaml --resume
    python train_net.py --config-file configs/quickstart.yaml --eval-only MODEL.WEIGHTS model.pth

It can also be started by torchrun, without ``--num-gpus``. docs/reliability.md describes stops and
restarts.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

import locreweight.modeling  # noqa: F401  (registers the model)
from locreweight.config import load_config, scale_to_world_size
from locreweight.data.training_sets import register_datasets
from locreweight.engine import (
    SemiSupervisedTrainer,
    argument_parser,
    check_device,
    evaluate,
    launch,
    load_for_evaluation,
)
from locreweight.engine.run_record import write_run_record
from locreweight.engine.startup_checks import lock_output_dir
from locreweight.errors import UsageError
from locreweight.installed_detectron2 import describe_detectron2


def setup(args: argparse.Namespace) -> CfgNode:
    """Load the config and set up loggers, seeds and data sets; returns the frozen config."""
    # Other programs may use Detectron2's argument parser, which has no --method.
    cfg = load_config(args.config_file, args.opts, getattr(args, "method", ""))
    if not args.eval_only:
        cfg = scale_to_world_size(cfg, comm.get_world_size())
    cfg.freeze()
    check_device(cfg.MODEL.DEVICE)
    register_datasets(cfg, training=not args.eval_only)
    try:
        if comm.is_main_process() and not args.eval_only:
            lock_output_dir(Path(cfg.OUTPUT_DIR))
        default_setup(cfg, args)
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="locreweight")
        logging.getLogger("locreweight").info("Detectron2 %s", describe_detectron2())
    except OSError as error:
        raise UsageError(f"cannot write to OUTPUT_DIR {cfg.OUTPUT_DIR!r}: {error}") from error
    return cfg


def main(args: argparse.Namespace) -> dict:
    """Train or evaluate in one process; returns the results."""
    cfg = setup(args)
    if args.eval_only:
        model = build_model(cfg)
        contents = load_for_evaluation(cfg, model)
        logging.getLogger("locreweight").info(
            "evaluating %s of %s", contents.value, cfg.MODEL.WEIGHTS
        )
        return evaluate(cfg, model)
    trainer = SemiSupervisedTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if comm.is_main_process() and trainer.start_iter < trainer.max_iter:
        write_run_record(Path(cfg.OUTPUT_DIR), sys.argv, comm.get_world_size())
    return trainer.train()


if __name__ == "__main__":
    launch(main, argument_parser().parse_args())
