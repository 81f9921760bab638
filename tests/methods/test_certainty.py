"""The certainty of box corners, and their order in another view."""

import math

import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch.testing import assert_close

from locreweight.data.transforms.views import UnlabeledSample, View
from locreweight.errors import UsageError
from locreweight.methods import build_method
from locreweight.methods.certainty import certainty, reorder_corners
from tests.modeling.tiny_model import random_image, tiny_config

VIEWS = {
    "same": ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [0, 1, 2, 3]),
    "scaled": ([[2, 0, 3], [0, 3, 1], [0, 0, 1]], [0, 1, 2, 3]),
    "flipped": ([[-1, 0, 64], [0, 1, 0], [0, 0, 1]], [2, 1, 0, 3]),
    "upside down": ([[1, 0, 0], [0, -1, 64], [0, 0, 1]], [0, 3, 2, 1]),
}


def make_sample(strong):
    """The weak view is shifted, so that the order depends on the matrix between the views."""
    weak = torch.tensor([[1.0, 0, 5], [0, 1, 5], [0, 0, 1]]).double()
    matrix = torch.tensor(strong, dtype=torch.float64) @ weak
    return UnlabeledSample("a.png", View(random_image(), weak), View(random_image(), matrix))


@pytest.mark.parametrize("view", VIEWS)
def test_corners_keep_their_side_of_the_object_in_a_flipped_view(view):
    strong, order = VIEWS[view]
    values = torch.tensor([[0.0, 1, 2, 3]])
    assert reorder_corners(values, make_sample(strong)).tolist() == [order]


def make_detections():
    """Three detections; the scores of the first and the last are above 0.5."""
    return Instances(
        (64, 64),
        pred_boxes=Boxes(torch.rand(3, 4)),
        scores=torch.tensor([0.9, 0.2, 0.7]),
        pred_classes=torch.tensor([0, 1, 2]),
        localization_quality=torch.rand(3),
        log_variance=torch.randn(3, 4),
    )


def test_certainty_of_a_variance():
    log_variance = torch.tensor([0.0, math.log(3), -math.log(3)])
    assert_close(certainty(log_variance), torch.tensor([0.5, 0.25, 0.75]))


@pytest.mark.parametrize("method", ["UnbiasedTeacherV2", "LocReweightMix"])
@pytest.mark.parametrize("key", ["GAUSSIAN_BOXES", "CORNER_CODING"])
def test_methods_need_variances_of_corners(key, method):
    keys = {"SEMI.METHOD": method, f"MODEL.ROI_BOX_HEAD.{key}": False}
    with pytest.raises(UsageError, match=rf"{method}.*MODEL.ROI_BOX_HEAD.{key} True"):
        build_method(tiny_config(keys))
