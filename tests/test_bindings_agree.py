"""The Detectron2 package and the torchvision reference compute the same training step.

Both get the same weights, proposals, views and ground truth, and the features of a proposal are a
function of its coordinates. Everything else is computed by each implementation on its own:
detections, pseudo-labels, projection between views, matching, the teacher's predictions for the
student's proposals, and the losses.
"""

import types

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.testing import assert_close

from examples import torchvision_reference as reference
from locreweight.data.loader import Batch
from locreweight.data.transforms.views import UnlabeledSample, View
from locreweight.engine.training_step import StepSettings, training_step
from tests.modeling.tiny_model import NUM_CLASSES, SIZE, ground_truth, tiny_config, tiny_model

WIDTH = 64  # number of features of a proposal
BRANCHES = {"logits": "cls_score", "deltas": "bbox_pred", "log_variance": "log_variance"}
LABELED = UNLABELED = 3
NO_LABELS = 1.0  # threshold that no score exceeds


class FeaturesOfBoxes(nn.Module):
    """Replaces the pooler. Its output depends only on the boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = torch.randn(4, WIDTH) / 15

    def forward(self, _, boxes, *sizes):
        coordinates = torch.cat([getattr(b, "tensor", b) for b in boxes])
        return (coordinates @ self.frequencies).sin()


class Proposer(nn.Module):
    """Replaces the RPN. Each call returns the next list of prepared boxes."""

    def __init__(self, calls) -> None:
        super().__init__()
        self.calls = iter(calls)

    def forward(self, images, *_):
        boxes = [b.clone() for b in next(self.calls)]
        return self.to_proposals(images, boxes), {}


class Detectron2Proposer(Proposer):
    def to_proposals(self, images, boxes):
        return [
            Instances(size, proposal_boxes=Boxes(b), objectness_logits=torch.zeros(len(b)))
            for size, b in zip(images.image_sizes, boxes, strict=True)
        ]


class ReferenceProposer(Proposer):
    def to_proposals(self, images, boxes):
        return boxes


def random_boxes(count):
    corner = torch.rand(count, 2) * 40
    return torch.cat([corner, corner + 6 + torch.rand(count, 2) * 18], dim=1)


def near(boxes, count):
    """Random proposals around boxes; some overlap enough to be foreground."""
    moved = boxes.repeat(count, 1) + 3 * torch.randn(len(boxes) * count, 4)
    return torch.cat([moved.clamp(0, SIZE), random_boxes(count)])


def random_matrix():
    """Rotation, scale and possibly a flip about the center of the image."""
    angle, scale, flip = torch.rand(()) - 0.5, 0.8 + 0.4 * torch.rand(()), torch.rand(()) < 0.5
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
    center = torch.full((2,), SIZE / 2)
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[:2, :2] = rotation * scale @ torch.diag(torch.tensor([-1.0 if flip else 1.0, 1.0]))
    matrix[:2, 2] = center - matrix[:2, :2].float() @ center
    return matrix


class Case:
    """Inputs of both implementations."""

    def __init__(self, seed, empty_images=False):
        torch.manual_seed(seed)
        self.gt_boxes = [random_boxes(0 if empty_images else n) for n in (1, 2, 3)]
        self.labels = [torch.randint(NUM_CLASSES, (len(b),)) for b in self.gt_boxes]
        self.matrices = [(random_matrix(), random_matrix()) for _ in range(UNLABELED)]
        self.student = [[near(b, 5) for b in self.gt_boxes]]
        # The student's proposals in the strong view are near the teacher's in the weak view.
        self.teacher = [[random_boxes(12) for _ in range(UNLABELED)]]
        self.pooler = FeaturesOfBoxes()
        self.layers = [self._layers() for _ in range(2)]  # student, teacher
        strong_views = [
            near(reference.warp_boxes(b, strong @ weak.inverse(), (SIZE, SIZE)), 3)
            for b, (weak, strong) in zip(self.teacher[0], self.matrices, strict=True)
        ]
        self.student.append([b[(b[:, 2:] - b[:, :2] > 1).all(1)] for b in strong_views])

    @staticmethod
    def _layers():
        sizes = (NUM_CLASSES + 1, NUM_CLASSES * 4, NUM_CLASSES * 4)
        scales = (0.5, 0.1, 0.2)
        return {
            name: (scale * torch.randn(size, WIDTH), scale * torch.randn(size))
            for name, size, scale in zip(BRANCHES, sizes, scales, strict=True)
        }


def image():
    return torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)


def detectron2_step(case, threshold, literal, beta):
    """Return losses and metrics by name, and the student's gradients by branch."""
    settings = {
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 4096,  # sample all proposals
        "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.5,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.05,
        "TEST.DETECTIONS_PER_IMAGE": 100,
        "MODEL.ROI_BOX_HEAD.FC_DIM": WIDTH,
        "SEMI.NORMALIZE_BY_SAMPLED": not literal,
        "SEMI.UNSUPERVISED_WEIGHT": beta,
        "SEMI.PSEUDO_LABEL_THRESHOLD": threshold,
    }
    models = []
    for layers, calls in zip(case.layers, (case.student, case.teacher), strict=True):
        model = tiny_model(settings)
        model.proposal_generator = Detectron2Proposer(calls)
        model.roi_heads.box_pooler, model.roi_heads.box_head = case.pooler, nn.Identity()
        for name, attribute in BRANCHES.items():
            set_layer(getattr(model.roi_heads.box_predictor, attribute), layers[name])
        models.append(model)
    student, teacher = models[0].train(), models[1].eval()
    labeled = [
        {"image": image(), "instances": ground_truth(b.tolist(), labels.tolist())}
        for b, labels in zip(case.gt_boxes, case.labels, strict=True)
    ]
    unlabeled = [
        UnlabeledSample("", View(image(), weak), View(image(), strong))
        for weak, strong in case.matrices
    ]
    with EventStorage():
        result = training_step(
            student,
            teacher,
            Batch(labeled, unlabeled),
            StepSettings.from_config(tiny_config(settings)),
        )
    result.total.backward()
    predictor = student.roi_heads.box_predictor
    gradients = {name: getattr(predictor, a).weight.grad for name, a in BRANCHES.items()}
    return result.losses, result.metrics, gradients


def reference_step(case, threshold, literal, beta, monkeypatch):
    """Return total loss, number of pseudo-labels, losses, and gradients by branch."""
    settings = reference.Settings(
        channels=16, sampled=4096, threshold=threshold, literal=literal, beta=beta
    )
    models = []
    for layers, calls in zip(case.layers, (case.student, case.teacher), strict=True):
        model = reference.Detector(NUM_CLASSES, settings).to(reference.DEVICE)
        model.rpn = ReferenceProposer(calls)
        model.roi_heads.box_roi_pool, model.roi_heads.box_head = case.pooler, nn.Identity()
        for name in BRANCHES:
            set_layer(model.roi_heads.box_predictor[name], layers[name])
        models.append(model)
    student, teacher = models[0].train(), models[1].eval().requires_grad_(False)
    labeled = [
        (
            reference.View(image(), torch.eye(3)),
            {"boxes": b, "labels": labels + 1, "quality": torch.ones(len(b))},
        )
        for b, labels in zip(case.gt_boxes, case.labels, strict=True)
    ]
    unlabeled = [
        [reference.View(image(), matrix) for matrix in matrices] for matrices in case.matrices
    ]
    parts = []
    proposals = reference.SampledProposals
    for name in ("supervised_losses", "unsupervised_losses"):
        monkeypatch.setattr(proposals, name, recording(getattr(proposals, name), parts))
    total, count = reference.training_step(student, teacher, labeled, unlabeled, settings)
    total.backward()
    branches = student.roi_heads.box_predictor
    return total, count, parts, {name: branches[name].weight.grad for name in BRANCHES}


def recording(method, calls):
    def recorded(*arguments):
        calls.append(method(*arguments))
        return calls[-1]

    return recorded


def set_layer(layer, values):
    layer.in_features = values[0].shape[1]
    layer.weight, layer.bias = (nn.Parameter(v.clone()) for v in values)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize(
    ("seed", "threshold", "empty_images"),
    [
        (0, 0.5, False),
        (1, 0.5, False),
        (2, 0.6, False),
        (3, NO_LABELS, False),
        (4, 0.5, True),
        (5, NO_LABELS, True),
    ],
)
def test_both_implementations_have_the_same_losses_and_gradients(
    seed, threshold, empty_images, literal, monkeypatch
):
    case, beta = Case(seed, empty_images), 1.7
    losses, metrics, gradients = detectron2_step(case, threshold, literal, beta)
    total, count, (supervised, unsupervised), reference_gradients = reference_step(
        case, threshold, literal, beta, monkeypatch
    )
    assert count == metrics["pseudo_labels/per_image"] * UNLABELED
    assert (count > 5) == (threshold != NO_LABELS), "the case has too few pseudo-labels"
    assert (metrics["proposals/foreground_per_image"] > 0) == (threshold != NO_LABELS)
    expected = types.SimpleNamespace(**losses)
    close = {"rtol": 1e-6, "atol": 1e-6}
    assert_close(supervised, (expected.loss_cls, expected.loss_box_reg), **close)
    assert_close(
        tuple(beta * loss for loss in unsupervised),
        (expected.loss_cls_unlabeled, expected.loss_box_reg_unlabeled),
        **close,
    )
    assert_close(total, sum(losses.values()), **close)
    for name in BRANCHES:
        assert_close(reference_gradients[name], gradients[name], rtol=1e-5, atol=1e-6)
