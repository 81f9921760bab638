"""Data sets in the layout of Ultralytics."""

import logging
import math

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from locreweight.data.datasets.catalog import register
from locreweight.errors import UsageError
from tests.perfect_detections import evaluate_perfect
from tests.tiny_data import CLASSES

WIDTH, HEIGHT = 80, 40


@pytest.fixture
def data(tmp_path):
    """Writes images, labels and ``data.yaml``, and reads the data set."""

    class Case:
        folder = tmp_path
        class_names = ()

        def image(self, file, size=(WIDTH, HEIGHT), **options):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size).save(tmp_path / file, **options)

        def write(self, file, text, encoding="utf-8"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(text, encoding=encoding)

        def read(self, location="data.yaml", **options):
            name = "yolo:" + ":".join(str(tmp_path / part) for part in location.split(":", 1))
            if location.startswith("data.yaml:"):
                name = f"yolo:{tmp_path}/{location}"
            register([name], self.class_names, **options)
            self.name = name
            return DatasetCatalog.get(name)

    return Case()


@pytest.fixture
def tree(data):
    """One image with a label, one with an empty label file and one without any."""
    for i in range(3):
        data.image(f"images/train/{i}.png")
    data.write("labels/train/0.txt", "2 0.5 0.25 0.5 0.5\n")
    data.write("labels/train/1.txt", "")
    data.write("data.yaml", "train: images/train\nnames: [cat, dog, owl]\n")
    return data


def boxes(record):
    return [(a["category_id"], a["bbox"]) for a in record["annotations"]]


def test_boxes_are_in_pixels_of_the_image(tree):
    records = tree.read()
    assert [boxes(record) for record in records] == [[(2, [20, 0, 60, 20])], [], []]
    assert [record["image_id"] for record in records] == [f"images/train/{i}.png" for i in range(3)]
    assert {(record["width"], record["height"]) for record in records} == {(WIDTH, HEIGHT)}
    assert MetadataCatalog.get(tree.name).thing_classes == list(CLASSES)


LINES = {
    # name of the case: (line, box in pixels)
    "box": ("0 0.5 0.5 0.25 0.5", [30, 10, 50, 30]),
    "triangle": ("0 0.25 0.25 0.75 0.25 0.5 0.75", [20, 10, 60, 30]),
    "four corners": ("0 0.5 0 1 0.5 0.5 1 0 0.5", [0, 0, 80, 40]),
    "class as a float": ("0.0 0.5 0.5 0.25 0.5", [30, 10, 50, 30]),
    "tabs and blanks": ("  0\t0.5  0.5 0.25 0.5  ", [30, 10, 50, 30]),
    "Windows line end": ("0 0.5 0.5 0.25 0.5\r", [30, 10, 50, 30]),
    "byte order mark": ("\ufeff0 0.5 0.5 0.25 0.5", [30, 10, 50, 30]),
    "whole image": ("0 0.5 0.5 1 1", [0, 0, 80, 40]),
}


@pytest.mark.parametrize("case", LINES)
def test_lines_of_labels(tree, case):
    line, expected = LINES[case]
    tree.write("labels/train/0.txt", line + "\n")
    assert boxes(tree.read()[0]) == [(0, pytest.approx(expected))]


BAD_LINES = {
    # name of the case: (line, words of the message)
    "pixels": ("0 40 20 10 10", "fractions of the image"),
    "NaN": ("0 nan 0.5 0.5 0.5", "fractions of the image"),
    "negative": ("0 -0.5 0.5 0.5 0.5", "fractions of the image"),
    "unknown class": ("3 0.5 0.5 0.5 0.5", r"no class 3 among 3 .*data\.yaml: cat, dog, owl"),
    "negative class": ("-1 0.5 0.5 0.5 0.5", "no class -1"),
    "fractional class": ("0.5 0.5 0.5 0.5 0.5", r"no class 0\.5"),
    "NaN as class": ("nan 0.5 0.5 0.5 0.5", "no class nan"),
    "three numbers": ("0 0.5 0.5 0.5", "4 numbers of a box, or 3 or more points"),
    "with a score": ("0 0.5 0.5 0.5 0.5 0.9", "4 numbers of a box, or 3 or more points"),
    "half a point": ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "4 numbers of a box"),
    "name of the class": ("cat 0.5 0.5 0.5 0.5", "could not convert"),
    "commas": ("0,0.5,0.5,0.5,0.5", "could not convert"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_named(tree, case):
    line, words = BAD_LINES[case]
    tree.write("labels/train/0.txt", f"0 0.5 0.5 0.5 0.5\n{line}\n")
    with pytest.raises(UsageError, match=rf"line 2 of .*labels/train/0\.txt.*{words}"):
        tree.read()


def test_keypoints_are_ignored(tree):
    tree.write("data.yaml", "train: images/train\nkpt_shape: [2, 2]\nnames: [cat]\n")
    tree.write("labels/train/0.txt", "0 0.5 0.5 0.25 0.5 0.1 0.1 0.9 0.9\n")
    assert boxes(tree.read()[0]) == [(0, pytest.approx([30, 10, 50, 30]))]


def test_rotated_images_have_their_upright_size(data):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    data.image("images/0.jpg", exif=exif)
    data.write("labels/0.txt", "0 0.5 0.5 0.5 0.5\n")
    data.write("data.yaml", "train: images\nnames: [cat]\n")
    (record,) = data.read()
    assert (record["width"], record["height"]) == (HEIGHT, WIDTH)
    assert boxes(record) == [(0, [10, 20, 30, 60])]


# -- data.yaml -------------------------------------------------------------------------------------

NAMES = {
    "list": "[cat, dog, owl]",
    "mapping": "{0: cat, 1: dog, 2: owl}",
    "unsorted mapping": "{2: owl, 0: cat, 1: dog}",
    "block": "\n  - cat\n  - dog\n  - owl",
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_class_names(tree, names):
    tree.write("data.yaml", f"train: images/train\nnc: 3\nnames: {names}\n")
    tree.read()
    assert MetadataCatalog.get(tree.name).thing_classes == list(CLASSES)


def test_names_are_texts_whatever_they_look_like(tree):
    tree.write("data.yaml", "train: images/train\nnames: [no, 7, null]\n")
    tree.read()
    assert MetadataCatalog.get(tree.name).thing_classes == ["no", "7", "null"]


def test_names_of_the_config(tree):
    tree.write("data.yaml", "train: images/train\n")
    tree.class_names = CLASSES
    tree.read()
    assert MetadataCatalog.get(tree.name).thing_classes == list(CLASSES)


def test_splits(tree):
    tree.image("images/val/7.png")
    tree.write("labels/val/7.txt", "0 0.5 0.5 0.5 0.5\n")
    tree.write(
        "data.yaml", "train: [images/train, images/val]\nval: images/val\nnames: [a, b, c]\n"
    )
    assert len(tree.read("data.yaml")) == 4
    for split in ("val", "valid"):
        (record,) = tree.read(f"data.yaml:{split}")
        assert record["image_id"] == "images/val/7.png"


@pytest.mark.parametrize(
    ("path", "entry"),
    [
        ("", "images/train"),
        (".", "images/train"),
        ("images", "train"),
        ("../datasets/nowhere", "images/train"),  # below Ultralytics' own folder
        ("", "../images/train"),  # as Roboflow writes
        ("", ".\\images\\train"),
        ("", "listed.txt"),
    ],
)
def test_places_of_images(tree, path, entry):
    tree.write("listed.txt", "./images/train/0.png\nimages\\train\\1.png\n\n./images/train/2.png\n")
    tree.write("data.yaml", f"path: {path}\ntrain: {entry}\nnames: [cat, dog, owl]\n")
    assert [len(record["annotations"]) for record in tree.read()] == [1, 0, 0]


def test_absolute_path(tree):
    tree.write("data.yaml", f"path: {tree.folder}\ntrain: images/train\nnames: [cat, dog, owl]\n")
    assert len(tree.read()) == 3


BAD_YAMLS = {
    "not yaml": ("names: [cat\n", "is not yaml"),
    "a list": ("- cat\n", "is not a YOLO data set"),
    "empty": ("", "is not a YOLO data set"),
    "no names": ("train: images/train\n", "has no names of classes"),
    "a single name": ("train: images/train\nnames: cat\n", "neither a list"),
    "gap": ("train: images/train\nnames: {0: cat, 2: owl}\n", "numbered from 0 to 1, not 0, 2"),
    "from 1": ("train: images/train\nnames: {1: cat}\n", "numbered from 0 to 0, not 1"),
    "other number": (
        "train: images/train\nnc: 5\nnames: [cat, dog]\n",
        "nc: 5.* but `names` has 2",
    ),
    "no split": ("val: images/train\nnames: [cat]\n", r"no images under 'train'. It has val"),
    "missing folder": ("train: imgs\nnames: [cat]\n", r"'imgs' in .*data\.yaml does not exist: "),
    "twice": ("train: [images, images/train]\nnames: [a, b, c]\n", r"train/0\.png more than once"),
    "empty folder": ("train: labels\nnames: [cat]\n", "there is no image in 'train'"),
}


@pytest.mark.parametrize("case", BAD_YAMLS)
def test_bad_yaml_files(tree, case):
    text, words = BAD_YAMLS[case]
    tree.write("data.yaml", text)
    with pytest.raises(UsageError, match=words):
        tree.read()


# -- label files -----------------------------------------------------------------------------------


def test_labels_beside_the_images(data):
    data.image("set/0.png")
    data.write("set/0.txt", "0 0.5 0.5 1 1\n")
    data.write("data.yaml", "train: set\nnames: [cat]\n")
    assert len(data.read()[0]["annotations"]) == 1


def test_folders_without_a_yaml_file(data):
    data.image("photos/a/0.png")
    data.write("texts/a/0.txt", "1 0.5 0.5 1 1\n")
    with pytest.raises(UsageError, match=r"no names: set DATASETS\.CLASS_NAMES"):
        data.read("photos:texts")
    data.write("texts/classes.txt", "cat\ndog\n")
    (record,) = data.read("photos:texts")
    assert record["image_id"] == "a/0.png"
    assert boxes(record) == [(1, [0, 0, WIDTH, HEIGHT])]


@pytest.mark.parametrize("file", ["texts/classes.txt", "obj.names"])
def test_names_of_the_config_in_another_order(data, file):
    data.image("photos/0.png")
    data.write("texts/0.txt", "1 0.5 0.5 1 1\n")
    data.write(file, "dog\ncat\n")
    data.class_names = ("cat", "dog")
    with pytest.raises(UsageError, match=rf"(?s)in a different order.*CLASS_NAMES.*{file}: 'dog'"):
        data.read("photos:texts")


@pytest.mark.parametrize("names", [(), ("bear", "lion")])
def test_class_file_in_another_encoding(data, names):
    data.image("photos/0.png")
    data.write("texts/0.txt", "1 0.5 0.5 1 1\n")
    data.write("texts/classes.txt", "Bär\nLöwe\n", encoding="latin-1")
    data.class_names = names
    if names:
        (record,) = data.read("photos:texts")
        assert boxes(record) == [(1, [0, 0, WIDTH, HEIGHT])]
    else:
        with pytest.raises(UsageError, match=r"cannot read .*classes\.txt"):
            data.read("photos:texts")


def test_unlabeled_images_with_names_in_another_order(data):
    data.image("photos/0.png")
    data.write("texts/0.txt", "1 0.5 0.5 1 1\n")
    data.write("texts/classes.txt", "dog\ncat\n")
    data.class_names = ("cat", "dog")
    (record,) = data.read("photos:texts", labeled=False)
    assert "annotations" not in record


@pytest.mark.parametrize("names", ["cat\ndog\n", "katze\nhund\n", ""])
def test_names_of_the_config_take_precedence(data, names):
    data.image("photos/0.png")
    data.write("texts/0.txt", "1 0.5 0.5 1 1\n")
    data.write("texts/classes.txt", names)
    data.class_names = ("cat", "dog")
    assert len(data.read("photos:texts")) == 1
    assert MetadataCatalog.get(data.name).thing_classes == ["cat", "dog"]


@pytest.mark.parametrize("other", ["0.jpg", "0.PNG"])
def test_two_images_of_one_label_file_are_an_error(tree, other):
    tree.image(f"images/train/{other}")
    with pytest.raises(UsageError, match=r"/0\.\w+ and .*/0\.\w+ have the same label file"):
        tree.read()


def test_names_that_differ_in_spelling(data):
    data.image("images/IMG_0.PNG")
    data.write("labels/img_0.txt", "0 0.5 0.5 1 1\n")
    data.write("data.yaml", "train: images\nnames: [cat]\n")
    assert len(data.read()[0]["annotations"]) == 1


def test_no_label_file_at_all_is_an_error(tree):
    (tree.folder / "labels").rename(tree.folder / "label")
    with pytest.raises(UsageError, match=r"none of 3 images .* has a label file, such as .*0\.txt"):
        tree.read()


def test_labels_of_no_image_are_reported(tree, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("locreweight"), "propagate", True)
    tree.write("labels/train/3.txt", "0 0.5 0.5 1 1\n")
    tree.write("labels/train/._0.txt", "not text")
    with caplog.at_level(logging.INFO):
        tree.read()
    assert "1 of 3 images" in caplog.text and "have no label file" in caplog.text
    assert "1 label files" in caplog.text and "3.txt" in caplog.text


def test_an_image_that_cannot_be_read_is_named(tree):
    tree.write("images/train/1.png", "no image")
    with pytest.raises(UsageError, match=r"images/train/1\.png"):
        tree.read()


def test_unlabeled_images_need_no_labels(tree):
    tree.write("labels/train/0.txt", "broken\n")
    records = tree.read(labeled=False)
    assert len(records) == 3 and not any("annotations" in record for record in records)


def test_perfect_detections_of_polygons(tree, tmp_path):
    lines = [f"{i} 0.{i + 1} 0.2 0.9 0.2 0.9 0.8{i}" for i in range(3)]
    tree.write("labels/train/0.txt", "\n".join(lines))
    results = evaluate_perfect(f"yolo:{tree.folder}/data.yaml", tmp_path / "output")
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert math.isfinite(results["bbox"]["AP50"])
