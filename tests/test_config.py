"""Config keys are explained and read, config files load, and batches scale with the GPUs."""

import re
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

from detectron2.config import CfgNode, get_cfg

from locreweight.config import add_locreweight_config, load_config, scale_to_world_size

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "projects/LocReweightTeacher/locreweight"
CONFIG = PACKAGE / "config.py"
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
BASE = str(ROOT / "configs/Base-LocReweight.yaml")


def leaves(node, prefix=""):
    """Dotted path -> value of all keys below a node."""
    found = {}
    for key, value in node.items():
        inner = isinstance(value, CfgNode)
        found |= leaves(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return found


def new_keys():
    ours = get_cfg()
    add_locreweight_config(ours)
    return sorted(set(leaves(ours)) - set(leaves(get_cfg())))


def reads(source, key):
    """Whether a source reads ``cfg.SEMI.LER``, or ``semi.LER`` after ``semi = cfg.SEMI``."""
    section, name = key.rsplit(".", 1)
    aliases = re.findall(rf"(\w+) = (?:self\.)?cfg\.{re.escape(section)}$", source, re.MULTILINE)
    return any(
        re.search(rf"\b{re.escape(node)}\.{name}\b", source)
        for node in (f"cfg.{section}", *aliases)
    )


def test_there_are_keys_to_check():
    assert {"SEMI.LER", "DATASETS.UNLABELED", "SOLVER.IMS_PER_BATCH_UNLABELED"} <= set(new_keys())
    assert not reads("semi = cfg.SEMI\nother.LER", "SEMI.LER")


@pytest.mark.parametrize("key", new_keys())
def test_every_new_key_is_read(key):
    sources = [file.read_text() for file in PACKAGE.rglob("*.py") if file != CONFIG]
    assert any(reads(source, key) for source in sources)


@pytest.mark.parametrize("key", new_keys())
def test_every_new_key_has_a_comment_above_it(key):
    lines = [line.strip() for line in CONFIG.read_text().splitlines()]
    (line,) = [i for i, text in enumerate(lines) if text.startswith(f"cfg.{key} = ")]
    # Keys that belong together may share a comment.
    while lines[line].startswith("cfg."):
        line -= 1
    assert lines[line].startswith("#")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_config_file_loads(file):
    cfg = load_config(str(file), [])
    assert cfg.MODEL.META_ARCHITECTURE == "SemiSupervisedRCNN"
    assert cfg.VERSION == 2


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_config_file_can_be_scaled(file, world_size):
    cfg = load_config(str(file), [])
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    scaled = scale_to_world_size(cfg, world_size)
    for key in ("IMS_PER_BATCH", "IMS_PER_BATCH_UNLABELED"):
        assert scaled.SOLVER[key] / world_size == cfg.SOLVER[key] / reference


def test_options_go_over_the_file_and_the_file_over_the_defaults():
    assert load_config("", []).SOLVER.BASE_LR != 0.005
    assert load_config(BASE, []).SOLVER.BASE_LR == 0.005
    assert load_config(BASE, ["SOLVER.BASE_LR", "0.1"]).SOLVER.BASE_LR == 0.1


def test_a_config_without_a_file_has_the_defaults():
    ours = get_cfg()
    add_locreweight_config(ours)
    assert load_config("", []) == ours


WRITTEN = {
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.IMS_PER_BATCH_UNLABELED": 16,
    "SOLVER.BASE_LR": 0.005,
    "SOLVER.MAX_ITER": 1800,
    "SOLVER.STEPS": (1200, 1600),
    "SOLVER.WARMUP_ITERS": 400,
    "SOLVER.CHECKPOINT_PERIOD": 200,
    "SEMI.BURN_IN_ITERS": 80,
    "TEST.EVAL_PERIOD": 120,
}
SCALED = {
    1: (2, 8, 0.0025, 3600, (2400, 3200), 800, 400, 160, 240),
    2: tuple(WRITTEN.values()),
    4: (8, 32, 0.01, 900, (600, 800), 200, 100, 40, 60),
    8: (16, 64, 0.02, 450, (300, 400), 100, 50, 20, 30),
}


def written(reference):
    pairs = [str(part) for pair in WRITTEN.items() for part in pair]
    return load_config("", ["SOLVER.REFERENCE_WORLD_SIZE", str(reference), *pairs])


@pytest.mark.parametrize("world_size", SCALED)
def test_batches_and_rate_grow_and_iterations_shrink_with_the_gpus(world_size):
    cfg = written(reference=2)
    scaled = leaves(scale_to_world_size(cfg, world_size))
    assert tuple(scaled[key] for key in WRITTEN) == SCALED[world_size]
    unchanged = set(scaled) - set(WRITTEN) - {"SOLVER.REFERENCE_WORLD_SIZE"}
    assert all(scaled[key] == leaves(cfg)[key] for key in unchanged)
    assert cfg == written(reference=2)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_without_a_reference_the_config_holds_as_written(world_size):
    assert scale_to_world_size(written(reference=0), world_size) == written(reference=0)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_scaling_twice_is_scaling_once(world_size):
    once = scale_to_world_size(written(reference=2), world_size)
    assert scale_to_world_size(once, world_size) == once


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_config_stays_frozen(frozen):
    cfg = written(reference=2)
    if frozen:
        cfg.freeze()
    assert scale_to_world_size(cfg, 4).is_frozen() == frozen


def test_supervised_training_can_be_scaled():
    cfg = load_config("", ["SOLVER.IMS_PER_BATCH_UNLABELED", "0"])
    assert scale_to_world_size(cfg, 2).SOLVER.IMS_PER_BATCH_UNLABELED == 0
