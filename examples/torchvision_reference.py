#!/usr/bin/env python
"""The whole method on torchvision's Faster R-CNN: read it from top to bottom, like the paper.

    python examples/torchvision_reference.py        # the synthetic set, from random weights
    torchrun --nproc-per-node 2 examples/torchvision_reference.py @examples/photographs.txt \\
        --labeled train.json --labeled-images train --unlabeled more --val val.json --val-images val

R: proposals of a batch; K: classes, class K is background. Boxes: xyxy, in pixels of their view.
"""

import argparse
import itertools
import os
import runpy
import sys
from contextlib import redirect_stdout
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate
from torch import Tensor, distributed, nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, models, ops, tv_tensors, utils
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList
from torchvision.transforms import v2
from tqdm import tqdm

from locreweight.ema import keep_rate, update_teacher
from locreweight.errors import UsageError
from locreweight.geometry import between_views, warp_boxes
from locreweight.losses import reweighting
from locreweight.losses.localization import kl_regression_loss, localization_quality

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DEVICE = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
DATASETS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + "/datasets"


class Settings(argparse.Namespace):  # each is an option: --burn-in 300. For the synthetic set:
    labeled, labeled_images = f"{DATASETS}/synthetic/labeled.json", f"{DATASETS}/synthetic/labeled"
    val, val_images = f"{DATASETS}/synthetic/val.json", f"{DATASETS}/synthetic/val"
    unlabeled, output = f"{DATASETS}/synthetic/unlabeled", "output/reference"
    backbone, backbone_weights = "resnet18", ""  # a file of torchvision's; random ones without
    channels, sampled = 64, 64  # of the feature pyramid; proposals of an image in training
    anchor, side = 12, 64  # pixels: the smallest; the short side (training: three quarters and up)
    labeled_batch, unlabeled_batch = 8, 8  # images of all processes together
    iterations, burn_in, period = 700, 300, 300  # the second without unlabeled images; to evaluate
    learning_rate, threshold, beta, final_keep_rate, seed = 0.015, 0.6, 2.0, 0.99, 1
    literal = False  # divide Eq. 10, 11, 14 as they say; else by the number of all proposals


# Sec. 3.2. Eq. 4: boxes are coded as offsets of their corners over the proposal's size
class CornerCoder(detection._utils.BoxCoder):
    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        return (reference_boxes - proposals) / self.unit(proposals)

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        moved = boxes[:, None] + rel_codes.unflatten(1, (-1, 4)) * self.unit(boxes)[:, None]
        return moved.unflatten(-1, (2, 2)).sort(dim=-2).values.flatten(1)  # no corners crossed

    def unit(self, boxes: Tensor) -> Tensor:
        return (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2) / boxes.new_tensor(self.weights)


# Student or teacher. Views come in their final size: torchvision's resizing is not used.
class Detector(detection.FasterRCNN):
    def __init__(self, num_classes: int, settings: Settings) -> None:
        norm = ops.FrozenBatchNorm2d if settings.backbone_weights else nn.BatchNorm2d
        body = models.get_model(settings.backbone, weights=None, norm_layer=norm)
        stages = {f"layer{i + 1}": str(i) for i in range(4)}
        widths = [body.inplanes // 8 * 2**i for i in range(4)]
        anchors, width = [[settings.anchor * 2**i] for i in range(5)], settings.channels * 4
        four = {name: nn.Linear(width, num_classes * 4) for name in ("deltas", "log_variance")}
        nn.init.normal_(four["log_variance"].weight, std=1e-4)  # Fig. 4; variances begin near 1
        super().__init__(
            detection.backbone_utils.BackboneWithFPN(body, stages, widths, settings.channels),
            rpn_anchor_generator=detection.rpn.AnchorGenerator(anchors, [[0.5, 1.0, 2.0]] * 5),
            **{f"rpn_{x}_nms_top_n_test": 2 * settings.sampled for x in ("pre", "post")},
            box_batch_size_per_image=settings.sampled,
            box_head=detection.faster_rcnn.TwoMLPHead(settings.channels * 7**2, width),
            box_predictor=nn.ModuleDict({"logits": nn.Linear(width, num_classes + 1)} | four),
        )
        self.roi_heads.box_coder = CornerCoder((10.0, 10.0, 10.0, 10.0))

    def see(self, views: list["View"]) -> tuple[ImageList, dict[str, Tensor]]:
        images = [self.transform.normalize(view.image.to(DEVICE) / 255) for view in views]
        batch = self.transform.batch_images(images)
        return ImageList(batch, [image.shape[-2:] for image in images]), self.backbone(batch)

    def predict(self, images: ImageList, features: dict, boxes: list[Tensor]) -> list[Tensor]:
        """Logits (R, K+1), deltas and log-variances (R, K, 4): the Gaussians of Eq. 4."""
        heads, padded = self.roi_heads, images.tensors.shape[-2:]  # which tells the strides
        x = heads.box_head(heads.box_roi_pool(features, boxes, [padded] * len(boxes)))
        logits, *gaussians = (layer(x) for layer in heads.box_predictor.values())
        return [logits, *(numbers.unflatten(1, (-1, 4)) for numbers in gaussians)]

    def detect(self, images: ImageList, features: dict) -> list[dict[str, Tensor]]:
        """What is found in each image after NMS; in eval mode."""
        proposals, _ = self.rpn(images, features)
        logits, deltas, log_variance = self.predict(images, features, proposals)
        boxes = self.roi_heads.box_coder.decode(deltas.flatten(1), proposals)
        scores, quality = logits.softmax(1)[:, :-1], localization_quality(log_variance)  # Eq. 5
        parts, found = [x.split([len(p) for p in proposals]) for x in (boxes, scores, quality)], []
        for b, s, q, size in zip(*parts, images.image_sizes, strict=True):
            row, label = (s > 0.05).nonzero(as_tuple=True)
            b, s, q = ops.clip_boxes_to_image(b[row, label], size), s[row, label], q[row, label]
            k = ops.batched_nms(b, s, label, 0.5)[:100]
            found.append({"boxes": b[k], "labels": label[k] + 1, "scores": s[k], "quality": q[k]})
        return found

    def forward(self, *batches: list[tuple["View", dict]]) -> list[tuple[Tensor, "Rois"]]:
        """The student's RPN loss and ROIs for batches of views with boxes, labels and quality."""
        images, features = self.see([view for batch in batches for view, _ in batch])
        start, answers, sample = 0, [], self.roi_heads.select_training_samples
        for batch in filter(None, batches):
            targets = [{name: x.to(DEVICE) for name, x in target.items()} for _, target in batch]
            part = slice(start, start := start + len(batch))
            levels = {name: feature[part] for name, feature in features.items()}
            seen = ImageList(images.tensors[part], images.image_sizes[part]), levels
            proposals, losses = self.rpn(*seen, targets)
            boxes, matched, labels, offsets = sample(proposals, targets)
            # Without any box in the image, all is "matched" to number 0: the one that is appended.
            pairs = zip(targets, matched, strict=True)
            quality = torch.cat([F.pad(t["quality"], (0, 1))[m] for t, m in pairs])
            logits, deltas, log_variance = self.predict(*seen, boxes)
            labels = (torch.cat(labels) - 1) % logits.shape[1]  # torchvision's background is 0
            rows = (labels < deltas.shape[1]).nonzero().squeeze(1)
            mean, log_variance = (x[rows, labels[rows]] for x in (deltas, log_variance))
            foreground = mean, log_variance, torch.cat(offsets)[rows], quality[rows]
            answers.append((sum(losses.values()), Rois(boxes, labels, logits, *foreground)))
        return answers


# Sec. 3.3 and 3.4: the losses of the ROI head for R sampled proposals, F of which are foreground
class Rois(NamedTuple):
    boxes: list[Tensor]  # of each image
    labels: Tensor  # (R,) in [0, K]
    logits: Tensor  # (R, K+1)
    mean: Tensor  # (F, 4) of Eq. 4, coded
    log_variance: Tensor  # (F, 4)
    target: Tensor  # (F, 4) the (pseudo) ground truth, coded
    quality: Tensor  # (F,) of its localization

    def supervised_losses(self, literal: bool) -> tuple[Tensor, Tensor]:
        """Eq. 1: Faster R-CNN's classification loss; Eq. 10 with the KL loss of Eq. 8 and 9."""
        divergence = kl_regression_loss(self.mean, self.target, self.log_variance)
        count = max(len(self.mean if literal else self.labels), 1)
        return F.cross_entropy(self.logits, self.labels), divergence.sum() / count

    def unsupervised_losses(self, reliability: Tensor, literal: bool) -> tuple[Tensor, Tensor]:
        """Eq. 2: PRC (Eq. 14) and LER (Eq. 11)."""
        error = F.smooth_l1_loss(self.mean, self.target, reduction="none")
        count = len(self.mean if literal else self.labels)
        return reweighting.reliability_weighted_cross_entropy(
            self.logits, self.labels, reliability, per_sampled_proposal=not literal
        ), reweighting.quality_weighted_box_loss(error, self.quality, count)


# Fig. 2: one step gives the loss of Eq. 3, and the number of pseudo-labels
def training_step(
    student: nn.Module, teacher: Detector, labeled: list, unlabeled: list, settings: Settings
) -> tuple[Tensor, int]:
    pseudo_labeled = []
    if unlabeled:
        seen = teacher.see([weak for weak, _ in unlabeled])
        for found, (weak, strong) in zip(teacher.detect(*seen), unlabeled, strict=True):
            boxes = found["boxes"] = weak.carry(found["boxes"], strong)
            visible = (boxes[:, 2:] - boxes[:, :2] > 1).all(dim=1)
            chosen = visible & (found["scores"] > settings.threshold)
            pseudo_labeled.append((strong, {name: x[chosen] for name, x in found.items()}))
    (rpn_loss, rois), *answers = student(labeled, pseudo_labeled)
    loss = rpn_loss + sum(rois.supervised_losses(settings.literal))
    for rpn_loss, rois in answers:
        # Sec. 3.4: the teacher judges the student's proposals, carried back to what it has seen.
        boxes = [s.carry(b, w) for b, (w, s) in zip(rois.boxes, unlabeled, strict=True)]
        logits, _, log_variance = teacher.predict(*seen, boxes)
        reliability = reweighting.proposal_reliability(logits.softmax(1), log_variance, rois.labels)
        unsupervised = rpn_loss + sum(rois.unsupervised_losses(reliability, settings.literal))
        loss = loss + settings.beta * unsupervised
    return loss, sum(len(target["labels"]) for _, target in pseudo_labeled)


# Sec. 4.2: views of images, each with the matrix from the original image's coordinates to its own
class View(NamedTuple):
    image: tv_tensors.Image  # (3, H, W) uint8
    matrix: Tensor  # (3, 3)

    @classmethod
    def make(cls, image: Image.Image, transform: v2.Transform) -> "View":
        """The matrix follows from where the transform sends three key points."""
        original = v2.functional.to_image(ImageOps.exif_transpose(image))
        points = tv_tensors.KeyPoints(torch.eye(3, 2).double(), canvas_size=original.shape[-2:])
        view, moved = transform(original, points)
        both = (F.pad(x.as_subclass(Tensor), (0, 1), value=1.0) for x in (points, moved))
        matrix = torch.linalg.solve(*both).T
        # Torchvision mirrors key points like numbers of pixels, to w - 1 - x; here they are places.
        matrix[0, 2] += matrix.det() < 0  # mirroring has to be the last transform
        return cls(view, matrix)

    def carry(self, boxes: Tensor, target: "View") -> Tensor:
        return warp_boxes(boxes, between_views(self.matrix, target.matrix), target.image.shape[-2:])


def recipe(side: int) -> list[v2.Transform]:
    """Transforms to a test image, a labeled view, a weak one and a strong one."""
    longest, mean_colour, flip = side * 5 // 3, [124, 116, 104], v2.RandomHorizontalFlip()
    size = v2.RandomShortestSize(list(range(side * 3 // 4, side + 1)), longest)
    jitter = [v2.ColorJitter(*strength) for strength in ((0.9,), (0, 0.9), (0, 0, 0.9))]
    tones = [v2.Identity(), v2.RandomAutocontrast(1.0), v2.RandomEqualize(1.0)]
    colour = v2.RandomChoice(jitter + tones)
    moves = [(30, None, None), (0, (0.1, 0.1), None), (0, None, 30), (0, None, (0, 0, -30, 30))]
    move = v2.RandomChoice([v2.RandomAffine(a, t, shear=s, fill=mean_colour) for a, t, s in moves])
    patches = [v2.RandomErasing(p, (0, 0.04), (1, 1), mean_colour) for p in (1.0, 0.5, 0.5, 0.5)]
    erase = v2.Lambda(v2.Compose(patches), tv_tensors.Image)
    views = [size, colour], [size], [size, colour, move, erase]
    return [v2.RandomShortestSize(side, longest), *(v2.Compose([*view, flip]) for view in views)]


def labeled_images(file: str, folder: str, transform: v2.Transform) -> datasets.CocoDetection:
    """Views with ground truth, in which crowds and boxes without area are left out."""

    def view_of(image: Image.Image, annotations: list[dict]) -> tuple[View, dict[str, Tensor]]:
        view = View.make(image, transform)
        own = [a for a in annotations if not a.get("iscrowd") and min(a["bbox"][2:]) > 0]
        boxes = ops.box_convert(torch.tensor([a["bbox"] for a in own]).view(-1, 4), "xywh", "xyxy")
        boxes = warp_boxes(boxes, view.matrix, view.image.shape[-2:])
        labels = torch.tensor([classes.index(a["category_id"]) for a in own], dtype=torch.int64)
        ok = ops.remove_small_boxes(boxes, 1e-2)
        return view, {"boxes": boxes[ok], "labels": labels[ok] + 1, "quality": torch.ones(len(ok))}

    try:
        with redirect_stdout(None):
            images = datasets.CocoDetection(folder, file, transforms=view_of)
    except (ValueError, KeyError, AssertionError) as error:
        raise UsageError(f"{file} cannot be read as COCO annotations: {error!r}") from error
    names, classes = [r["file_name"] for r in images.coco.imgs.values()], images.coco.getCatIds()
    if missing := [name for name in names if not os.path.isfile(f"{folder}/{name}")]:
        raise UsageError(f"{len(missing)} images of {file} are not in {folder}: {missing[:5]}")
    return images


# Pairs of a weak and a strong view of all images under a folder; None for one that is bad
class UnlabeledImages(datasets.ImageFolder):
    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        return [os.path.abspath(directory)], {os.path.abspath(directory): 0}

    def __getitem__(self, index: int) -> list[View] | None:
        try:
            return super().__getitem__(index)[0]
        except Exception as error:  # Pillow has many kinds
            print(f"skipped {self.samples[index][0]}: {error!r}", file=sys.stderr)
            return None


# Sec. 4: evaluation and training
@torch.no_grad()
def evaluate(model: Detector, images: datasets.CocoDetection, output: str = "") -> list[float]:
    """AP, AP50 and AP75 in percent; draws what is found in some images if there is an output."""
    model, coco, results = model.eval(), images.coco, []
    classes = coco.loadCats(coco.getCatIds())
    views = (view for view, _ in images)
    batches = iter(lambda: list(itertools.islice(views, 8)), [])
    seen = (pair for x in batches for pair in zip(x, model.detect(*model.see(x)), strict=True))
    for number, (view, found) in zip(images.ids, seen, strict=True):
        size = coco.imgs[number]["height"], coco.imgs[number]["width"]
        boxes = warp_boxes(found["boxes"], view.matrix.inverse(), size)
        columns = [ops.box_convert(boxes, "xyxy", "xywh"), *list(found.values())[1:]]
        texts = []
        for box, label, score, quality in zip(*(x.tolist() for x in columns), strict=True):
            kind, where = classes[label - 1], {"image_id": number, "bbox": box, "score": score}
            results.append(where | {"category_id": kind["id"]})
            texts += [f"{kind['name']} {score:.0%} q {quality:.2f}"] if score > 0.5 else []
        if output and texts and number in images.ids[:12]:
            zoom, picture = 480 / min(view.image.shape[1:]), v2.functional.resize(view.image, [480])
            boxes = found["boxes"][: len(texts)] * zoom
            picture = utils.draw_bounding_boxes(picture, boxes, texts, width=2)
            v2.functional.to_pil_image(picture).save(f"{output}/{number}.png")
    if not results:
        return [0.0] * 3
    with redirect_stdout(None):
        scored = COCOeval(coco, coco.loadRes(results), "bbox")
        scored.evaluate(), scored.accumulate(), scored.summarize()
    return [100 * x for x in scored.stats[:3]]


def train(settings: Settings) -> None:
    to_test, to_label, *to_pair = recipe(settings.side)
    labeled = labeled_images(settings.labeled, settings.labeled_images, to_label)
    val = labeled_images(settings.val, settings.val_images, to_test)
    if labeled.coco.cats != val.coco.cats:
        raise UsageError(f"{settings.labeled} and {settings.val} have different categories")
    unlabeled = UnlabeledImages(settings.unlabeled, lambda x: [View.make(x, t) for t in to_pair])
    os.makedirs(settings.output, exist_ok=True)
    torch.manual_seed(settings.seed + RANK)  # the first process's weights become those of all
    student, teacher = (Detector(len(labeled.coco.cats), settings).to(DEVICE) for _ in range(2))
    if settings.backbone_weights:
        student.backbone.body.load_state_dict(torch.load(settings.backbone_weights), strict=False)
    model = nn.parallel.DistributedDataParallel(student) if PROCESSES > 1 else student
    update_teacher(teacher.eval(), student, keep_rate=0.0)
    optimizer = optim.SGD(student.parameters(), settings.learning_rate, 0.9, weight_decay=1e-4)
    warmup = optim.lr_scheduler.LinearLR(optimizer, 1e-3, 1.0, settings.iterations // 16)
    parts = (labeled, settings.labeled_batch), (unlabeled, settings.unlabeled_batch)
    workers: Any = {} if DEVICE == "cpu" else {"num_workers": 4, "multiprocessing_context": "fork"}
    loaders = [DataLoader(x, n // PROCESSES, True, collate_fn=list, **workers) for x, n in parts]
    labeled_batches, pairs = (itertools.chain.from_iterable(itertools.repeat(x)) for x in loaders)
    rows, batch = [], f"{PROCESSES} process(es) x {[x.batch_size for x in loaders]} images"
    progress = tqdm(range(1, settings.iterations + 1), batch, disable=RANK > 0, mininterval=2)
    for step in progress:
        mutual = max(step - settings.burn_in, 0)
        views = [pair for pair in next(pairs) if pair] if mutual else []
        loss, count = training_step(model, teacher, next(labeled_batches), views, settings)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 10.0, error_if_nonfinite=True)
        optimizer.step()
        warmup.step()
        update_teacher(teacher, student, keep_rate(mutual, settings.final_keep_rate))
        progress.set_postfix(loss=f"{loss:.2f}", pseudo_labels=count, refresh=False)
        if RANK == 0 and (step % settings.period == 0 or step == settings.iterations):
            rows.append(["teacher", step, *evaluate(teacher, val, settings.output)])
            torch.save((vars(settings), teacher.state_dict()), f"{settings.output}/teacher.pt")
    if RANK == 0:
        rows.append(["student", step, *evaluate(student, val)])
        print(tabulate(rows, ["model", "iterations", "AP", "AP50", "AP75"], floatfmt=".2f"))


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__, fromfile_prefix_chars="@")
    for name, value in vars(Settings).items():
        if name[0] != "_":
            kind: Any = {"action": "store_true"} if value is False else {"type": type(value)}
            parser.add_argument("--" + name.replace("_", "-"), **kind)
    settings = parser.parse_args(namespace=Settings())
    if settings.labeled == Settings.labeled and RANK == 0:
        runpy.run_path(f"{DATASETS}/make_synthetic.py")["main"]([])
    if PROCESSES > 1:  # after the first process joins here
        distributed.init_process_group(timeout=timedelta(hours=6))  # evaluation takes time
    try:
        train(settings)
    except (OSError, UsageError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
