"""The matrix of a view maps image content to where it is in the view."""

import dataclasses

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from locreweight.config import load_config
from locreweight.data.image_io import UnreadableImage
from locreweight.data.mapper import ViewMapper
from locreweight.data.transforms.augmentations import (
    AffineTransform,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    RandomColorOperation,
    RandomErasing,
    RandomGeometricOperation,
)
from locreweight.data.transforms.policies import AugmentationPolicy, build_augmentation_policy
from locreweight.data.transforms.views import View, affine_matrix

HEIGHT, WIDTH = SIZE = (90, 120)
BLACK = (0, 0, 0)
POLICIES = ["SoftTeacherPolicy", "UnbiasedTeacherPolicy"]
AUGMENTATIONS = {
    "resize": T.ResizeShortestEdge((40, 150), 200, "range"),
    "flip in x": T.RandomFlip(1.0),
    "flip in y": T.RandomFlip(1.0, horizontal=False, vertical=True),
    "crop": T.RandomCrop("relative_range", (0.5, 0.5)),
    "rotation": T.RandomRotation([-40, 40]),
    "extent": T.RandomExtent((0.7, 1.3), (0.1, 0.1)),
    "geometry": RandomGeometricOperation(BLACK),
    "color": RandomColorOperation(),
    "jitter": ColorJitter(),
    "gray": Grayscale(),
    "blur": GaussianBlur(),
    "erasing": RandomErasing(BLACK),
    "none": T.NoOpTransform(),
}
MOVES_PIXELS = ("resize", "flip in x", "flip in y", "geometry")
eight_seeds = pytest.mark.parametrize("seed", range(8))


def config(policy, *options):
    sizes = ["INPUT.MIN_SIZE_TRAIN", "(60, 140)", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"]
    return load_config("", ["INPUT.AUGMENTATION_POLICY", policy, *sizes, *options])


def augmented(augmentations, image):
    given = T.AugInput(image)
    transforms = T.AugmentationList(augmentations)(given)
    return given.image, transforms


def noise(size=SIZE):
    return np.random.randint(0, 256, (*size, 3), dtype=np.uint8)


def mapped(matrix, points):
    matrix = np.asarray(matrix)
    return np.asarray(points) @ matrix[:2, :2].T + matrix[:2, 2]


def blob(x, y, sigma=3.0):
    """A black image with a bright spot at (x, y). The center of the first pixel is (0.5, 0.5)."""
    across, down = np.arange(WIDTH) + 0.5 - x, np.arange(HEIGHT) + 0.5 - y
    spot = np.exp(-(across[None] ** 2 + down[:, None] ** 2) / (2 * sigma**2))
    return np.repeat(np.round(250 * spot).astype(np.uint8)[..., None], 3, axis=2)


def brightness_center(image):
    weights = np.asarray(image, dtype=float).sum(axis=2)
    y, x = np.indices(weights.shape) + 0.5
    return np.array([(weights * x).sum(), (weights * y).sum()]) / weights.sum()


def assert_spot_is_at(image, point):
    # With the wrong convention for pixel centers, the error would be half a pixel.
    assert_allclose(brightness_center(image), point, atol=0.25)


@eight_seeds
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_matrix_of_an_augmentation_maps_coordinates(name, seed):
    np.random.seed(seed)
    _, transforms = augmented([AUGMENTATIONS[name]], noise())
    points = np.random.uniform(-50, 200, (20, 2))
    matrix = affine_matrix(transforms, SIZE)
    assert_allclose(mapped(matrix, points), transforms.apply_coords(points.copy()), atol=1e-3)


@eight_seeds
@pytest.mark.parametrize("view", ["weak", "strong", "labeled"])
@pytest.mark.parametrize("policy", POLICIES)
def test_matrix_of_a_policy_maps_coordinates(policy, view, seed):
    np.random.seed(seed)
    augmentations = getattr(build_augmentation_policy(config(policy)), view)
    for one_view in augmentations if view == "labeled" else [augmentations]:
        _, transforms = augmented(one_view, noise())
        points = np.random.uniform(-50, 200, (20, 2))
        matrix = affine_matrix(transforms, SIZE)
        assert_allclose(mapped(matrix, points), transforms.apply_coords(points.copy()), atol=1e-3)


@eight_seeds
@pytest.mark.parametrize("name", MOVES_PIXELS)
def test_matrix_of_an_augmentation_maps_image_content(name, seed):
    np.random.seed(seed)
    spot = np.random.uniform((45, 35), (75, 55))
    image, transforms = augmented([AUGMENTATIONS[name]], blob(*spot))
    assert_spot_is_at(image, mapped(affine_matrix(transforms, SIZE), spot))


@eight_seeds
@pytest.mark.parametrize("policy", POLICIES)
def test_matrices_of_both_views_map_image_content(policy, seed, tmp_path):
    np.random.seed(seed)
    spot = np.random.uniform((45, 35), (75, 55))
    file = tmp_path / "blob.png"
    Image.fromarray(blob(*spot)).save(file)
    whole = build_augmentation_policy(config(policy, "MODEL.PIXEL_MEAN", "(0.0, 0.0, 0.0)"))
    # Without color operations, which can turn black into white.
    moving = (T.ResizeShortestEdge, T.RandomFlip, RandomGeometricOperation)
    geometry = dataclasses.replace(
        whole,
        weak=[a for a in whole.weak if isinstance(a, moving)],
        strong=[a for a in whole.strong if isinstance(a, moving)],
    )
    sample = ViewMapper(policy=geometry, image_format="BGR").unlabeled({"file_name": str(file)})
    for view in (sample.weak, sample.strong):
        assert_spot_is_at(view.image.numpy().transpose(1, 2, 0), mapped(view.matrix, spot))


@eight_seeds
@pytest.mark.parametrize("policy", POLICIES)
def test_labeled_boxes_are_transformed_with_the_image(policy, seed, tmp_path):
    np.random.seed(seed)
    file, (x1, y1, x2, y2) = tmp_path / "box.png", (30, 20, 80, 70)
    image = np.zeros((*SIZE, 3), np.uint8)
    image[y1:y2, x1:x2] = 255
    Image.fromarray(image).save(file)
    record = {
        "file_name": str(file),
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": [
            {"bbox": [x1, y1, x2, y2], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 2}
        ],
    }
    # Weak augmentations only: color operations may make the box indistinguishable.
    weak = build_augmentation_policy(config(policy)).weak
    mapper = ViewMapper(policy=AugmentationPolicy([weak, weak], [], []), image_format="BGR")
    first, second = mapper.labeled(record)
    for sample in (first, second):
        rows, columns = np.nonzero(sample["image"][0].numpy() > 127)
        visible = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert_allclose(sample["instances"].gt_boxes.tensor[0], visible, atol=1)
        assert sample["instances"].gt_classes.tolist() == [2]
    assert first["image"].shape != second["image"].shape  # each view is drawn independently


@eight_seeds
def test_strong_on_weak_shares_the_geometry(seed, tmp_path):
    np.random.seed(seed)
    Image.fromarray(noise()).save(tmp_path / "image.png")
    mapper = ViewMapper(config("UnbiasedTeacherPolicy"))
    sample = mapper.unlabeled({"file_name": str(tmp_path / "image.png")})
    assert torch.equal(sample.weak.matrix, sample.strong.matrix)
    assert sample.weak.image_size == sample.strong.image_size


@eight_seeds
def test_strong_on_weak_composes_geometry(seed, tmp_path):
    np.random.seed(seed)
    spot = np.random.uniform((45, 35), (75, 55))
    Image.fromarray(blob(*spot)).save(tmp_path / "blob.png")
    weak = [T.ResizeShortestEdge(60), T.RandomFlip(1.0)]
    policy = AugmentationPolicy([[]], weak, [RandomGeometricOperation(BLACK)], strong_on_weak=True)
    mapper = ViewMapper(policy=policy, image_format="BGR")
    strong = mapper.unlabeled({"file_name": str(tmp_path / "blob.png")}).strong
    assert_spot_is_at(strong.image.numpy().transpose(1, 2, 0), mapped(strong.matrix, spot))


def test_view_has_uint8_image_and_float64_matrix(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "image.png")
    sample = ViewMapper(config("SoftTeacherPolicy")).unlabeled(
        {"file_name": str(tmp_path / "image.png")}
    )
    for view in (sample.weak, sample.strong):
        assert view.image.dtype == torch.uint8
        assert view.matrix.dtype == torch.float64
        assert view.image.shape == (3, *view.image_size)


def test_view_image_size_is_height_and_width():
    assert View(torch.zeros(3, 4, 5), torch.eye(3)).image_size == (4, 5)


class Perspective(T.Transform):
    def apply_image(self, img):
        return img

    def apply_coords(self, coords):
        return coords / (1 + 0.002 * coords[:, :1])


def test_non_affine_transform_is_an_error(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "image.png")
    policy = AugmentationPolicy(labeled=[[]], weak=[], strong=[Perspective()])
    with pytest.raises(ValueError, match=r"not affine.*Perspective") as caught:
        ViewMapper(policy=policy, image_format="RGB").unlabeled(
            {"file_name": str(tmp_path / "image.png")}
        )
    assert not isinstance(caught.value, UnreadableImage)  # those are skipped


class TestAffineTransform:
    def test_quarter_turn_is_exact(self):
        image = noise((31, 31))
        quarter = np.array([[0, -1, 31], [1, 0, 0], [0, 0, 1]])  # clockwise, y points down
        assert_array_equal(AffineTransform(quarter, BLACK).apply_image(image), np.rot90(image, -1))

    def test_mirror_is_exact(self):
        image = noise()
        mirror = np.array([[-1, 0, WIDTH], [0, 1, 0], [0, 0, 1]])
        assert_array_equal(AffineTransform(mirror, BLACK).apply_image(image), image[:, ::-1])

    @pytest.mark.parametrize(("x", "y"), [(7, 0), (0, 5), (3, 4)])
    def test_translation_by_whole_pixels_is_exact(self, x, y):
        image, fill = noise(), (10, 20, 30)
        matrix = np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])
        moved = AffineTransform(matrix, fill).apply_image(image)
        assert_array_equal(moved[y:, x:], image[: HEIGHT - y, : WIDTH - x])
        assert (moved[:y] == fill).all()
        assert (moved[:, :x] == fill).all()

    def test_segmentation_keeps_its_labels(self):
        labels = np.random.randint(0, 200, SIZE, dtype=np.uint8)
        turn = np.array([[0.8, -0.6, 20], [0.6, 0.8, -5], [0, 0, 1]])
        moved = AffineTransform(turn, BLACK).apply_segmentation(labels * 0 + 7)
        assert set(np.unique(moved)) == {0, 7}
        shift = np.array([[1, 0, 2], [0, 1, 0], [0, 0, 1]])
        moved = AffineTransform(shift, BLACK).apply_segmentation(labels)
        assert_array_equal(moved[:, 2:], labels[:, :-2])

    def test_inverse_maps_points_and_pixels_back(self):
        matrix = np.array([[1, 0.3, 4], [-0.2, 1.1, -7], [0, 0, 1]])
        transform = AffineTransform(matrix, BLACK)
        points = np.random.uniform(0, 100, (10, 2))
        back = transform.inverse().apply_coords(transform.apply_coords(points))
        assert_allclose(back, points, atol=1e-9)
        image = blob(60.2, 45.7)
        assert_spot_is_at(
            transform.inverse().apply_image(transform.apply_image(image)), (60.2, 45.7)
        )


class TestRandomGeometricOperation:
    def draws(self, **limits):
        geometry = RandomGeometricOperation(BLACK, **limits)
        return [geometry.get_transform(np.zeros((*SIZE, 3), np.uint8)).matrix for _ in range(150)]

    def kinds(self, matrices):
        linear = [m[:2, :2] for m in matrices]
        translation = [np.array_equal(part, np.eye(2)) for part in linear]
        rotation = [
            not still and np.allclose(part @ part.T, np.eye(2))
            for part, still in zip(linear, translation, strict=True)
        ]
        return np.array(translation), np.array(rotation)

    def test_draws_each_operation_equally_often(self):
        translation, rotation = self.kinds(self.draws())
        for count in (translation.sum(), rotation.sum(), (~translation & ~rotation).sum()):
            assert 30 < count < 70

    def test_rotation_and_shear_keep_the_center(self):
        matrices = np.array(self.draws(max_translation=0.0))
        center = (WIDTH / 2, HEIGHT / 2)
        for matrix in matrices:
            assert_allclose(mapped(matrix, [center])[0], center, atol=1e-9)

    def test_strengths_use_their_whole_range(self):
        matrices = np.array(self.draws(max_translation=0.1, max_rotation=20, max_shear=40))
        translation, rotation = self.kinds(matrices)
        shear = ~translation & ~rotation
        for drawn, limit in (
            (matrices[translation, 0, 2], 0.1 * WIDTH),
            (matrices[translation, 1, 2], 0.1 * HEIGHT),
            (np.degrees(np.arctan2(matrices[rotation, 1, 0], matrices[rotation, 0, 0])), 20),
            (np.degrees(np.arctan(matrices[shear, 0, 1])), 40),
            (np.degrees(np.arctan(matrices[shear, 1, 0])), 40),
        ):
            assert abs(drawn).max() <= limit + 1e-9
            assert drawn.max() > 0.7 * limit
            assert drawn.min() < -0.7 * limit
