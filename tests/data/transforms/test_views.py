"""The matrix of a view says where its image content went."""

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
RECIPES = ["SoftTeacherPolicy", "UnbiasedTeacherPolicy"]
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
each_seed = pytest.mark.parametrize("seed", range(8))


def config(recipe, *options):
    sizes = ["INPUT.MIN_SIZE_TRAIN", "(60, 140)", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"]
    return load_config("", ["INPUT.AUGMENTATION_POLICY", recipe, *sizes, *options])


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
    """Black, with a bright spot about (x, y); the first pixel's center is (0.5, 0.5)."""
    across, down = np.arange(WIDTH) + 0.5 - x, np.arange(HEIGHT) + 0.5 - y
    spot = np.exp(-(across[None] ** 2 + down[:, None] ** 2) / (2 * sigma**2))
    return np.repeat(np.round(250 * spot).astype(np.uint8)[..., None], 3, axis=2)


def center_of_light(image):
    weights = np.asarray(image, dtype=float).sum(axis=2)
    y, x = np.indices(weights.shape) + 0.5
    return np.array([(weights * x).sum(), (weights * y).sum()]) / weights.sum()


def assert_light_is_at(image, point):
    # Half a pixel is what the wrong convention for a pixel's center costs.
    assert_allclose(center_of_light(image), point, atol=0.25)


@each_seed
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_matrix_of_an_augmentation_is_what_it_does_to_coordinates(name, seed):
    np.random.seed(seed)
    _, transforms = augmented([AUGMENTATIONS[name]], noise())
    points = np.random.uniform(-50, 200, (20, 2))
    matrix = affine_matrix(transforms, SIZE)
    assert_allclose(mapped(matrix, points), transforms.apply_coords(points.copy()), atol=1e-3)


@each_seed
@pytest.mark.parametrize("view", ["weak", "strong", "labeled"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_matrix_of_a_recipe_is_what_it_does_to_coordinates(recipe, view, seed):
    np.random.seed(seed)
    augmentations = getattr(build_augmentation_policy(config(recipe)), view)
    for one_view in augmentations if view == "labeled" else [augmentations]:
        _, transforms = augmented(one_view, noise())
        points = np.random.uniform(-50, 200, (20, 2))
        matrix = affine_matrix(transforms, SIZE)
        assert_allclose(mapped(matrix, points), transforms.apply_coords(points.copy()), atol=1e-3)


@each_seed
@pytest.mark.parametrize("name", MOVES_PIXELS)
def test_image_content_goes_where_the_matrix_says(name, seed):
    np.random.seed(seed)
    spot = np.random.uniform((45, 35), (75, 55))
    image, transforms = augmented([AUGMENTATIONS[name]], blob(*spot))
    assert_light_is_at(image, mapped(affine_matrix(transforms, SIZE), spot))


@each_seed
@pytest.mark.parametrize("recipe", RECIPES)
def test_both_views_of_a_file_show_its_content_where_their_matrices_say(recipe, seed, tmp_path):
    np.random.seed(seed)
    spot = np.random.uniform((45, 35), (75, 55))
    file = tmp_path / "blob.png"
    Image.fromarray(blob(*spot)).save(file)
    whole = build_augmentation_policy(config(recipe, "MODEL.PIXEL_MEAN", "(0.0, 0.0, 0.0)"))
    # Color operations can turn black into white; they are left out, what moves pixels stays.
    moving = (T.ResizeShortestEdge, T.RandomFlip, RandomGeometricOperation)
    geometry = dataclasses.replace(
        whole,
        weak=[a for a in whole.weak if isinstance(a, moving)],
        strong=[a for a in whole.strong if isinstance(a, moving)],
    )
    sample = ViewMapper(policy=geometry, image_format="BGR").unlabeled({"file_name": str(file)})
    for view in (sample.weak, sample.strong):
        assert_light_is_at(view.image.numpy().transpose(1, 2, 0), mapped(view.matrix, spot))


@each_seed
@pytest.mark.parametrize("recipe", RECIPES)
def test_labeled_boxes_go_with_the_image(recipe, seed, tmp_path):
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
    # The weak augmentations: what a color operation leaves of the box cannot be told.
    weak = build_augmentation_policy(config(recipe)).weak
    mapper = ViewMapper(policy=AugmentationPolicy([weak, weak], [], []), image_format="BGR")
    first, second = mapper.labeled(record)
    for sample in (first, second):
        rows, columns = np.nonzero(sample["image"][0].numpy() > 127)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert_allclose(sample["instances"].gt_boxes.tensor[0], seen, atol=1)
        assert sample["instances"].gt_classes.tolist() == [2]
    assert first["image"].shape != second["image"].shape  # each view has its own draw


@each_seed
def test_a_strong_view_on_the_weak_one_shares_its_geometry(seed, tmp_path):
    np.random.seed(seed)
    Image.fromarray(noise()).save(tmp_path / "image.png")
    mapper = ViewMapper(config("UnbiasedTeacherPolicy"))
    sample = mapper.unlabeled({"file_name": str(tmp_path / "image.png")})
    assert torch.equal(sample.weak.matrix, sample.strong.matrix)
    assert sample.weak.image_size == sample.strong.image_size


@each_seed
def test_geometry_on_top_of_the_weak_view_comes_after_it(seed, tmp_path):
    np.random.seed(seed)
    spot = np.random.uniform((45, 35), (75, 55))
    Image.fromarray(blob(*spot)).save(tmp_path / "blob.png")
    weak = [T.ResizeShortestEdge(60), T.RandomFlip(1.0)]
    recipe = AugmentationPolicy([[]], weak, [RandomGeometricOperation(BLACK)], strong_on_weak=True)
    mapper = ViewMapper(policy=recipe, image_format="BGR")
    strong = mapper.unlabeled({"file_name": str(tmp_path / "blob.png")}).strong
    assert_light_is_at(strong.image.numpy().transpose(1, 2, 0), mapped(strong.matrix, spot))


def test_a_view_holds_bytes_and_a_matrix_of_full_precision(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "image.png")
    sample = ViewMapper(config("SoftTeacherPolicy")).unlabeled(
        {"file_name": str(tmp_path / "image.png")}
    )
    for view in (sample.weak, sample.strong):
        assert view.image.dtype == torch.uint8
        assert view.matrix.dtype == torch.float64
        assert view.image.shape == (3, *view.image_size)


def test_image_size_is_height_and_width():
    assert View(torch.zeros(3, 4, 5), torch.eye(3)).image_size == (4, 5)


class Perspective(T.Transform):
    def apply_image(self, img):
        return img

    def apply_coords(self, coords):
        return coords / (1 + 0.002 * coords[:, :1])


def test_a_transform_that_is_not_affine_is_an_error_that_names_it(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "image.png")
    recipe = AugmentationPolicy(labeled=[[]], weak=[], strong=[Perspective()])
    with pytest.raises(ValueError, match=r"not affine.*Perspective") as caught:
        ViewMapper(policy=recipe, image_format="RGB").unlabeled(
            {"file_name": str(tmp_path / "image.png")}
        )
    assert not isinstance(caught.value, UnreadableImage)  # which would be skipped


class TestAffineTransform:
    def test_a_quarter_turn_is_exact(self):
        image = noise((31, 31))
        quarter = np.array([[0, -1, 31], [1, 0, 0], [0, 0, 1]])  # clockwise, y points down
        assert_array_equal(AffineTransform(quarter, BLACK).apply_image(image), np.rot90(image, -1))

    def test_a_mirror_is_exact(self):
        image = noise()
        mirror = np.array([[-1, 0, WIDTH], [0, 1, 0], [0, 0, 1]])
        assert_array_equal(AffineTransform(mirror, BLACK).apply_image(image), image[:, ::-1])

    @pytest.mark.parametrize(("x", "y"), [(7, 0), (0, 5), (3, 4)])
    def test_a_translation_by_whole_pixels_is_exact_and_fills(self, x, y):
        image, fill = noise(), (10, 20, 30)
        matrix = np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])
        moved = AffineTransform(matrix, fill).apply_image(image)
        assert_array_equal(moved[y:, x:], image[: HEIGHT - y, : WIDTH - x])
        assert (moved[:y] == fill).all()
        assert (moved[:, :x] == fill).all()

    def test_a_segmentation_moves_with_the_image_and_keeps_its_labels(self):
        labels = np.random.randint(0, 200, SIZE, dtype=np.uint8)
        turn = np.array([[0.8, -0.6, 20], [0.6, 0.8, -5], [0, 0, 1]])
        moved = AffineTransform(turn, BLACK).apply_segmentation(labels * 0 + 7)
        assert set(np.unique(moved)) == {0, 7}
        shift = np.array([[1, 0, 2], [0, 1, 0], [0, 0, 1]])
        moved = AffineTransform(shift, BLACK).apply_segmentation(labels)
        assert_array_equal(moved[:, 2:], labels[:, :-2])

    def test_the_inverse_brings_points_and_pixels_back(self):
        matrix = np.array([[1, 0.3, 4], [-0.2, 1.1, -7], [0, 0, 1]])
        transform = AffineTransform(matrix, BLACK)
        points = np.random.uniform(0, 100, (10, 2))
        back = transform.inverse().apply_coords(transform.apply_coords(points))
        assert_allclose(back, points, atol=1e-9)
        image = blob(60.2, 45.7)
        assert_light_is_at(
            transform.inverse().apply_image(transform.apply_image(image)), (60.2, 45.7)
        )


class TestRandomGeometry:
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

    def test_each_kind_is_drawn_equally_often(self):
        translation, rotation = self.kinds(self.draws())
        for count in (translation.sum(), rotation.sum(), (~translation & ~rotation).sum()):
            assert 30 < count < 70

    def test_rotation_and_shear_leave_the_centre_where_it_is(self):
        matrices = np.array(self.draws(max_translation=0.0))
        center = (WIDTH / 2, HEIGHT / 2)
        for matrix in matrices:
            assert_allclose(mapped(matrix, [center])[0], center, atol=1e-9)

    def test_strengths_stay_within_their_limits_and_reach_them(self):
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
