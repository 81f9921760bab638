"""Fast pixel operations give the same results as Detectron2's transforms and Pillow."""

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
def test_resize_bilinear_is_within_one_level_of_pillow(image, size):
    expected = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    resized = resize_bilinear(image, *size)
    assert (resized.dtype, resized.shape) == (np.uint8, (*size, 3))
    assert np.abs(resized.astype(int) - np.asarray(expected)).max() <= 1


def test_resize_bilinear_is_antialiased():
    """Every second column is white. A filter without antialiasing would return white or black."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    middle = resize_bilinear(stripes, 16, 16)[4:-4, 4:-4]
    assert np.abs(middle.astype(int) - 127).max() <= 1


def test_resize_bilinear_accepts_read_only_images():
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
def test_fast_aug_input_equals_aug_input(augmentations, seed):
    results = []
    for kind in (T.AugInput, FastAugInput):
        np.random.seed(seed)
        augmented = kind(smooth(90, 120))
        results.append((augmented, T.AugmentationList(augmentations)(augmented)))
    (theirs, their_transforms), (ours, our_transforms) = results
    # Resizing and warping each round.
    assert np.abs(ours.image.astype(int) - theirs.image).max() <= 2
    assert [type(t) for t in their_transforms.transforms] == [
        type(t) for t in our_transforms.transforms
    ]
    points = np.random.uniform(0, 100, (9, 2))
    assert_array_equal(
        their_transforms.apply_coords(points.copy()), our_transforms.apply_coords(points.copy())
    )


def test_resize_cache_shares_resized_images_of_one_size():
    image, cache = noise(), {}
    first, second, third = (FastAugInput(image, cache) for _ in range(3))
    for view, size in ((first, (45, 60)), (second, (45, 60)), (third, (50, 60))):
        view.transform(T.ResizeTransform(90, 120, *size))
    assert np.shares_memory(first.image, second.image)
    assert third.image.shape == (50, 60, 3)
    first.transform(T.HFlipTransform(60))
    first.transform(T.ResizeTransform(45, 60, 50, 60))  # of a flipped image: not from the cache
    assert_array_equal(second.image, resize_bilinear(image, 45, 60))
    assert_array_equal(
        first.image, resize_bilinear(resize_bilinear(image, 45, 60)[:, ::-1], 50, 60)
    )
    assert set(cache) == {(45, 60), (50, 60)}


def test_shared_images_are_read_only():
    augmented = FastAugInput(noise())
    for _ in range(2):
        with pytest.raises(ValueError, match="read-only"):
            augmented.image[:] = 0
        augmented.transform(T.ResizeTransform(90, 120, 45, 60))


def test_other_resize_filters_are_unchanged():
    image = noise()
    nearest = T.ResizeTransform(90, 120, 45, 70, Image.Resampling.NEAREST)
    augmented = FastAugInput(image)
    augmented.transform(nearest)
    assert_array_equal(augmented.image, nearest.apply_image(image))


def test_subclasses_of_transforms_are_applied_themselves():
    class White(T.HFlipTransform):
        def apply_image(self, img):
            return img * 0 + 255

    augmented = FastAugInput(noise())
    augmented.transform(White(120))
    assert (augmented.image == 255).all()


def test_transform_lists_are_applied_completely():
    np.random.seed(0)
    several = ColorJitter().get_transform(noise())
    augmented = FastAugInput(noise())
    augmented.transform(several)
    assert_array_equal(augmented.image, several.apply_image(noise()))


@pytest.mark.parametrize("size", [(4, 5), (1, 1), (1, 7), (7, 1)])
def test_channels_first_orders_channels(size):
    image = noise(*size)
    red, green, blue = (torch.from_numpy(image[:, :, c].copy()) for c in range(3))
    assert torch.equal(channels_first(image, "RGB"), torch.stack([red, green, blue]))
    assert torch.equal(channels_first(image, "BGR"), torch.stack([blue, green, red]))
    turned = image[::-1, ::-1]
    assert torch.equal(
        channels_first(turned, "RGB"), torch.from_numpy(turned.copy()).permute(2, 0, 1)
    )


def test_flip_and_mirroring_affine_transform_cancel():
    image = noise()
    augmented = FastAugInput(image)
    mirror = np.array([[-1, 0, 120], [0, 1, 0], [0, 0, 1]])
    augmented.transform(
        T.TransformList([T.HFlipTransform(120), AffineTransform(mirror, (0, 0, 0))])
    )
    assert_array_equal(augmented.image, image)
