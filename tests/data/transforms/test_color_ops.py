"""Color operations on arrays are Pillow's, at every strength that recipes draw."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from locreweight.data.transforms import color_ops as colors

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
    "plain": np.full((30, 30, 3), (200, 100, 50), np.uint8),
    "few pixels": generator().integers(0, 256, (3, 5, 3), dtype=np.uint8),
    "a row": generator().integers(0, 256, (1, 40, 3), dtype=np.uint8),
    "a column of two": generator().integers(0, 256, (2, 1, 3), dtype=np.uint8),
    "one pixel": np.array([[[1, 2, 3]]], np.uint8),
}
each_image = pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES.keys())


def every_color():
    """Each of the 2 ** 24 colors once."""
    numbers = np.arange(1 << 24, dtype=np.uint32).reshape(4096, 4096)
    return np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16], axis=2).astype(np.uint8)


def farthest(found, expected):
    """Greatest difference to an image of Pillow's."""
    return np.abs(found.astype(int) - np.asarray(expected)).max()


@each_image
@pytest.mark.parametrize("factor", FACTORS)
def test_brightness_is_pillows_to_the_bit(image, factor):
    expected = ImageEnhance.Brightness(Image.fromarray(image)).enhance(factor)
    assert farthest(colors.brightness(image, factor), expected) == 0


@each_image
@pytest.mark.parametrize(
    ("ours", "pillows"),
    [
        (colors.contrast, ImageEnhance.Contrast),
        (colors.saturation, ImageEnhance.Color),
        (colors.sharpness, ImageEnhance.Sharpness),
    ],
)
def test_other_enhancements_are_within_one_of_pillows(image, ours, pillows):
    enhanced = pillows(Image.fromarray(image))
    for factor in FACTORS:
        assert farthest(ours(image, factor), enhanced.enhance(factor)) <= 1


@each_image
@pytest.mark.parametrize("operation", [colors.contrast, colors.saturation, colors.sharpness])
def test_an_enhancement_by_one_changes_nothing(image, operation):
    assert farthest(operation(image, 1.0), image) == 0


@each_image
def test_tables_are_pillows_to_the_bit(image):
    given = Image.fromarray(image)
    for threshold in range(257):
        expected = ImageOps.solarize(given, threshold)
        assert farthest(colors.solarize(image, threshold), expected) == 0
    for bits in range(1, 9):
        assert farthest(colors.posterize(image, bits), ImageOps.posterize(given, bits)) == 0
    assert farthest(colors.autocontrast(image), ImageOps.autocontrast(given)) == 0
    assert farthest(colors.equalize(image), ImageOps.equalize(given)) == 0


@pytest.mark.parametrize("seed", range(20))
def test_equalize_is_pillows_whatever_the_frequencies(seed):
    draw = np.random.default_rng(seed)
    values = draw.choice(256, size=draw.integers(1, 40), replace=False).astype(np.uint8)
    weights = draw.dirichlet(np.full(len(values), 0.3))
    image = draw.choice(values, size=(31, 45, 3), p=weights)
    assert farthest(colors.equalize(image), ImageOps.equalize(Image.fromarray(image))) == 0
    assert farthest(colors.autocontrast(image), ImageOps.autocontrast(Image.fromarray(image))) == 0


def test_grey_and_saturation_of_every_color_are_within_one_of_pillows():
    image = every_color()
    given = Image.fromarray(image)
    assert farthest(colors.grayscale(image), given.convert("L").convert("RGB")) <= 1
    enhanced = ImageEnhance.Color(given)
    for factor in (0.1, 0.7, 1.9):
        assert farthest(colors.saturation(image, factor), enhanced.enhance(factor)) <= 1


def test_no_enhancement_makes_images_darker_or_brighter_than_pillows():
    """Differences of one are rounding. Half a level would mean that only one of us cuts off."""
    image = IMAGES["noise"]
    for ours, pillows in (
        (colors.saturation, ImageEnhance.Color),
        (colors.sharpness, ImageEnhance.Sharpness),
    ):
        # As drawn ones: at 0.5, for one, Pillow cuts off 0 or 0.5, half as much as on average.
        for factor in (0.137, 0.513, 1.487, 1.871):
            expected = np.asarray(pillows(Image.fromarray(image)).enhance(factor), float)
            assert abs(ours(image, factor).mean() - expected.mean()) < 0.15
