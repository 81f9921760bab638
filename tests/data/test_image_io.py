"""Reading for training gives the same pixels and refuses the same files as for evaluation."""

import io
import math

import numpy as np
import pytest
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.structures import BoxMode
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from locreweight.config import load_config
from locreweight.data import image_io
from locreweight.data.image_io import (
    SizeLimit,
    UnreadableImage,
    image_size,
    read_for_training,
    read_rgb,
)
from locreweight.data.mapper import RecordMapper, ViewMapper
from locreweight.data.transforms.policies import AugmentationPolicy
from tests.data.transforms.test_color_ops import smooth
from tests.odd_images import BROKEN, VALID

FULL_SIZE = SizeLimit()


def jpeg(path, image=None, **options):
    Image.fromarray(smooth(96, 128) if image is None else image).save(path, "JPEG", **options)
    return str(path)


def jpeg_with_orientation(path, orientation, image):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(path, image, exif=exif, quality=95)


@pytest.mark.parametrize("case", VALID)
def test_read_for_training_equals_read_rgb(case, tmp_path):
    name, make, _ = VALID[case]
    make(tmp_path / name)
    read = read_for_training(str(tmp_path / name), FULL_SIZE)
    assert_array_equal(read.pixels, read_rgb(str(tmp_path / name)))
    assert read.shape == read.pixels.shape[:2]
    assert image_size(str(tmp_path / name)) == read.shape[::-1]


@pytest.mark.parametrize("case", BROKEN)
def test_read_for_training_refuses_broken_files(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, content = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableImage, match=name):
        read_for_training(str(tmp_path / name), SizeLimit(4, 4))


@pytest.mark.parametrize("orientation", range(10))
def test_read_for_training_applies_the_exif_orientation_of_jpegs(orientation, tmp_path):
    file = jpeg_with_orientation(tmp_path / "a.jpg", orientation, smooth(60, 88))
    read = read_for_training(file, FULL_SIZE)
    assert_array_equal(read.pixels, read_rgb(file))
    assert read.shape == read.pixels.shape[:2]


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"quality": 5},
        {"dpi": (9, 9)},
    ],
    ids=str,
)
def test_read_for_training_equals_read_rgb_for_kinds_of_jpegs(options, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (45, 67, 3), dtype=np.uint8)
    file = jpeg(tmp_path / "a.jpg", noise, **options)
    assert_array_equal(read_for_training(file, FULL_SIZE).pixels, read_rgb(file))


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 50, 400])
def test_truncated_jpegs_are_treated_as_by_pillow(cut, tmp_path):
    content = io.BytesIO()
    jpeg(content)
    (tmp_path / "a.jpg").write_bytes(content.getvalue()[: len(content.getvalue()) - cut])
    assert_same_outcome(str(tmp_path / "a.jpg"))


@pytest.mark.parametrize("seed", range(150))
def test_damaged_jpegs_are_treated_as_by_pillow(seed, tmp_path):
    rng = np.random.default_rng(seed)
    stored = io.BytesIO()
    jpeg(stored, smooth(40, 56), progressive=bool(seed % 2))
    content = bytearray(stored.getvalue())
    for position in rng.integers(2, len(content), size=rng.integers(1, 6)):
        content[position] = rng.integers(256)
    if seed % 3 == 0:  # 50 bytes are missing in the middle
        start = int(rng.integers(2, len(content) - 60))
        del content[start : start + 50]
    (tmp_path / "a.jpg").write_bytes(bytes(content))
    assert_same_outcome(str(tmp_path / "a.jpg"))


def assert_same_outcome(file):
    """Both functions return the same pixels, or both refuse the file."""
    try:
        expected = read_rgb(file)
    except UnreadableImage:
        with pytest.raises(UnreadableImage):
            read_for_training(file, FULL_SIZE)
    else:
        assert_array_equal(read_for_training(file, FULL_SIZE).pixels, expected)


class TestReduction:
    @pytest.mark.parametrize(
        ("size", "limit", "reduction"),
        [
            ((4032, 3024), SizeLimit(320, 1333), 4),  # 3024 / 4 = 756 >= 1.5 * 320, / 8 is not
            ((4032, 3024), SizeLimit(800, 1333), 2),  # 3024 / 2 = 1512 >= 1.5 * 800
            ((4032, 3024), SizeLimit(1200, 1333), 2),  # the long side decides: 2016 >= 1.5 * 1333
            ((3024, 4032), SizeLimit(1200, 1333), 2),
            ((640, 480), SizeLimit(320, 1333), 1),  # 480 / 2 < 320
            ((640, 480), SizeLimit(160, 1333), 2),  # 480 / 2 = 1.5 * 160
            ((640, 480), SizeLimit(161, 1333), 1),
            ((6400, 480), SizeLimit(400, 640), 4),  # 6400 / 4 >= 1.5 * 640
            ((4032, 3026), SizeLimit(320, 1333), 2),  # 3026 is not divisible by 4
            ((4032, 3023), SizeLimit(320, 1333), 1),
            ((8000, 8000), SizeLimit(), 1),
        ],
    )
    def test_leaves_enough_pixels_for_the_largest_view(self, size, limit, reduction):
        assert limit.reduction(*size) == reduction

    @pytest.mark.parametrize("reduction", [2, 4, 8])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_reduced_image_has_block_means_and_the_full_shape(
        self, reduction, orientation, tmp_path
    ):
        file = jpeg_with_orientation(tmp_path / "a.jpg", orientation, smooth(192, 256))
        side = 192 / reduction / image_io.MIN_OVERSAMPLING
        read = read_for_training(file, SizeLimit(side, math.inf))
        full = read_rgb(file)
        height, width = full.shape[:2]
        assert read.shape == (height, width)
        assert read.pixels.shape == (height // reduction, width // reduction, 3)
        blocks = full.reshape(height // reduction, reduction, width // reduction, reduction, 3)
        # Block means up to compression errors. Neighboring pixels differ by about 10.
        assert np.abs(blocks.mean(axis=(1, 3)) - read.pixels).mean() < 3
        corners = np.array([[0.0, 0.0], [width, height]])
        assert_allclose(read.scaling.apply_coords(corners), [[0, 0], read.pixels.shape[1::-1]])

    def test_other_formats_are_not_reduced(self, tmp_path):
        Image.fromarray(smooth(96, 128)).save(tmp_path / "a.png")
        read = read_for_training(str(tmp_path / "a.png"), SizeLimit(8, 8))
        assert_array_equal(read.pixels, smooth(96, 128))

    def test_views_of_reduced_and_full_images_are_similar(self, tmp_path):
        file = jpeg(tmp_path / "a.jpg", smooth(480, 640), quality=95)
        resize = [T.ResizeShortestEdge(100), T.RandomFlip(1.0)]
        samples = [
            mapper_of(resize, reduced).unlabeled({"file_name": file}) for reduced in (True, False)
        ]
        for small, full in zip(*[(s.weak, s.strong) for s in samples], strict=True):
            assert_allclose(small.matrix, full.matrix, atol=1e-9)
            difference = small.image.float() - full.image.float()
            assert difference.abs().mean() < 0.5


def mapper_of(view, reduced=True):
    policy = AugmentationPolicy(labeled=[view], weak=view, strong=view)
    return ViewMapper(policy=policy, image_format="RGB", reduced_decoding=reduced)


@pytest.fixture
def reductions(monkeypatch):
    """The reductions at which JPEGs are decoded."""
    reductions = []

    class RecordingDict(dict):
        def __getitem__(self, reduction):
            reductions.append(reduction)
            return super().__getitem__(reduction)

    monkeypatch.setattr(image_io, "JPEG_DECODE_FLAGS", RecordingDict(image_io.JPEG_DECODE_FLAGS))
    return reductions


class TestMapper:
    def record(self, file, height=480, width=640):
        box = {"bbox": [64, 48, 320, 240], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}
        box["segmentation"] = [[64, 48, 320, 48, 320, 240]]
        return {"file_name": file, "height": height, "width": width, "annotations": [box]}

    @pytest.mark.parametrize(
        ("first", "reduction"),
        [
            (T.ResizeShortestEdge(100), 2),
            (T.ResizeShortestEdge([50, 100], sample_style="choice"), 2),
            (T.ResizeShortestEdge((60, 170), sample_style="range"), 1),
            (T.ResizeShortestEdge(400, max_size=100), 4),
            (T.ResizeShortestEdge([0, 50], sample_style="choice"), 1),  # 0: not resized
            (T.RandomCrop("absolute", (50, 50)), 1),
            (T.RandomFlip(), 1),
        ],
    )
    def test_reduction_depends_on_the_first_augmentation(
        self, first, reduction, tmp_path, reductions
    ):
        file = jpeg(tmp_path / "a.jpg", smooth(480, 640))
        mapper = mapper_of([first, T.RandomFlip()])
        mapper.unlabeled({"file_name": file})
        mapper.labeled(self.record(file))
        assert reductions == [reduction, reduction]

    def test_reduction_depends_on_the_largest_view(self, tmp_path, reductions):
        file = jpeg(tmp_path / "a.jpg", smooth(480, 640))
        small, large = [T.ResizeShortestEdge(50)], [T.ResizeShortestEdge(200)]
        for policy, expected in (
            (AugmentationPolicy([small, large], small, small), [4, 1]),
            (AugmentationPolicy([small, small], small, large), [1, 4]),
            (AugmentationPolicy([small, []], small, []), [1, 1]),
            # The strong view is made from the weak view.
            (AugmentationPolicy([small], small, [T.RandomFlip()], strong_on_weak=True), [4, 4]),
        ):
            reductions.clear()
            mapper = ViewMapper(policy=policy, image_format="RGB", reduced_decoding=True)
            mapper.unlabeled({"file_name": file})
            mapper.labeled(self.record(file))
            assert reductions == expected

    @pytest.mark.parametrize(("option", "reduction"), [("True", 2), ("False", 1)])
    def test_config_switches_reduced_decoding(self, option, reduction, tmp_path, reductions):
        file = jpeg(tmp_path / "a.jpg", smooth(480, 640))
        options = ["INPUT.MIN_SIZE_TRAIN", "(100,)", "INPUT.REDUCED_DECODING", option]
        ViewMapper(load_config("", options)).unlabeled({"file_name": file})
        assert reductions == [reduction]

    def test_labeled_boxes_are_scaled_from_the_full_size(self, tmp_path, reductions):
        file = jpeg(tmp_path / "a.jpg", smooth(480, 640))
        mapper = mapper_of([T.ResizeShortestEdge(120), T.RandomFlip(1.0)])
        record = self.record(file)
        (sample,) = mapper.labeled(record)
        assert reductions == [2]
        assert (sample["height"], sample["width"]) == (480, 640)
        # Scaled by 1/4 and mirrored in 160 pixels.
        assert sample["instances"].gt_boxes.tensor.tolist() == [[80, 12, 144, 60]]
        assert record == self.record(file)  # is not modified
        with pytest.raises(UnreadableImage, match="Mismatched image shape") as caught:
            mapper.labeled(self.record(file, 240, 320))
        assert isinstance(caught.value.__cause__, SizeMismatchError)

    def test_labeled_views_share_one_decoding(self, tmp_path, reductions):
        file = jpeg(tmp_path / "a.jpg", smooth(480, 640))
        policy = AugmentationPolicy([[T.ResizeShortestEdge(300)]] * 3, [], [])
        samples = ViewMapper(policy=policy, image_format="RGB").labeled(self.record(file))
        assert (len(samples), reductions) == (3, [1])

    @pytest.mark.parametrize("order", ["RGB", "BGR"])
    def test_evaluation_pixels_equal_detectron2s(self, order, tmp_path, reductions):
        noise = np.random.default_rng(0).integers(0, 256, (120, 90, 3), dtype=np.uint8)
        file = jpeg(tmp_path / "a.jpg", noise)
        cfg = load_config("", ["INPUT.MIN_SIZE_TEST", "50", "INPUT.FORMAT", order])
        image = RecordMapper(cfg, is_train=False)({"file_name": file})["image"]
        pixels = read_rgb(file) if order == "RGB" else read_rgb(file)[:, :, ::-1]
        expected = T.ResizeTransform(120, 90, 67, 50).apply_image(pixels)
        assert_array_equal(image.numpy().transpose(1, 2, 0), expected)
        assert reductions == []
