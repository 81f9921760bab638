#!/usr/bin/env python
"""The whole method on torchvision's Faster R-CNN, in one file, in the order of the paper.

    python examples/torchvision_reference.py    # trains on a synthetic set, from random weights
    torchrun --nproc-per-node 2 examples/torchvision_reference.py @examples/photographs.txt \\
        --labeled train.json --labeled-images train --unlabeled photos --val val.json \\
        --val-images val --backbone-weights resnet50.pth

Letters in shapes: R proposals of a batch, F of them foreground; K classes, class K is background.
Boxes are xyxy, in pixels of their view.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate
from torch import Tensor, distributed, nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, models, ops, tv_tensors
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList
from torchvision.transforms import v2
from tqdm import tqdm

from locreweight.ema import keep_rate, update_teacher
from locreweight.errors import UsageError
from locreweight.geometry import between_views, warp_boxes
from locreweight.losses import reweighting
from locreweight.losses.localization import kl_regression_loss, localization_quality

RANK = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
DEVICE = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
DATASETS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + "/datasets"


def option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class Settings:
    """The command line's options: burn_in is --burn-in. The defaults are for the synthetic set."""

    labeled: str = option(f"{DATASETS}/synthetic/labeled.json", "COCO json of the labeled images")
    labeled_images: str = option(f"{DATASETS}/synthetic/labeled", "folder of the labeled images")
    unlabeled: str = option(f"{DATASETS}/synthetic/unlabeled", "folder of the unlabeled images")
    val: str = option(f"{DATASETS}/synthetic/val.json", "COCO json of the validation images")
    val_images: str = option(f"{DATASETS}/synthetic/val", "folder of the validation images")
    output: str = option("output/reference", "folder for the teacher's weights")
    backbone: str = option("resnet18", "one of torchvision's ResNets")
    backbone_weights: str = option("", "file with torchvision's weights; empty for random weights")
    channels: int = option(64, "channels of the feature pyramid")
    anchor: int = option(12, "side of the smallest anchors in pixels")
    sampled: int = option(64, "proposals sampled per image in training")
    side: int = option(64, "short side of test images; in training, 3/4 of it up to all of it")
    labeled_batch: int = option(8, "labeled images per iteration, of all processes together")
    unlabeled_batch: int = option(8, "unlabeled images per iteration, of all processes together")
    iterations: int = option(700, "iterations, including burn-in")
    burn_in: int = option(300, "iterations on labeled images only")
    period: int = option(300, "iterations between evaluations")
    learning_rate: float = option(0.015, "learning rate after a linear warmup")
    seed: int = option(1, "seed of all random numbers")
    threshold: float = option(0.6, "lowest class probability of a pseudo-label")
    beta: float = option(2.0, "weight of the unsupervised losses (Eq. 3)")
    final_keep_rate: float = option(0.99, "keep rate of the EMA teacher after its ramp")
    literal: bool = option(False, "divide Eq. 10, 11, 14 as written, not by all sampled proposals")


# --- Sec. 3.2: the detector -----------------------------------------------------------------------


class CornerCoder(detection._utils.BoxCoder):
    """Codes boxes as offsets of their corners, relative to the proposal's size (Eq. 4)."""

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        return (reference_boxes - proposals) / self.unit(proposals)

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        corners = boxes[:, None] + rel_codes.unflatten(1, (-1, 4)) * self.unit(boxes)[:, None]
        # Sorted, so that the first corner stays above and left of the second one.
        return corners.unflatten(-1, (2, 2)).sort(dim=-2).values.flatten(1)

    def unit(self, boxes: Tensor) -> Tensor:
        """Pixels per unit of the code, (N, 4)."""
        sizes = boxes[:, 2:] - boxes[:, :2]
        return sizes.repeat(1, 2) / boxes.new_tensor(self.weights)


class Detector(detection.FasterRCNN):
    """Student or teacher: Faster R-CNN that also predicts a variance for each box coordinate.

    It takes views in their final size; torchvision's own resizing is not used.
    """

    def __init__(self, num_classes: int, settings: Settings) -> None:
        channels, width = settings.channels, 4 * settings.channels
        norm = ops.FrozenBatchNorm2d if settings.backbone_weights else nn.BatchNorm2d
        body = models.get_model(settings.backbone, weights=None, norm_layer=norm)
        stages = {f"layer{i + 1}": str(i) for i in range(4)}
        stage_channels = [body.inplanes // 8 * 2**i for i in range(4)]
        anchors = [[settings.anchor * 2**i] for i in range(5)], [[0.5, 1.0, 2.0]] * 5
        boxes = {name: nn.Linear(width, num_classes * 4) for name in ("deltas", "log_variance")}
        nn.init.normal_(boxes["log_variance"].weight, std=1e-4)  # Fig. 4; variances begin near 1
        super().__init__(
            detection.backbone_utils.BackboneWithFPN(body, stages, stage_channels, channels),
            rpn_anchor_generator=detection.rpn.AnchorGenerator(*anchors),
            rpn_pre_nms_top_n_test=2 * settings.sampled,
            rpn_post_nms_top_n_test=2 * settings.sampled,
            box_batch_size_per_image=settings.sampled,
            box_head=detection.faster_rcnn.TwoMLPHead(channels * 7**2, width),
            box_predictor=nn.ModuleDict({"logits": nn.Linear(width, num_classes + 1)} | boxes),
        )
        self.roi_heads.box_coder = CornerCoder((10.0, 10.0, 10.0, 10.0))

    def extract_features(self, views: list[View]) -> tuple[ImageList, dict[str, Tensor]]:
        """The normalized views, padded to one size, and the feature pyramid's levels."""
        images = [self.transform.normalize(view.image.to(DEVICE) / 255) for view in views]
        batch = self.transform.batch_images(images)
        return ImageList(batch, [image.shape[-2:] for image in images]), self.backbone(batch)

    def predict_rois(
        self, images: ImageList, features: dict[str, Tensor], boxes: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (R, K+1), deltas (R, K, 4) and log-variances (R, K, 4): the Gaussians of Eq. 4."""
        heads = self.roi_heads
        # The pooler infers the strides from these sizes, so they have to be the padded ones.
        padded_sizes = [images.tensors.shape[-2:]] * len(boxes)
        x = heads.box_head(heads.box_roi_pool(features, boxes, padded_sizes))
        logits, deltas, log_variance = (layer(x) for layer in heads.box_predictor.values())
        return logits, deltas.unflatten(1, (-1, 4)), log_variance.unflatten(1, (-1, 4))

    def detect(self, images: ImageList, features: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Detections of each image after NMS, in eval mode.

        Returns:
            for each image: boxes (N, 4), labels (N,) in [1, K], scores (N,), quality (N,).
        """
        proposals, _ = self.rpn(images, features)
        logits, deltas, log_variance = self.predict_rois(images, features, proposals)
        boxes = self.roi_heads.box_coder.decode(deltas.flatten(1), proposals)
        scores, quality = logits.softmax(1)[:, :-1], localization_quality(log_variance)  # Eq. 5
        counts, detections = [len(p) for p in proposals], []
        parts = (x.split(counts) for x in (boxes, scores, quality))
        for boxes, scores, quality, size in zip(*parts, images.image_sizes, strict=True):
            row, label = (scores > 0.05).nonzero(as_tuple=True)
            boxes = ops.clip_boxes_to_image(boxes[row, label], size)
            scores, quality = scores[row, label], quality[row, label]
            kept = ops.batched_nms(boxes, scores, label, 0.5)[:100]
            found = {"boxes": boxes, "labels": label + 1, "scores": scores, "quality": quality}
            detections.append({name: x[kept] for name, x in found.items()})
        return detections

    def forward(self, *batches: list[LabeledView]) -> list[tuple[Tensor, SampledProposals]]:
        """The student in training, with one pass of the backbone over all batches.

        Returns:
            for each batch that is not empty: the RPN loss and the sampled proposals.
        """
        images, features = self.extract_features([view for batch in batches for view, _ in batch])
        outputs, start = [], 0
        for batch in filter(None, batches):
            part = slice(start, start + len(batch))
            start = part.stop
            batch_images = ImageList(images.tensors[part], images.image_sizes[part])
            batch_features = {name: level[part] for name, level in features.items()}
            targets = [{name: x.to(DEVICE) for name, x in target.items()} for _, target in batch]
            proposals, rpn_losses = self.rpn(batch_images, batch_features, targets)
            sampled = self.sample(batch_images, batch_features, proposals, targets)
            outputs.append((sum(rpn_losses.values()), sampled))
        return outputs

    def sample(
        self, images: ImageList, features: dict, proposals: list[Tensor], targets: list[dict]
    ) -> SampledProposals:
        """Match proposals with the (pseudo) ground truth, sample some, and predict them."""
        boxes, matched, labels, offsets = self.roi_heads.select_training_samples(proposals, targets)
        # In an image without boxes, all proposals are "matched" with index 0, hence the padding.
        pairs = zip(targets, matched, strict=True)
        quality = torch.cat([F.pad(target["quality"], (0, 1))[index] for target, index in pairs])
        logits, deltas, log_variance = self.predict_rois(images, features, boxes)
        labels = (torch.cat(labels) - 1) % logits.shape[1]  # torchvision's background is 0
        rows = (labels < deltas.shape[1]).nonzero().squeeze(1)  # foreground
        mean, log_variance = (x[rows, labels[rows]] for x in (deltas, log_variance))
        foreground = mean, log_variance, torch.cat(offsets)[rows], quality[rows]
        return SampledProposals(boxes, labels, logits, *foreground)


# --- Sec. 3.3 and 3.4: the losses of the ROI head -------------------------------------------------


class SampledProposals(NamedTuple):
    """R sampled proposals of a batch, F of which are foreground, and their predictions."""

    boxes: list[Tensor]  # of each image
    labels: Tensor  # (R,) in [0, K]
    logits: Tensor  # (R, K+1)
    mean: Tensor  # (F, 4) of Eq. 4, coded
    log_variance: Tensor  # (F, 4)
    target: Tensor  # (F, 4) matched (pseudo) ground truth, coded
    quality: Tensor  # (F,) localization quality of the matched pseudo-label

    def supervised_losses(self, literal: bool) -> tuple[Tensor, Tensor]:
        """Eq. 1: Faster R-CNN's classification loss, and Eq. 10 with the KL loss of Eq. 8 and 9."""
        classification_loss = F.cross_entropy(self.logits, self.labels)
        box_loss = kl_regression_loss(self.mean, self.target, self.log_variance)
        count = len(self.mean) if literal else len(self.labels)
        return classification_loss, box_loss.sum() / max(count, 1)

    def unsupervised_losses(self, reliability: Tensor, literal: bool) -> tuple[Tensor, Tensor]:
        """Eq. 2: PRC (Eq. 14) and LER (Eq. 11)."""
        classification_loss = reweighting.reliability_weighted_cross_entropy(
            self.logits, self.labels, reliability, per_sampled_proposal=not literal
        )
        error = F.smooth_l1_loss(self.mean, self.target, reduction="none")
        count = len(self.mean) if literal else len(self.labels)
        box_loss = reweighting.quality_weighted_box_loss(error, self.quality, count)
        return classification_loss, box_loss


# --- Fig. 2: one training step --------------------------------------------------------------------


def training_step(
    student: nn.Module, teacher: Detector, labeled: list, unlabeled: list, settings: Settings
) -> tuple[Tensor, int]:
    """The loss of Eq. 3 and the number of pseudo-labels.

    ``labeled`` has views with their ground truth. ``unlabeled`` has a weak and a strong view of
    each image; it is empty during burn-in.
    """
    pseudo_labeled: list[LabeledView] = []
    if unlabeled:
        teacher_features = teacher.extract_features([weak for weak, _ in unlabeled])
        detections = teacher.detect(*teacher_features)
        for detected, (weak, strong) in zip(detections, unlabeled, strict=True):
            boxes = weak.project_boxes(detected["boxes"], strong)
            visible = (boxes[:, 2:] - boxes[:, :2] > 1).all(dim=1)
            kept = visible & (detected["scores"] > settings.threshold)
            targets = {name: x[kept] for name, x in (detected | {"boxes": boxes}).items()}
            pseudo_labeled.append((strong, targets))

    (rpn_loss, proposals), *unlabeled_outputs = student(labeled, pseudo_labeled)
    loss = rpn_loss + sum(proposals.supervised_losses(settings.literal))
    for rpn_loss, proposals in unlabeled_outputs:
        # Sec. 3.4: the teacher scores the student's proposals, projected into its own view.
        boxes_per_image = zip(proposals.boxes, unlabeled, strict=True)
        teacher_boxes = [strong.project_boxes(b, weak) for b, (weak, strong) in boxes_per_image]
        logits, _, log_variance = teacher.predict_rois(*teacher_features, teacher_boxes)
        reliability = reweighting.proposal_reliability(
            logits.softmax(1), log_variance, proposals.labels
        )
        losses = proposals.unsupervised_losses(reliability, settings.literal)
        loss = loss + settings.beta * (rpn_loss + sum(losses))
    return loss, sum(len(targets["labels"]) for _, targets in pseudo_labeled)


# --- Sec. 4.2: views of images --------------------------------------------------------------------


class View(NamedTuple):
    """An augmented image, with the matrix from the original image's coordinates to its own."""

    image: tv_tensors.Image  # (3, H, W) uint8
    matrix: Tensor  # (3, 3)

    @classmethod
    def make(cls, image: Image.Image, transform: v2.Transform) -> View:
        """Transform an image, and three key points with it that determine the matrix."""
        original = v2.functional.to_image(ImageOps.exif_transpose(image))
        points = tv_tensors.KeyPoints(torch.eye(3, 2).double(), canvas_size=original.shape[-2:])
        view, moved_points = transform(original, points)
        before, after = (
            F.pad(x.as_subclass(Tensor), (0, 1), value=1.0) for x in (points, moved_points)
        )
        matrix = torch.linalg.solve(before, after).T
        # Torchvision flips key points to w - 1 - x, as if they were pixel indices. As coordinates
        # they belong at w - x. This correction is right only if the flip is the last transform.
        matrix[0, 2] += matrix.det() < 0
        return cls(view, matrix)

    def project_boxes(self, boxes: Tensor, target: View) -> Tensor:
        """Boxes of this view, (N, 4), in the coordinates of another view of the same image."""
        matrix = between_views(self.matrix, target.matrix)
        return warp_boxes(boxes, matrix, target.image.shape[-2:])


# A view with its (pseudo) ground truth: boxes (N, 4), labels (N,) in [1, K], quality (N,).
LabeledView = tuple[View, dict[str, Tensor]]


def build_transforms(side: int) -> list[v2.Transform]:
    """Transforms to a test view, a labeled view, a weak view and a strong view."""
    longest, mean_color, flip = side * 5 // 3, [124, 116, 104], v2.RandomHorizontalFlip()
    resize = v2.RandomShortestSize(list(range(side * 3 // 4, side + 1)), longest)
    jitter = [v2.ColorJitter(**{name: 0.9}) for name in ("brightness", "contrast", "saturation")]
    tones = [v2.Identity(), v2.RandomAutocontrast(1.0), v2.RandomEqualize(1.0)]
    color = v2.RandomChoice(jitter + tones)
    # Degrees, translation, shear: one of rotation, translation, and shear along x or y.
    moves = [(30, None, None), (0, (0.1, 0.1), None), (0, None, 30), (0, None, (0, 0, -30, 30))]
    move = v2.RandomChoice([v2.RandomAffine(d, t, shear=s, fill=mean_color) for d, t, s in moves])
    patches = [v2.RandomErasing(p, (0, 0.04), (1, 1), mean_color) for p in (1.0, 0.5, 0.5, 0.5)]
    erase = v2.Lambda(v2.Compose(patches), tv_tensors.Image)
    training = [resize, color], [resize], [resize, color, move, erase]
    return [
        v2.RandomShortestSize(side, longest),
        *(v2.Compose([*transforms, flip]) for transforms in training),
    ]


# --- data -----------------------------------------------------------------------------------------


def load_labeled(file: str, folder: str, transform: v2.Transform) -> datasets.CocoDetection:
    """A data set of labeled views. Crowds and boxes without area are left out."""

    def to_view(image: Image.Image, annotations: list[dict]) -> LabeledView:
        view = View.make(image, transform)
        used = [a for a in annotations if not a.get("iscrowd") and min(a["bbox"][2:]) > 0]
        boxes = torch.tensor([a["bbox"] for a in used]).view(-1, 4)
        boxes = ops.box_convert(boxes, "xywh", "xyxy")
        boxes = warp_boxes(boxes, view.matrix, view.image.shape[-2:])
        labels = [category_ids.index(a["category_id"]) + 1 for a in used]
        truth = {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64)}
        kept = ops.remove_small_boxes(boxes, 1e-2)
        truth = {name: x[kept] for name, x in truth.items()}
        return view, truth | {"quality": torch.ones(len(kept))}

    try:
        with redirect_stdout(None):
            images = datasets.CocoDetection(folder, file, transforms=to_view)
    except (ValueError, KeyError, AssertionError) as error:
        raise UsageError(f"{file} cannot be read as COCO annotations: {error!r}") from error
    category_ids = images.coco.getCatIds()
    names = [record["file_name"] for record in images.coco.imgs.values()]
    if missing := [name for name in names if not os.path.isfile(f"{folder}/{name}")]:
        raise UsageError(f"{len(missing)} images of {file} are not in {folder}: {missing[:5]}")
    return images


class UnlabeledImages(datasets.ImageFolder):
    """Views of all images in a folder and its subfolders; None for one that cannot be read."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        # Torchvision takes subfolders for classes. Here the whole folder is the only class.
        return [os.path.abspath(directory)], {os.path.abspath(directory): 0}

    def __getitem__(self, index: int) -> list[View] | None:
        try:
            return super().__getitem__(index)[0]
        except Exception as error:  # Pillow raises many kinds
            print(f"skipped {self.samples[index][0]}: {error!r}", file=sys.stderr)
            return None


def endless_batches(data: Dataset, size: int) -> Iterator[list]:
    """Shuffled batches for this process, epoch after epoch. ``size`` is for all processes."""
    workers: Any = {} if DEVICE == "cpu" else {"num_workers": 4, "multiprocessing_context": "fork"}
    loader = DataLoader(data, size // PROCESSES, shuffle=True, collate_fn=list, **workers)
    while True:
        yield from loader


# --- Sec. 4: evaluation and training --------------------------------------------------------------


@torch.no_grad()
def evaluate(model: Detector, images: datasets.CocoDetection) -> list[float]:
    """AP, AP50 and AP75 in percent."""
    model.eval()
    coco, results = images.coco, []
    category_ids = coco.getCatIds()
    views = zip(images.ids, (view for view, _ in images), strict=True)
    while batch := list(itertools.islice(views, 8)):
        detections = model.detect(*model.extract_features([view for _, view in batch]))
        for (image_id, view), detected in zip(batch, detections, strict=True):
            size = coco.imgs[image_id]["height"], coco.imgs[image_id]["width"]
            boxes = warp_boxes(detected["boxes"], view.matrix.inverse(), size)
            boxes = ops.box_convert(boxes, "xyxy", "xywh")
            columns = (boxes, detected["labels"], detected["scores"])
            for box, label, score in zip(*(x.tolist() for x in columns), strict=True):
                result = {"image_id": image_id, "bbox": box, "score": score}
                results.append(result | {"category_id": category_ids[label - 1]})
    if not results:
        return [0.0, 0.0, 0.0]
    with redirect_stdout(None):
        coco_eval = COCOeval(coco, coco.loadRes(results), "bbox")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return [100 * x for x in coco_eval.stats[:3]]


def train(settings: Settings) -> None:
    to_test, to_labeled, to_weak, to_strong = build_transforms(settings.side)
    labeled = load_labeled(settings.labeled, settings.labeled_images, to_labeled)
    val = load_labeled(settings.val, settings.val_images, to_test)
    if labeled.coco.cats != val.coco.cats:
        raise UsageError(f"{settings.labeled} and {settings.val} have different categories")
    to_pair = to_weak, to_strong
    unlabeled = UnlabeledImages(settings.unlabeled, lambda x: [View.make(x, t) for t in to_pair])
    os.makedirs(settings.output, exist_ok=True)

    # DistributedDataParallel copies the first process's weights to the others.
    torch.manual_seed(settings.seed + RANK)
    student, teacher = (Detector(len(labeled.coco.cats), settings).to(DEVICE) for _ in range(2))
    if settings.backbone_weights:
        student.backbone.body.load_state_dict(torch.load(settings.backbone_weights), strict=False)
    model = nn.parallel.DistributedDataParallel(student) if PROCESSES > 1 else student
    update_teacher(teacher.eval(), student, keep_rate=0.0)
    optimizer = optim.SGD(student.parameters(), settings.learning_rate, 0.9, weight_decay=1e-4)
    warmup = optim.lr_scheduler.LinearLR(optimizer, 1e-3, 1.0, settings.iterations // 16)

    labeled_batches = endless_batches(labeled, settings.labeled_batch)
    unlabeled_batches = endless_batches(unlabeled, settings.unlabeled_batch)
    sizes = [size // PROCESSES for size in (settings.labeled_batch, settings.unlabeled_batch)]
    label, steps = f"{PROCESSES} process(es) x {sizes} images", range(1, settings.iterations + 1)
    progress, rows = tqdm(steps, label, disable=RANK > 0, mininterval=2), []
    for step in progress:
        mutual_steps = max(step - settings.burn_in, 0)  # of student and teacher, after burn-in
        views = [pair for pair in next(unlabeled_batches) if pair] if mutual_steps else []
        loss, count = training_step(model, teacher, next(labeled_batches), views, settings)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 10.0, error_if_nonfinite=True)
        optimizer.step()
        warmup.step()
        update_teacher(teacher, student, keep_rate(mutual_steps, settings.final_keep_rate))
        progress.set_postfix(loss=f"{loss:.2f}", pseudo_labels=count, refresh=False)
        if RANK == 0 and (step % settings.period == 0 or step == settings.iterations):
            rows.append(["teacher", step, *evaluate(teacher, val)])
            torch.save((vars(settings), teacher.state_dict()), f"{settings.output}/teacher.pt")
    if RANK == 0:
        rows.append(["student", settings.iterations, *evaluate(student, val)])
        print(tabulate(rows, ["model", "iterations", "AP", "AP50", "AP75"], floatfmt=".2f"))


def parse_settings() -> Settings:
    parser = argparse.ArgumentParser(allow_abbrev=False, usage=__doc__, fromfile_prefix_chars="@")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    for field in dataclasses.fields(Settings):
        kind: Any = {"action": "store_true"} if field.default is False else {}
        kind = kind or {"type": type(field.default), "metavar": type(field.default).__name__}
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=field.default, help=field.metadata["help"], **kind)
    return Settings(**vars(parser.parse_args()))


def main() -> None:
    settings = parse_settings()
    if settings.labeled == Settings.labeled and RANK == 0:
        runpy.run_path(f"{DATASETS}/make_synthetic.py")["main"]([])
    if PROCESSES > 1:
        # Waits for the first process, which may be making the data set or evaluating.
        distributed.init_process_group(timeout=timedelta(hours=6))
    try:
        train(settings)
    except (OSError, UsageError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
