"""Pictures of weak and strong views: boxes are drawn where the views show their content."""

import numpy as np
import pytest
import torch

from locreweight.data.transforms.views import UnlabeledSample, View
from locreweight.engine.predictor import load_student
from locreweight.visualization import views
from locreweight.visualization.drawing import OUTLINE
from tests.modeling.tiny_model import tiny_config
from tests.tiny_data import make_folder


def extent_of_color(picture, color):
    """x1, y1, x2, y2 of the pixels that have a color."""
    rows, columns = np.nonzero((picture == color).all(axis=2))
    return [columns.min(), rows.min(), columns.max(), rows.max()]


@pytest.mark.parametrize("is_wrong", [False, True])
def test_draw_views_shows_a_wrong_matrix(is_wrong):
    """A bright square is in both views. Only a correct matrix puts its box on it in the strong."""
    weak = torch.full((3, 100, 100), 50, dtype=torch.uint8)
    weak[:, 10:30, 10:30] = 250
    strong = torch.roll(weak, (40, 20), dims=(1, 2))
    shift = torch.tensor([[1, 0, 20], [0, 1, 40], [0, 0, 1]], dtype=torch.float64)
    if is_wrong:
        shift[0, 2] = -5
    sample = UnlabeledSample(
        "a", View(weak, torch.eye(3, dtype=torch.float64)), View(strong, shift)
    )
    record = {"annotations": [{"bbox": [10, 10, 20, 20], "bbox_mode": 1, "category_id": 0}]}
    _, picture = views.draw_views(sample, record, torch.zeros(0, 4), [""], "RGB")
    box = extent_of_color(picture, OUTLINE)
    square = [4 * v for v in (30, 50, 50, 70)]
    differences = np.abs(np.subtract(box, square))
    assert (differences[[0, 2, 3]].max() < 8) != is_wrong  # the label is above the box


def test_draw_views_projects_proposals_to_the_weak_view():
    image = torch.full((3, 100, 100), 128, dtype=torch.uint8)
    shift = torch.tensor([[1, 0, 20], [0, 1, 40], [0, 0, 1]], dtype=torch.float64)
    sample = UnlabeledSample(
        "a", View(image, torch.eye(3, dtype=torch.float64)), View(image, shift)
    )
    boxes = torch.tensor([[40.0, 50, 80, 90]])
    weak, strong = views.draw_views(sample, {"file_name": "a"}, boxes, ["cat"], "RGB")
    (color,) = views.proposal_colors(1)
    for view, (left, right, bottom) in ((strong, (160, 320, 360)), (weak, (80, 240, 200))):
        x1, _, x2, y2 = extent_of_color(view, color)  # the label is above the box
        assert (x1, x2, y2) == pytest.approx((left, right, bottom), abs=4)


def test_draw_view_table_keeps_the_order_of_the_records(tmp_path):
    """Each seed draws the images in another order. The rows must not depend on it."""
    folder = make_folder(tmp_path / "images", images=3)
    cfg = tiny_config()
    records = [{"file_name": str(folder / f"000{i}.png")} for i in (2, 0, 1)]
    student = load_student(cfg, "")
    titles = []
    for seed in range(4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(views, "captioned", lambda _, title: titles.append(title))
            patch.setattr(views, "grid", lambda rows: rows)
            patch.setattr(views, "explained", lambda picture, _: picture)
            views.draw_view_table(cfg, records, student, num_proposals=1, seed=seed)
    expected = ["weak: 0002.png", "strong", "weak: 0000.png", "strong", "weak: 0001.png", "strong"]
    assert titles == 4 * expected
