"""Augmentations: effect on known pixels, channel order, dtype and shape."""

import itertools

import numpy as np
import pytest
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from locreweight.data.mapper import ViewMapper
from locreweight.data.transforms.augmentations import (
    AffineTransform,
    ColorJitter,
    Cutout,
    EraseTransform,
    GaussianBlur,
    Grayscale,
    PhotometricOperations,
    RandomColorOperation,
    RandomErasing,
)
from locreweight.data.transforms.policies import AugmentationPolicy

SIDE = 24
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
# Luminance of ITU-R 601: 0.299 R + 0.587 G + 0.114 B.
LUMINANCE = {RED: 76, GREEN: 150, BLUE: 29}
# Index of each operation in RandomColorOperation.
(IDENTITY, AUTOCONTRAST, EQUALIZE, SOLARIZE, POSTERIZE, COLOR, CONTRAST, BRIGHTNESS, SHARPNESS) = (
    range(9)
)
both_channel_orders = pytest.mark.parametrize("order", ["RGB", "BGR"])


def uniform_image(color):
    return np.full((SIDE, SIDE, 3), color, dtype=np.uint8)


def noise(height=SIDE, width=SIDE):
    return np.random.randint(0, 256, (height, width, 3), dtype=np.uint8)


def apply(augmentation, image):
    given = T.AugInput(image)
    augmentation(given)
    return given.image


def color_of(image):
    """Return the color of a uniform image, an (H, W, 3) array or a (3, H, W) tensor."""
    rows = image.reshape(-1, 3) if isinstance(image, np.ndarray) else image.flatten(1).T.numpy()
    assert (rows == rows[0]).all()
    return tuple(int(value) for value in rows[0])


@pytest.fixture
def operation(monkeypatch):
    """Make RandomColorOperation apply operation ``index`` with a given strength."""

    def make(index, strength=1.0):
        monkeypatch.setattr(np.random, "randint", lambda count: index)
        monkeypatch.setattr(np.random, "uniform", lambda low, high: strength)
        return RandomColorOperation()

    return make


@pytest.fixture
def jitter(monkeypatch):
    """Make ColorJitter use given factors, in the order brightness, contrast, saturation, hue."""

    def make(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0):
        def uniform(low, high, size=None):
            return hue if size is None else np.array([brightness, contrast, saturation])

        monkeypatch.setattr(np.random, "uniform", uniform)
        monkeypatch.setattr(np.random, "permutation", lambda count: range(count))
        return ColorJitter()

    return make


def views_of(mapper, file):
    box = {"bbox": [2, 2, 20, 20], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"file_name": str(file), "height": SIDE, "width": SIDE, "annotations": [box]}
    sample = mapper.unlabeled(record)
    labeled = [x["image"] for x in mapper.labeled(record)]
    return [sample.weak.image, sample.strong.image, *labeled]


@both_channel_orders
@pytest.mark.parametrize("color", [RED, BLUE])
@pytest.mark.parametrize("strong_on_weak", [False, True])
def test_views_have_the_channel_order_of_the_model(order, color, strong_on_weak, tmp_path):
    Image.fromarray(uniform_image(color)).save(tmp_path / "image.png")
    identity = [T.NoOpTransform()]
    policy = AugmentationPolicy([identity, identity], identity, identity, strong_on_weak)
    expected = color if order == "RGB" else color[::-1]
    views = views_of(ViewMapper(policy=policy, image_format=order), tmp_path / "image.png")
    assert [color_of(view) for view in views] == [expected] * 4


@both_channel_orders
def test_augmentations_receive_rgb(order, tmp_path):
    colors = []

    class RecordColor(T.Augmentation):
        def get_transform(self, image):
            colors.append(color_of(image))
            return T.NoOpTransform()

    Image.fromarray(uniform_image((1, 2, 3))).save(tmp_path / "image.png")
    policy = AugmentationPolicy([[RecordColor()]], [RecordColor()], [RecordColor()])
    views_of(ViewMapper(policy=policy, image_format=order), tmp_path / "image.png")
    assert colors == [(1, 2, 3)] * 3


@pytest.mark.parametrize("index", range(9))
@pytest.mark.parametrize("strength", [0.1, 1.0, 1.9])
def test_color_operations_keep_dtype_and_shape(operation, index, strength):
    image = noise()
    before = image.copy()
    changed = apply(operation(index, strength), image)
    assert changed.dtype == np.uint8
    assert changed.shape == image.shape
    assert_array_equal(image, before)


@pytest.mark.parametrize("index", [IDENTITY, COLOR, CONTRAST, BRIGHTNESS, SHARPNESS])
def test_color_operations_of_strength_one_change_nothing(operation, index):
    image = noise()
    assert_array_equal(apply(operation(index, 1.0), image), image)


@pytest.mark.parametrize(
    ("index", "strength", "color", "expected"),
    [
        # Values from the threshold 128 * strength on are inverted.
        (SOLARIZE, 1.0, (127, 128, 200), (127, 127, 55)),
        (SOLARIZE, 0.5, (63, 64, 200), (63, 191, 55)),
        # 4 + int(2 * strength) bits are kept: 4, 6 and 7.
        (POSTERIZE, 0.1, (255, 37, 15), (240, 32, 0)),
        (POSTERIZE, 1.0, (255, 37, 3), (252, 36, 0)),
        (POSTERIZE, 1.9, (255, 37, 1), (254, 36, 0)),
        # Mean of color and luminance: 0.5 * 255 + 0.5 * 76, and so on.
        (COLOR, 0.5, RED, (165, 38, 38)),
        (COLOR, 0.5, BLUE, (14, 14, 142)),
        (BRIGHTNESS, 0.5, (200, 100, 50), (100, 50, 25)),
        (BRIGHTNESS, 1.9, (200, 100, 50), (255, 190, 95)),
        # Mean of color and mean luminance, 76.
        (CONTRAST, 0.5, RED, (165, 38, 38)),
        (SHARPNESS, 1.9, (200, 100, 50), (200, 100, 50)),
    ],
)
def test_color_operations_on_known_colors(operation, index, strength, color, expected):
    changed = apply(operation(index, strength), uniform_image(color))
    assert_allclose(color_of(changed), expected, atol=1)


def test_autocontrast_stretches_each_channel(operation):
    image = uniform_image((0, 0, 0))
    image[:, 0] = (100, 50, 0)
    image[:, 1:] = (150, 60, 255)
    changed = apply(operation(AUTOCONTRAST), image)
    assert_array_equal(changed[:, 0], np.zeros((SIDE, 3)))
    assert_array_equal(changed[0, 1:], np.full((SIDE - 1, 3), 255))


def test_equalize_spreads_values(operation):
    image = np.repeat(np.random.randint(100, 130, (64, 64, 1), dtype=np.uint8), 3, axis=2)
    assert np.ptp(apply(operation(EQUALIZE), image)) > 240


def test_random_color_operation_draws_all_operations_and_strengths(monkeypatch):
    drawn = []
    monkeypatch.setattr(T, "ColorTransform", drawn.append)
    image = noise()
    for _ in range(120):
        RandomColorOperation().get_transform(image)
    assert len({operation.__code__ for operation in drawn}) == 9
    assert len({operation(image).tobytes() for operation in drawn}) > 50


@pytest.mark.parametrize(("color", "luminance"), LUMINANCE.items())
def test_grayscale_is_the_luminance(color, luminance):
    assert color_of(apply(Grayscale(), uniform_image(color))) == (luminance,) * 3


@pytest.mark.parametrize(("color", "luminance"), LUMINANCE.items())
def test_jitter_with_zero_saturation_is_the_luminance(jitter, color, luminance):
    assert color_of(apply(jitter(saturation=0.0), uniform_image(color))) == (luminance,) * 3


@pytest.mark.parametrize(("hue", "expected"), [(1 / 3, GREEN), (-1 / 3, BLUE)])
def test_jitter_hue_shifts_red_to_green_and_blue(jitter, hue, expected):
    # Pillow's hue has 256 steps, which a third does not divide.
    assert_allclose(color_of(apply(jitter(hue=hue), uniform_image(RED))), expected, atol=6)


def test_jitter_brightness_and_contrast(jitter):
    assert_allclose(
        color_of(apply(jitter(brightness=0.6), uniform_image((200, 100, 50)))),
        (120, 60, 30),
        atol=1,
    )
    halves = uniform_image((100, 100, 100))
    halves[:, SIDE // 2 :] = 200
    changed = apply(jitter(contrast=0.5), halves)  # half the distance to the mean, 150
    assert_allclose(changed[0, [0, -1], 0], [125, 175], atol=1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "augmentation",
    [
        *(ColorJitter(), Grayscale(), GaussianBlur(), RandomErasing((1.0, 2.0, 3.0))),
        *(PhotometricOperations(prob=1.0), Cutout()),
    ],
    ids=lambda augmentation: type(augmentation).__name__,
)
def test_appearance_augmentations_keep_dtype_shape_and_input(augmentation, seed):
    np.random.seed(seed)
    image = noise(30, 20)
    before = image.copy()
    changed = apply(augmentation, image)
    assert changed.dtype == np.uint8
    assert changed.shape == image.shape
    assert_array_equal(image, before)


def test_jitter_is_random():
    image = noise()
    first, second = (apply(ColorJitter(), image) for _ in range(2))
    assert not np.array_equal(first, image)
    assert not np.array_equal(first, second)


def test_blur_keeps_uniform_images_and_smooths_noise():
    assert color_of(apply(GaussianBlur(2.0, 2.0), uniform_image((9, 99, 199)))) == (9, 99, 199)
    image = noise()
    weak, strong = (apply(GaussianBlur(sigma, sigma), image) for sigma in (0.5, 2.0))
    assert image.std() > weak.std() > strong.std()
    assert abs(strong.mean() - image.mean()) < 3


def test_photometric_operations_are_each_used_with_the_probability():
    used = [
        len(PhotometricOperations(prob=0.2).get_transform(noise()).transforms) for _ in range(1500)
    ]
    assert abs(np.mean(used) - 1.0) < 0.08
    assert_array_equal(apply(PhotometricOperations(prob=0.0), noise_ := noise()), noise_)


@pytest.mark.parametrize("place", range(5))
def test_photometric_operations_stay_in_their_ranges(place):
    """Of a uniform image: brighter, shifted, compressed, permuted, blurred."""
    color = (100, 120, 140)
    seen = set()
    for _ in range(100):
        operation = PhotometricOperations(prob=1.0).get_transform(noise()).transforms[place]
        seen.add(color_of(operation.apply_image(uniform_image(color))))
    changes = np.array(sorted(seen)) - color
    if place == 0:  # 100 -> at least 1.1 * 100 + 25.5, at most 1.3 * 100 + 76.5
        assert (changes[:, 0] >= 35).all() and (changes[:, 0] <= 107).all()
    elif place == 1:
        assert abs(changes).max() <= 75 and len(seen) > 50  # hue and saturation change most
    elif place == 3:
        assert seen == set(itertools.permutations(color))
    else:
        assert abs(changes).max() <= 2


class TestCutout:
    def test_squares_are_black_and_cut_off_at_the_border(self):
        image = uniform_image((200, 100, 50))
        for _ in range(50):
            erased = apply(Cutout(holes=1, side=8), image)
            black = (erased == 0).all(axis=2)
            rows, columns = np.flatnonzero(black.any(axis=1)), np.flatnonzero(black.any(axis=0))
            assert black.sum() == len(rows) * len(columns)  # a rectangle
            for side in (rows, columns):
                at_border = side[0] == 0 or side[-1] == SIDE - 1
                assert len(side) == 8 or (at_border and 4 <= len(side) < 8)

    def test_number_of_squares(self):
        assert len(Cutout(holes=3).get_transform(noise()).patches) == 3

    @pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
    def test_accepts_images_of_any_size(self, size):
        assert apply(Cutout(), noise(*size)).shape == (*size, 3)


class TestErasing:
    def test_fills_patches_and_keeps_other_pixels(self):
        image, patches, fill = noise(), [(1, 2, 5, 9), (10, 10, 24, 24)], (9.0, 99.0, 199.0)
        erased = EraseTransform(patches, fill).apply_image(image)
        inside = np.zeros((SIDE, SIDE), bool)
        inside[2:9, 1:5] = inside[10:24, 10:24] = True
        assert (erased[inside] == fill).all()
        assert_array_equal(erased[~inside], image[~inside])

    def test_fill_color_equals_that_of_affine_transforms(self):
        fill = (123.675, 116.28, 103.53)
        erased = EraseTransform([(0, 0, 4, 4)], fill).apply_image(noise())
        outside = np.array([[1, 0, 9 * SIDE], [0, 1, 0], [0, 0, 1]])
        moved = AffineTransform(outside, fill).apply_image(noise())
        assert tuple(erased[0, 0]) == tuple(moved[0, 0]) == (124, 116, 104)

    def test_keeps_coordinates_and_segmentations(self):
        transform = EraseTransform([(0, 0, 9, 9)], RED)
        points, labels = np.random.rand(5, 2) * SIDE, noise()[..., 0]
        assert_array_equal(transform.apply_coords(points.copy()), points)
        assert_array_equal(transform.apply_segmentation(labels.copy()), labels)

    @pytest.mark.parametrize(
        ("patches", "area", "aspect"),
        [((1, 4), (0.0, 0.04), (1.0, 1.0)), ((1, 1), (0.05, 0.2), (0.3, 3.3))],
    )
    def test_number_area_and_aspect_ratio_of_patches(self, patches, area, aspect):
        erasing = RandomErasing(RED, patches, area, aspect)
        height, width = 300, 400
        drawn = [erasing.get_transform(noise(height, width)).patches for _ in range(100)]
        assert {len(patches_of_draw) for patches_of_draw in drawn} == set(
            range(patches[0], patches[1] + 1)
        )
        x1, y1, x2, y2 = np.array(
            [patch for patches_of_draw in drawn for patch in patches_of_draw]
        ).T
        assert min(x1.min(), y1.min()) >= 0
        assert x2.max() <= width
        assert y2.max() <= height
        areas = (x2 - x1) * (y2 - y1) / (height * width)
        assert area[0] * 0.95 <= areas.min() < areas.max() <= area[1] * 1.05
        large = (x2 - x1 > 30) & (y2 - y1 > 30)  # rounding changes the ratio of small ones
        ratios = (y2 - y1)[large] / (x2 - x1)[large]
        assert aspect[0] * 0.95 <= ratios.min() <= ratios.max() <= aspect[1] * 1.05
        if aspect[0] < aspect[1]:
            assert ratios.min() < 0.6 < 1.7 < ratios.max()

    @pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3)])
    def test_accepts_images_of_any_size(self, size):
        for _ in range(20):
            apply(RandomErasing(RED, (4, 4), (0.02, 0.2), (0.05, 8.0)), noise(*size))
