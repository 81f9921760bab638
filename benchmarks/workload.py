"""A full-size training step on fixed data in memory, and the same passes by plain Detectron2.

Weights are random. Therefore the statistics of frozen batch norm are computed from some images,
since activations would grow from layer to layer otherwise, and the teacher's detections are fixed,
since a random teacher would find none.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import Tensor, nn

from locreweight.config import load_config
from locreweight.data.loader import Batch
from locreweight.data.training_sets import register_datasets
from locreweight.data.transforms.policies import build_augmentation_policy
from locreweight.data.transforms.views import UnlabeledSample, View
from locreweight.engine import SemiSupervisedTrainer
from locreweight.methods import SemiSupervisedMethod
from locreweight.modeling.committee import members_of
from locreweight.modeling.meta_arch import SemiSupervisedRCNN, TeacherOutput

ROOT = Path(__file__).resolve().parents[1]
BASE = str(ROOT / "configs" / "Base-LocReweight.yaml")
ORIGINAL = (480, 640)  # height and width of the images before augmentation, in pixels


@dataclass(frozen=True)
class Workload:
    """The input of a training step.

    Attributes:
        short_side: short side of all views in pixels; the long side is 4/3 of it.
        labeled, unlabeled: number of images.
        objects: number of objects per image, labeled or pseudo-labeled.
        classes: number of foreground classes.
        proposals: number of sampled proposals per image.
        config_file: config of the detector.
    """

    short_side: int = 640
    labeled: int = 2
    unlabeled: int = 2
    objects: int = 5
    classes: int = 80
    proposals: int = 512
    config_file: str = BASE

    @classmethod
    def of_config(cls, config_file: str, **sizes: int) -> Workload:
        """The input for a config's detector, with its number of sampled proposals."""
        proposals = load_config(config_file, []).MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
        return cls(**sizes, proposals=proposals, config_file=config_file)

    @property
    def view_size(self) -> tuple[int, int]:
        """``(height, width)`` of all views."""
        return ResizeShortestEdge.get_output_shape(*ORIGINAL, self.short_side, 10**9)

    def __str__(self) -> str:
        height, width = self.view_size
        return (
            f"{Path(self.config_file).stem}, "
            f"{self.labeled} labeled + {self.unlabeled} unlabeled images of {width}x{height}, "
            f"{self.objects} objects each, {self.classes} classes, {self.proposals} proposals"
        )


def make_config(workload: Workload, folder: Path, options: list[str], method: str = "") -> CfgNode:
    """Build a config with datasets of one image each, which steps do not read.

    Args:
        workload: the input, with the config of the detector.
        folder: for the datasets.
        options: ``KEY VALUE`` pairs that override the config.
        method: as for ``--method``.
    """
    (folder / "images").mkdir(exist_ok=True)
    for name in ("0.jpg", "1.jpg"):
        Image.new("RGB", ORIGINAL[::-1]).save(folder / "images" / name)
    annotations = {
        "images": [{"id": 0, "file_name": "0.jpg", "height": ORIGINAL[0], "width": ORIGINAL[1]}],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 1, "bbox": [9, 9, 99, 99], "area": 9801}
            | {"iscrowd": 0}
        ],
        "categories": [{"id": i + 1, "name": f"class {i}"} for i in range(workload.classes)],
    }
    (folder / "annotations.json").write_text(json.dumps(annotations))
    settings = {
        "OUTPUT_DIR": str(folder / "output"),
        "DATASETS.TRAIN": (f"coco:{folder}/annotations.json:{folder}/images",),
        "DATASETS.UNLABELED": (f"folder:{folder}/images",),
        "DATASETS.EXCLUDE_LABELED": True,
        "DATALOADER.NUM_WORKERS": 0,
        "MODEL.WEIGHTS": "",
        "MODEL.TIMM.PRETRAINED": "",
        "MODEL.DEVICE": "cuda" if torch.cuda.is_available() else "cpu",
        "MODEL.ROI_HEADS.NUM_CLASSES": workload.classes,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": workload.proposals,
        "SOLVER.REFERENCE_WORLD_SIZE": 0,
        "SOLVER.IMS_PER_BATCH": workload.labeled,
        "SOLVER.IMS_PER_BATCH_UNLABELED": workload.unlabeled,
        "SOLVER.AMP.ENABLED": torch.cuda.is_available(),
        # Small enough that repeated steps do not change the weights.
        "SOLVER.BASE_LR": 1e-9,
        "SEMI.BURN_IN_ITERS": 0,
        "VIS_PERIOD": 0,
    }
    pairs = [str(part) for pair in settings.items() for part in pair]
    return load_config(workload.config_file, [*pairs, *options], method)


def make_batch(workload: Workload, seed: int = 0) -> Batch:
    """Make a batch of smooth random images with boxes of many sizes, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    height, width = workload.view_size
    matrix = torch.diag(torch.tensor([width / ORIGINAL[1], height / ORIGINAL[0], 1.0])).double()
    labeled = [
        {
            "image": make_image(workload, generator),
            "instances": make_objects(workload, generator),
            "file_name": f"{i}.jpg",
        }
        for i in range(workload.labeled)
    ]
    unlabeled = [
        UnlabeledSample(
            f"{i}.jpg",
            weak=View(make_image(workload, generator), matrix),
            strong=View(make_image(workload, generator), matrix),
        )
        for i in range(workload.unlabeled)
    ]
    return Batch(labeled, unlabeled)


def make_image(workload: Workload, generator: torch.Generator) -> Tensor:
    """Make an image, ``(3, H, W)`` uint8."""
    coarse = torch.rand(1, 3, 12, 16, generator=generator) * 255
    smooth = nn.functional.interpolate(coarse, workload.view_size, mode="bicubic")[0]
    return (smooth + 12 * torch.randn(smooth.shape, generator=generator)).clamp(0, 255).byte()


def make_objects(workload: Workload, generator: torch.Generator) -> Instances:
    """Make the ground truth of an image; boxes are xyxy, in absolute pixels of the view."""
    height, width = workload.view_size
    center = torch.rand(workload.objects, 2, generator=generator) * 0.6 + 0.2
    # Sides are between a tenth and a half of the image's.
    half = torch.exp(torch.rand(workload.objects, 2, generator=generator) * 1.6) / 20
    boxes = torch.cat([center - half, center + half], 1) * torch.tensor([width, height] * 2)
    classes = torch.randint(workload.classes, (workload.objects,), generator=generator)
    return Instances(workload.view_size, gt_boxes=Boxes(boxes), gt_classes=classes)


@torch.no_grad()
def calibrate_batch_norms(model: nn.Module, images: Tensor) -> None:
    """Set the statistics of all frozen batch norms to those of their inputs.

    Args:
        model: a Detectron2 model.
        images: ``(N, 3, H, W)``, normalized.
    """

    def measure(norm: FrozenBatchNorm2d, inputs: tuple[Tensor]) -> None:
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(inputs[0].var((0, 2, 3)))

    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    model(images)
    for handle in handles:
        handle.remove()


def views_of_method(batch: Batch, cfg: CfgNode, method: SemiSupervisedMethod) -> Batch:
    """Repeat images where the method's augmentations make several views of them."""
    labeled_views = len(build_augmentation_policy(cfg).labeled)
    further = method.num_members - 1 if method.own_strong_views else 0
    return Batch(
        batch.labeled * labeled_views,
        [replace(x, further_strong=(x.strong,) * further) for x in batch.unlabeled],
    )


class FixedDetections:
    """Replace a teacher's detections by fixed ones, after it has detected objects as usual."""

    def __init__(self, teacher: SemiSupervisedRCNN, workload: Workload) -> None:
        self._detect = teacher.detect
        generator = torch.Generator().manual_seed(1)
        self._detections = []
        for _ in range(workload.unlabeled):
            objects = make_objects(workload, generator)
            detections = Instances(
                objects.image_size,
                pred_boxes=objects.gt_boxes,
                pred_classes=objects.gt_classes,
                scores=torch.full((len(objects),), 0.9),
                log_variance=torch.full((len(objects), 4), -3.0),
                localization_quality=torch.full((len(objects),), 0.3),
            )
            self._detections.append(detections.to(teacher.device))

    def __call__(self, batched_inputs: list[dict]) -> TeacherOutput:
        return replace(self._detect(batched_inputs), detections=list(self._detections))


class TrainerStep:
    """One iteration of the real trainer per call, always on the same batch."""

    def __init__(
        self,
        workload: Workload,
        weights: dict[str, Tensor],
        options: list[str],
        method: str = "",
    ) -> None:
        """
        Args:
            workload: the input.
            weights: weights of students and teachers.
            options: ``KEY VALUE`` pairs that override the config.
            method: as for ``--method``.
        """
        self._folder = tempfile.TemporaryDirectory()
        cfg = make_config(workload, Path(self._folder.name), options, method)
        register_datasets(cfg)
        self.trainer = trainer = SemiSupervisedTrainer(cfg)
        students, teachers = (
            members_of(x) for x in (trainer.models.students, trainer.models.teachers)
        )
        for model in (*students, *teachers):
            model.load_state_dict(weights, strict=False)
        for teacher in teachers:
            teacher.detect = FixedDetections(teacher, workload)  # type: ignore[method-assign]
        batch = views_of_method(make_batch(workload), cfg, trainer.settings.method)
        trainer._batches = itertools.repeat(batch)
        trainer.storage = EventStorage()
        trainer.iter = 0

    def __call__(self) -> None:
        with self.trainer.storage:
            self.trainer.run_step()
        self.trainer.iter += 1
        self.trainer.storage.step()


class Detectron2Baseline:
    """Plain Detectron2: a student's forward and backward pass, and a teacher's forward pass.

    Student and teacher get the same images as in :class:`TrainerStep`. No weights are updated.
    """

    def __init__(self, workload: Workload, options: list[str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            cfg = make_config(workload, Path(folder), options)
        cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        torch.manual_seed(0)
        self.student, self.teacher = build_model(cfg).train(), build_model(cfg).eval()
        batch = make_batch(workload)
        generator = torch.Generator().manual_seed(1)
        strong = [
            {"image": sample.strong.image, "instances": make_objects(workload, generator)}
            for sample in batch.unlabeled
        ]
        # Each batch takes one forward pass.
        self._student_batches = [[*batch.labeled, *strong]]
        self._teacher_inputs = [{"image": sample.weak.image} for sample in batch.unlabeled]
        images = self.student.preprocess_image(self._student_batches[0]).tensor
        calibrate_batch_norms(self.student.backbone, images)
        self.teacher.load_state_dict(self.student.state_dict())
        self._autocast = torch.autocast(
            self.student.device.type, dtype=torch.float16, enabled=cfg.SOLVER.AMP.ENABLED
        )

    @property
    def device(self) -> torch.device:
        return self.student.device

    def __call__(self) -> None:
        self.student.zero_grad()
        with EventStorage(), self._autocast:
            if self._teacher_inputs:
                with torch.no_grad():
                    self.teacher.inference(self._teacher_inputs, do_postprocess=False)
            losses = [
                loss for batch in self._student_batches for loss in self.student(batch).values()
            ]
            torch.stack(losses).sum().backward()


class Detectron2Training(Detectron2Baseline):
    """The baseline with the optimizer's step and an EMA update, which is a loop over state_dict."""

    def __init__(self, workload: Workload, options: list[str]) -> None:
        super().__init__(workload, options)
        self._optimizer = torch.optim.SGD(self.student.parameters(), 1e-9, momentum=0.9)

    def __call__(self) -> None:
        super().__call__()
        self._optimizer.step()
        update_by_state_dict(self.teacher, self.student)


class UnbiasedTeacherBaseline(Detectron2Training):
    """The passes of Unbiased Teacher for the same images, by plain Detectron2.

    The student gets a weak and a strong view of labeled images and the strong view of unlabeled
    images, in two forward passes.
    """

    def __init__(self, workload: Workload, options: list[str]) -> None:
        super().__init__(workload, options)
        (images,) = self._student_batches
        labeled, unlabeled = images[: workload.labeled], images[workload.labeled :]
        self._student_batches = [2 * labeled, unlabeled]


@torch.no_grad()
def update_by_state_dict(teacher: nn.Module, student: nn.Module, keep_rate: float = 0.9996) -> None:
    """Update the teacher by EMA the way most projects do."""
    new = student.state_dict()
    averaged = {
        name: new[name] * (1 - keep_rate) + value * keep_rate
        for name, value in teacher.state_dict().items()
    }
    teacher.load_state_dict(averaged)
