"""Every config key that this project adds to Detectron2's, with its default and what it means."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from .bounded_config import BoundedConfig
from .errors import UsageError
from .installed_detectron2 import check_compiled_kernels
from .zoo.address import PREFIX as ZOO

# Not text, not YAML, YAML that would run Python, not a mapping, made for another version, its
# _BASE_ is not there or is the file itself.
_UNREADABLE = (
    AssertionError,
    AttributeError,
    OSError,
    RecursionError,
    TypeError,
    UnicodeDecodeError,
    yaml.YAMLError,
)
# What configs of others cannot say: whom to trust.
_STRANGERS = ["MODEL.TRUST_WEIGHTS", False, "DATASETS.ALLOW_OUTSIDE_PATHS", False]


def add_locreweight_config(cfg: CfgNode) -> None:
    """Add this project's keys to a Detectron2 config, in place."""
    _add_training_keys(cfg)
    _add_model_keys(cfg)
    _add_data_keys(cfg)


def _add_training_keys(cfg: CfgNode) -> None:
    cfg.SEMI = CfgNode()
    # The method: which pseudo-labels, and how they are learned from (engine/strategies/):
    # "LocReweight", its control "ShuffledLocReweight", or one to compare it with: "Stac",
    # "UnbiasedTeacher", "SoftTeacher".
    cfg.SEMI.STRATEGY = "LocReweight"
    # Iterations on labeled images only, before the teacher starts to label. With at least
    # SOLVER.MAX_ITER of them training is supervised from end to end.
    cfg.SEMI.BURN_IN_ITERS = 2000
    # Share of itself that the teacher keeps in each update; reached by a ramp (method/teacher.py).
    # It follows the batch when that is scaled with the number of GPUs.
    cfg.SEMI.EMA_KEEP_RATE = 0.9996
    # A detection of the teacher is a pseudo-label if its class probability exceeds this.
    cfg.SEMI.PSEUDO_LABEL_THRESHOLD = 0.8
    # beta of Eq. 3: weight of all losses on unlabeled images.
    cfg.SEMI.UNSUPERVISED_WEIGHT = 4.0
    # Of LocReweight: LER (Eq. 11). Off: all pseudo-labels count alike in the box loss.
    cfg.SEMI.LER = True
    # Of LocReweight: PRC (Eq. 14). Off: the detector's own classification loss on pseudo-labels.
    cfg.SEMI.PRC = True
    # Factor on the localization quality wherever it is a weight, for studies of its range (0, 0.5).
    cfg.SEMI.QUALITY_SCALE = 1.0
    # Losses of the region proposal network on pseudo-labels, each with its switch.
    cfg.SEMI.RPN_OBJECTNESS_LOSS = True
    cfg.SEMI.RPN_BOX_LOSS = True
    # Eq. 10, 11 and 14 divide by the number of foreground (background) proposals. True: divide by
    # the number of all sampled proposals instead, as Detectron2 does.
    cfg.SEMI.NORMALIZE_BY_SAMPLED = False

    # SOLVER.IMS_PER_BATCH counts the labeled images of one iteration over all GPUs, as in any
    # Detectron2 config; this counts the unlabeled ones.
    cfg.SOLVER.IMS_PER_BATCH_UNLABELED = 16
    # Of the checkpoints that SOLVER.CHECKPOINT_PERIOD writes, the newest so many stay; 0: all. The
    # best and the final one stay in any case. With 1 a damaged file has none before it.
    cfg.SOLVER.KEEP_CHECKPOINTS = 3
    # A step whose loss or gradient is not finite is left out, and its images are written to
    # OUTPUT_DIR/skipped_steps.jsonl. So many of them in a row end training.
    cfg.SOLVER.MAX_SKIPPED_STEPS = 10
    # What SOLVER.AMP.ENABLED computes in: "float16" (with loss scaling) or "bfloat16".
    cfg.SOLVER.AMP.DTYPE = "float16"


def _add_model_keys(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "SemiSupervisedRCNN"
    cfg.MODEL.ROI_HEADS.NAME = "LocalizationAwareROIHeads"
    # MODEL.WEIGHTS are read as numbers only. True: unpickle whatever the file holds, which can run
    # any code; for files of people you trust.
    cfg.MODEL.TRUST_WEIGHTS = False
    # Frozen batch norm of the backbone becomes part of the convolution before it: the same numbers
    # but for rounding, in less time. False: two operations, as Detectron2.
    cfg.MODEL.FOLD_FROZEN_NORM = True
    # What the box branch predicts and Eq. 4 models: True: offsets of the two corners over the
    # proposal's width and height; False: Detectron2's (dx, dy, dw, dh). Both are multiplied with
    # MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS (corners: with its first two numbers).
    cfg.MODEL.ROI_BOX_HEAD.CORNER_CODING = True
    # The predicted log-variance is bounded to [-limit, limit].
    cfg.MODEL.ROI_BOX_HEAD.LOG_VARIANCE_LIMIT = 7.0
    # Boxes of labeled images are trained by the KL loss of Eq. 10, which fits the variances. Off:
    # by smooth L1, as in detectors without a localization-aware branch; variances stay untrained.
    cfg.MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES = True
    # Above 0: proposals are classified by focal loss with this exponent (Unbiased Teacher: 1.5).
    cfg.MODEL.ROI_BOX_HEAD.FOCAL_GAMMA = 0.0
    # Detectron2's key, for smooth L1 on pseudo-labels (Eq. 11), in the units of the box coding.
    cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA = 1.0


def _add_data_keys(cfg: CfgNode) -> None:
    # Data sets are named by what Detectron2 has registered, or by where they lie:
    #   "coco:<annotations.json>:<image folder>"   "voc:<folder>:<split>"   "folder:<image folder>"
    #   "list:<index.txt>:<image folder>"
    # DATASETS.TRAIN is labeled, DATASETS.UNLABELED needs no annotations (never learned from).
    cfg.DATASETS.UNLABELED = ()
    # Share of DATASETS.TRAIN, in percent, that is used with its labels; the rest joins the
    # unlabeled images. Drawn by DATASETS.SPLIT_SEED alone: the same in every process and run.
    cfg.DATASETS.LABELED_PERCENT = 100.0
    cfg.DATASETS.SPLIT_SEED = 1
    # A file with splits, from which the two keys above choose one: written by
    # datasets/make_split.py, or Unbiased Teacher's COCO_supervision.txt. Empty: the split is drawn.
    cfg.DATASETS.SPLIT_FILE = ""
    # Class names of "voc:" data sets, in the order of the model's classes. Empty: VOC's twenty.
    cfg.DATASETS.CLASS_NAMES = ()
    # The truth of unlabeled images, to measure pseudo-labels with and for nothing else: annotated
    # data sets whose images are (also) in DATASETS.UNLABELED. That of images which LABELED_PERCENT
    # set aside, and of annotated sets in DATASETS.UNLABELED, is known without it.
    cfg.DATASETS.UNLABELED_TRUTH = ()
    # An unlabeled image that is among the labeled ones is an error, one among the test images a
    # warning; True leaves them out instead.
    cfg.DATASETS.EXCLUDE_LABELED = False
    # A NaN, infinite or inverted labeled box is an error; True leaves it out instead.
    cfg.DATASETS.DROP_BAD_BOXES = False
    # All labeled and test images are decoded once before training: a broken one is an error then.
    # False leaves it out, for those who start often from a slow disk.
    cfg.DATASETS.CHECK_IMAGES = True
    # An unlabeled image that cannot be read is skipped. Training stops when more than this share of
    # those drawn since it was started or resumed are such, counted from 100 drawn on.
    cfg.DATASETS.MAX_UNREADABLE_SHARE = 0.1
    # Annotation files may name images by absolute paths and by paths with "..". False: an error,
    # since somebody else's file could then make any image or text of this machine part of a run.
    cfg.DATASETS.ALLOW_OUTSIDE_PATHS = False
    # Resume although there are more, less or other training images than before. False: an error.
    cfg.DATASETS.ALLOW_CHANGED = False

    # Detectron2's VIS_PERIOD is how often, in iterations, the pseudo-labels of some fixed unlabeled
    # images are drawn and measured (0: never); so many of them are measured.
    cfg.TEST.WATCHED_IMAGES = 200

    # How views are made (data/recipes.py): "SoftTeacherRecipe", "UnbiasedTeacherRecipe",
    # "StacRecipe", or the name of your own in RECIPE_REGISTRY. Sizes and flips follow Detectron2's
    # INPUT keys.
    cfg.INPUT.RECIPE = "SoftTeacherRecipe"
    # JPEGs of training images are decoded at 1/2, 1/4 or 1/8 of their size where even that leaves
    # 1.5 times the pixels, across and down, of the largest view that the keys above allow.
    # Photos of a phone then cost a fraction; the pixels of a view change by less than a bicubic
    # instead of a bilinear filter would change them. False: every image is decoded whole.
    cfg.INPUT.REDUCED_DECODING = True


def load_config(config_file: str, options: Sequence[str], method: str = "") -> CfgNode:
    """Detectron2's defaults, this project's keys, files and ``KEY VALUE`` pairs, in that order.

    Args:
        config_file: data, detector and schedule; empty for none. May be a model of the zoo, as in
            ``locreweight://<name>.yaml``.
        options: the pairs, one after another.
        method: a file with what one method does otherwise (``configs/methods/``), laid over the
            first one. Unless the pairs name OUTPUT_DIR, the method's name is appended to it, so
            that methods do not write into each other's folders.

    Raises:
        UsageError: for a missing file, an unknown key or a value of the wrong type.
    """
    of_zoo = config_file.startswith(ZOO)
    if of_zoo and not config_file.endswith(".yaml"):
        raise UsageError(f"{config_file} are weights; their config is {config_file}.yaml")
    first = PathManager.get_local_path(config_file) if of_zoo else config_file
    if of_zoo and "_BASE_" in Path(first).read_text():
        raise UsageError(f"{config_file} names a _BASE_, a file that the zoo does not vouch for")
    files = [file for file in (first, method) if file]
    for file in files:
        if not Path(file).is_file():
            raise UsageError(f"config file {file!r} does not exist")

    def merge(cfg: CfgNode) -> None:
        for file in files:
            BoundedConfig.load_yaml_with_base(file)
            # Detectron2's default would run whatever Python the file asks for.
            cfg.merge_from_file(file, allow_unsafe=False)
            if of_zoo and file == first:
                cfg.merge_from_list(_STRANGERS)
        if method:
            cfg.OUTPUT_DIR += f"-{Path(method).stem}"

    return _merged(merge, f"the config file {' or '.join(map(repr, files))}", options)


def config_from_text(text: str, options: Sequence[str]) -> CfgNode:
    """The same with the config that a checkpoint carries, as ``cfg.dump()`` wrote it."""

    def merge(cfg: CfgNode) -> None:
        cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(text)))
        cfg.merge_from_list(_STRANGERS)

    return _merged(merge, "the config in the checkpoint", options)


def _merged(merge: Callable[[CfgNode], None], source: str, options: Sequence[str]) -> CfgNode:
    cfg = get_cfg()
    add_locreweight_config(cfg)
    known = _key_paths(cfg)
    if len(options) % 2:
        raise UsageError(f"options come in pairs, KEY VALUE; got {options}")
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
            f"config value of the wrong type: {error}. Fractions need their point (10.0, not 10), "
            "lists their brackets and quotes (['a'], not a)"
        ) from error
    return cfg


def _key_paths(node: CfgNode, prefix: str = "") -> list[str]:
    paths = []
    for key, value in node.items():
        paths += _key_paths(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else []
        paths.append(prefix + key)
    return paths


def _unknown_key_message(error: str, known: list[str]) -> str:
    key = error.strip("'\"").rsplit(": ", 1)[-1]
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"unknown config key {key}{hint}"


def check_supported(cfg: CfgNode) -> None:
    """Check for keys of Detectron2 that have no effect here or that this installation lacks.

    Raises:
        UsageError: names the first such key, or OUTPUT_DIR if it is empty.
    """
    check_compiled_kernels(cfg)
    if not cfg.OUTPUT_DIR:
        raise UsageError("OUTPUT_DIR is empty: a run needs a folder for its checkpoints")
    box_head = cfg.MODEL.ROI_BOX_HEAD
    for key, is_set in {
        "MODEL.MASK_ON": cfg.MODEL.MASK_ON,
        "MODEL.KEYPOINT_ON": cfg.MODEL.KEYPOINT_ON,
        "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": box_head.USE_SIGMOID_CE,
        "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": box_head.USE_FED_LOSS,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": box_head.BBOX_REG_LOSS_TYPE != "smooth_l1",
        "INPUT.CROP.ENABLED": cfg.INPUT.CROP.ENABLED,
        "TEST.PRECISE_BN.ENABLED": cfg.TEST.PRECISE_BN.ENABLED,
    }.items():
        if is_set:
            raise UsageError(f"{key} has no effect here; leave it at Detectron2's default")
