"""MixPL: averages, the mosaic, the cache, and the weights of the losses."""

import pytest
import torch
from detectron2.structures import Boxes
from torch.testing import assert_close

from locreweight.methods import LabelingInputs, SampledProposals, StudentImage, build_method
from locreweight.methods import mixpl as module
from locreweight.methods.mixpl import average, flip_and_fit, mosaic
from tests.methods.test_methods import expected_box_losses, sample
from tests.modeling.output_layer_cases import K, cross_entropy_of, rows_of
from tests.modeling.tiny_model import ground_truth, random_image, tiny_config

MEAN = torch.tensor([1.0, 2.0, 3.0])
FILL = MEAN[:, None, None]


def make_method(cached=0):
    keys = {"SEMI.METHOD": "MixPL", "MODEL.PIXEL_MEAN": MEAN.tolist()}
    method = build_method(tiny_config(keys))
    method.update_state([[cache_entry(i) for i in range(cached)]])
    return method


def cache_entry(i, size=(40, 60)):
    boxes = torch.tensor([[2.0, 3, 20, 30]])
    return {"image": random_image(size, i), "boxes": boxes, "classes": torch.tensor([i % 3])}


def student_image(boxes, classes, size=(40, 60), seed=0):
    labels = ground_truth(boxes, classes, size, gt_score=torch.rand(len(boxes)))
    return StudentImage(random_image(size, seed), labels, sample="views")


# Pixels and boxes


def test_flip_without_resizing_mirrors_pixels_and_boxes():
    image = random_image((40, 60))
    labels = ground_truth([[2.0, 3, 20, 30], [0, 0, 60, 40]], [2, 1], (40, 60))
    labels.gt_score = torch.tensor([0.5, 0.25])
    flipped = flip_and_fit(image, labels, (40, 80))
    assert torch.equal(flipped.image, image.flip(2).float())
    assert flipped.pseudo_labels.gt_boxes.tensor.tolist() == [[40, 3, 58, 30], [0, 0, 60, 40]]
    assert flipped.pseudo_labels.gt_classes.tolist() == [2, 1]
    assert flipped.pseudo_labels.gt_score.tolist() == [0.5, 0.25]
    assert labels.gt_boxes.tensor[0].tolist() == [2, 3, 20, 30]


@pytest.mark.parametrize(
    ("size", "fitted"), [((20, 90), (20, 30)), ((80, 90), (60, 90)), ((1, 1), (1, 1))]
)
def test_images_are_resized_to_fit_with_the_same_aspect_ratio(size, fitted):
    image = torch.full((3, 40, 60), 9, dtype=torch.uint8)
    resized = flip_and_fit(image, ground_truth([[6.0, 4, 30, 40]], [0], (40, 60)), size)
    assert resized.image.shape[1:] == resized.pseudo_labels.image_size == fitted
    assert_close(resized.image, torch.full((3, *fitted), 9.0))
    scale = torch.tensor([fitted[1] / 60, fitted[0] / 40]).repeat(2)
    expected = torch.tensor([[30.0, 4, 54, 40]]) * scale
    assert_close(resized.pseudo_labels.gt_boxes.tensor, expected)


def test_average_of_equal_sizes_is_the_mean_with_all_labels():
    first, second = student_image([[0, 0, 9, 9]], [0]), student_image([[5, 5, 50, 35]], [2], seed=1)
    mixed = average(first, second, MEAN)
    assert_close(mixed.image, (first.image.float() + second.image.float()) / 2)
    labels = mixed.pseudo_labels
    assert labels.gt_boxes.tensor.tolist() == [[0, 0, 9, 9], [5, 5, 50, 35]]
    assert labels.gt_classes.tolist() == [0, 2]
    assert mixed.sample is None


def test_average_of_different_sizes_places_them_at_random():
    """The boxes move with the pixels."""
    wide = student_image([[0, 0, 60, 20]], [0], size=(20, 60))
    high = student_image([[1, 2, 9, 38]], [1], size=(40, 10), seed=1)
    corners = set()
    for _ in range(200):
        mixed = average(wide, high, MEAN)
        assert mixed.image.shape == (3, 40, 60) and mixed.pseudo_labels.image_size == (40, 60)
        (x1, y1, *_), (x2, y2, *_) = mixed.pseudo_labels.gt_boxes.tensor.int().tolist()
        corners |= {(y1, x2 - 1)}
        assert x1 == 0 and y2 == 2
        expected = torch.stack([FILL.repeat(1, 40, 60)] * 2)
        expected[0, :, y1 : y1 + 20] = wide.image
        expected[1, :, :, x2 - 1 : x2 + 9] = high.image
        assert_close(mixed.image, expected.mean(dim=0))
    rows, columns = map(set, zip(*corners, strict=True))
    assert min(rows) == 0 and max(rows) == 20 and min(columns) == 0 and max(columns) == 50


def test_mosaic_places_four_images_around_the_center():
    sizes = [(10, 8), (6, 12), (10, 12), (4, 4)]
    parts = [student_image([[0, 0, 3, 2]], [0], size, seed=i) for i, size in enumerate(sizes)]
    result = mosaic(parts, (10, 12), MEAN)
    expected = FILL.repeat(1, 20, 24)
    corners = [(4, 0), (12, 4), (0, 10), (12, 10)]
    for part, (x, y), (height, width) in zip(parts, corners, sizes, strict=True):
        expected[:, y : y + height, x : x + width] = part.image
    assert torch.equal(result.image, expected)
    assert result.pseudo_labels.gt_boxes.tensor.tolist() == [
        [x, y, x + 3, y + 2] for x, y in corners
    ]
    assert result.pseudo_labels.image_size == (20, 24)


# Composing a batch


def views(count):
    return [student_image([[8, 8, 40, 39]], [1], seed=50 + i) for i in range(count)]


@pytest.mark.parametrize("cached", [0, 7])
def test_nothing_is_mixed_before_the_cache_is_full(cached):
    images = views(3)
    assert make_method(cached).compose(images, []) is images


@pytest.mark.parametrize("count", [1, 3, 8, 11])
def test_each_image_is_averaged_with_a_cached_one_and_a_mosaic_is_added(count):
    method = make_method(8)
    composed = method.compose(views(count), [])
    assert len(composed) == count + method.further_images
    flipped = [cache_entry(i)["image"].flip(2).float() for i in range(8)]
    partners = []
    for x, view in zip(composed[:-1], views(count), strict=True):
        other = 2 * x.image - view.image
        (match,) = [i for i in range(8) if torch.allclose(other, flipped[i])]
        partners.append(match)
        assert x.pseudo_labels.gt_classes.tolist() == [1, match % 3]
        assert x.pseudo_labels.gt_boxes.tensor.tolist()[1] == [40, 3, 58, 30]
        assert set(x.pseudo_labels.get_fields()) == {"gt_boxes", "gt_classes"}
    assert len(set(partners)) == min(count, 8)
    added = composed[-1]
    assert added.image.shape == (3, 40, 60) and len(added.pseudo_labels) == 4
    # Half as large: quarters of 20 x 30 pixels.
    assert_close(added.pseudo_labels.gt_boxes.tensor[0], torch.tensor([20, 1.5, 29, 15]))


def test_weights_are_the_mean_over_averages_plus_half_of_the_mosaic():
    composed = make_method(8).compose(views(3), [])
    weights = [x.loss_weight / len(composed) for x in composed]
    assert weights == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.5])


def test_labels_may_be_empty():
    method = make_method()
    empty = {"boxes": torch.zeros(0, 4), "classes": torch.zeros(0, dtype=torch.int64)}
    method.update_state([[cache_entry(i) | empty for i in range(8)]])
    composed = method.compose([student_image([], [])], [])
    assert [len(x.pseudo_labels) for x in composed] == [0, 0]


# Losses


def test_losses_multiply_each_proposal_by_the_weight_of_its_image():
    labels, weights = [[0, K, 2, K], [1, 1, K]], [0.5, 3.0]
    plain = sample(labels)
    proposals = SampledProposals(
        plain.instances, plain.predictions, plain.box_predictor, None, weights
    )
    row_weights = [weights[i] for i, image in enumerate(labels) for _ in image]
    assert proposals.image_weight.tolist() == row_weights
    logits = proposals.predictions.scores.tolist()
    expected = sum(
        weight * cross_entropy_of(logits[row], label)
        for row, ((label, *_), weight) in enumerate(
            zip(rows_of(proposals.instances), row_weights, strict=True)
        )
    )
    losses = make_method().losses(proposals)
    assert_close(losses["loss_cls"], torch.tensor(expected / 7))
    boxes = [
        loss * row_weights[row] for row, loss in expected_box_losses(plain, "corners", False, 1.0)
    ]
    assert_close(losses["loss_box_reg"], torch.tensor(sum(boxes) / 4), rtol=1e-4, atol=1e-5)


# Cache


def test_cache_holds_the_newest_images_of_all_processes_in_order():
    method = make_method()
    method.update_state([[cache_entry(0), cache_entry(1)], [cache_entry(2)]])
    method.update_state([[cache_entry(i) for i in range(3, 7)], [cache_entry(7), cache_entry(8)]])
    images = [x["image"] for x in method.cache]
    assert len(images) == 8
    assert all(torch.equal(x, cache_entry(i)["image"]) for i, x in enumerate(images, 1))


def test_state_is_restored():
    method, restored = make_method(8), make_method()
    restored.load_state_dict(method.state_dict())
    torch.manual_seed(3)
    first = method.compose(views(2), [])
    torch.manual_seed(3)
    second = restored.compose(views(2), [])
    assert all(torch.equal(a.image, b.image) for a, b in zip(first, second, strict=True))
    method.update_state([[cache_entry(9)]])
    assert torch.equal(restored.cache[0]["image"], cache_entry(0)["image"])


@pytest.mark.parametrize(
    ("processes", "kept"), [(1, [0, 1, 2, 3, 4]), (2, [1, 2, 3, 4]), (5, [3, 4])]
)
def test_each_process_adds_its_share_of_the_cache(monkeypatch, processes, kept):
    """In strong views with the boxes projected to them; the strong views are flipped."""
    from tests.engine.test_training_step import FLIP, make_sample

    monkeypatch.setattr(module.comm, "get_world_size", lambda: processes)
    samples = [make_sample(FLIP, seed=i) for i in range(5)]
    labels = [ground_truth([[4, 5, 20, 30 + i]], [i % 3]) for i in range(5)]
    observed = make_method().observe(LabelingInputs(None, None, samples), labels)
    assert len(observed) == len(kept)
    for entry, i in zip(observed, kept, strict=True):
        assert torch.equal(entry["image"], samples[i].strong.image)
        assert entry["boxes"].tolist() == [[44, 5, 60, 30 + i]]
        assert entry["classes"].tolist() == [i % 3]
    assert isinstance(labels[0].gt_boxes, Boxes)
