"""LabelMe's json files, and Pascal VOC's xml files beside the images."""

import json
import logging

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from locreweight.data.datasets.catalog import register, with_unannotated_images
from locreweight.errors import UsageError
from tests.tiny_data import make_voc, write_voc_xml


def shape(label, points, kind="rectangle", **fields):
    return {"label": label, "points": points, "shape_type": kind, "group_id": None} | fields


@pytest.fixture
def data(tmp_path):
    """Writes images and annotations, and reads the folder."""

    class Case:
        folder = tmp_path

        def image(self, file, size=(64, 48)):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size).save(tmp_path / file)

        def annotate(self, file, shapes, image_path="0.png", **fields):
            content = {"shapes": shapes, "imagePath": image_path, "imageData": None}
            content |= {"imageWidth": 64, "imageHeight": 48} | fields
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(json.dumps(content))

        def read(self, kind="labelme", class_names=(), **options):
            self.name = f"{kind}:{tmp_path}"
            register([self.name], class_names, **options)
            return DatasetCatalog.get(self.name)

        @property
        def classes(self):
            return MetadataCatalog.get(self.name).thing_classes

    return Case()


def boxes(record):
    return [(a["category_id"], a["bbox"]) for a in record["annotations"]]


SHAPES = {
    # name of the case: (shape, its box)
    "rectangle": (shape("cat", [[4, 5], [20, 30]]), [4, 5, 20, 30]),
    "other corners": (shape("cat", [[20, 5], [4, 30]]), [4, 5, 20, 30]),
    "four corners": (shape("cat", [[4, 5], [20, 5], [20, 30], [4, 30]]), [4, 5, 20, 30]),
    "polygon": (shape("cat", [[4, 9], [20, 5], [9.5, 30]], "polygon"), [4, 5, 20, 30]),
    "no type": (shape("cat", [[4, 9], [20, 5], [9, 30]], None), [4, 5, 20, 30]),
    "rotated": (shape("cat", [[4, 9], [8, 5], [20, 26], [16, 30]], "rotation"), [4, 5, 20, 30]),
    "oriented": (
        shape("cat", [[4, 9], [8, 5], [20, 26], [16, 30]], "oriented_rectangle"),
        [4, 5, 20, 30],
    ),
    "circle": (shape("cat", [[20, 20], [23, 24]], "circle"), [15, 15, 25, 25]),
    "mask": (shape("cat", [[4, 5], [20, 30]], "mask", mask="..."), [4, 5, 20, 30]),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_become_boxes(data, case):
    drawn, box = SHAPES[case]
    data.image("0.png")
    data.annotate("0.json", [drawn])
    (record,) = data.read()
    assert boxes(record) == [(0, box)]
    assert (record["image_id"], record["width"], record["height"]) == ("0", 64, 48)


def test_points_and_lines_are_left_out_and_reported(data, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("locreweight"), "propagate", True)
    data.image("0.png")
    shapes = [shape("cat", [[4, 5]], "point"), shape("cat", [[4, 5], [9, 9]], "line")]
    data.annotate("0.json", [*shapes, shape("__ignore__", [[4, 5], [9, 9]])])
    (record,) = data.read()
    assert boxes(record) == []
    assert "1 of type point, 1 of type line" in caplog.text


def test_a_group_is_one_object(data):
    data.image("0.png")
    parts = [[[0, 0], [4, 4]], [[10, 2], [20, 8]]]
    data.annotate("0.json", [shape("cat", points, group_id=1) for points in parts])
    assert boxes(data.read()[0]) == [(0, [0, 0, 20, 8])]


def test_classes_are_sorted_unless_they_are_given(data):
    data.image("0.png")
    data.annotate("0.json", [shape(name, [[4, 5], [9, 9]]) for name in ("owl", "cat", "owl")])
    assert [label for label, _ in boxes(data.read()[0])] == [1, 0, 1]
    assert data.classes == ["cat", "owl"]


def test_given_classes(data):
    data.image("0.png")
    data.annotate("0.json", [shape(name, [[4, 5], [9, 9]]) for name in ("owl", "cat", "owl")])
    assert [label for label, _ in boxes(data.read(class_names=["owl", "dog", "cat"])[0])] == [
        0,
        2,
        0,
    ]
    assert data.classes == ["owl", "dog", "cat"]


def test_an_unknown_class_is_an_error(data):
    data.image("0.png")
    data.annotate("0.json", [shape("owl", [[4, 5], [9, 9]])])
    with pytest.raises(UsageError, match=r"0\.json is malformed: class 'owl' is not in \['cat'\]"):
        data.read(class_names=["cat"])


@pytest.mark.parametrize(
    ("image", "annotation", "image_path"),
    [
        ("0.png", "0.json", "0.png"),
        ("a/0.png", "a/0.json", "0.png"),
        ("images/0.png", "labels/0.json", "..\\images\\0.png"),
        ("images/0.png", "labels/0.json", "../images/0.png"),
        ("0.PNG", "0.json", "0.png"),
        ("new.png", "new.json", "old.png"),  # both were renamed
        ("0.png", "0.json", "C:\\Users\\someone\\0.png"),
        ("0.png", "0.json", None),
    ],
)
def test_the_image_is_found(data, image, annotation, image_path):
    data.image(image)
    data.annotate(annotation, [shape("cat", [[4, 5], [9, 9]])], image_path)
    assert data.read()[0]["file_name"] == str(data.folder / image)


def test_an_image_path_does_not_leave_the_folder(data):
    data.image("0.png")
    data.annotate("0.json", [], "../../../../../../../etc/passwd")
    assert data.read()[0]["file_name"] == str(data.folder / "0.png")


def test_two_files_of_one_image_are_an_error(data):
    for name in ("0", "1"):
        data.image(f"{name}.png")
        data.annotate(f"{name}.json", [], image_path="0.png")
    with pytest.raises(UsageError, match=r"0\.json and 1\.json .* same image .*/0\.png"):
        data.read()


def test_the_size_is_that_of_the_image_if_the_json_has_none(data):
    data.image("0.png", size=(30, 20))
    data.annotate("0.json", [], imageWidth=None, imageHeight=None)
    (record,) = data.read()
    assert (record["width"], record["height"]) == (30, 20)


def test_other_json_files_and_companions_are_passed_over(data):
    data.image("0.png")
    data.annotate("0.json", [])
    (data.folder / "coco.json").write_text('{"images": []}')
    (data.folder / "._0.json").write_bytes(b"\x00\x05\x16\x07")
    assert len(data.read()) == 1


BAD = {
    "not json": (lambda file: file.write_text("{"), r"0\.json is not json"),
    "no label": ([{"points": [[1, 1], [2, 2]]}], "a shape has no label"),
    "no points": ([{"label": "cat"}], "points are not pairs"),
    "one point": ([shape("cat", [[1, 1]])], "a rectangle has fewer than two points"),
    "text": ([shape("cat", "1 1 2 2")], "points are not pairs"),
    "three numbers": ([shape("cat", [[1, 1, 1], [2, 2, 2]])], "points are not pairs"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(data, case):
    spoil, words = BAD[case]
    data.image("0.png")
    data.annotate("0.json", spoil if isinstance(spoil, list) else [])
    if callable(spoil):
        spoil(data.folder / "0.json")
    with pytest.raises(UsageError, match=words) as error:
        data.read()
    assert "0.json" in str(error.value)


def test_a_folder_without_annotations_is_an_error(data):
    data.image("0.png")
    with pytest.raises(UsageError, match="no json file of LabelMe"):
        data.read()
    with pytest.raises(UsageError, match="no xml file"):
        data.read("voc")


# -- Pascal VOC ------------------------------------------------------------------------------------


def test_xml_files_beside_the_images(data):
    data.image("0.png")
    data.image("a/1.JPG")
    data.image("a/unlabeled.jpg")
    write_voc_xml(data.folder / "0.xml", [("owl", 5, 6, 20, 30)], (48, 64))
    write_voc_xml(data.folder / "a/1.xml", [("cat", 5, 6, 20, 30)], (48, 64))
    (data.folder / "a/._1.xml").write_bytes(b"\x00\x05\x16\x07")
    records = data.read("voc")
    assert [record["image_id"] for record in records] == ["0", "a/1"]
    assert [boxes(record) for record in records] == [[(1, [4, 5, 20, 30])], [(0, [4, 5, 20, 30])]]
    assert [record["file_name"] for record in records] == [
        str(data.folder / "0.png"),
        str(data.folder / "a/1.JPG"),
    ]
    assert data.classes == ["cat", "owl"]


def test_vocs_own_layout_without_lists(tmp_path):
    folder = make_voc(tmp_path / "voc")
    register([f"voc:{folder}"])
    records = DatasetCatalog.get(f"voc:{folder}")
    assert [record["file_name"] for record in records] == [
        f"{folder}/JPEGImages/{i:04d}.jpg" for i in range(4)
    ]


@pytest.fixture
def voc(tmp_path):
    folder = make_voc(tmp_path / "voc", images=1)

    def file_name(rename=None, filename=None, listed=None, others=()):
        image = folder / "JPEGImages/0000.jpg"
        for other in others:
            (image.parent / other).write_bytes(image.read_bytes())
        if rename:
            image.rename(image.parent / rename)
        if filename:
            file = folder / "Annotations/0000.xml"
            text = file.read_text().replace("<size>", f"<filename>{filename}</filename><size>")
            file.write_text(text)
        if listed:
            (folder / "ImageSets/Main/trainval.txt").write_text(listed)
        register([f"voc:{folder}:trainval"], ("cat", "dog", "owl"))
        (record,) = DatasetCatalog.get(f"voc:{folder}:trainval")
        return record["file_name"].removeprefix(f"{folder}/JPEGImages/")

    return file_name


@pytest.mark.parametrize("name", ["0000.png", "0000.JPG", "0000.jpeg", "0000.tif"])
def test_images_of_other_kinds(voc, name):
    assert voc(rename=name) == name


def test_the_list_has_suffixes(voc):
    assert voc(listed="0000.jpg\n") == "0000.jpg"


def test_a_file_name_that_differs(voc):
    assert voc(rename="photo.png", filename="photo.png") == "photo.png"


def test_the_image_of_the_same_name_comes_first(voc):
    """VOC2007 has wrong <filename> entries in copies of it."""
    assert voc(filename="other.jpg", others=["other.jpg"]) == "0000.jpg"


def test_the_file_name_decides_between_kinds(voc):
    assert voc(rename="0000.bmp", filename="0000.png", others=["0000.png"]) == "0000.png"


@pytest.mark.parametrize(
    ("filename", "others", "found"),
    [
        ("0000.png", ["0000.png"], "0000.png"),
        ("images\\0000.PNG", ["0000.png"], "0000.png"),
        ("0000.png", ["0000.bmp"], "0000.jpg"),  # converted since
        ("0001.png", ["0000.png"], "0000.jpg"),  # a wrong entry
    ],
)
def test_the_file_name_decides_between_jpg_and_another_kind(voc, filename, others, found):
    assert voc(filename=filename, others=others) == found


def test_several_images_of_the_same_name_are_an_error(voc):
    with pytest.raises(UsageError, match=r"may be 0000\.bmp or 0000\.png"):
        voc(rename="0000.bmp", others=["0000.png"])


def test_a_missing_image_keeps_the_usual_name(voc):
    assert voc(rename="0001.jpg") == "0000.jpg"


@pytest.mark.parametrize("kind", ["labelme", "voc"])
@pytest.mark.parametrize("is_damaged", [False, True])
def test_unlabeled_images_need_no_annotation(data, kind, is_damaged):
    for i in range(3):
        data.image(f"{i}.png")
    if kind == "labelme":
        data.annotate("1.json", [shape("cat", [[4, 5], [20, 30]])], image_path="1.png")
    else:
        write_voc_xml(data.folder / "1.xml", [("cat", 4, 5, 20, 30)])
    if is_damaged:
        next(data.folder.glob("1.[jx]*")).write_text("{")
    records = with_unannotated_images(f"{kind}:{data.folder}", data.read(kind, labeled=False))
    assert {record["file_name"] for record in records} == set(map(str, data.folder.glob("*.png")))
    assert len({record["image_id"] for record in records}) == 3
    annotated = [record["file_name"] for record in records if record.get("annotations")]
    assert annotated == ([] if is_damaged else [str(data.folder / "1.png")])
