"""A trained detector, ready to be used: from a checkpoint alone, on images as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager

from ..checkpoint.checkpointer import (
    PLAIN_DETECTOR,
    CheckpointDescription,
    TeacherCheckpointer,
    check_weights_exist,
    load_for_evaluation,
)
from ..checkpoint.files import last_checkpoint
from ..checkpoint.safe_loading import read_weights
from ..config import config_from_text, load_config
from ..data.datasets.catalog import register
from ..data.transforms.augmentations import resize_and_flip
from ..errors import UsageError
from ..modeling.meta_arch import SemiSupervisedRCNN


@dataclass(frozen=True)
class Predictor:
    """A model with what it takes to use it.

    Attributes:
        cfg: the effective config that it was trained with; ``MODEL.DEVICE`` is that of now.
        model: in evaluation mode.
        class_names: in the order of its classes.
        measures_quality: whether its localization quality means anything; a plain Detectron2
            detector has not learned any.
    """

    cfg: CfgNode
    model: SemiSupervisedRCNN
    class_names: list[str]
    has_localization_quality: bool

    @property
    def default_batch_size(self) -> int:
        """Images at a time: a GPU is busy with several; a CPU gains nothing by them."""
        return 8 if self.cfg.MODEL.DEVICE.startswith("cuda") else 1

    @torch.no_grad()
    def detect(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Detections in images.

        Args:
            images: each ``(H, W, 3)`` uint8 RGB; they go through the model together.

        Returns:
            for each image, on the CPU: ``pred_boxes`` (xyxy, absolute pixels of that image),
            ``pred_classes``, ``scores`` above ``MODEL.ROI_HEADS.SCORE_THRESH_TEST`` and
            ``localization_quality``.
        """
        outputs = self.model([self.model_input(image) for image in images])
        return [output["instances"].to("cpu") for output in outputs]

    def model_input(self, image: np.ndarray) -> dict:
        """An image, ``(H, W, 3)`` uint8 RGB, as the model takes it: resized, in its own format."""
        resized = T.AugInput(image)
        T.AugmentationList(resize_and_flip(self.cfg, is_train=False))(resized)
        pixels = torch.from_numpy(np.ascontiguousarray(resized.image.transpose(2, 0, 1)))
        ordered = pixels if self.cfg.INPUT.FORMAT == "RGB" else pixels.flip(0)
        return {"image": ordered, "height": image.shape[0], "width": image.shape[1]}


def load_predictor(
    weights: str, config_file: str = "", options: Sequence[str] = (), device: str = ""
) -> Predictor:
    """The detector of a checkpoint; of one that training here wrote, that of the teacher.

    Args:
        weights: a file, or an ``OUTPUT_DIR``, whose last checkpoint is taken.
        config_file: needed for files that do not say how they were trained, and have no
            ``config.yaml`` beside them.
        options: ``KEY VALUE`` pairs that go over the config.
        device: "cuda", "cpu", ...; empty for a GPU if there is one.

    Raises:
        UsageError: if the file is not there, is no detector's, or needs a config file.
    """
    file = _checkpoint_file(weights)
    check_weights_exist(file)
    trusted = load_config("", options).MODEL.TRUST_WEIGHTS
    description = None if file.endswith(".pkl") else read_description(file, trusted=trusted)
    cfg = _config_of(file, config_file, description, options)
    cfg.MODEL.WEIGHTS = file
    cfg.MODEL.DEVICE = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cfg.freeze()
    model = build_model(cfg).eval()
    held = load_for_evaluation(cfg, model)
    names = description.class_names if description else _class_names_of(cfg)
    return Predictor(cfg, model, names, has_localization_quality=held != PLAIN_DETECTOR)


def load_student(cfg: CfgNode, weights: str) -> SemiSupervisedRCNN:
    """The student of a checkpoint in evaluation mode, on the CPU; a random one without a file.

    Of files without a student, such as plain Detectron2 detectors, it is their one model.

    Raises:
        UsageError: if the file is not there, or does not fit the config.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = _checkpoint_file(weights) if weights else ""
    model, student = build_model(cfg).eval(), build_model(cfg).eval()
    if not weights:
        return student
    load_for_evaluation(cfg, model)
    student.load_state_dict(model.state_dict())
    TeacherCheckpointer(model, save_to_disk=False, student=student).load(cfg.MODEL.WEIGHTS)
    return student


def read_description(file: str, *, trusted: bool = False) -> CheckpointDescription | None:
    """What a checkpoint says of itself.

    Args:
        file: a path or an address.
        trusted: as in :func:`.safe_reading.read_weights`.

    Raises:
        UsageError: if it cannot be read.
    """
    content = read_weights(PathManager.get_local_path(file), trusted=trusted)
    return CheckpointDescription.from_fields(content) if isinstance(content, dict) else None


def _checkpoint_file(weights: str) -> str:
    folder = Path(weights)
    if not folder.is_dir():
        return weights
    name = last_checkpoint(folder)
    if name is None:
        raise UsageError(
            f"the folder {weights} has no checkpoint yet: name a file or an OUTPUT_DIR"
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
    beside = Path(file).with_name("config.yaml")
    if beside.is_file():
        return load_config(str(beside), options)
    raise UsageError(
        f"{file} does not say how it was trained, and there is no config.yaml beside it: name its "
        "config with --config-file"
    )


def _class_names_of(cfg: CfgNode) -> list[str]:
    """For a file that does not say them: of the config's data sets, or numbers without these."""
    count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        try:
            register(
                [name],
                cfg.DATASETS.CLASS_NAMES,
                allow_outside=cfg.DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS,
            )
            if not hasattr(MetadataCatalog.get(name), "thing_classes"):
                DatasetCatalog.get(name)  # a COCO json says its classes when it is read
        except (OSError, UsageError):  # the data are elsewhere
            continue
        names = list(MetadataCatalog.get(name).get("thing_classes", []))
        if len(names) == count:
            return names
    return [f"class {i}" for i in range(count)]
