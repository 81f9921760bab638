"""Instant-Teaching: mixed images, their labels, and the weights of the classification loss."""

import pytest
import torch
from detectron2.structures import Boxes
from torch.testing import assert_close

from locreweight.methods import StudentImage, build_method
from locreweight.methods.instant_teaching import InstantTeaching, cut_labels, mixup, mosaic
from tests.methods.test_methods import sample
from tests.modeling.output_layer_cases import K, cross_entropy_of
from tests.modeling.tiny_model import ground_truth, labeled_inputs, random_image, tiny_config

MEAN = torch.tensor([1.0, 2.0, 3.0])


def make_method():
    keys = {"SEMI.METHOD": "InstantTeaching", "MODEL.PIXEL_MEAN": MEAN.tolist()}
    return build_method(tiny_config(keys))


def student_image(boxes, classes, size=(40, 60), seed=0):
    return StudentImage(random_image(size, seed), ground_truth(boxes, classes, size), sample=None)


FIRST = student_image([[0, 0, 10, 10], [20, 30, 60, 40]], [0, 1])
SECOND = student_image([[5, 5, 50, 35]], [2], seed=1)


# Mixup


def test_mixup_averages_pixels_and_unites_weighted_labels():
    mixed = mixup(FIRST, SECOND, 0.75, MEAN)
    assert_close(mixed.image, 0.75 * FIRST.image.float() + 0.25 * SECOND.image.float())
    labels = mixed.pseudo_labels
    assert labels.image_size == (40, 60)
    assert labels.gt_boxes.tensor.tolist() == [
        [0, 0, 10, 10],
        [20, 30, 60, 40],
        [5, 5, 50, 35],
    ]
    assert labels.gt_classes.tolist() == [0, 1, 2]
    assert labels.gt_weight.tolist() == [0.75, 0.75, 0.25]
    assert mixed.sample is None


def test_mixup_of_different_sizes_fills_with_the_pixel_mean():
    other = student_image([[0, 0, 30, 50]], [2], size=(50, 30), seed=2)
    mixed = mixup(FIRST, other, 0.5, MEAN)
    assert mixed.image.shape == (3, 50, 60) and mixed.pseudo_labels.image_size == (50, 60)
    assert_close(
        mixed.image[:, :40, :30], (FIRST.image[:, :, :30] + other.image[:, :40].float()) / 2
    )
    only_first = (FIRST.image[:, :, 30:] + MEAN[:, None, None]) / 2
    assert_close(mixed.image[:, :40, 30:], only_first)
    assert_close(mixed.image[:, 40:, 30:], MEAN[:, None, None].expand(3, 10, 30))


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, FIRST), (0.0, SECOND)])
def test_mixup_with_all_weight_on_one_image_is_that_image(ratio, expected):
    mixed = mixup(FIRST, SECOND, ratio, MEAN)
    assert torch.equal(mixed.image, expected.image.float())
    boxes = expected.pseudo_labels.gt_boxes.tensor
    assert torch.equal(mixed.pseudo_labels.gt_boxes.tensor, boxes)
    assert (mixed.pseudo_labels.gt_weight == 1).all()


# Mosaic


def test_mosaic_of_upper_and_lower_part_is_that_of_its_sources_pixel_by_pixel():
    mixed = mosaic(FIRST, SECOND, 0, 17, MEAN)
    assert torch.equal(mixed.image[:, :17], FIRST.image[:, :17].float())
    assert torch.equal(mixed.image[:, 17:], SECOND.image[:, 17:].float())
    labels = mixed.pseudo_labels
    assert labels.gt_boxes.tensor.tolist() == [[0, 0, 10, 10], [5, 17, 50, 35]]
    assert labels.gt_classes.tolist() == [0, 2]
    assert labels.gt_weight.tolist() == [1, 1]


def test_mosaic_of_left_and_right_part_is_that_of_its_sources_pixel_by_pixel():
    other = student_image([[5, 5, 50, 35]], [2], size=(30, 70), seed=3)
    mixed = mosaic(FIRST, other, 1, 32, MEAN)
    assert mixed.image.shape == (3, 40, 70)
    assert torch.equal(mixed.image[:, :, :32], FIRST.image[:, :, :32].float())
    assert torch.equal(mixed.image[:, :30, 32:], other.image[:, :, 32:].float())
    assert torch.equal(mixed.image[:, 30:, 32:], MEAN[:, None, None].expand(3, 10, 38))
    boxes = mixed.pseudo_labels.gt_boxes.tensor.tolist()
    assert boxes == [[0, 0, 10, 10], [20, 30, 32, 40], [32, 5, 50, 35]]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([0, 0, 20, 20], [0, 0, 20, 20]),
        ([10, 0, 50, 20], None),  # a quarter of the width: 10 of 40
        ([9, 0, 49, 20], [9, 0, 20, 20]),  # more than a quarter
        ([0, 24, 10, 36], [0, 24, 10, 30]),
        ([0, 27, 10, 39], None),  # a quarter of the height: 3 of 12
        ([19, 29, 39, 49], None),
        ([30, 0, 50, 20], None),  # outside
        ([0, 0, 0, 10], None),  # without area
    ],
)
def test_a_cut_box_stays_if_more_than_a_quarter_of_each_side_remains(box, expected):
    labels = ground_truth([box], [1], gt_score=torch.tensor([0.5]))
    cut = cut_labels(labels, (0, 0, 20, 30))
    assert cut.gt_boxes.tensor.tolist() == ([] if expected is None else [expected])
    assert len(cut.gt_score) == len(cut) == (expected is not None)
    assert labels.gt_boxes.tensor.tolist() == [box]  # unchanged


def test_cut_of_no_labels_is_empty():
    assert len(cut_labels(ground_truth([], []), (0, 0, 20, 30))) == 0


# Composing a batch


def strong_views(count):
    return [
        StudentImage(random_image(seed=50 + i), ground_truth([[8, 8, 40, 40]], [1]), sample="views")
        for i in range(count)
    ]


def test_half_of_the_images_are_mixed_half_of_them_by_mixup():
    method = make_method()
    composed = method.compose(strong_views(400), labeled_inputs())
    mixed = [x for x in composed if x.sample is None]
    assert 160 < len(mixed) < 240
    averaged = [x for x in mixed if (x.image != x.image.round()).any()]
    assert 60 < len(averaged) < 140
    for i, x in enumerate(composed):
        assert x.image.shape == (3, 64, 64) and len(x.pseudo_labels.gt_weight) == len(
            x.pseudo_labels
        )
        if x.sample is not None:
            assert torch.equal(x.image, random_image(seed=50 + i))
            assert x.pseudo_labels.gt_weight.tolist() == [1.0]


def test_mixup_and_mosaic_are_equally_likely_and_ratio_and_cut_uniform(monkeypatch):
    ratios, cuts = [], []
    module = "locreweight.methods.instant_teaching"
    monkeypatch.setattr(f"{module}.mixup", lambda a, b, ratio, fill: ratios.append(ratio) or a)
    monkeypatch.setattr(
        f"{module}.mosaic", lambda a, b, axis, cut, _: cuts.append((axis, cut)) or a
    )
    make_method().compose(strong_views(1600), labeled_inputs())
    assert abs(len(ratios) - 400) < 60 and abs(len(cuts) - 400) < 60
    counts = torch.tensor(ratios).mul(4).int().bincount(minlength=4)
    assert counts.min() > 0.18 * len(ratios)
    assert {axis for axis, _ in cuts} == {0, 1}
    positions = torch.tensor([cut for _, cut in cuts])
    assert positions.min() == 16 and positions.max() == 47  # [1/4, 3/4) of 64 pixels
    assert abs(positions.float().mean() - 31.5) < 2


def test_labeled_image_without_objects_and_images_of_one_pixel_can_be_mixed():
    method = make_method()
    method.mixing_probability = 1.0
    empty = [{"image": random_image((1, 1)), "instances": ground_truth([], [], (1, 1))}]
    tiny = StudentImage(random_image((1, 1)), ground_truth([], [], (1, 1)), sample="views")
    for _ in range(20):
        for image in (tiny, strong_views(1)[0]):
            (composed,) = method.compose([image], empty)
            assert composed.image.isfinite().all() and composed.sample is None


# Loss


@pytest.mark.parametrize("labels", [[[0, K, 2, K], [1, 1, K]], [[K, K]], [[0, 1]]])
def test_classification_loss_weights_proposals_of_mixed_objects(labels):
    count = sum(map(len, labels))
    weights = torch.rand(count)
    proposals = sample(labels, gt_weight=weights)
    matched = proposals.matched_gt_field("gt_weight").tolist()
    flat = [label for image in labels for label in image]
    logits = proposals.predictions.scores.tolist()
    expected = sum(
        (matched[row] if label < K else 1.0) * cross_entropy_of(logits[row], label)
        for row, label in enumerate(flat)
    )
    loss = make_method().classification_loss(proposals)
    assert_close(loss, torch.tensor(expected / count))


def test_box_loss_is_not_weighted():
    labels = [[0, K, 2, K], [1, 1, K]]
    proposals = sample(labels, gt_weight=torch.rand(7))
    base = super(InstantTeaching, make_method())
    assert torch.equal(make_method().box_loss(proposals), base.box_loss(proposals))
    assert isinstance(proposals.instances[0].gt_boxes, Boxes)
