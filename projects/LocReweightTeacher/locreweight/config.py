"""Config keys that this project adds to Detectron2, and functions that load and check configs."""

from __future__ import annotations

import difflib
import io
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from .checkpoint.zoo import PREFIX as ZOO
from .errors import UsageError
from .modeling.backbones import set_timm_input

logger = logging.getLogger(__name__)

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
    # It concerns labeled images, and unlabeled ones only for methods that use it there: the default
    # classification loss, as of Unbiased Teacher, and CST.
    cfg.MODEL.ROI_BOX_HEAD.FOCAL_GAMMA = 0.0
    # Above 0: average each detected box with the boxes that overlap it by an IoU of at least 0.5,
    # weighted by their scores and predicted variances (variance voting,
    # locreweight/modeling/box_voting.py). A smaller value, such as 0.02, gives boxes that overlap
    # less a smaller weight. Pseudo-labels are not averaged. Requires CORNER_CODING.
    cfg.MODEL.ROI_BOX_HEAD.VOTING_SIGMA = 0.0
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
    # classes.txt and obj.names may have other names. If they have the same names, the order must
    # be the same.
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
    # Allow --eval-only on data with other class names than DATASETS.CLASS_NAMES or those that the
    # checkpoint was trained with: class i of the data is class i of the model. False: an error.
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
        usual_method = cfg.SEMI.METHOD
        for file in files:
            _BoundedConfig.load_yaml_with_base(file)
            former_method = cfg.SEMI.METHOD
            # By default Detectron2 falls back to a loader that runs Python code in the file.
            cfg.merge_from_file(file, allow_unsafe=False)
            if is_zoo_model and file == base_file:
                cfg.merge_from_list(_UNTRUSTED)
        if method_file:
            cfg.OUTPUT_DIR += f"-{Path(method_file).stem}"
            if former_method not in (usual_method, cfg.SEMI.METHOD):
                logger.warning(
                    "%s is a config of the method %s. Keys that %s does not set keep their values, "
                    "such as SEMI.EMA_KEEP_RATE %g. Use a config without a method instead",
                    base_file,
                    former_method,
                    method_file,
                    cfg.SEMI.EMA_KEEP_RATE,
                )

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
        UsageError: if there is neither; suggests similar names and lists all short names.
    """
    files = sorted(METHODS_FOLDER.rglob("*.yaml"))
    names = {file.relative_to(METHODS_FOLDER).with_suffix("").as_posix(): file for file in files}
    if method in names:
        return names[method]
    if not Path(method).is_file():
        close = difflib.get_close_matches(method, names, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(close)}?" if close else "."
        raise UsageError(
            f"method {method!r} does not exist{hint} The methods are {', '.join(names)}. The path "
            "of a config file is possible as well"
        )
    return Path(method)


def _build_config(merge: Callable[[CfgNode], None], source: str, options: Sequence[str]) -> CfgNode:
    cfg = default_config()
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


def default_config() -> CfgNode:
    """Return a config with the defaults of Detectron2 and of this project."""
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
