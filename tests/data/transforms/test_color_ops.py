"""Color operations on arrays equal Pillow's, at every strength that policies draw."""

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from locreweight.data.transforms import color_ops

FACTORS = np.linspace(0, 2, 81)


def generator():
    return np.random.default_rng(0)


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9 + c) * np.cos(y / 13 - c) for c in range(3)]
    return np.round(127.5 + 100 * np.stack(waves, axis=2)).astype(np.uint8)


IMAGES = {
    "smooth": smooth(90, 120),
    "noise": generator().integers(0, 256, (90, 121, 3), dtype=np.uint8),
    "narrow range": generator().integers(90, 110, (60, 50, 3), dtype=np.uint8),
    "extremes": generator().choice(np.array([0, 255], np.uint8), (40, 40, 3)),
    "uniform": np.full((30, 30, 3), (200, 100, 50), np.uint8),
    "3x5": generator().integers(0, 256, (3, 5, 3), dtype=np.uint8),
    "1x40": generator().integers(0, 256, (1, 40, 3), dtype=np.uint8),
    "2x1": generator().integers(0, 256, (2, 1, 3), dtype=np.uint8),
    "1x1": np.array([[[1, 2, 3]]], np.uint8),
}
all_images = pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES.keys())


def every_color():
    """Return an image that has each of the 2 ** 24 colors once."""
    numbers = np.arange(1 << 24, dtype=np.uint32).reshape(4096, 4096)
    return np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16], axis=2).astype(np.uint8)


def max_difference(image, expected):
    """Return the largest absolute difference from a Pillow image."""
    return cv2.absdiff(image, np.asarray(expected)).max()


@all_images
def test_brightness_equals_pillow(image):
    enhancer = ImageEnhance.Brightness(Image.fromarray(image))
    for factor in FACTORS:
        assert max_difference(color_ops.brightness(image, factor), enhancer.enhance(factor)) == 0


@all_images
@pytest.mark.parametrize(
    ("operation", "pillow_enhancer"),
    [
        (color_ops.contrast, ImageEnhance.Contrast),
        (color_ops.saturation, ImageEnhance.Color),
        (color_ops.sharpness, ImageEnhance.Sharpness),
    ],
)
def test_enhancements_are_within_one_level_of_pillow(image, operation, pillow_enhancer):
    enhancer = pillow_enhancer(Image.fromarray(image))
    for factor in FACTORS:
        assert max_difference(operation(image, factor), enhancer.enhance(factor)) <= 1


@all_images
@pytest.mark.parametrize(
    "operation", [color_ops.contrast, color_ops.saturation, color_ops.sharpness]
)
def test_enhancements_by_factor_one_change_nothing(image, operation):
    assert max_difference(operation(image, 1.0), image) == 0


@all_images
def test_lookup_tables_equal_pillow(image):
    pillow_image = Image.fromarray(image)
    for threshold in range(257):
        expected = ImageOps.solarize(pillow_image, threshold)
        assert max_difference(color_ops.solarize(image, threshold), expected) == 0
    for bits in range(1, 9):
        assert (
            max_difference(color_ops.posterize(image, bits), ImageOps.posterize(pillow_image, bits))
            == 0
        )
    assert max_difference(color_ops.autocontrast(image), ImageOps.autocontrast(pillow_image)) == 0
    assert max_difference(color_ops.equalize(image), ImageOps.equalize(pillow_image)) == 0


@pytest.mark.parametrize("seed", range(20))
def test_equalize_equals_pillow_for_random_histograms(seed):
    rng = np.random.default_rng(seed)
    values = rng.choice(256, size=rng.integers(1, 40), replace=False).astype(np.uint8)
    weights = rng.dirichlet(np.full(len(values), 0.3))
    image = rng.choice(values, size=(31, 45, 3), p=weights)
    assert max_difference(color_ops.equalize(image), ImageOps.equalize(Image.fromarray(image))) == 0
    assert (
        max_difference(color_ops.autocontrast(image), ImageOps.autocontrast(Image.fromarray(image)))
        == 0
    )


def test_grayscale_and_saturation_of_every_color_are_within_one_level_of_pillow():
    image = every_color()
    pillow_image = Image.fromarray(image)
    assert max_difference(color_ops.grayscale(image), pillow_image.convert("L").convert("RGB")) <= 1
    enhancer = ImageEnhance.Color(pillow_image)
    for factor in (0.1, 0.7, 1.9):
        assert max_difference(color_ops.saturation(image, factor), enhancer.enhance(factor)) <= 1


def test_enhancements_have_the_mean_brightness_of_pillow():
    """A mean difference of half a level would mean that one truncates and the other rounds."""
    image = IMAGES["noise"]
    for operation, pillow_enhancer in (
        (color_ops.saturation, ImageEnhance.Color),
        (color_ops.sharpness, ImageEnhance.Sharpness),
    ):
        # Factors without special fractions: at 0.5, Pillow truncates 0 or 0.5 only.
        for factor in (0.137, 0.513, 1.487, 1.871):
            expected = np.asarray(pillow_enhancer(Image.fromarray(image)).enhance(factor), float)
            assert abs(operation(image, factor).mean() - expected.mean()) < 0.15


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        ((0, 0, 0), (255, 0, 0)),
        ((60, 0, 0), (0, 255, 0)),
        ((-60, 0, 0), (0, 0, 255)),
        ((0, 0, -55), (200, 0, 0)),
        ((0, -255, 0), (255, 255, 255)),
        ((0, 99, 99), (255, 0, 0)),  # clipped
    ],
)
def test_hsv_is_shifted(shift, expected):
    red = np.full((4, 4, 3), (255, 0, 0), dtype=np.uint8)
    assert color_ops.shift_hsv(red, *shift)[0, 0].tolist() == list(expected)


def test_jpeg_keeps_channels_and_loses_more_with_a_lower_quality():
    image = cv2.GaussianBlur(IMAGES["noise"], (0, 0), 3)
    high, low = (color_ops.jpeg(image, quality).astype(float) for quality in (95, 30))
    assert abs(high - image).mean() < 2 < abs(low - image).mean() < 10
    assert abs(low.mean(axis=(0, 1)) - image.mean(axis=(0, 1))).max() < 1.5
