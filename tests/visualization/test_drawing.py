"""Drawing of boxes, labels, grids and captions."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from locreweight.visualization.drawing import (
    CLASS_COLORS,
    OUTLINE,
    WHITE,
    DrawingStyle,
    LabelDetail,
    Layer,
    captioned,
    detection_labels,
    draw,
    draw_detections,
    explained,
    grid,
    quality_colors,
    quality_legend,
    save_picture,
)

RED = (255, 0, 0)


def gray(height, width):
    return np.full((height, width, 3), 128, np.uint8)


def layer(*boxes, labels=None):
    return Layer(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), [RED] * len(boxes), labels
    )


def red_pixels(picture):
    """Return the rows and the columns of red pixels."""
    return np.nonzero((picture == RED).all(axis=2))


@pytest.mark.parametrize(("height", "width", "scale"), [(60, 90, 8), (1440, 720, 0.5)])
def test_draw_resizes_image_and_boxes(height, width, scale):
    box = [width * 0.25, height * 0.5, width * 0.75, height * 0.75]
    picture = draw(gray(height, width), [layer(box)], side=720)
    assert picture.shape == (height * scale, width * scale, 3)
    rows, columns = red_pixels(picture)
    measured = [columns.min(), rows.min(), columns.max(), rows.max()]
    assert measured == pytest.approx([value * scale for value in box], abs=3)


def test_draw_keeps_the_colors_of_the_image():
    image = gray(50, 50)
    image[:, :25] = (0, 0, 255)
    picture = draw(image, [], side=50)
    assert np.array_equal(picture, image)


def test_boxes_outside_or_without_area_are_not_drawn():
    boxes = [[60, 60, 80, 80], [10, 10, 10, 30], [-20, -20, -5, -5]]
    picture = draw(gray(50, 50), [layer(*boxes, labels=[["a"], ["b"], ["c"]])], side=50)
    assert np.array_equal(picture, gray(50, 50))


def test_boxes_are_clipped_to_the_image():
    rows, columns = red_pixels(draw(gray(50, 50), [layer([-10, 20, 100, 30])], side=50))
    assert columns.min() == 0 and columns.max() == 49
    assert 18 <= rows.min() and rows.max() <= 32


def test_later_layers_cover_earlier_ones():
    green = Layer(torch.tensor([[10.0, 10, 40, 40]]), [(0, 255, 0)])
    first, second = (
        draw(gray(50, 50), order, 50)
        for order in ([green, layer([10, 10, 40, 40])], [layer([10, 10, 40, 40]), green])
    )
    assert len(red_pixels(first)[0]) and not len(red_pixels(second)[0])


def test_detection_labels_have_class_score_and_quality():
    detections = Instances(
        (50, 50),
        pred_boxes=Boxes(torch.zeros(2, 4)),
        pred_classes=torch.tensor([1, 0]),
        scores=torch.tensor([0.931, 0.5]),
        localization_quality=torch.tensor([0.412, 0.2]),
    )
    assert detection_labels(detections, ["cat", "dog"]) == [
        ["dog 93% q 0.41", "dog 93%", "dog"],
        ["cat 50% q 0.20", "cat 50%", "cat"],
    ]
    assert detection_labels(detections, ["cat", "dog"], quality=False) == [
        ["dog 93%", "dog"],
        ["cat 50%", "cat"],
    ]


def two_detections(first_score):
    """Two equal boxes, a cat with the given score and a dog with a score of 0.5."""
    return Instances(
        (60, 60),
        pred_boxes=Boxes(torch.tensor([[10.0, 20, 50, 50]] * 2)),
        pred_classes=torch.tensor([0, 1]),
        scores=torch.tensor([first_score, 0.5]),
        localization_quality=torch.tensor([0.3, 0.3]),
    )


@pytest.mark.parametrize(("score", "visible"), [(0.9, 0), (0.1, 1)])
def test_detections_with_high_scores_cover_others(score, visible):
    style = DrawingStyle(LabelDetail.NONE)
    picture = draw_detections(
        gray(60, 60), two_detections(score), ["cat", "dog"], 60, quality=True, style=style
    )
    shown = [bool((picture == CLASS_COLORS[i]).all(axis=2).any()) for i in (0, 1)]
    assert shown == [visible == 0, visible == 1]


def test_label_detail_and_line_width():
    def pixels(style):
        detections = two_detections(0.9)[:1]
        picture = draw_detections(gray(60, 60), detections, ["cat"], 240, quality=True, style=style)
        return int((picture == CLASS_COLORS[0]).all(axis=2).sum())

    counts = [pixels(DrawingStyle(detail)) for detail in LabelDetail]  # none, class, score
    assert counts == sorted(set(counts))
    assert pixels(DrawingStyle(LabelDetail.NONE, 6)) > 2 * pixels(DrawingStyle(LabelDetail.NONE, 2))


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_boxes_are_visible_on_any_background(shade):
    image = np.full((60, 60, 3), shade, np.uint8)
    for color in (*CLASS_COLORS, (255, 255, 255)):
        boxes = torch.tensor([[10.0, 10, 50, 50]])
        picture = draw(image, [Layer(boxes, [color])], 60)
        luma = picture[30, :30].astype(int) @ (0.299, 0.587, 0.114)
        assert luma.max() - luma.min() > 60


def test_ground_truth_is_dashed():
    truth = Instances((60, 60), gt_boxes=Boxes(torch.tensor([[5.0, 5, 55, 55]])))
    truth.gt_classes = torch.tensor([0])
    picture = draw(gray(60, 60), [Layer.of_ground_truth(truth)], 60)
    white, dark = ((picture[5] == color).all(axis=1).sum() for color in (WHITE, OUTLINE))
    assert white > 20 and dark > 10


def test_labels_become_shorter_if_they_have_no_room():
    """Both texts would need the same place: the short one is used, and fits."""
    texts = ["a text that is far too long for the picture", "a"]
    boxes = torch.tensor([[10.0, 20, 50, 50]])
    long, short, fallback = (
        draw(gray(60, 60), [Layer(boxes, [RED], [labels])], 60)
        for labels in (texts[:1], texts[1:], texts)
    )
    assert np.array_equal(fallback, short) and not np.array_equal(fallback, long)


def test_explanation_is_wrapped_below_the_picture():
    picture = explained(gray(30, 200), "word " * 60)
    assert picture.shape[1] == 200 and picture.shape[0] > 30 + 2 * 22
    assert np.array_equal(picture[:30], gray(30, 200))


def test_quality_colors_go_from_red_to_blue():
    (bad, worse), (good,) = (
        quality_colors(torch.tensor([0.25, 0.0])),
        quality_colors(torch.tensor([0.5])),
    )
    assert bad == worse and bad[0] > 2 * bad[2]
    assert good[2] > 2 * good[0]
    # 0.5 of 1 is the same fraction as 0.25 of 0.5.
    assert quality_colors(torch.tensor([0.5]), highest=1.0) == [bad]


def test_grid_contains_all_pictures():
    small, wide, tall = gray(10, 10), gray(10, 30), gray(20, 10)
    picture = grid([[small, wide], [tall]], gap=2)
    assert picture.shape == (10 + 2 + 20 + 2, 10 + 2 + 30 + 2, 3)
    assert (picture == 128).all(axis=2).sum() == 100 + 300 + 200


def test_caption_and_legend_have_the_width_of_the_picture():
    picture = captioned(gray(30, 200), "a text that is far too long for such a small picture" * 3)
    assert picture.shape[1] == 200 and picture.shape[0] > 30
    assert np.array_equal(picture[-30:], gray(30, 200))
    assert quality_legend(200).shape[1] == 200


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".bmp", ".JPEG"])
def test_save_picture_uses_the_format_of_the_suffix(tmp_path, suffix):
    file = tmp_path / "new" / f"a{suffix}"
    save_picture(gray(20, 30), file)
    with Image.open(file) as image:
        assert image.size == (30, 20)
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - 128).max() <= 2
