"""Predictor: a trained detector, loaded from a checkpoint, that takes images of any size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TypeVar, overload

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Instances
from PIL import Image

from ..checkpoint.checkpointer import CheckpointContents, CheckpointDescription, TeacherCheckpointer
from ..checkpoint.files import choose_checkpoint
from ..checkpoint.loading import check_weights_exist, load_for_evaluation, read_description
from ..config import config_from_text, load_config
from ..data.datasets.catalog import register
from ..data.image_io import decode_image, read_rgb, unreadable_image_errors
from ..data.transforms.augmentations import resize_and_flip
from ..errors import UsageError
from ..modeling import build_detector, use_project_classes
from ..modeling.meta_arch import SemiSupervisedRCNN
from ..run_files import CONFIG_FILE
from .detections import Detections
from .startup_checks import check_device

ImageSource = str | Path | np.ndarray | Image.Image
Key = TypeVar("Key")

DEFAULT_THRESHOLD = 0.5


class Predictor:
    """A trained detector that finds objects in images of any size::

        predictor = Predictor("output/mine")
        for detections in predictor(["a.jpg", "b.jpg"]):
            print(detections.names, detections.boxes, detections.scores)
            detections.save("found.jpg")

    Attributes:
        cfg: the effective config of the training run, with the current ``MODEL.DEVICE``.
            ``MODEL.WEIGHTS`` is the checkpoint file.
        model: the teacher of the checkpoint, in evaluation mode.
        class_names: in the order of the model's classes.
        is_plain_detector: whether the checkpoint is a plain Detectron2 detector.
        has_localization_quality: whether the model was trained to predict localization quality,
            which plain Detectron2 detectors and those without the KL loss
            (``MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES False``) were not.
        score_threshold: the score threshold with the best F1 on the test set of the training; None
            if it is not known.
        threshold: objects above this score are returned by a call. Default: ``score_threshold``, or
            0.5 if it is not known.
    """

    cfg: CfgNode
    model: SemiSupervisedRCNN
    class_names: list[str]
    is_plain_detector: bool
    has_localization_quality: bool
    score_threshold: float | None
    threshold: float

    def __init__(
        self,
        weights: str | Path,
        config_file: str = "",
        options: Sequence[str] = (),
        device: str = "",
        *,
        last: bool = False,
        threshold: float | None = None,
    ) -> None:
        """Load the detector of a checkpoint; in checkpoints of a training run, this is the teacher.

        Args:
            weights: a checkpoint, an ``OUTPUT_DIR``, or ``locreweight://<name>`` of a model zoo.
            config_file: required for checkpoints that contain no config and have no
                ``config.yaml`` beside them. It can be a config of Detectron2.
            options: ``KEY VALUE`` pairs that override the config.
            device: such as "cuda" or "cpu"; empty for a GPU if there is one.
            last: load the last checkpoint of an ``OUTPUT_DIR`` instead of the best one.
            threshold: sets the attribute ``threshold``.

        Raises:
            UsageError: if the file does not exist, holds no detector, a config file is required,
                or the config describes a detector that is not supported.
        """
        file = _checkpoint_file(str(weights), last=last)
        check_weights_exist(file)
        trusted = load_config("", options).MODEL.TRUST_WEIGHTS
        description = None if file.endswith(".pkl") else read_description(file, trusted=trusted)
        cfg = _config_of(file, config_file, description, options)
        cfg.MODEL.WEIGHTS = file
        cfg.MODEL.DEVICE = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(cfg.MODEL.DEVICE, "use the device cpu")
        cfg.freeze()
        self.cfg = cfg
        self.model = build_detector(cfg).eval()
        contents = load_for_evaluation(cfg, self.model)
        self.is_plain_detector = contents is CheckpointContents.PLAIN_DETECTOR
        is_gaussian = cfg.MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES
        self.has_localization_quality = is_gaussian and not self.is_plain_detector
        names = description.class_names if description else class_names_of_data(cfg)
        self.class_names = names or [f"class {i}" for i in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES)]
        self.score_threshold = description.score_threshold if description else None
        if threshold is None:
            threshold = self.score_threshold
        self.threshold = DEFAULT_THRESHOLD if threshold is None else threshold

    @property
    def default_batch_size(self) -> int:
        """Batch size: 8 on a GPU; 1 on a CPU, where larger batches are not faster."""
        return 8 if self.cfg.MODEL.DEVICE.startswith("cuda") else 1

    @property
    def threshold_note(self) -> str:
        """What to tell the user if the model's own threshold is above ``threshold``, else ""."""
        limit = self.cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST
        if self.threshold >= limit:
            return ""
        return (
            f"the model itself drops objects with a score below {limit:g}; to get them, lower "
            f"MODEL.ROI_HEADS.SCORE_THRESH_TEST to {self.threshold:g}"
        )

    @overload
    def __call__(self, images: ImageSource) -> Detections: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, images: Iterable[ImageSource]) -> list[Detections]: ...

    def __call__(
        self, images: ImageSource | Iterable[ImageSource]
    ) -> Detections | list[Detections]:
        """Find the objects above ``threshold`` in one image or in several.

        Args:
            images: an image or an iterable of images. An image is the path of a file, a Pillow
                image, or an ``(H, W, 3)`` uint8 RGB array. A Pillow image is treated like its file:
                it is rotated by its EXIF orientation, and 16-bit channels are reduced to 8 bits. To
                rotate it beforehand, use ``PIL.ImageOps.exif_transpose``.
                Images that OpenCV reads are BGR: pass ``image[:, :, ::-1]``.

        Returns:
            the detections in the image, or a list with those in each image. The list holds all
            images in memory; use :meth:`stream` for very many.

        Raises:
            UsageError: if an image cannot be read, or has another type or shape.
        """
        if isinstance(images, str | Path | np.ndarray | Image.Image):
            return next(self.stream([images]))
        return list(self.stream(images))

    def stream(
        self, images: Iterable[ImageSource], batch: int | None = None
    ) -> Iterator[Detections]:
        """Yield the detections of each image, reading only a batch of images at a time.

        Args:
            images: as in :meth:`__call__`.
            batch: number of images that are processed together. Default: 8 on a GPU, else 1.
        """
        named = ((_file_name(image), _as_array(image)) for image in images)
        for file, detections in self.detect_each(named, batch):
            yield replace(detections.select(self.threshold), file=file)

    def detect_each(
        self, images: Iterable[tuple[Key, np.ndarray]], batch: int | None = None
    ) -> Iterator[tuple[Key, Detections]]:
        """Yield each key with the detections of its image, whatever their score.

        Args:
            images: keys of any type, and images ``(H, W, 3)`` uint8 RGB.
            batch: number of images that are processed together. Default: 8 on a GPU, else 1.
        """
        remaining = iter(images)
        while group := list(islice(remaining, batch or self.default_batch_size)):
            results = self.detect([image for _, image in group])
            for (key, image), instances in zip(group, results, strict=True):
                yield (
                    key,
                    Detections(image, instances, self.class_names, self.has_localization_quality),
                )

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
        outputs = self.model([model_input(self.cfg, image) for image in images])
        return [output["instances"].to("cpu") for output in outputs]


def model_input(cfg: CfgNode, image: np.ndarray) -> dict:
    """Convert an image to the model's input: resized, channels first, as ``INPUT.FORMAT`` says.

    Args:
        cfg: config of the model.
        image: ``(H, W, 3)`` uint8 RGB.

    Returns:
        Detectron2's input: ``image``, and the original ``height`` and ``width``.
    """
    resized = T.AugInput(image)
    T.AugmentationList(resize_and_flip(cfg, is_train=False))(resized)
    pixels = torch.from_numpy(np.ascontiguousarray(resized.image.transpose(2, 0, 1)))
    ordered = pixels if cfg.INPUT.FORMAT == "RGB" else pixels.flip(0)
    return {"image": ordered, "height": image.shape[0], "width": image.shape[1]}


def load_student(cfg: CfgNode, weights: str, *, last: bool = False) -> SemiSupervisedRCNN:
    """Load the student of a checkpoint, in evaluation mode on the CPU.

    Args:
        cfg: config of the model.
        weights: a checkpoint or an ``OUTPUT_DIR``; empty for a randomly initialized model. For
            files with a single model, such as plain Detectron2 detectors, that model is returned.
        last: load the last checkpoint of an ``OUTPUT_DIR`` instead of the best one.

    Raises:
        UsageError: if the file does not exist or does not fit the config.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = _checkpoint_file(weights, last=last) if weights else ""
    model, student = build_detector(cfg).eval(), build_detector(cfg).eval()
    if not weights:
        return student
    load_for_evaluation(cfg, model)
    student.load_state_dict(model.state_dict())
    TeacherCheckpointer(model, save_to_disk=False, student=student).load(cfg.MODEL.WEIGHTS)
    return student


def _checkpoint_file(weights: str, *, last: bool) -> str:
    path = Path(weights)
    if path.is_dir():
        return str(choose_checkpoint(path, last=last))
    if "://" not in weights and not path.exists():
        raise UsageError(f"the checkpoint or OUTPUT_DIR {weights!r} does not exist")
    return weights


def _file_name(image: ImageSource) -> str:
    return str(image) if isinstance(image, str | Path) else ""


def _as_array(image: ImageSource) -> np.ndarray:
    """Read an image, or check an array; returns ``(H, W, 3)`` uint8 RGB."""
    if isinstance(image, str | Path):
        return read_rgb(str(image))
    if isinstance(image, Image.Image):
        name = getattr(image, "filename", "") or f"(a Pillow image of mode {image.mode})"
        with unreadable_image_errors(str(name), Exception):
            image = decode_image(image)
    if not isinstance(image, np.ndarray):
        raise UsageError(f"an image must be a path, a Pillow image or an array, not {type(image)}")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise UsageError(
            f"an image must be an (H, W, 3) uint8 RGB array, not {image.shape} {image.dtype}"
        )
    return image


def _config_of(
    file: str,
    config_file: str,
    description: CheckpointDescription | None,
    options: Sequence[str],
) -> CfgNode:
    """Load the config of a checkpoint, with this project's classes for a plain Faster R-CNN."""
    beside = Path(file).with_name(CONFIG_FILE)
    if description and not config_file:
        source, cfg = file, config_from_text(description.config, options)
    elif config_file or beside.is_file():
        source = config_file or str(beside)
        cfg = load_config(source, options)
    else:
        raise UsageError(
            f"{file} contains no config, and there is no {CONFIG_FILE} beside it: pass its config "
            "with --config-file"
        )
    use_project_classes(cfg, source)
    return cfg


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
