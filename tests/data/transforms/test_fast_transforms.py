"""Fast arithmetic on pixels gives what Detectron2's transforms give, and keeps what they record."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from numpy.testing import assert_array_equal
from PIL import Image

from locreweight.data.transforms.augmentations import (
    AffineTransform,
    ColorJitter,
    RandomGeometricOperation,
)
from locreweight.data.transforms.fast_transforms import (
    FastAugInput,
    channels_first,
    resize_bilinear,
)
from tests.data.transforms.test_color_ops import smooth

SIZES = [(90, 120), (45, 60), (44, 61), (200, 267), (91, 119), (30, 300), (300, 30), (1, 1), (7, 5)]


def noise(height=90, width=120):
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("image", [smooth(90, 120), noise()], ids=["smooth", "noise"])
def test_resizing_is_within_one_of_pillows(image, size):
    expected = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    found = resize_bilinear(image, *size)
    assert (found.dtype, found.shape) == (np.uint8, (*size, 3))
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1


def test_shrinking_averages_what_it_leaves_out():
    """Where every second pixel is white; a filter of two pixels sees white or black alone."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    middle = resize_bilinear(stripes, 16, 16)[4:-4, 4:-4]
    assert np.abs(middle.astype(int) - 127).max() <= 1


def test_what_may_not_be_written_to_is_resized_and_kept():
    image = noise()
    image.flags.writeable = False
    before = image.copy()
    assert_array_equal(resize_bilinear(image, 40, 50), resize_bilinear(before, 40, 50))
    assert_array_equal(image, before)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "augmentations",
    [
        [T.ResizeShortestEdge((40, 200), 300, "range"), T.RandomFlip()],
        [T.RandomFlip(horizontal=False, vertical=True), T.RandomCrop("relative", (0.5, 0.5))],
        [T.ResizeScale(0.5, 2.0, 80, 80), T.RandomExtent((0.7, 1.3), (0.1, 0.1))],
        [T.ResizeShortestEdge(50), RandomGeometricOperation((1.0, 2.0, 3.0)), T.RandomFlip()],
    ],
)
def test_a_list_of_augmentations_does_and_records_as_with_detectron2(augmentations, seed):
    ends = []
    for kind in (T.AugInput, FastAugInput):
        np.random.seed(seed)
        given = kind(smooth(90, 120))
        ends.append((given, T.AugmentationList(augmentations)(given)))
    (theirs, recorded), (ours, recorded_too) = ends
    # Two roundings, of the resize and of the warp.
    assert np.abs(ours.image.astype(int) - theirs.image).max() <= 2
    assert [type(t) for t in recorded.transforms] == [type(t) for t in recorded_too.transforms]
    points = np.random.uniform(0, 100, (9, 2))
    assert_array_equal(
        recorded.apply_coords(points.copy()), recorded_too.apply_coords(points.copy())
    )


def test_views_of_one_size_share_the_resized_image_and_nothing_else():
    image, shared = noise(), {}
    first, second, third = (FastAugInput(image, shared) for _ in range(3))
    for view, size in ((first, (45, 60)), (second, (45, 60)), (third, (50, 60))):
        view.transform(T.ResizeTransform(90, 120, *size))
    assert np.shares_memory(first.image, second.image)
    assert third.image.shape == (50, 60, 3)
    first.transform(T.HFlipTransform(60))
    first.transform(T.ResizeTransform(45, 60, 50, 60))  # of another image: not the shared one
    assert_array_equal(second.image, resize_bilinear(image, 45, 60))
    assert_array_equal(
        first.image, resize_bilinear(resize_bilinear(image, 45, 60)[:, ::-1], 50, 60)
    )
    assert set(shared) == {(45, 60), (50, 60)}


def test_what_views_share_cannot_be_written_to():
    given = FastAugInput(noise())
    for _ in range(2):
        with pytest.raises(ValueError, match="read-only"):
            given.image[:] = 0
        given.transform(T.ResizeTransform(90, 120, 45, 60))


def test_other_filters_stay_detectron2s():
    image = noise()
    nearest = T.ResizeTransform(90, 120, 45, 70, Image.Resampling.NEAREST)
    given = FastAugInput(image)
    given.transform(nearest)
    assert_array_equal(given.image, nearest.apply_image(image))


def test_a_derived_transform_does_what_it_says():
    class White(T.HFlipTransform):
        def apply_image(self, img):
            return img * 0 + 255

    given = FastAugInput(noise())
    given.transform(White(120))
    assert (given.image == 255).all()


def test_augmentations_that_record_several_transforms_do_them_all():
    np.random.seed(0)
    several = ColorJitter().get_transform(noise())
    given = FastAugInput(noise())
    given.transform(several)
    assert_array_equal(given.image, several.apply_image(noise()))


@pytest.mark.parametrize("size", [(4, 5), (1, 1), (1, 7), (7, 1)])
def test_channels_come_first_in_the_order_of_the_model(size):
    image = noise(*size)
    red, green, blue = (torch.from_numpy(image[:, :, c].copy()) for c in range(3))
    assert torch.equal(channels_first(image, "RGB"), torch.stack([red, green, blue]))
    assert torch.equal(channels_first(image, "BGR"), torch.stack([blue, green, red]))
    turned = image[::-1, ::-1]
    assert torch.equal(
        channels_first(turned, "RGB"), torch.from_numpy(turned.copy()).permute(2, 0, 1)
    )


def test_a_flip_and_an_affine_transform_are_exact_together():
    image = noise()
    given = FastAugInput(image)
    mirror = np.array([[-1, 0, 120], [0, 1, 0], [0, 0, 1]])
    given.transform(T.TransformList([T.HFlipTransform(120), AffineTransform(mirror, (0, 0, 0))]))
    assert_array_equal(given.image, image)
