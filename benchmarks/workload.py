"""A full-size training step on fixed data in memory, and the bare Detectron2 work that it holds.

Weights are random, so two things are put in their place: the statistics of frozen batch norm are
taken from some images, without which numbers grow from layer to layer; and pseudo-labels are given,
as many as a trained teacher would find.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
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
from locreweight.data.transforms.views import UnlabeledSample, View
from locreweight.engine import SemiSupervisedTrainer
from locreweight.modeling import SemiSupervisedRCNN, TeacherOutput

ROOT = Path(__file__).resolve().parents[1]
ORIGINAL = (480, 640)  # height and width of the images before augmentation, in pixels


@dataclass(frozen=True)
class Size:
    """Of a step.

    Attributes:
        short_side: of all views, in pixels; the long one is 4/3 of it.
        labeled, unlabeled: images.
        objects: of each image, labeled or pseudo-labeled.
        classes: foreground classes.
        proposals: sampled ones of each image.
    """

    short_side: int = 640
    labeled: int = 2
    unlabeled: int = 2
    objects: int = 5
    classes: int = 80
    proposals: int = 512

    @property
    def view(self) -> tuple[int, int]:
        """``(height, width)`` of all views."""
        return ResizeShortestEdge.get_output_shape(*ORIGINAL, self.short_side, 10**9)

    def __str__(self) -> str:
        height, width = self.view
        return (
            f"{self.labeled} labeled + {self.unlabeled} unlabeled images of {width}x{height}, "
            f"{self.objects} objects each, {self.classes} classes, {self.proposals} proposals"
        )


def make_config(size: Size, folder: Path, options: list[str]) -> CfgNode:
    """The base config, R50-FPN, on two little files: the loader is not measured here."""
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", ORIGINAL[::-1]).save(folder / "images" / "0.jpg")
    Image.new("RGB", ORIGINAL[::-1]).save(folder / "images" / "1.jpg")
    truth = {
        "images": [{"id": 0, "file_name": "0.jpg", "height": ORIGINAL[0], "width": ORIGINAL[1]}],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 1, "bbox": [9, 9, 99, 99], "area": 9801}
            | {"iscrowd": 0}
        ],
        "categories": [{"id": i + 1, "name": f"class {i}"} for i in range(size.classes)],
    }
    (folder / "truth.json").write_text(json.dumps(truth))
    settings = {
        "OUTPUT_DIR": str(folder / "output"),
        "DATASETS.TRAIN": (f"coco:{folder}/truth.json:{folder}/images",),
        "DATASETS.UNLABELED": (f"folder:{folder}/images",),
        "DATASETS.EXCLUDE_LABELED": True,
        "DATALOADER.NUM_WORKERS": 0,
        "MODEL.WEIGHTS": "",
        "MODEL.DEVICE": "cuda" if torch.cuda.is_available() else "cpu",
        "MODEL.ROI_HEADS.NUM_CLASSES": size.classes,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": size.proposals,
        "SOLVER.REFERENCE_WORLD_SIZE": 0,
        "SOLVER.IMS_PER_BATCH": size.labeled,
        "SOLVER.IMS_PER_BATCH_UNLABELED": size.unlabeled,
        "SOLVER.AMP.ENABLED": torch.cuda.is_available(),
        # So small that the weights stay what they are, however often a step is repeated.
        "SOLVER.BASE_LR": 1e-9,
        "SEMI.BURN_IN_ITERS": 0,
        "VIS_PERIOD": 0,
    }
    words = [str(word) for pair in settings.items() for word in pair]
    return load_config(str(ROOT / "configs" / "Base-LocReweight.yaml"), [*words, *options])


def make_batch(size: Size, seed: int = 0) -> Batch:
    """Smooth random images with boxes of many sizes, on the CPU as the loader gives them."""
    draw = torch.Generator().manual_seed(seed)
    height, width = size.view
    matrix = torch.diag(torch.tensor([width / ORIGINAL[1], height / ORIGINAL[0], 1.0])).double()
    labeled = [
        {"image": image(size, draw), "instances": objects(size, draw), "file_name": f"{i}.jpg"}
        for i in range(size.labeled)
    ]
    unlabeled = [
        UnlabeledSample(
            f"{i}.jpg", View(image(size, draw), matrix), View(image(size, draw), matrix)
        )
        for i in range(size.unlabeled)
    ]
    return Batch(labeled, unlabeled)


def image(size: Size, draw: torch.Generator) -> Tensor:
    """``(3, H, W)`` uint8."""
    coarse = torch.rand(1, 3, 12, 16, generator=draw) * 255
    smooth = nn.functional.interpolate(coarse, size.view, mode="bicubic")[0]
    return (smooth + 12 * torch.randn(smooth.shape, generator=draw)).clamp(0, 255).byte()


def objects(size: Size, draw: torch.Generator) -> Instances:
    """Ground truth of an image; boxes xyxy, absolute pixels of the view."""
    height, width = size.view
    center = torch.rand(size.objects, 2, generator=draw) * 0.6 + 0.2
    # Sides from a tenth to a half of the image's.
    half = torch.exp(torch.rand(size.objects, 2, generator=draw) * 1.6) / 20
    boxes = torch.cat([center - half, center + half], 1) * torch.tensor([width, height] * 2)
    classes = torch.randint(size.classes, (size.objects,), generator=draw)
    return Instances(size.view, gt_boxes=Boxes(boxes), gt_classes=classes)


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> None:
    """Set the statistics of all frozen batch norms to those of what reaches them.

    Args:
        model: Detectron2's, whose frozen norms are operations of their own.
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


class Given:
    """Chooses given pseudo-labels, after the strategy has done its work for its own."""

    def __init__(self, choose: Callable, size: Size, device: torch.device) -> None:
        self._choose = choose
        draw = torch.Generator().manual_seed(1)
        self._labels = [objects(size, draw).to(device) for _ in range(size.unlabeled)]

    def __call__(self, teacher: SemiSupervisedRCNN, seen: TeacherOutput) -> list[Instances]:
        self._choose(teacher, seen)
        for labels in self._labels:
            labels.gt_localization_quality = labels.gt_boxes.tensor.new_full((len(labels),), 0.3)
            labels.gt_score = labels.gt_localization_quality + 0.6
        return list(self._labels)


class Step:
    """Iterations of the real trainer, always on the same batch."""

    def __init__(self, size: Size, weights: dict[str, Tensor], options: list[str]) -> None:
        """
        Args:
            size: of the batch.
            weights: of student and teacher.
            options: ``KEY VALUE`` pairs that go over the base config.
        """
        self._folder = tempfile.TemporaryDirectory()
        cfg = make_config(size, Path(self._folder.name), options)
        register_datasets(cfg)
        self.trainer = trainer = SemiSupervisedTrainer(cfg)
        for model in (trainer.student, trainer.teacher):
            model.load_state_dict(weights, strict=False)
        method = trainer.settings.method
        method.select_pseudo_labels = Given(method.select_pseudo_labels, size, trainer.device)
        trainer._batches = itertools.repeat(make_batch(size))
        trainer.storage = EventStorage()
        trainer.iter = 0

    def __call__(self) -> None:
        with self.trainer.storage:
            self.trainer.run_step()
        self.trainer.iter += 1
        self.trainer.storage.step()


class Floor:
    """Bare Detectron2: a student's forward and backward pass, and a teacher's look.

    The student sees the images that the step's student sees, the teacher those of its teacher;
    nothing is updated.
    """

    def __init__(self, size: Size, options: list[str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            cfg = make_config(size, Path(folder), options)
        cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NAME = (
            "GeneralizedRCNN",
            "StandardROIHeads",
        )
        torch.manual_seed(0)
        self.student, self.teacher = build_model(cfg).train(), build_model(cfg).eval()
        batch = make_batch(size)
        draw = torch.Generator().manual_seed(1)
        strong = [
            {"image": sample.strong.image, "instances": objects(size, draw)}
            for sample in batch.unlabeled
        ]
        self._seen_by_student = [*batch.labeled, *strong]
        self._seen_by_teacher = [{"image": sample.weak.image} for sample in batch.unlabeled]
        calibrate(
            self.student.backbone, self.student.preprocess_image(self._seen_by_student).tensor
        )
        self.teacher.load_state_dict(self.student.state_dict())
        self._autocast = torch.autocast(
            self.student.device.type, dtype=torch.float16, enabled=cfg.SOLVER.AMP.ENABLED
        )

    @property
    def device(self) -> torch.device:
        return self.student.device

    def __call__(self) -> None:
        self._pass_over(self._seen_by_student)

    def _pass_over(self, *batches: list[dict]) -> None:
        """The teacher's look, the student's forward passes, and one backward pass."""
        self.student.zero_grad()
        with EventStorage(), self._autocast:
            if self._seen_by_teacher:
                with torch.no_grad():
                    self.teacher.inference(self._seen_by_teacher, do_postprocess=False)
            losses = [loss for batch in batches for loss in self.student(batch).values()]
            torch.stack(losses).sum().backward()


class UnbiasedTeacherPasses(Floor):
    """What Unbiased Teacher asks of the detector for the same images, by bare Detectron2.

    The student sees labeled images in a weak and a strong view and unlabeled ones in the strong
    view, in two passes; the optimizer's step and the average, a loop over ``state_dict``, follow.
    """

    def __init__(self, size: Size, options: list[str]) -> None:
        super().__init__(size, options)
        self._labeled = 2 * self._seen_by_student[: size.labeled]
        self._unlabeled = self._seen_by_student[size.labeled :]
        self._optimizer = torch.optim.SGD(self.student.parameters(), 1e-9, momentum=0.9)

    def __call__(self) -> None:
        self._pass_over(self._labeled, self._unlabeled)
        self._optimizer.step()
        average_by_state_dict(self.teacher, self.student)


@torch.no_grad()
def average_by_state_dict(
    teacher: nn.Module, student: nn.Module, keep_rate: float = 0.9996
) -> None:
    """The moving average as most projects have it."""
    new = student.state_dict()
    averaged = {
        name: new[name] * (1 - keep_rate) + value * keep_rate
        for name, value in teacher.state_dict().items()
    }
    teacher.load_state_dict(averaged)
