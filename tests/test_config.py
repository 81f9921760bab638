"""Config keys are explained and read, config files load, and batches scale with the GPUs."""

import re
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg

from locreweight.config import (
    add_locreweight_config,
    check_supported,
    load_config,
)
from locreweight.data.recipes import build_recipe
from locreweight.engine.strategies import build_strategy
from locreweight.errors import UsageError
from locreweight.world_size import scale_to_world_size

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "projects/LocReweightTeacher/locreweight"
CONFIG = PACKAGE / "config.py"
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
METHODS = sorted((ROOT / "configs/methods").rglob("*.yaml"))
EXPERIMENTS = [file for file in FILES if file not in METHODS]
QUICKSTART = str(ROOT / "configs/quickstart.yaml")
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


def name_of(file):
    return str(file.relative_to(ROOT / "configs"))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=name_of)
def test_every_config_file_loads(file):
    cfg = load_config(str(file), [])
    assert cfg.MODEL.META_ARCHITECTURE == "SemiSupervisedRCNN"
    assert cfg.VERSION == 2
    check_supported(cfg)


def differences(first, second):
    """The keys whose values are not the same."""
    first, second = leaves(first), leaves(second)
    return {key for key in first if first[key] != second[key]}


@pytest.mark.parametrize("file", EXPERIMENTS, ids=name_of)
def test_a_config_file_differs_from_its_base_in_all_that_it_says(file, tmp_path):
    content = yaml.safe_load(file.read_text())
    bases = content.pop("_BASE_", None)
    if bases is None:
        assert str(file) == BASE
        return
    named = [bases] if isinstance(bases, str) else bases
    alone = tmp_path / "bases.yaml"
    alone.write_text(yaml.dump({"_BASE_": [str(file.parent / base) for base in named]}))
    changed = differences(load_config(str(file), []), load_config(str(alone), []))
    assert set(leaves(CfgNode(content))) == changed


@pytest.mark.parametrize("file", EXPERIMENTS, ids=name_of)
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
    "VIS_PERIOD": 40,
    "SEMI.EMA_KEEP_RATE": 0.25,  # two updates of half the batch keep as much as one: 0.5 * 0.5
}
SCALED = {
    1: (2, 8, 0.0025, 3600, (2400, 3200), 800, 400, 160, 240, 80, 0.5),
    2: tuple(WRITTEN.values()),
    4: (8, 32, 0.01, 900, (600, 800), 200, 100, 40, 60, 20, 0.0625),
    8: (16, 64, 0.02, 450, (300, 400), 100, 50, 20, 30, 10, 0.25**4),
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


@pytest.mark.parametrize(("period", "scaled"), [(0, 0), (1, 1), (9, 3)])
def test_pictures_are_never_switched_off_or_on_by_scaling(period, scaled):
    cfg = load_config(BASE, ["VIS_PERIOD", str(period)])
    assert scale_to_world_size(cfg, 8).VIS_PERIOD == scaled


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_config_stays_frozen(frozen):
    cfg = written(reference=2)
    if frozen:
        cfg.freeze()
    assert scale_to_world_size(cfg, 4).is_frozen() == frozen


def test_supervised_training_can_be_scaled():
    cfg = load_config("", ["SOLVER.IMS_PER_BATCH_UNLABELED", "0"])
    assert scale_to_world_size(cfg, 2).SOLVER.IMS_PER_BATCH_UNLABELED == 0


# --- the paper's experiments, and the methods that it is compared with ----------------------------


def setting(config, keys):
    cfg = load_config(str(ROOT / "configs" / config), [])
    values = leaves(cfg)
    return tuple(values[key] for key in keys)


PAPER = (
    "DATASETS.LABELED_PERCENT",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.IMS_PER_BATCH_UNLABELED",
    "SEMI.UNSUPERVISED_WEIGHT",
    "SEMI.PSEUDO_LABEL_THRESHOLD",
    "SOLVER.MAX_ITER",
    "MODEL.ROI_HEADS.NUM_CLASSES",
)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        ("coco/standard-1.yaml", (1.0, 4, 16, 4.0, 0.8, 180000, 80)),
        ("coco/standard-5.yaml", (5.0, 4, 16, 4.0, 0.8, 180000, 80)),
        ("coco/standard-10.yaml", (10.0, 4, 16, 4.0, 0.8, 180000, 80)),
        ("coco/addition.yaml", (100.0, 4, 16, 4.0, 0.8, 180000, 80)),
        ("voc/voc07_voc12.yaml", (100.0, 8, 8, 2.0, 0.8, 72000, 20)),
        *(
            (f"table4/threshold-{t}.yaml", (10.0, 4, 16, 4.0, t, 180000, 80))
            for t in (0.6, 0.7, 0.8, 0.9)
        ),
    ],
)
def test_settings_of_the_paper(config, values):
    assert setting(config, PAPER) == values
    assert setting(config, ["SOLVER.REFERENCE_WORLD_SIZE", "SEMI.LER", "SEMI.PRC"]) == (
        2,
        True,
        True,
    )


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ("1-neither", (False, False)),
        ("2-ler", (True, False)),
        ("3-prc", (False, True)),
        ("4-both", (True, True)),
    ],
)
def test_rows_of_table_3_differ_in_ler_and_prc_alone(config, parts):
    keys = ["SEMI.LER", "SEMI.PRC"]
    assert setting(f"table3/{config}.yaml", keys) == parts
    row = load_config(str(ROOT / f"configs/table3/{config}.yaml"), [])
    whole = load_config(str(ROOT / "configs/coco/standard-10.yaml"), [])
    assert differences(row, whole) <= {*keys, "OUTPUT_DIR"}


@pytest.mark.parametrize(
    ("supervised", "config"),
    [
        *((f"coco/supervised-{p}", f"coco/standard-{p}") for p in (1, 5, 10)),
        ("coco/supervised-addition", "coco/addition"),
        ("voc/supervised", "voc/voc07_voc12"),
    ],
)
def test_a_supervised_baseline_differs_in_nothing_but_that_it_is_supervised(supervised, config):
    baseline = load_config(str(ROOT / f"configs/{supervised}.yaml"), [])
    other = load_config(str(ROOT / f"configs/{config}.yaml"), [])
    assert differences(baseline, other) - {"DATASETS.UNLABELED"} == {
        "SEMI.BURN_IN_ITERS",
        "SEMI.NORMALIZE_BY_SAMPLED",
        "MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES",
        "OUTPUT_DIR",
    }
    assert not baseline.DATASETS.UNLABELED  # nobody has to fetch what is never drawn
    for gpus in (1, 2, 8):
        scaled = scale_to_world_size(baseline, gpus)
        assert scaled.SEMI.BURN_IN_ITERS >= scaled.SOLVER.MAX_ITER


@pytest.mark.parametrize("file", METHODS, ids=name_of)
def test_a_method_goes_over_any_config(file):
    for config in (QUICKSTART, str(ROOT / "configs/voc/voc07_voc12.yaml")):
        data = load_config(config, [])
        cfg = load_config(config, [], str(file))
        check_supported(cfg)
        build_strategy(cfg)
        build_recipe(cfg)
        # What a method may decide; data, detector and schedule are the config's.
        assert {key.split(".")[0] for key in differences(cfg, data)} <= {
            "SEMI",
            "MODEL",
            "INPUT",
            "OUTPUT_DIR",
        }
        assert {key for key in differences(cfg, data) if key.startswith(("MODEL", "INPUT"))} <= {
            "MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES",
            "MODEL.ROI_BOX_HEAD.FOCAL_GAMMA",
            "INPUT.RECIPE",
        }


VALUES = ("PSEUDO_LABEL_THRESHOLD", "UNSUPERVISED_WEIGHT", "EMA_KEEP_RATE", "BURN_IN_ITERS")


@pytest.mark.parametrize(
    ("method", "kept", "published"),
    [
        ("stac", (0.6, 2.0, 0.0, 300), {"stac-coco": (0.9, 2.0, 0.0, 90000)}),
        (
            "unbiased_teacher",
            (0.6, 2.0, 0.99, 300),
            {
                "unbiased_teacher-coco": (0.7, 4.0, 0.9996, 2000),
                "unbiased_teacher-voc": (0.7, 2.0, 0.999, 30000),
            },
        ),
        ("soft_teacher", (0.6, 2.0, 0.99, 300), {"soft_teacher-coco": (0.9, 4.0, 0.999, 0)}),
    ],
)
def test_a_method_keeps_the_values_of_the_config_or_brings_its_published_ones(
    method, kept, published
):
    found = {method: kept} | {f"published/{file}": values for file, values in published.items()}
    for file, expected in found.items():
        cfg = load_config(QUICKSTART, [], str(ROOT / f"configs/methods/{file}.yaml"))
        assert tuple(cfg.SEMI[key] for key in VALUES) == expected


def test_a_method_writes_into_a_folder_of_its_own_unless_one_is_named():
    method = str(ROOT / "configs/methods/stac.yaml")
    assert load_config(QUICKSTART, [], method).OUTPUT_DIR == "output/quickstart-stac"
    assert load_config(QUICKSTART, ["OUTPUT_DIR", "here"], method).OUTPUT_DIR == "here"


def test_options_go_over_the_method():
    method = str(ROOT / "configs/methods/stac.yaml")
    cfg = load_config(QUICKSTART, ["SEMI.EMA_KEEP_RATE", "0.5"], method)
    assert cfg.SEMI.EMA_KEEP_RATE == 0.5
    assert cfg.SEMI.STRATEGY == "Stac"


def test_a_method_that_is_not_there_is_named():
    with pytest.raises(UsageError, match=r"'none\.yaml' does not exist"):
        load_config(QUICKSTART, [], "none.yaml")


def test_output_folders_of_all_experiments_differ():
    folders = [load_config(str(file), []).OUTPUT_DIR for file in EXPERIMENTS if str(file) != BASE]
    assert len(set(folders)) == len(folders)
