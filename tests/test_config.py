"""Config keys, config files, methods, and scaling to the number of GPUs."""

import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator
from detectron2.solver import build_lr_scheduler

from locreweight.config import (
    add_locreweight_config,
    config_from_text,
    find_method_file,
    load_config,
)
from locreweight.config_checks import check_supported
from locreweight.config_scaling import scale_to_world_size
from locreweight.data.transforms.policies import build_augmentation_policy
from locreweight.errors import UsageError
from locreweight.methods import build_method
from locreweight.modeling import build_detector
from locreweight.modeling.backbones import uses_timm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "projects/LocReweightTeacher/locreweight"
CONFIG = PACKAGE / "config.py"
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
METHODS = sorted((ROOT / "configs/methods").rglob("*.yaml"))
EXPERIMENTS = [file for file in FILES if file not in METHODS]
QUICKSTART = str(ROOT / "configs/quickstart.yaml")
BASE = str(ROOT / "configs/Base-LocReweight.yaml")


@cache
def load(file, method=""):
    """A config file without options, as a frozen config."""
    cfg = load_config(str(file), [], method)
    cfg.freeze()
    return cfg


def flatten_config(node, prefix=""):
    """Dotted path -> value of all keys below a node."""
    flat = {}
    for key, value in node.items():
        inner = isinstance(value, CfgNode)
        flat |= flatten_config(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def new_keys():
    ours = get_cfg()
    add_locreweight_config(ours)
    return sorted(set(flatten_config(ours)) - set(flatten_config(get_cfg())))


def reads(source, key):
    """Whether a source reads ``cfg.SEMI.LER``, or ``semi.LER`` after ``semi = cfg.SEMI``."""
    section, name = key.rsplit(".", 1)
    aliases = re.findall(rf"(\w+) = (?:self\.)?cfg\.{re.escape(section)}$", source, re.MULTILINE)
    return any(
        re.search(rf"\b{re.escape(node)}\.{name}\b", source)
        for node in (f"cfg.{section}", *aliases)
    )


def test_helpers_find_keys_and_their_use():
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
    # Consecutive keys may share a comment.
    while lines[line].startswith("cfg."):
        line -= 1
    assert lines[line].startswith("#")


def name_of(file):
    return str(file.relative_to(ROOT / "configs"))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=name_of)
def test_every_config_file_loads(file):
    cfg = load(file)
    assert cfg.MODEL.META_ARCHITECTURE == "SemiSupervisedRCNN"
    assert cfg.VERSION == 2
    check_supported(cfg)
    build_method(cfg)


def differences(first, second):
    """The keys whose values are not the same."""
    first, second = flatten_config(first), flatten_config(second)
    return {key for key in first if first[key] != second[key]}


@pytest.mark.parametrize("file", EXPERIMENTS, ids=name_of)
def test_config_file_changes_every_key_that_it_sets(file, tmp_path):
    content = yaml.safe_load(file.read_text())
    bases = content.pop("_BASE_", None)
    if bases is None:
        assert str(file) == BASE
        return
    files = [bases] if isinstance(bases, str) else bases
    alone = tmp_path / "bases.yaml"
    alone.write_text(yaml.dump({"_BASE_": [str(file.parent / base) for base in files]}))
    changed = differences(load(file), load(alone))
    # A timm backbone implies the normalization of its input.
    is_implied = uses_timm(load(file)) or uses_timm(load(alone))
    implied = {"INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"} if is_implied else set()
    assert set(flatten_config(CfgNode(content))) == changed - implied


@pytest.mark.parametrize("file", EXPERIMENTS, ids=name_of)
def test_every_config_file_can_be_scaled(file):
    cfg = load(file)
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    for world_size in (1, 2, 4, 8):
        scaled = scale_to_world_size(cfg, world_size)
        for key in ("IMS_PER_BATCH", "IMS_PER_BATCH_UNLABELED"):
            assert scaled.SOLVER[key] / world_size == cfg.SOLVER[key] / reference


def test_options_override_the_file_and_the_file_overrides_the_defaults():
    assert load_config("", []).SOLVER.BASE_LR != 0.005
    assert load_config(BASE, []).SOLVER.BASE_LR == 0.005
    assert load_config(BASE, ["SOLVER.BASE_LR", "0.1"]).SOLVER.BASE_LR == 0.1


def test_config_without_a_file_has_the_defaults():
    ours = get_cfg()
    add_locreweight_config(ours)
    assert load_config("", []) == ours


WRITTEN = {
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.IMS_PER_BATCH_UNLABELED": 16,
    "SOLVER.BASE_LR": 0.005,
    "SOLVER.BASE_LR_END": 0.001,
    "SOLVER.MAX_ITER": 1800,
    "SOLVER.STEPS": (1200, 1600),
    "SOLVER.WARMUP_ITERS": 400,
    "SOLVER.CHECKPOINT_PERIOD": 200,
    "SEMI.BURN_IN_ITERS": 80,
    "TEST.EVAL_PERIOD": 120,
    "VIS_PERIOD": 40,
    "SEMI.EMA_KEEP_RATE": 0.25,  # one update replaces two with half the batch: 0.5 * 0.5
}
SCALED = {
    1: (2, 8, 0.0025, 0.0005, 3600, (2400, 3200), 800, 400, 160, 240, 80, 0.5),
    2: tuple(WRITTEN.values()),
    4: (8, 32, 0.01, 0.002, 900, (600, 800), 200, 100, 40, 60, 20, 0.0625),
    8: (16, 64, 0.02, 0.004, 450, (300, 400), 100, 50, 20, 30, 10, 0.25**4),
}


def written(reference):
    pairs = [str(part) for pair in WRITTEN.items() for part in pair]
    return load_config("", ["SOLVER.REFERENCE_WORLD_SIZE", str(reference), *pairs])


@pytest.mark.parametrize("world_size", SCALED)
def test_scaling_changes_batch_rate_and_iterations(world_size):
    cfg = written(reference=2)
    scaled = flatten_config(scale_to_world_size(cfg, world_size))
    assert tuple(scaled[key] for key in WRITTEN) == SCALED[world_size]
    unchanged = set(scaled) - set(WRITTEN) - {"SOLVER.REFERENCE_WORLD_SIZE"}
    assert all(scaled[key] == flatten_config(cfg)[key] for key in unchanged)
    assert cfg == written(reference=2)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_without_reference_nothing_is_scaled(world_size):
    assert scale_to_world_size(written(reference=0), world_size) == written(reference=0)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_scaling_twice_equals_scaling_once(world_size):
    once = scale_to_world_size(written(reference=2), world_size)
    assert scale_to_world_size(once, world_size) == once


@pytest.mark.parametrize("frozen", [False, True])
def test_scaling_keeps_a_config_frozen(frozen):
    cfg = written(reference=2)
    if frozen:
        cfg.freeze()
    assert scale_to_world_size(cfg, 4).is_frozen() == frozen


def test_config_without_unlabeled_images_can_be_scaled():
    cfg = load_config("", ["SOLVER.IMS_PER_BATCH_UNLABELED", "0"])
    assert scale_to_world_size(cfg, 2).SOLVER.IMS_PER_BATCH_UNLABELED == 0


# --- experiments of the paper ---------------------------------------------------------------------


def setting(config, keys):
    cfg = load(ROOT / "configs" / config)
    values = flatten_config(cfg)
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
def test_configs_have_the_settings_of_the_paper(config, values):
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
def test_rows_of_table_3_differ_only_in_ler_and_prc(config, parts):
    keys = ["SEMI.LER", "SEMI.PRC"]
    assert setting(f"table3/{config}.yaml", keys) == parts
    row = load(ROOT / f"configs/table3/{config}.yaml")
    whole = load(ROOT / "configs/coco/standard-10.yaml")
    assert differences(row, whole) <= {*keys, "OUTPUT_DIR"}


@pytest.mark.parametrize(
    ("supervised", "config"),
    [
        *((f"coco/supervised-{p}", f"coco/standard-{p}") for p in (1, 5, 10)),
        ("coco/supervised-addition", "coco/addition"),
        ("voc/supervised", "voc/voc07_voc12"),
    ],
)
def test_supervised_baselines_differ_only_in_being_supervised(supervised, config):
    baseline = load(ROOT / f"configs/{supervised}.yaml")
    other = load(ROOT / f"configs/{config}.yaml")
    assert differences(baseline, other) - {"DATASETS.UNLABELED"} == {
        "SEMI.BURN_IN_ITERS",
        "SEMI.NORMALIZE_BY_SAMPLED",
        "MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES",
        "OUTPUT_DIR",
    }
    assert not baseline.DATASETS.UNLABELED  # so the unlabeled images need not be downloaded
    for gpus in (1, 2, 8):
        scaled = scale_to_world_size(baseline, gpus)
        assert scaled.SEMI.BURN_IN_ITERS >= scaled.SOLVER.MAX_ITER


@pytest.mark.parametrize("file", sorted((ROOT / "configs/detectors").glob("*.yaml")), ids=name_of)
def test_detectors_for_own_data_use_measured_values(file):
    """The normalizer that their learning rates are for, and a beta that was measured."""
    semi = load(file).SEMI
    assert semi.NORMALIZE_BY_SAMPLED and semi.UNSUPERVISED_WEIGHT == 2.0


# --- keys that occur twice -----------------------------------------------------------------------


@pytest.mark.parametrize("is_base", [False, True])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("SEMI:\n  LER: True\nSEED: 1\nSEMI:\n  PRC: False", "SEMI twice, in lines 1 and 4"),
        ("SEMI:\n  LER: True\n  PRC: True\n  LER: False", "LER twice, in lines 2 and 4"),
        ("SOLVER: {AMP: {ENABLED: True, ENABLED: False}}", "ENABLED twice, in lines 1 and 1"),
    ],
)
def test_key_that_occurs_twice_in_a_file_is_an_error(tmp_path, text, problem, is_base):
    file = tmp_path / "twice.yaml"
    file.write_text(text)
    derived = tmp_path / "derived.yaml"
    derived.write_text("_BASE_: twice.yaml\nSEED: 2")
    with pytest.raises(UsageError, match=rf"twice\.yaml has the key {problem}"):
        load_config(str(derived if is_base else file), [])


def test_key_may_occur_in_a_base_and_beside_a_merge_key(tmp_path):
    (tmp_path / "base.yaml").write_text("SEED: 1\nSEMI: {LER: False}")
    file = tmp_path / "derived.yaml"
    file.write_text(
        "_BASE_: base.yaml\n"
        "SEED: 2\n"
        "SEMI: {PRC: False}\n"
        "INPUT: {CROP: {<<: {TYPE: absolute, SIZE: [1.0, 1.0]}, TYPE: relative}}"
    )
    cfg = load_config(str(file), [])
    assert (cfg.SEED, cfg.SEMI.LER, cfg.SEMI.PRC) == (2, False, False)
    assert (cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE) == ("relative", [1.0, 1.0])


# --- methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", METHODS, ids=name_of)
def test_method_can_be_merged_into_any_config(file):
    for config in (QUICKSTART, str(ROOT / "configs/voc/voc07_voc12.yaml")):
        data = load(config)
        cfg = load(config, str(file))
        check_supported(cfg)
        build_method(cfg)
        build_augmentation_policy(cfg)
        # A method must not change data, detector and schedule.
        assert {key.split(".")[0] for key in differences(cfg, data)} <= {
            "SEMI",
            "MODEL",
            "INPUT",
            "OUTPUT_DIR",
        }
        assert {key for key in differences(cfg, data) if key.startswith(("MODEL", "INPUT"))} <= {
            "MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES",
            "MODEL.ROI_BOX_HEAD.FOCAL_GAMMA",
            "MODEL.ROI_BOX_HEAD.VOTING_SIGMA",
            "INPUT.AUGMENTATION_POLICY",
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
        (
            "mum",
            (0.6, 2.0, 0.99, 300),
            {"mum-coco": (0.7, 4.0, 0.9996, 0), "mum-voc": (0.7, 4.0, 0.9996, 0)},
        ),
        (
            "instant_teaching",
            (0.6, 2.0, 0.0, 300),
            {"instant_teaching-coco": (0.9, 1.0, 0.0, 0)},
        ),
        ("mixpl", (0.6, 2.0, 0.99, 300), {"mixpl-coco": (0.7, 2.0, 0.9998, 0)}),
        (
            "instant_teaching_star",
            (0.6, 2.0, 0.0, 300),
            {"instant_teaching_star-coco": (0.9, 1.0, 0.0, 0)},
        ),
        (
            "unbiased_teacher_v2",
            (0.6, 2.0, 0.99, 300),
            {"unbiased_teacher_v2-coco": (0.7, 4.0, 0.9996, 2000)},
        ),
        ("labelmatch", (0.6, 2.0, 0.99, 300), {"labelmatch-coco": (0.9, 2.0, 0.996, 40000)}),
        *(
            (method, (0.6, 2.0, 0.99, 300), {})
            for method in ("rpl", "cst", "ismt", "loc_reweight_mix")
        ),
    ],
)
def test_method_keeps_the_values_of_the_config_unless_published(method, kept, published):
    methods = {method: kept} | {f"published/{file}": values for file, values in published.items()}
    for name, expected in methods.items():
        cfg = load(QUICKSTART, name)
        assert tuple(cfg.SEMI[key] for key in VALUES) == expected


@pytest.mark.parametrize(
    "method", ["stac", "published/stac-coco", ROOT / "configs/methods/stac.yaml"]
)
def test_method_has_its_own_output_folder_unless_one_is_given(method):
    stem = Path(method).stem
    cfg = load_config(QUICKSTART, [], str(method))
    assert cfg.OUTPUT_DIR == f"output/quickstart-{stem}"
    assert load_config(QUICKSTART, ["OUTPUT_DIR", "here"], str(method)).OUTPUT_DIR == "here"


@pytest.mark.parametrize("file", METHODS, ids=name_of)
@pytest.mark.parametrize("other", ["unbiased_teacher", "loc_reweight_mix"])
def test_method_replaces_another_one(tmp_path, other, file):
    """Such as ``--config-file <run>/config.yaml --method <other>``."""
    config = tmp_path / "config.yaml"
    config.write_text(load(QUICKSTART, other).dump())
    cfg, expected = load(config, str(file)), load(QUICKSTART, str(file))
    build_method(cfg)
    assert cfg.SEMI.METHOD == expected.SEMI.METHOD
    assert (cfg.SEMI.LER, cfg.SEMI.PRC) == (expected.SEMI.LER, expected.SEMI.PRC)
    heads = cfg.MODEL.ROI_BOX_HEAD, expected.MODEL.ROI_BOX_HEAD
    assert heads[0].GAUSSIAN_BOXES == heads[1].GAUSSIAN_BOXES
    if "LocReweight" in expected.SEMI.METHOD and "Mix" not in expected.SEMI.METHOD:
        return  # the paper's method uses the losses and views of the config
    assert heads[0].FOCAL_GAMMA == heads[1].FOCAL_GAMMA
    assert cfg.SEMI.RPN_BOX_LOSS == expected.SEMI.RPN_BOX_LOSS
    assert cfg.SEMI.NORMALIZE_BY_SAMPLED == expected.SEMI.NORMALIZE_BY_SAMPLED
    assert cfg.INPUT.AUGMENTATION_POLICY == expected.INPUT.AUGMENTATION_POLICY


@pytest.mark.parametrize(
    ("former", "method", "warns"),
    [
        ("stac", "soft_teacher", True),
        ("stac", "stac", False),
        ("loc_reweight", "stac", False),
        ("", "stac", False),
    ],
)
def test_config_of_another_method_gives_a_warning(tmp_path, caplog, former, method, warns):
    """Values such as the keep rate 0 of STAC stay, which few would expect."""
    config = tmp_path / "config.yaml"
    config.write_text(load_config(QUICKSTART, [], former).dump())
    cfg = load_config(str(config), [], method)
    assert (f"{config} is a config of the method STAC" in caplog.text) == warns
    assert cfg.SEMI.EMA_KEEP_RATE == 0.0


def test_options_override_the_method():
    cfg = load_config(QUICKSTART, ["SEMI.EMA_KEEP_RATE", "0.5"], "stac")
    assert cfg.SEMI.EMA_KEEP_RATE == 0.5
    assert cfg.SEMI.METHOD == "STAC"


def test_find_method_file_accepts_all_names_and_paths(tmp_path):
    for file in METHODS:
        name = name_of(file).removeprefix("methods/").removesuffix(".yaml")
        assert find_method_file(name) == find_method_file(str(file)) == file
    own = tmp_path / "own.yaml"
    own.touch()
    assert find_method_file(str(own)) == own


@pytest.mark.parametrize("method", ["none.yaml", "ler", "published", "../quickstart", ""])
def test_find_method_file_lists_the_names(method):
    with pytest.raises(UsageError, match=rf"'{method}' does not exist.* ablation/ler, .*stac"):
        find_method_file(method)


@pytest.mark.parametrize(
    ("method", "close"), [("softteacher", "soft_teacher"), ("ler", "ablation/ler")]
)
def test_find_method_file_suggests_similar_names(method, close):
    with pytest.raises(UsageError, match=rf"does not exist; did you mean {close}\b.*\?"):
        find_method_file(method)


# --- renamed keys ---------------------------------------------------------------------------------

RENAMED = {  # former key: former value, today's key, today's value
    "SEMI.STRATEGY": ("SoftTeacher", "SEMI.METHOD", "SoftTeacher"),
    "INPUT.RECIPE": ("StacRecipe", "INPUT.AUGMENTATION_POLICY", "STACPolicy"),
    "TEST.WATCHED_IMAGES": (7, "TEST.MONITORED_IMAGES", 7),
    "DATASETS.DROP_BAD_BOXES": (True, "DATASETS.CHECKS.DROP_BAD_BOXES", True),
    "DATASETS.CHECK_IMAGES": (False, "DATASETS.CHECKS.DECODE_IMAGES", False),
    "DATASETS.MAX_UNREADABLE_SHARE": (0.3, "DATASETS.CHECKS.MAX_UNREADABLE_SHARE", 0.3),
    "DATASETS.ALLOW_CHANGED": (True, "DATASETS.CHECKS.ALLOW_CHANGED", True),
    # A checkpoint must not decide which files are trusted.
    "DATASETS.ALLOW_OUTSIDE_PATHS": (True, "DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS", False),
}


@pytest.mark.parametrize("old", RENAMED)
def test_renamed_key_is_an_error_that_names_the_new_key(tmp_path, old):
    value, new, _ = RENAMED[old]
    section, name = old.split(".")
    file = tmp_path / "old.yaml"
    file.write_text(yaml.dump({section: {name: value}}))
    for arguments in ((str(file), []), ("", [old, str(value)])):
        with pytest.raises(UsageError, match=f"{old} was renamed: use {new}$"):
            load_config(*arguments)


def test_config_of_an_older_checkpoint_is_translated():
    content = yaml.safe_load(load_config(QUICKSTART, []).dump())
    del content["DATASETS"]["CHECKS"]
    for old, (value, new, _) in RENAMED.items():
        section, name = old.split(".")
        content[section].pop(new.split(".")[1], None)
        content[section][name] = value
    values = flatten_config(config_from_text(yaml.dump(content), ["SOLVER.MAX_ITER", "9"]))
    assert {new: values[new] for _, new, _ in RENAMED.values()} == {
        new: expected for _, new, expected in RENAMED.values()
    }
    assert values["SOLVER.MAX_ITER"] == 9
    assert values["SEMI.BURN_IN_ITERS"] == 300


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("SoftTeacherRecipe", "SoftTeacherPolicy"),
        ("UnbiasedTeacherRecipe", "UnbiasedTeacherPolicy"),
        ("StacRecipe", "STACPolicy"),
        ("StacPolicy", "STACPolicy"),
    ],
)
def test_former_names_of_policies_are_accepted(old, new):
    cfg = config_from_text(f"INPUT: {{RECIPE: {old}}}", [])
    assert cfg.INPUT.AUGMENTATION_POLICY == new
    build_augmentation_policy(cfg)


@pytest.mark.parametrize(("old", "new"), [("Stac", "STAC"), ("Mum", "MUM")])
def test_former_names_of_methods_are_accepted(tmp_path, old, new):
    file = tmp_path / "old.yaml"
    file.write_text(f"SEMI: {{METHOD: {old}}}")
    for cfg in (
        load_config(str(file), []),
        load_config("", ["SEMI.METHOD", old]),
        config_from_text(f"SEMI: {{METHOD: {old}}}", []),
    ):
        assert cfg.SEMI.METHOD == new
        assert type(build_method(cfg)).__name__ == new


def test_output_folders_of_all_experiments_differ():
    folders = [load(file).OUTPUT_DIR for file in EXPERIMENTS if str(file) != BASE]
    assert len(set(folders)) == len(folders)


# --- schedule and anchors -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "world_size", "message"),
    [
        (["SOLVER.STEPS", "(80, 60)"], 1, r"SOLVER\.STEPS \(80, 60\) .* increasing order"),
        (["SOLVER.STEPS", "(60, 60)"], 1, "increasing order"),
        (["SOLVER.STEPS", "(0, 60)"], 1, "must be positive"),
        (["SOLVER.STEPS", "(60, 100)"], 1, r"not SOLVER\.MAX_ITER 100 itself"),
        (["SOLVER.STEPS", "(300, 200)"], 1, "increasing order"),
        (
            ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultistepLR"],
            1,
            r"unknown SOLVER\.LR_SCHEDULER_NAME 'WarmupMultistepLR'; .*: WarmupMultiStepLR,",
        ),
        (["SOLVER.WARMUP_METHOD", "lin"], 1, r"unknown SOLVER\.WARMUP_METHOD 'lin'"),
        (["SOLVER.OPTIMIZER", "Adam"], 1, r"unknown SOLVER\.OPTIMIZER 'Adam'; .*: SGD, AdamW"),
        (
            ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full"],
            1,
            r"unknown SOLVER\.CLIP_GRADIENTS\.CLIP_TYPE 'full'; .*: norm, value",
        ),
        (
            ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR_END", "0.5"],
            1,
            r"SOLVER\.BASE_LR_END 0\.5 must be from 0 to SOLVER\.BASE_LR 0\.005",
        ),
        (["SOLVER.MAX_ITER", "1"], 2, r"SOLVER\.MAX_ITER 1 is less than one .* at least 2"),
        (["SOLVER.MAX_ITER", "3"], 8, r"on 8 GPUs, .* on 1 GPUs .* at least 8"),
        (["SOLVER.MAX_ITER", "0"], 1, "at least 1"),
        (["SOLVER.MAX_ITER", "-5", "SOLVER.REFERENCE_WORLD_SIZE", "0"], 4, "at least 1"),
    ],
)
def test_impossible_schedules_are_rejected(options, world_size, message):
    short = ["SOLVER.MAX_ITER", "100", "SOLVER.REFERENCE_WORLD_SIZE", "1", "SOLVER.STEPS", "()"]
    cfg = load_config(BASE, [*short, *options])
    with pytest.raises(UsageError, match=message) as error:
        scale_to_world_size(cfg, world_size)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        ["SOLVER.STEPS", "(1, 50, 99)"],
        ["SOLVER.STEPS", "(50, 120000, 160000)"],  # Detectron2 ignores steps after the end
        ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.STEPS", "(9, 3)"],
        ["SOLVER.MAX_ITER", "1"],
    ],
)
def test_possible_schedules_are_accepted(options):
    cfg = load_config(
        BASE, ["SOLVER.REFERENCE_WORLD_SIZE", "0", "SOLVER.MAX_ITER", "100", *options]
    )
    cfg = scale_to_world_size(cfg, 1)
    parameter = torch.nn.Parameter(torch.zeros(1))
    build_lr_scheduler(cfg, torch.optim.SGD([parameter], lr=cfg.SOLVER.BASE_LR))


@pytest.mark.parametrize("key", ["TEST.EVAL_PERIOD", "SOLVER.CHECKPOINT_PERIOD", "VIS_PERIOD"])
@pytest.mark.parametrize(("period", "on_8_gpus"), [(0, 0), (1, 1), (2, 1), (80, 10)])
def test_scaling_turns_no_period_on_or_off(key, period, on_8_gpus):
    cfg = load_config(BASE, ["SOLVER.REFERENCE_WORLD_SIZE", "1", key, str(period)])
    assert flatten_config(scale_to_world_size(cfg, 8))[key] == on_8_gpus


@pytest.mark.parametrize(
    ("sizes", "ratios", "message"),
    [
        ([[12], [24], [48], [96]], [[1.0]], r"SIZES .* has 4 lists for 5 feature levels"),
        ([[12]], [[0.5], [1.0]], r"ASPECT_RATIOS .* has 2 lists for 5 feature levels"),
        ([[12], [24], [48], [96], []], [[1.0]], "SIZES"),
        ([], [[1.0]], "SIZES"),
        ([[12], [24], [48], [96], [0]], [[1.0]], "must be positive numbers"),
        ([[12], 24], [[1.0]], "must be positive numbers"),
        ([[12], [24], [48], [96], [192, 384]], [[1.0, 2.0]], r"\[2, 2, 2, 2, 4\]"),
    ],
)
def test_impossible_anchors_are_rejected(sizes, ratios, message):
    key = "MODEL.ANCHOR_GENERATOR"
    cfg = load_config(BASE, [f"{key}.SIZES", str(sizes), f"{key}.ASPECT_RATIOS", str(ratios)])
    for check in (check_supported, build_detector):
        with pytest.raises(UsageError, match=message):
            check(cfg)


@pytest.mark.parametrize("sizes", ["(640,)", "(480, 640, 800)", "(64, 48)"])
def test_sizes_that_are_no_range_are_an_error(sizes):
    with pytest.raises(UsageError, match=r"INPUT\.MIN_SIZE_TRAIN \(.*give it twice.*to choice"):
        check_supported(load_config(QUICKSTART, ["INPUT.MIN_SIZE_TRAIN", sizes]))
    check_supported(
        load_config(
            QUICKSTART,
            ["INPUT.MIN_SIZE_TRAIN", sizes, "INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice"],
        )
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("INPUT.RANDOM_FLIP", "both", "'both'; known names: none, horizontal, vertical"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "uniform", "'uniform'; known names: range, choice"),
        ("INPUT.MIN_SIZE_TRAIN", "()", "is empty"),
    ],
)
def test_impossible_views_are_an_error(key, value, message):
    with pytest.raises(UsageError, match=f"{key} {message}"):
        check_supported(load_config(QUICKSTART, [key, value]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sigma", [-1.0, math.nan, math.inf])
def test_impossible_voting_is_an_error(training, sigma):
    cfg = load_config(QUICKSTART, [])
    cfg.defrost()
    cfg.MODEL.ROI_BOX_HEAD.VOTING_SIGMA = sigma
    with pytest.raises(UsageError, match="VOTING_SIGMA is .*; it must be at least 0"):
        check_supported(cfg, training=training)


def test_paths_may_contain_the_home_folder_and_variables(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/runs")
    options = ["OUTPUT_DIR", "~/out", "MODEL.WEIGHTS", "$RUNS/model.pth"]
    for cfg in (load_config(QUICKSTART, options), config_from_text("{}", options)):
        assert (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS) == ("/home/me/out", "/runs/model.pth")
    # An address must not send a variable to a server.
    address = "https://example.com/$RUNS"
    assert load_config("", ["MODEL.WEIGHTS", address]).MODEL.WEIGHTS == address


@pytest.mark.parametrize(
    ("sizes", "ratios"),
    [
        ([[12], [24], [48], [96], [192]], [[0.5, 1.0, 2.0]]),
        ([[12, 24]], [[1.0]]),
        ([12, 24], [0.5, 1.0]),
        ([[12], [24], [48], [96], [192]], [[1.0], [1.0], [1.0], [1.0], [2.0]]),
    ],
)
def test_possible_anchors_are_accepted(sizes, ratios):
    key = "MODEL.ANCHOR_GENERATOR"
    cfg = load_config(BASE, [f"{key}.SIZES", str(sizes), f"{key}.ASPECT_RATIOS", str(ratios)])
    check_supported(cfg)
    levels = [ShapeSpec(channels=8, stride=2**i) for i in range(2, 7)]
    build_anchor_generator(cfg, levels)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.RESNETS.DEPTH", "35"),
        ("MODEL.RESNETS.NORM", "BatchNorm"),
        ("MODEL.BACKBONE.NAME", "build_nothing"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool3"),
    ],
)
def test_impossible_detectors_are_rejected_in_one_line(key, value):
    cfg = load_config(BASE, ["MODEL.DEVICE", "cpu", key, value])
    with pytest.raises(UsageError, match=r"the MODEL keys .* \(at .*\.py:\d+\)") as error:
        build_detector(cfg)
    assert "\n" not in str(error.value)
