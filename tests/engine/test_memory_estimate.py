"""Estimated memory of training."""

import pytest
import torch
from detectron2.modeling import build_model

from locreweight.engine.memory_estimate import estimate_memory
from tests.modeling.tiny_model import BACKBONES, tiny_config


@pytest.mark.parametrize("backbone", BACKBONES)
def test_estimate_counts_models_exactly(backbone):
    cfg = tiny_config(BACKBONES[backbone])
    torch.manual_seed(0)
    model_bytes = sum(p.numel() * 4 for p in build_model(cfg).parameters())
    one = estimate_memory(cfg, [(64, 64)], num_gpus=1)
    assert one.models == 4 * model_bytes  # student, teacher, gradients and momentum
    assert estimate_memory(cfg, [(64, 64)], num_gpus=2).models == 5 * model_bytes
    stac = tiny_config(BACKBONES[backbone] | {"SEMI.METHOD": "STAC"})
    assert estimate_memory(stac, [(64, 64)], num_gpus=1).models == 5 * model_bytes


def test_estimate_grows_with_batch_views_and_size():
    settings = {"SOLVER.IMS_PER_BATCH": 2, "SOLVER.IMS_PER_BATCH_UNLABELED": 6}
    plain = estimate_memory(tiny_config(settings), [(64, 64)], num_gpus=1)
    assert plain.images == 8
    assert estimate_memory(tiny_config(settings), [(64, 64)], num_gpus=2).images == 4
    two_views = tiny_config(settings | {"INPUT.AUGMENTATION_POLICY": "UnbiasedTeacherPolicy"})
    assert estimate_memory(two_views, [(64, 64)], num_gpus=1).images == 10
    mixpl = tiny_config(settings | {"SEMI.METHOD": "MixPL"})
    assert estimate_memory(mixpl, [(64, 64)], num_gpus=1).images == 9  # and the mosaic
    assert estimate_memory(mixpl, [(64, 64)], num_gpus=2).images == 5
    supervised = tiny_config(settings | {"SOLVER.MAX_ITER": 5, "SEMI.BURN_IN_ITERS": 5})
    assert estimate_memory(supervised, [(64, 64)], num_gpus=1).images == 2
    large = {"INPUT.MIN_SIZE_TRAIN": [128, 128], "INPUT.MAX_SIZE_TRAIN": 128}
    larger = estimate_memory(tiny_config(settings | large), [(64, 64)], num_gpus=1)
    assert 2 < larger.per_image / plain.per_image < 5  # four times the pixels, the same proposals
