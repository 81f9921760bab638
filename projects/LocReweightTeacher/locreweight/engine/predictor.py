"""Predictor: a trained detector, loaded from a checkpoint, that takes images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Instances

from ..checkpoint.checkpointer import CheckpointContents, CheckpointDescription, TeacherCheckpointer
from ..checkpoint.files import last_checkpoint
from ..checkpoint.loading import check_weights_exist, load_for_evaluation, read_description
from ..config import config_from_text, load_config
from ..data.datasets.catalog import register
from ..data.transforms.augmentations import resize_and_flip
from ..errors import UsageError
from ..modeling import build_detector
from ..modeling.meta_arch import SemiSupervisedRCNN
from ..run_files import CONFIG_FILE
from .startup_checks import check_device


@dataclass(frozen=True)
class Predictor:
    """A trained model with its config and class names.

    Attributes:
        cfg: the effective config of the training run, with the current ``MODEL.DEVICE``.
        model: in evaluation mode.
        class_names: in the order of the model's classes.
        has_localization_quality: whether the model was trained to predict localization quality,
            which a plain Detectron2 detector was not.
        score_threshold: the score threshold with the best F1 on the test set of the training; None
            if it is not known.
    """

    cfg: CfgNode
    model: SemiSupervisedRCNN
    class_names: list[str]
    has_localization_quality: bool
    score_threshold: float | None = None

    @property
    def default_batch_size(self) -> int:
        """Batch size: 8 on a GPU; 1 on a CPU, where larger batches are not faster."""
        return 8 if self.cfg.MODEL.DEVICE.startswith("cuda") else 1

    @torch.no_grad()
    def detect(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Detect objects in images.

        Args:
            images: ``(H, W, 3)`` uint8 RGB each; processed as one batch.

        Returns:
            for each image, on the CPU: ``pred_boxes`` (xyxy, absolute pixels of the image),
            ``pred_classes``, ``scores`` above ``MODEL.ROI_HEADS.SCORE_THRESH_TEST`` and
            ``localization_quality``.
        """
        outputs = self.model([self.model_input(image) for image in images])
        return [output["instances"].to("cpu") for output in outputs]

    def model_input(self, image: np.ndarray) -> dict:
        """Convert an image to the model's input: resized, channels first, as ``INPUT.FORMAT`` says.

        Args:
            image: ``(H, W, 3)`` uint8 RGB.

        Returns:
            Detectron2's input: ``image``, and the original ``height`` and ``width``.
        """
        resized = T.AugInput(image)
        T.AugmentationList(resize_and_flip(self.cfg, is_train=False))(resized)
        pixels = torch.from_numpy(np.ascontiguousarray(resized.image.transpose(2, 0, 1)))
        ordered = pixels if self.cfg.INPUT.FORMAT == "RGB" else pixels.flip(0)
        return {"image": ordered, "height": image.shape[0], "width": image.shape[1]}


def load_predictor(
    weights: str, config_file: str = "", options: Sequence[str] = (), device: str = ""
) -> Predictor:
    """Load the detector of a checkpoint; in checkpoints of a training run, this is the teacher.

    Args:
        weights: a checkpoint, or an ``OUTPUT_DIR`` for its last checkpoint.
        config_file: required for checkpoints that contain no config and have no ``config.yaml``
            beside them.
        options: ``KEY VALUE`` pairs that override the config.
        device: such as "cuda" or "cpu"; empty for a GPU if there is one.

    Raises:
        UsageError: if the file does not exist, holds no detector, or a config file is required.
    """
    file = _checkpoint_file(weights)
    check_weights_exist(file)
    trusted = load_config("", options).MODEL.TRUST_WEIGHTS
    description = None if file.endswith(".pkl") else read_description(file, trusted=trusted)
    cfg = _config_of(file, config_file, description, options)
    cfg.MODEL.WEIGHTS = file
    cfg.MODEL.DEVICE = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(cfg.MODEL.DEVICE, "use --device cpu")
    cfg.freeze()
    model = build_detector(cfg).eval()
    plain = load_for_evaluation(cfg, model) is CheckpointContents.PLAIN_DETECTOR
    names = description.class_names if description else class_names_of_data(cfg)
    if not names:
        names = [f"class {i}" for i in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES)]
    threshold = description.score_threshold if description else None
    return Predictor(
        cfg, model, names, has_localization_quality=not plain, score_threshold=threshold
    )


def load_student(cfg: CfgNode, weights: str) -> SemiSupervisedRCNN:
    """Load the student of a checkpoint, in evaluation mode on the CPU.

    Args:
        cfg: config of the model.
        weights: a checkpoint or an ``OUTPUT_DIR``; empty for a randomly initialized model. For
            files with a single model, such as plain Detectron2 detectors, that model is returned.

    Raises:
        UsageError: if the file does not exist or does not fit the config.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = _checkpoint_file(weights) if weights else ""
    model, student = build_detector(cfg).eval(), build_detector(cfg).eval()
    if not weights:
        return student
    load_for_evaluation(cfg, model)
    student.load_state_dict(model.state_dict())
    TeacherCheckpointer(model, save_to_disk=False, student=student).load(cfg.MODEL.WEIGHTS)
    return student


def _checkpoint_file(weights: str) -> str:
    folder = Path(weights)
    if not folder.is_dir():
        return weights
    name = last_checkpoint(folder)
    if name is None:
        raise UsageError(
            f"the folder {weights} has no checkpoint: use a checkpoint or the OUTPUT_DIR of a run"
        )
    return str(folder / name)


def _config_of(
    file: str,
    config_file: str,
    description: CheckpointDescription | None,
    options: Sequence[str],
) -> CfgNode:
    if config_file:
        return load_config(config_file, options)
    if description:
        return config_from_text(description.config, options)
    beside = Path(file).with_name(CONFIG_FILE)
    if beside.is_file():
        return load_config(str(beside), options)
    raise UsageError(
        f"{file} contains no config, and there is no {CONFIG_FILE} beside it: pass its config with "
        "--config-file"
    )


def class_names_of_data(cfg: CfgNode) -> list[str] | None:
    """Look up the class names in the data sets of a config.

    Returns:
        the names of the first data set that can be read and has as many classes as the model; None
        if there is none.
    """
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        try:
            register(
                [name],
                cfg.DATASETS.CLASS_NAMES,
                allow_outside=cfg.DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS,
            )
            if not hasattr(MetadataCatalog.get(name), "thing_classes"):
                DatasetCatalog.get(name)  # class names of a COCO json are known once it is read
        except (OSError, UsageError):  # the data are not on this machine
            continue
        names = list(MetadataCatalog.get(name).get("thing_classes", []))
        if len(names) == cfg.MODEL.ROI_HEADS.NUM_CLASSES:
            return names
    return None
