"""Config keys that this project adds to Detectron2, and functions that load and check configs."""

from __future__ import annotations

import difflib
import io
import math
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import attrgetter
from pathlib import Path

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.utils.file_io import PathManager

from .checkpoint.zoo import PREFIX as ZOO
from .errors import UsageError, get_registered
from .installed_detectron2 import check_compiled_kernels
from .modeling.backbones import set_timm_input, uses_timm
from .modeling.building import check_anchors
from .modeling.meta_arch import SemiSupervisedRCNN
from .modeling.roi_heads import LocalizationAwareROIHeads

CONFIGS_FOLDER = Path(__file__).resolve().parents[3] / "configs"
METHODS_FOLDER = CONFIGS_FOLDER / "methods"

# Former key -> today's key.
_RENAMED_KEYS = {
    "SEMI.STRATEGY": "SEMI.METHOD",
    "INPUT.RECIPE": "INPUT.AUGMENTATION_POLICY",
    "TEST.WATCHED_IMAGES": "TEST.MONITORED_IMAGES",
    "DATASETS.DROP_BAD_BOXES": "DATASETS.CHECKS.DROP_BAD_BOXES",
    "DATASETS.CHECK_IMAGES": "DATASETS.CHECKS.DECODE_IMAGES",
    "DATASETS.MAX_UNREADABLE_SHARE": "DATASETS.CHECKS.MAX_UNREADABLE_SHARE",
    "DATASETS.ALLOW_OUTSIDE_PATHS": "DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS",
    "DATASETS.ALLOW_CHANGED": "DATASETS.CHECKS.ALLOW_CHANGED",
}
# Key -> former value -> today's value. Former values are accepted everywhere.
_RENAMED_VALUES = {
    "SEMI.METHOD": {"Stac": "STAC", "Mum": "MUM"},
    "INPUT.AUGMENTATION_POLICY": {
        "SoftTeacherRecipe": "SoftTeacherPolicy",
        "UnbiasedTeacherRecipe": "UnbiasedTeacherPolicy",
        "StacRecipe": "STACPolicy",
        "StacPolicy": "STACPolicy",
    },
}

# Former keys without a successor.
_REMOVED_KEYS = ("MODEL.FOLD_FROZEN_NORM",)

# Keys of Detectron2 that have no effect here: in training and evaluation, and in training only.
_IGNORED = (
    "MODEL.LOAD_PROPOSALS",
    "DATASETS.PROPOSAL_FILES_TEST",
    "TEST.AUG.ENABLED",
    "TEST.EXPECTED_RESULTS",
)
_IGNORED_IN_TRAINING = (
    "MODEL.MASK_ON",
    "MODEL.KEYPOINT_ON",
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE",
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE",
    "INPUT.CROP.ENABLED",
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "DATALOADER.SAMPLER_TRAIN",
    "DATALOADER.REPEAT_THRESHOLD",
    "TEST.PRECISE_BN.ENABLED",
)
_Range = tuple[str, Callable[[float], bool]]
_AT_LEAST_0: _Range = ("at least 0", lambda x: 0 <= x < math.inf)
_ABOVE_0: _Range = ("above 0", lambda x: 0 < x < math.inf)
_RANGES: dict[str, _Range] = {
    "SEMI.PSEUDO_LABEL_THRESHOLD": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "SEMI.UNSUPERVISED_WEIGHT": _AT_LEAST_0,
    "SEMI.QUALITY_SCALE": _ABOVE_0,
    "SOLVER.BASE_LR": _ABOVE_0,
    "SOLVER.IMS_PER_BATCH_UNLABELED": _AT_LEAST_0,
    "SOLVER.EARLY_STOPPING_PATIENCE": _AT_LEAST_0,
    "TEST.MONITORED_IMAGES": _AT_LEAST_0,
}
# A config of someone else must not decide which files this machine trusts.
_UNTRUSTED = ["MODEL.TRUST_WEIGHTS", False, "DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS", False]
# A config file has at most this many values, where each alias counts as the values that it stands
# for. Detectron2 has about 300 keys.
_MAX_VALUES = 10_000
# Exceptions that loading an invalid config file raises: it is not text, YAML or a mapping, it
# contains Python objects, its VERSION differs, or its _BASE_ is missing or is the file itself.
_UNREADABLE = (
    AssertionError,
    AttributeError,
    OSError,
    RecursionError,
    TypeError,
    UnicodeDecodeError,
    yaml.YAMLError,
)


def add_locreweight_config(cfg: CfgNode) -> None:
    """Add this project's keys to a Detectron2 config, in place."""
    _add_training_keys(cfg)
    _add_model_keys(cfg)
    _add_data_keys(cfg)


def _add_training_keys(cfg: CfgNode) -> None:
    cfg.SEMI = CfgNode()
    # Semi-supervised method (locreweight/methods/): "LocReweight", one of its controls
    # "ShuffledLocReweight" and "MeanLocReweight", "LocReweightMix", or a published method: "STAC",
    # "UnbiasedTeacher", "SoftTeacher", "MUM", "InstantTeaching", "InstantTeachingStar", "MixPL",
    # "UnbiasedTeacherV2", "LabelMatch", "RPL", "CST", "ISMT". It decides which detections become
    # pseudo-labels, what the student sees and which losses are used.
    cfg.SEMI.METHOD = "LocReweight"
    # Number of iterations on labeled images only, before the teacher makes pseudo-labels. Training
    # is fully supervised if this is at least SOLVER.MAX_ITER.
    cfg.SEMI.BURN_IN_ITERS = 2000
    # Keep rate of the EMA teacher: teacher = rate * teacher + (1 - rate) * student. After burn-in
    # the rate ramps up to this value (locreweight/ema.py). It is adapted to the number
    # of GPUs if SOLVER.REFERENCE_WORLD_SIZE is set.
    cfg.SEMI.EMA_KEEP_RATE = 0.9996
    # A detection of the teacher becomes a pseudo-label if its class probability exceeds this value,
    # which is at least 0 and below 1.
    cfg.SEMI.PSEUDO_LABEL_THRESHOLD = 0.8
    # Weight of all losses on unlabeled images, beta in Eq. 3.
    cfg.SEMI.UNSUPERVISED_WEIGHT = 4.0
    # For LocReweight: reweight the box loss on pseudo-labels by localization quality (LER, Eq. 11).
    # False: all pseudo-labels have the same weight. With methods other than LocReweight and its
    # controls, False is an error.
    cfg.SEMI.LER = True
    # For LocReweight: reweight the classification loss on unlabeled images by the reliability that
    # the teacher gives each proposal (PRC, Eq. 14). False: the detector's classification loss.
    cfg.SEMI.PRC = True
    # Factor on localization quality, in weights and in predictions and metrics. With 1, the
    # quality lies in (0, 0.5).
    cfg.SEMI.QUALITY_SCALE = 1.0
    # Train the region proposal network on pseudo-labels: objectness loss, and box loss.
    cfg.SEMI.RPN_OBJECTNESS_LOSS = True
    cfg.SEMI.RPN_BOX_LOSS = True
    # Eq. 10, 11 and 14 divide by the number of foreground (or background) proposals. True: divide
    # by the number of all sampled proposals, as Detectron2 does.
    cfg.SEMI.NORMALIZE_BY_SAMPLED = False
    _add_method_keys(cfg)

    # Number of unlabeled images per iteration over all GPUs. SOLVER.IMS_PER_BATCH is the number of
    # labeled images.
    cfg.SOLVER.IMS_PER_BATCH_UNLABELED = 16
    # Number of periodic checkpoints (SOLVER.CHECKPOINT_PERIOD) to keep, the newest ones; 0 keeps
    # all. The best and the final checkpoint are always kept. With 1 there is no older checkpoint to
    # resume from if the newest is damaged.
    cfg.SOLVER.KEEP_CHECKPOINTS = 3
    # A step with a NaN or infinite loss or gradient is skipped, and its images are written to
    # OUTPUT_DIR/skipped_steps.jsonl. Training stops after this number of skipped steps in a row.
    cfg.SOLVER.MAX_SKIPPED_STEPS = 10
    # "SGD" or "AdamW". AdamW needs a lower SOLVER.BASE_LR, such as 0.0003, and ignores
    # SOLVER.MOMENTUM and SOLVER.NESTEROV.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Factor on the learning rate of the backbone without its feature pyramid, of any kind.
    cfg.SOLVER.BACKBONE_LR_FACTOR = 1.0
    # Factor on the learning rate of a plain vision transformer for each block further from the
    # output, as in ViTDet (0.7 to 0.9). Other backbones must leave it at 1.
    cfg.SOLVER.BACKBONE_LR_DECAY = 1.0
    # Training ends early after this number of evaluations (TEST.EVAL_PERIOD) in a row without a
    # better teacher. Evaluations in burn-in do not count. 0: train for SOLVER.MAX_ITER iterations.
    cfg.SOLVER.EARLY_STOPPING_PATIENCE = 0
    # Data type for SOLVER.AMP.ENABLED: "float16" (with loss scaling) or "bfloat16".
    cfg.SOLVER.AMP.DTYPE = "float16"


def _add_method_keys(cfg: CfgNode) -> None:
    cfg.SEMI.LABEL_MATCH = CfgNode()
    # For LabelMatch: number of unlabeled images after which the thresholds of the classes are
    # computed again, from the detections in these images. 0: 10000, as published, or a twentieth of
    # the unlabeled images that the training uses if that is fewer.
    cfg.SEMI.LABEL_MATCH.IMAGES = 0

    # For RPL, whose constants are not known with certainty: exponents of a class's certainty,
    # relative to the most certain class, in the threshold and in the weight of the losses.
    cfg.SEMI.RPL = CfgNode()
    cfg.SEMI.RPL.THRESHOLD_EXPONENT = 0.05
    cfg.SEMI.RPL.WEIGHT_EXPONENT = 0.6
    # Pseudo-labels need a localization quality above this, which lies in (0, 0.5) (Eq. 5).
    cfg.SEMI.RPL.MIN_QUALITY = 0.2
    # Lower bound of a class's relative certainty, for classes that are never found.
    cfg.SEMI.RPL.MIN_RATIO = 0.01

    cfg.SEMI.CST = CfgNode()
    # For CST, whose weight is an assumption: a pseudo-label has the weight exp(-E * KL), where KL
    # is the divergence between the class probabilities of the two teachers. 0: no weights.
    cfg.SEMI.CST.AGREEMENT_EXPONENT = 1.0

    # For ISMT, whose constants are unknown: IoU of the NMS that fuses new with stored detections;
    # share of features that DropBlock sets to zero in the students' ROI heads, and the side of its
    # blocks in the pooled features.
    cfg.SEMI.ISMT = CfgNode()
    cfg.SEMI.ISMT.NMS_IOU = 0.5
    cfg.SEMI.ISMT.DROP_BLOCK_SHARE = 0.1
    cfg.SEMI.ISMT.DROP_BLOCK_SIZE = 3


def _add_model_keys(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "SemiSupervisedRCNN"
    cfg.MODEL.ROI_HEADS.NAME = "LocalizationAwareROIHeads"
    # Only numbers are read from MODEL.WEIGHTS. True: unpickle the whole file, which can run
    # arbitrary code; only for files from people you trust.
    cfg.MODEL.TRUST_WEIGHTS = False
    # Backbones of timm (docs/pretrained_backbones.md), for MODEL.BACKBONE.NAME
    # "build_timm_fpn_backbone" or, for plain vision transformers,
    # "build_timm_simple_pyramid_backbone". Pixel mean, pixel std and channel order follow from it.
    cfg.MODEL.TIMM = CfgNode()
    # timm's name of the model with the tag of its weights, such as "resnet50.a1_in1k".
    cfg.MODEL.TIMM.NAME = ""
    # Pretrained weights that a training without MODEL.WEIGHTS starts from: "hub" for those that
    # timm publishes under this name, downloaded once to the machine's cache, or a file of weights
    # in timm's names. Empty: random weights. Neither resuming nor using a trained model reads them.
    cfg.MODEL.TIMM.PRETRAINED = ""
    # Batch norm in the backbone: "FrozenBN" (pretrained statistics, not trained), "BN" or "SyncBN",
    # as MODEL.RESNETS.NORM.
    cfg.MODEL.TIMM.NORM = "FrozenBN"
    # Drop path rate (stochastic depth) of the last block; those of earlier blocks are smaller.
    cfg.MODEL.TIMM.DROP_PATH = 0.0
    # Box coordinates that the box branch predicts and Eq. 4 models. True: corner offsets over the
    # proposal's width and height. False: Detectron2's (dx, dy, dw, dh). Both are multiplied by
    # MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS; corners use its first two numbers.
    cfg.MODEL.ROI_BOX_HEAD.CORNER_CODING = True
    # Predicted log-variances are clamped to [-limit, limit].
    cfg.MODEL.ROI_BOX_HEAD.LOG_VARIANCE_LIMIT = 7.0
    # Box loss on labeled images. True: KL loss (Eq. 10), which also trains the variances. False:
    # smooth L1, as in a detector without a localization-aware branch; variances stay untrained.
    cfg.MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES = True
    # Above 0: classify proposals with a focal loss with this exponent (Unbiased Teacher uses 1.5).
    # It concerns labeled images, and unlabeled ones only for methods with the default
    # classification loss, such as Unbiased Teacher.
    cfg.MODEL.ROI_BOX_HEAD.FOCAL_GAMMA = 0.0
    # Detectron2's key: beta of the smooth L1 loss, in coded units: on pseudo-labels (Eq. 11) and,
    # without GAUSSIAN_BOXES, on labeled images.
    cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA = 1.0


def _add_data_keys(cfg: CfgNode) -> None:
    # Data sets are named by their location, such as "coco:<annotations.json>:<image folder>", or by
    # a name registered in Detectron2. locreweight/data/datasets/catalog.py lists all formats.
    # DATASETS.TRAIN holds labeled images. DATASETS.UNLABELED needs no annotations; annotations that
    # it has are not used for training.
    cfg.DATASETS.UNLABELED = ()
    # Percentage of DATASETS.TRAIN that keeps its labels; the other images join the unlabeled ones.
    # The split depends on DATASETS.SPLIT_SEED only, so it is the same in every process and run.
    cfg.DATASETS.LABELED_PERCENT = 100.0
    cfg.DATASETS.SPLIT_SEED = 1
    # File with splits to choose from by LABELED_PERCENT and SPLIT_SEED: written by
    # datasets/make_split.py, or Unbiased Teacher's COCO_supervision.txt. Empty: draw the split.
    cfg.DATASETS.SPLIT_FILE = ""
    # Class names of data sets that do not list their own ("voc:", "labelme:", "yolo:"), in the
    # order of the model's classes. Empty: the 20 VOC classes for "voc:<folder>:<split>",
    # classes.txt or obj.names for "yolo:<images>:<labels>", otherwise the classes in the
    # annotations. All labeled and test sets, also those that list their classes, must have these.
    cfg.DATASETS.CLASS_NAMES = ()
    # Ground truth of unlabeled images, used only to measure the quality of pseudo-labels: annotated
    # data sets with images that are also in DATASETS.UNLABELED. Not needed for annotated sets in
    # DATASETS.UNLABELED nor for images that LABELED_PERCENT made unlabeled.
    cfg.DATASETS.UNLABELED_TRUTH = ()
    # By default an unlabeled image that is also a labeled one is an error, and an unlabeled image
    # that is also a test image gives a warning. True: remove both from the unlabeled images.
    cfg.DATASETS.EXCLUDE_LABELED = False

    cfg.DATASETS.SHARDS = CfgNode()
    # Folder for copies of remote shards ("shards:s3://..."), and its largest size in GB. Runs on
    # the same machine can share it. It should hold 16 shards, which are used at the same time.
    # Empty: ~/.cache/locreweight/shards.
    cfg.DATASETS.SHARDS.CACHE_DIR = ""
    cfg.DATASETS.SHARDS.CACHE_GB = 50.0

    cfg.DATASETS.CHECKS = CfgNode()
    # A labeled box with NaN, infinite or inverted coordinates is an error. True: drop the box.
    cfg.DATASETS.CHECKS.DROP_BAD_BOXES = False
    # Decode all labeled and test images before training; a broken image is an error. False: skip
    # this check, which takes long on a slow disk.
    cfg.DATASETS.CHECKS.DECODE_IMAGES = True
    # Unlabeled images that cannot be read are skipped. Training stops if they exceed this share of
    # the unlabeled images drawn since the start (or resume), checked from 100 images on.
    cfg.DATASETS.CHECKS.MAX_UNREADABLE_SHARE = 0.1
    # Allow annotation files to refer to images by absolute paths and by paths with "..". False: an
    # error, because a foreign annotation file could then read any image or text of this machine.
    cfg.DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS = False
    # Allow --eval-only on data with other class names than those that the checkpoint was trained
    # with: class i of the data is class i of the checkpoint. False: an error.
    cfg.DATASETS.CHECKS.ALLOW_OTHER_CLASS_NAMES = False
    # Allow --resume after the set of training images has changed. False: an error.
    cfg.DATASETS.CHECKS.ALLOW_CHANGED = False

    # Number of unlabeled images whose pseudo-labels are measured every VIS_PERIOD iterations (a
    # Detectron2 key; 0 turns it off). The first few are also drawn.
    cfg.TEST.MONITORED_IMAGES = 200

    # How training images are augmented (locreweight/data/transforms/policies.py):
    # "SoftTeacherPolicy", "UnbiasedTeacherPolicy", "STACPolicy", "InstantTeachingPolicy", or a name
    # that you registered in AUGMENTATION_POLICY_REGISTRY. Sizes and flips come from Detectron2's
    # INPUT keys.
    cfg.INPUT.AUGMENTATION_POLICY = "SoftTeacherPolicy"
    # Decode large JPEGs of training images at 1/2, 1/4 or 1/8 of their size where the result is
    # still 1.5 times as wide and high as the largest view. This saves much time on photos.
    # Pixels change less than they would if resizing were bicubic instead of bilinear. False:
    # decode at full size.
    cfg.INPUT.REDUCED_DECODING = True


def load_config(config_file: str, options: Sequence[str], method: str = "") -> CfgNode:
    """Load a config: defaults, then the config file, the method's file and the options.

    Args:
        config_file: data, detector and schedule; may be empty. Either a path or a model of the zoo,
            ``locreweight://<name>.yaml``.
        options: ``KEY VALUE`` pairs, one after another.
        method: name or file of a method's config, see :func:`find_method_file`. Its name is
            appended to the config's OUTPUT_DIR, so that each method has its own folder. OUTPUT_DIR
            in ``options`` is used as given.

    Raises:
        UsageError: for a missing file, an unknown key or a value of the wrong type.
    """
    is_zoo_model = config_file.startswith(ZOO)
    if is_zoo_model and not config_file.endswith(".yaml"):
        raise UsageError(f"{config_file} is a file of weights; its config is {config_file}.yaml")
    base_file = PathManager.get_local_path(config_file) if is_zoo_model else config_file
    if is_zoo_model and "_BASE_" in Path(base_file).read_text():
        raise UsageError(f"{config_file} has a _BASE_, a file outside the model zoo")
    if base_file and not Path(base_file).is_file():
        raise UsageError(f"config file {base_file!r} does not exist")
    method_file = str(find_method_file(method)) if method else ""
    files = [file for file in (base_file, method_file) if file]

    def merge(cfg: CfgNode) -> None:
        for file in files:
            _BoundedConfig.load_yaml_with_base(file)
            # By default Detectron2 falls back to a loader that runs Python code in the file.
            cfg.merge_from_file(file, allow_unsafe=False)
            if is_zoo_model and file == base_file:
                cfg.merge_from_list(_UNTRUSTED)
        if method_file:
            cfg.OUTPUT_DIR += f"-{Path(method_file).stem}"

    return _build_config(merge, f"the config file {' or '.join(map(repr, files))}", options)


def config_from_text(text: str, options: Sequence[str]) -> CfgNode:
    """Load the config that is stored in a checkpoint; keys of older versions are translated.

    Args:
        text: as written by ``cfg.dump()``.
        options: ``KEY VALUE`` pairs, as for :func:`load_config`.

    Raises:
        UsageError: as :func:`load_config`.
    """

    def merge(cfg: CfgNode) -> None:
        stored = CfgNode(yaml.safe_load(text))
        _translate_renamed_keys(stored)
        cfg.merge_from_other_cfg(stored)
        cfg.merge_from_list(_UNTRUSTED)

    return _build_config(merge, "the config in the checkpoint", options)


def find_method_file(method: str) -> Path:
    """Find the config file of a method.

    Args:
        method: a short name such as ``soft_teacher`` or ``ablation/ler``, which stands for
            ``configs/methods/<name>.yaml`` of this repository, or the path of a file.

    Raises:
        UsageError: if there is neither; lists the short names.
    """
    files = sorted(METHODS_FOLDER.rglob("*.yaml"))
    names = {file.relative_to(METHODS_FOLDER).with_suffix("").as_posix(): file for file in files}
    if method in names:
        return names[method]
    if not Path(method).is_file():
        raise UsageError(
            f"method {method!r} does not exist; give one of {', '.join(names)}, or the path of a "
            "config file"
        )
    return Path(method)


def _build_config(merge: Callable[[CfgNode], None], source: str, options: Sequence[str]) -> CfgNode:
    cfg = _default_config()
    known = _key_paths(cfg)
    if len(options) % 2:
        raise UsageError(f"options must be given in pairs, KEY VALUE; got {options}")
    for key in options[::2]:
        if key not in known:
            raise UsageError(_unknown_key_message(key, known))
    try:
        merge(cfg)
        cfg.merge_from_list(list(options))
    except KeyError as error:
        raise UsageError(_unknown_key_message(str(error), known)) from error
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"cannot read {source}: {reason}") from error
    except ValueError as error:
        raise UsageError(
            f"config value of the wrong type: {error}. Write fractions with a decimal point "
            "(10.0, not 10) and lists with brackets and quotes (['a'], not a)"
        ) from error
    for key, names in _RENAMED_VALUES.items():
        section, name = key.split(".")
        cfg[section][name] = names.get(cfg[section][name], cfg[section][name])
    for node, key in ((cfg, "OUTPUT_DIR"), (cfg.MODEL, "WEIGHTS"), (cfg.MODEL.TIMM, "PRETRAINED")):
        if node[key] and "://" not in node[key]:
            node[key] = os.path.expanduser(os.path.expandvars(node[key]))
    set_timm_input(cfg)
    return cfg


def _default_config() -> CfgNode:
    cfg = get_cfg()
    add_locreweight_config(cfg)
    return cfg


def _key_paths(node: CfgNode, prefix: str = "") -> list[str]:
    paths = []
    for key, value in node.items():
        paths += _key_paths(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else []
        paths.append(prefix + key)
    return paths


def _unknown_key_message(error: str, known: list[str]) -> str:
    key = error.strip("'\"").rsplit(": ", 1)[-1]
    if key in _RENAMED_KEYS:
        return f"the config key {key} was renamed: use {_RENAMED_KEYS[key]}"
    if key in _REMOVED_KEYS:
        return f"the config key {key} was removed: leave it out"
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"unknown config key {key}{hint}"


def _translate_renamed_keys(cfg: CfgNode) -> None:
    """Replace former keys by today's and drop removed keys, in place."""
    for key in _REMOVED_KEYS:
        section, name = key.rsplit(".", 1)
        cfg.get(section, {}).pop(name, None)
    for old, new in _RENAMED_KEYS.items():
        old_section, old_name = old.rsplit(".", 1)
        if old_name not in cfg.get(old_section, {}):
            continue
        value = cfg[old_section].pop(old_name)
        node = cfg
        *sections, name = new.split(".")
        for section in sections:
            node = node.setdefault(section, CfgNode())
        node[name] = value


class _BoundedConfig(CfgNode):
    """Reads config files and their bases.

    It rejects files with a key that occurs twice in a section, and files whose aliases expand
    without bound.
    """

    @classmethod
    def _open_cfg(cls, filename: str) -> io.StringIO:
        with super()._open_cfg(filename) as file:
            text = file.read()
        pending, count = [yaml.safe_load(text)], 0
        while pending:
            node = pending.pop()
            pending += node.values() if isinstance(node, dict) else []
            pending += node if isinstance(node, list) else []
            count += 1
            if count > _MAX_VALUES:
                raise yaml.YAMLError(f"{filename} has more than {_MAX_VALUES} values")
        _check_unique_keys(filename, text)
        return io.StringIO(text)


def _check_unique_keys(filename: str, text: str) -> None:
    """Check that no section has a key twice, of which yaml would keep the last."""
    pending, visited = [yaml.compose(text, yaml.SafeLoader)], set()
    while pending:
        node = pending.pop()
        if node in visited or not isinstance(node, yaml.CollectionNode):
            continue
        visited.add(node)  # aliases are the same node
        if isinstance(node, yaml.SequenceNode):
            pending += node.value
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            pending.append(value)
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(
                    f"{filename} has the key {key.value} twice, in lines {lines[key.value]} and "
                    f"{line}: join them, because only the last one would count"
                )
            if key.tag != "tag:yaml.org,2002:merge":
                lines[key.value] = line


def check_supported(cfg: CfgNode, *, training: bool = True) -> None:
    """Check for keys that have no effect here, are out of range or contradict each other.

    Args:
        cfg: the config.
        training: also check the keys that evaluation does not read.

    Raises:
        UsageError: names the first such key and says what to set it to.
    """
    if training:
        check_compiled_kernels(cfg)
        check_anchors(cfg)
        if not cfg.OUTPUT_DIR:
            raise UsageError("OUTPUT_DIR is empty; set it to a folder for checkpoints and logs")
        _check_model(cfg)
        _check_timm(cfg)
        _check_ranges(cfg)
        _check_input(cfg)
        _check_early_stopping(cfg)
    _check_ignored(cfg, _IGNORED + (_IGNORED_IN_TRAINING if training else ()))
    _check_datasets(cfg, ("TRAIN", "UNLABELED", "TEST") if training else ("TEST",))


def _check_model(cfg: CfgNode) -> None:
    """Check that the detector can be trained on unlabeled images."""
    for key, registry, needed in (
        ("MODEL.META_ARCHITECTURE", META_ARCH_REGISTRY, SemiSupervisedRCNN),
        ("MODEL.ROI_HEADS.NAME", ROI_HEADS_REGISTRY, LocalizationAwareROIHeads),
    ):
        name = attrgetter(key)(cfg)
        if not issubclass(get_registered(registry, key, name), needed):
            raise UsageError(
                f"{key} {name} cannot be trained on unlabeled images: set it to {needed.__name__}"
            )


def _check_timm(cfg: CfgNode) -> None:
    timm = cfg.MODEL.TIMM
    if uses_timm(cfg):
        if cfg.MODEL.WEIGHTS.startswith("detectron2://ImageNetPretrained/"):
            raise UsageError(
                f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} holds a ResNet of Detectron2, but the backbone "
                f"is MODEL.TIMM.NAME {timm.NAME}: set MODEL.WEIGHTS '', and MODEL.TIMM.PRETRAINED "
                "to its weights"
            )
        return
    default = _default_config().MODEL.TIMM
    if changed := [key for key in timm if timm[key] != default[key]]:
        values = ", ".join(f"MODEL.TIMM.{key} is {timm[key]}" for key in changed)
        defaults = " ".join(f"MODEL.TIMM.{key} {default[key]!r}" for key in changed)
        raise UsageError(
            f"{values}, but MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} does not use MODEL.TIMM: "
            "set MODEL.BACKBONE.NAME build_timm_fpn_backbone and MODEL.TIMM.NAME "
            f"(docs/pretrained_backbones.md), or {defaults}"
        )


def _check_ranges(cfg: CfgNode) -> None:
    for key, (text, contains) in _RANGES.items():
        value = attrgetter(key)(cfg)
        if not contains(value):
            raise UsageError(f"{key} is {value}; it must be {text}")


def _check_early_stopping(cfg: CfgNode) -> None:
    if cfg.SOLVER.EARLY_STOPPING_PATIENCE and not (cfg.DATASETS.TEST and cfg.TEST.EVAL_PERIOD > 0):
        raise UsageError(
            "SOLVER.EARLY_STOPPING_PATIENCE counts evaluations, and there are none during training:"
            " set DATASETS.TEST and TEST.EVAL_PERIOD"
        )


def _check_input(cfg: CfgNode) -> None:
    _check_choice(cfg, "INPUT.RANDOM_FLIP", ("none", "horizontal", "vertical"))
    _check_choice(cfg, "INPUT.MIN_SIZE_TRAIN_SAMPLING", ("range", "choice"))
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    if not sizes:
        raise UsageError("INPUT.MIN_SIZE_TRAIN is empty; set it to the short side of the images")
    is_range = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    if is_range and (len(sizes) != 2 or sizes[0] > sizes[1]):
        raise UsageError(
            f"INPUT.MIN_SIZE_TRAIN {tuple(sizes)} must be a smallest and a largest size, because "
            "INPUT.MIN_SIZE_TRAIN_SAMPLING is range: for a single size, give it twice; for a list "
            "of sizes, set the sampling to choice"
        )


def _check_ignored(cfg: CfgNode, keys: Sequence[str]) -> None:
    default = _default_config()
    for key in keys:
        value = attrgetter(key)(default)
        if attrgetter(key)(cfg) != value:
            raise UsageError(
                f"{key} is not supported here; leave it at Detectron2's default, {value!r}"
            )


def _check_datasets(cfg: CfgNode, keys: Sequence[str]) -> None:
    for key in keys:
        names = cfg.DATASETS[key]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"DATASETS.{key} contains {name!r} more than once: name it once")
    for name in cfg.DATASETS.CLASS_NAMES:
        if not isinstance(name, str):
            raise UsageError(
                f"DATASETS.CLASS_NAMES contains {name!r}: use a text in quotes, such as "
                f"{str(name)!r}, because yaml reads words like yes and no, and digits, as other "
                "values"
            )


def _check_choice(cfg: CfgNode, key: str, known: Sequence[str]) -> None:
    value = attrgetter(key)(cfg)
    if value not in known:
        raise UsageError(f"unknown {key} {value!r}; known names: {', '.join(known)}")


def scale_to_world_size(cfg: CfgNode, world_size: int) -> CfgNode:
    """Scale a config to the number of GPUs.

    With ``SOLVER.REFERENCE_WORLD_SIZE`` set, the number of images per GPU stays the same. Batch
    size and learning rate grow with the number of GPUs, and everything that is counted in
    iterations shrinks, as in Detectron2. The EMA keep rate is raised to the power of the scale, so
    that the teacher averages over the same number of images (Busbridge et al., How to Scale Your
    EMA, 2023). With 0 the config is used as written.

    Args:
        cfg: not changed.
        world_size: number of GPUs (processes).

    Raises:
        UsageError: if a batch cannot be divided equally among the GPUs, or the keep rate is not
            between 0 and 1.
    """
    if not 0.0 <= cfg.SEMI.EMA_KEEP_RATE <= 1.0:
        raise UsageError(
            f"SEMI.EMA_KEEP_RATE is {cfg.SEMI.EMA_KEEP_RATE:g}; it must be from 0 to 1"
        )
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    for size in (reference, world_size) if reference else (world_size,):
        for key in ("IMS_PER_BATCH", "IMS_PER_BATCH_UNLABELED"):
            images = cfg.SOLVER[key]
            # With a reference, only the reference has to divide the batch.
            if images % size and (size == reference or not reference):
                raise UsageError(
                    f"SOLVER.{key} = {images} cannot be divided equally among {size} GPUs; use a "
                    f"multiple of {size}, for example {max(size, round(images / size) * size)}"
                )
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size)
    if scaled is not cfg:
        scale = world_size / reference
        frozen = scaled.is_frozen()
        scaled.defrost()
        scaled.SOLVER.IMS_PER_BATCH_UNLABELED = round(cfg.SOLVER.IMS_PER_BATCH_UNLABELED * scale)
        scaled.SEMI.BURN_IN_ITERS = round(cfg.SEMI.BURN_IN_ITERS / scale)
        scaled.SEMI.EMA_KEEP_RATE = cfg.SEMI.EMA_KEEP_RATE**scale
        # At least 1, because 0 means never.
        scaled.VIS_PERIOD = math.ceil(cfg.VIS_PERIOD / scale)
        if cfg.TEST.EVAL_PERIOD > 0:
            scaled.TEST.EVAL_PERIOD = max(1, scaled.TEST.EVAL_PERIOD)
        if cfg.SOLVER.CHECKPOINT_PERIOD > 0:
            scaled.SOLVER.CHECKPOINT_PERIOD = max(1, scaled.SOLVER.CHECKPOINT_PERIOD)
        if frozen:
            scaled.freeze()
    if scaled.SOLVER.IMS_PER_BATCH < 1:
        raise UsageError("SOLVER.IMS_PER_BATCH must be at least one labeled image per GPU")
    if scaled.SOLVER.MAX_ITER < 1:
        raise UsageError(
            f"SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER} is less than one iteration on {world_size} "
            f"GPUs, because it counts iterations on {reference or world_size} GPUs "
            "(SOLVER.REFERENCE_WORLD_SIZE): set it to at least "
            f"{max(1, math.ceil(world_size / (reference or world_size)))}"
        )
    _check_schedule(scaled)
    return scaled


def _check_schedule(cfg: CfgNode) -> None:
    """Check the keys of the optimizer and of the learning rate schedule."""
    solver = cfg.SOLVER
    for key, known in {
        "LR_SCHEDULER_NAME": (
            "WarmupMultiStepLR",
            "WarmupCosineLR",
            "WarmupStepWithFixedGammaLR",
        ),
        "WARMUP_METHOD": ("linear", "constant"),
        "OPTIMIZER": ("SGD", "AdamW"),
    }.items():
        _check_choice(cfg, f"SOLVER.{key}", known)
    if solver.CLIP_GRADIENTS.ENABLED:
        _check_choice(cfg, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", ("norm", "value"))
    # Later steps have no effect, so that a short trial run does not need other steps.
    reached = [step for step in solver.STEPS if step <= solver.MAX_ITER]
    is_multi_step = solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
    if is_multi_step and (
        any(first >= second for first, second in pairwise([0, *solver.STEPS]))
        or solver.MAX_ITER in reached
    ):
        raise UsageError(
            f"SOLVER.STEPS {tuple(solver.STEPS)} must be positive, in increasing order, and not "
            f"SOLVER.MAX_ITER {solver.MAX_ITER} itself: the learning rate changes after these "
            "iterations"
        )
    is_cosine = solver.LR_SCHEDULER_NAME == "WarmupCosineLR"
    if is_cosine and not 0.0 <= solver.BASE_LR_END <= solver.BASE_LR:
        raise UsageError(
            f"SOLVER.BASE_LR_END {solver.BASE_LR_END:g} must be from 0 to SOLVER.BASE_LR "
            f"{solver.BASE_LR:g}"
        )
