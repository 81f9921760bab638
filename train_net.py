#!/usr/bin/env python
"""Train a detector from few labeled and many unlabeled images, resume, or evaluate.

The command line is Detectron2's own (``--help`` shows it), and ``--method``:

    python train_net.py --num-gpus 2 --config-file configs/quickstart.yaml
    python train_net.py --num-gpus 2 --config-file configs/quickstart.yaml \\
        --method configs/methods/soft_teacher.yaml
    python train_net.py --num-gpus 2 --config-file configs/quickstart.yaml --resume
    python train_net.py --config-file configs/quickstart.yaml --eval-only MODEL.WEIGHTS model.pth

torchrun starts it as well, without ``--num-gpus``. Stops and restarts:
docs/reliability.md.
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
from locreweight.config import load_config
from locreweight.data.training_sets import register_datasets
from locreweight.engine import (
    SemiSupervisedTrainer,
    argument_parser,
    check_device,
    evaluate,
    launch,
    load_for_evaluation,
)
from locreweight.engine.folder_lock import claim
from locreweight.engine.run_record import write_run_record
from locreweight.errors import UsageError
from locreweight.installed_detectron2 import describe_detectron2
from locreweight.world_size import scale_to_world_size


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config, with loggers, seeds and data sets ready."""
    # Programs that come with Detectron2's own arguments have no method.
    cfg = load_config(args.config_file, args.opts, getattr(args, "method", ""))
    if not args.eval_only:
        cfg = scale_to_world_size(cfg, comm.get_world_size())
    cfg.freeze()
    check_device(cfg.MODEL.DEVICE)
    register_datasets(cfg, training=not args.eval_only)
    try:
        if comm.is_main_process() and not args.eval_only:
            claim(Path(cfg.OUTPUT_DIR))
        default_setup(cfg, args)
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="locreweight")
        logging.getLogger("locreweight").info("Detectron2 %s", describe_detectron2())
    except OSError as error:
        raise UsageError(f"cannot write into OUTPUT_DIR {cfg.OUTPUT_DIR!r}: {error}") from error
    return cfg


def main(args: argparse.Namespace) -> dict:
    """One process of the run."""
    cfg = setup(args)
    if args.eval_only:
        model = build_model(cfg)
        held = load_for_evaluation(cfg, model)
        logging.getLogger("locreweight").info("evaluating %s of %s", held, cfg.MODEL.WEIGHTS)
        return evaluate(cfg, model)
    trainer = SemiSupervisedTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if comm.is_main_process() and trainer.start_iter < trainer.max_iter:
        write_run_record(Path(cfg.OUTPUT_DIR), sys.argv, comm.get_world_size())
    return trainer.train()


if __name__ == "__main__":
    launch(main, argument_parser().parse_args())
