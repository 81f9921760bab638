#!/usr/bin/env python
"""Train a detector from few labeled and many unlabeled images, resume, or evaluate.

The command line is Detectron2's own (``--help`` shows it):

    python train_net.py --num-gpus 2 --config-file configs/quickstart.yaml
    python train_net.py --num-gpus 2 --config-file configs/quickstart.yaml --resume
    python train_net.py --config-file configs/quickstart.yaml --eval-only MODEL.WEIGHTS model.pth
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException

import locreweight.modeling  # noqa: F401  (registers the model)
from locreweight.config import load_config, scale_to_world_size
from locreweight.data.training_sets import register_datasets
from locreweight.engine import SemiSupervisedTrainer, evaluate, load_for_evaluation
from locreweight.engine.run_record import write_run_record
from locreweight.errors import UsageError


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config, with loggers, seeds and data sets ready."""
    cfg = load_config(args.config_file, args.opts)
    if not args.eval_only:
        cfg = scale_to_world_size(cfg, comm.get_world_size())
    cfg.freeze()
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("there is no GPU here: add MODEL.DEVICE cpu SOLVER.AMP.ENABLED False")
    register_datasets(cfg, training=not args.eval_only)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="locreweight")
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


def run(args: argparse.Namespace) -> dict:
    """:func:`main`, where what the user has to put right ends the process with one line."""
    try:
        return main(args)
    except UsageError as error:
        # From a loader's worker the message comes with its traceback, of which it is the end.
        last_line = str(error).strip().splitlines()[-1]
        sys.exit("error: " + last_line.removeprefix("locreweight.data.images.UnreadableImage: "))


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    try:
        launch(
            run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ProcessExitedException as error:
        # One of several processes: it has said why, unless a signal ended it.
        if error.signal_name:
            raise
        sys.exit(error.exit_code)
