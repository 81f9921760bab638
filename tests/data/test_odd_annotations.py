"""Unusual annotations: the expected boxes, or a clear error before training starts."""

import json
import logging
import os
import re
import shutil

import pytest
from detectron2.data import DatasetCatalog

from locreweight.data.datasets.catalog import register
from locreweight.data.loader import Stream, StreamPosition
from locreweight.errors import UsageError
from tests.tiny_data import CLASSES, edit_json, make_voc, write_voc_xml
from tests.tiny_project import Project

SIDE = 64
BOX = {"bbox": [8, 8, 20, 20], "category_id": 1, "iscrowd": 0}


@pytest.fixture
def project(tmp_path):
    """Views are as large as their images."""
    project = Project(tmp_path)
    project.set("INPUT.MIN_SIZE_TRAIN", "(0,)")
    project.set("INPUT.RANDOM_FLIP", "none")
    return project


def edited(edit):
    return lambda project: edit_json(project.json, edit)


def first(key, **values):
    """Changes the first entry of a list in the labeled json."""
    return edited(lambda content: content[key][0].update(values))


def replaced(**lists):
    return edited(lambda content: content.update(lists))


def written(text):
    data = text if isinstance(text, bytes) else text.encode()
    return lambda project: project.json.write_bytes(data)


def with_number(field, text):
    """Writes a number into the first image as json has it, not as Python does."""

    def spoil(project):
        content = project.json.read_text()
        project.json.write_text(content.replace(f'"{field}": {SIDE}', f'"{field}": {text}', 1))

    return spoil


def repeated(key):
    def edit(content):
        content[key].append(dict(content[key][0]))

    return edited(edit)


def named(name):
    return first("images", file_name=name)


def named_absolutely(project):
    """The right file, by its absolute path."""
    named(str(project.images / "0000.png"))(project)


def in_voc(name, text):
    """Replaces a file in VOC's layout."""

    def spoil(project):
        file = project.voc() / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())

    return spoil


def voc_text(old, new):
    def spoil(project):
        file = project.voc() / "Annotations" / "0001.xml"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return spoil


def xml(body, head=""):
    return f'<?xml version="1.0"?>{head}<annotation>{body}</annotation>'


def laughs(levels):
    entities = "".join(
        f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' if i else '<!ENTITY a0 "ha">'
        for i in range(levels)
    )
    return xml(f"<object><name>&a{levels - 1};</name></object>", f"<!DOCTYPE a [{entities}]>")


def class_that_is_a_path(project):
    project.voc()
    project.set("DATASETS.CLASS_NAMES", ["cat", "dog", "../owl"])


def class_that_is_a_number(project):
    project.voc()
    project.set("DATASETS.CLASS_NAMES", [3, 4, 5])


def masks_without_boxes(content):
    for annotation in content["annotations"]:
        del annotation["bbox"]
        annotation["segmentation"] = {"size": [SIDE, SIDE], "counts": "0"}


def in_test(box):
    def spoil(project):
        edit_json(project.test_json, lambda content: content["annotations"][0].update(bbox=box))

    return spoil


LIST, XML = "ImageSets/Main/trainval.txt", "Annotations/0001.xml"
NO_COCO = r"annotations\.json is not a COCO annotation file: "
INTEGER, SIZE = "is not an integer", "is not a positive integer"
OUTSIDE = r"may lie outside of .*DATASETS\.CHECKS\.ALLOW_OUTSIDE_PATHS True"
DROP = r"0000\.png.*DATASETS\.CHECKS\.DROP_BAD_BOXES True"
DEEP = "[" * 200_000 + "]" * 200_000

ERRORS = {
    # case: (edit of the project, regular expression of the message)
    # the file
    "nested too deeply": (written(DEEP), NO_COCO + "it is nested too deeply"),
    "too long a number": (written('{"images": ' + "9" * 5000 + "}"), NO_COCO + "it is not json"),
    "Latin-1": (written('{"\u00e9": []}'.encode("latin-1")), NO_COCO + "it is not json"),
    "UTF-16 cut off": (written(b"\xff\xfe{"), NO_COCO + "it is not json"),
    "two documents": (written("{}{}"), NO_COCO + "it is not json"),
    "a number": (written("3"), NO_COCO + "its top level is a int"),
    "images by name": (replaced(images={"0000.png": {}}), "no list named 'images'"),
    "annotations are null": (replaced(annotations=None), "no list named 'annotations'"),
    "categories by id": (replaced(categories={"1": "cat"}), "no list named 'categories'"),
    "image is a text": (replaced(images=["0000.png"]), "entry of 'images' is not an object"),
    "annotation is null": (replaced(annotations=[None]), "'annotations' is not an object"),
    "category is a text": (replaced(categories=["cat"]), "'categories' is not an object"),
    # images
    "image id is a text": (first("images", id="1"), f"'id' that {INTEGER}"),
    "image id is a list": (first("images", id=[1]), f"'id' that {INTEGER}"),
    "image id is null": (first("images", id=None), f"'id' that {INTEGER}"),
    "image id is true": (first("images", id=True), f"'id' that {INTEGER}"),
    "image ids repeated": (repeated("images"), "ids of 'images' are not unique: 1 occurs"),
    "width is NaN": (with_number("width", "NaN"), f"'width' that {SIZE}"),
    "height is infinite": (with_number("height", "Infinity"), f"'height' that {SIZE}"),
    "width is a text": (first("images", width="64"), f"'width' that {SIZE}"),
    "width is null": (first("images", width=None), f"'width' that {SIZE}"),
    "width is zero": (first("images", width=0), f"'width' that {SIZE}"),
    "height is negative": (first("images", height=-SIDE), f"'height' that {SIZE}"),
    "another height": (first("images", height=65), r"0000\.png is 64 x 64 pixels .* 64 x 65"),
    "absurd width": (first("images", width=10**30), r"0000\.png is 64 x 64 pixels"),
    # names
    "name is null": (named(None), "'file_name' that is not a text"),
    "name is a number": (named(7), "'file_name' that is not a text"),
    "name is empty": (named(""), "contains '', which cannot be a file name"),
    "name is blank": (named(" "), "contains ' ', which cannot be a file name"),
    "name with a zero byte": (named("a\0.png"), r"'a\\x00.png', which cannot be a file name"),
    "name is a dot": (named("."), "1 of 4 images are missing"),
    "name is nearly right": (named("0009.png"), r"0009\.png \(nearest: 000\d\.png\)"),
    "name of another's missing image": (named("C:\\images\\a.png"), r"missing.*C:\\images\\a\.png"),
    "name of another's other image": (named("C:\\images\\0001.png"), "only one such image"),
    "name leads up": (named("../images/0000.png"), OUTSIDE),
    "name leads up to nothing": (named("../images/a.png"), OUTSIDE),
    "name leads far up": (named("../" * 30 + "etc/passwd"), OUTSIDE),
    "name is absolute": (named("/etc/passwd"), OUTSIDE),
    "name is absolute, and right": (named_absolutely, OUTSIDE),
    # annotations
    "data set is a number": (lambda p: p.set("DATASETS.TRAIN", [7]), "unknown data set 7"),
    "annotation id is a text": (first("annotations", id="1"), f"'id' that {INTEGER}"),
    "image of it is a text": (first("annotations", image_id="1"), f"'image_id' that {INTEGER}"),
    "class of it is a text": (first("annotations", category_id="cat"), f"_id' that {INTEGER}"),
    "class of it is unknown": (first("annotations", category_id=0), "category_id=0 of an annot"),
    "crowd is a text": (first("annotations", iscrowd="0"), "'iscrowd' that is not 0 or 1"),
    "crowd is null": (first("annotations", iscrowd=None), "'iscrowd' that is not 0 or 1"),
    "crowd is two": (first("annotations", iscrowd=2), "'iscrowd' that is not 0 or 1"),
    "ignored": (first("annotations", ignore=1), NO_COCO + '.*"ignore"'),
    "box is null": (first("annotations", bbox=None), "'bbox' that is not a list of numbers"),
    "box is a text": (first("annotations", bbox="1 1 9 9"), "'bbox' that is not a list"),
    "box is an object": (first("annotations", bbox={"x": 1}), "'bbox' that is not a list"),
    "box of texts": (first("annotations", bbox=["1", "1", "9", "9"]), DROP),
    "box of lists": (first("annotations", bbox=[[1, 1], [9, 9], [1], [1]]), DROP),
    "box of five": (first("annotations", bbox=[1, 1, 9, 9, 9]), DROP),
    "box beyond floats": (first("annotations", bbox=[1, 1, 10**400, 9]), DROP),
    "box of 1e300": (first("annotations", bbox=[1, 1, 1e300, 9]), DROP),
    "no box at all": (edited(masks_without_boxes), r"no annotation of .*\.json has a bbox.*toBbox"),
    "no box in a test set": (
        lambda project: edit_json(project.test_json, masks_without_boxes),
        "no annotation of .* has a bbox",
    ),
    "a box is missing": (edited(lambda c: c["annotations"][0].pop("bbox") and None), DROP),
    "negative width": (first("annotations", bbox=[9, 9, -5, 5]), DROP),
    "NaN in a test set": (in_test([float("nan"), 1, 9, 9]), "test set .* NaN.*Repair"),
    "negative in a test set": (in_test([9, 9, -5, 5]), "test set .* inverted.*Repair"),
    "three numbers in a test set": (in_test([9, 9, 5]), "test set .* malformed.*Repair"),
    # categories
    "category id is a text": (first("categories", id="1"), f"'id' that {INTEGER}"),
    "category ids repeated": (repeated("categories"), "ids of 'categories' are not unique: 1 oc"),
    "category name is null": (first("categories", name=None), "'name' that is not a text"),
    # Pascal VOC
    "voc: name leads up": (in_voc(LIST, "../../secret\n"), OUTSIDE),
    "voc: name is absolute": (in_voc(LIST, "/etc/passwd\n"), OUTSIDE),
    "voc: name with a zero byte": (
        in_voc(LIST, "00\x0001\n"),
        r"'00\\x0001', which cannot be a file name",
    ),
    "voc: listed twice": (in_voc(LIST, "0001\n0002\n0001\n"), "lists 0001 more than once"),
    "voc: empty list": (in_voc(LIST, "\n"), "has no images"),
    "voc: a list of bytes": (in_voc(LIST, b"\xff\xfe\x00"), "trainval.txt is not a list of images"),
    "voc: empty annotation": (in_voc(XML, ""), r"0001\.xml is malformed"),
    "voc: entities without end": (
        in_voc(XML, laughs(12)),
        r"0001\.xml is malformed.*amplification",
    ),
    "voc: file as entity": (
        in_voc(XML, xml("&a;", '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]>')),
        r"0001\.xml is malformed: undefined entity",
    ),
    "voc: unknown encoding": (
        in_voc(XML, '<?xml version="1.0" encoding="ebcdic-?"?><a/>'),
        r"0001\.xml is malformed",
    ),
    "voc: another width": (voc_text("<width>64", "<width>65"), r"0001\.jpg is 64 x 64 pix.* 65 x"),
    "voc: size of zero": (voc_text("<width>64", "<width>0"), r"0001\.xml is malformed: .*0 x 64"),
    "voc: fraction for a size": (voc_text("<width>64", "<width>64.5"), r"0001\.xml is malformed"),
    "voc: NaN": (voc_text("<xmin>", "<xmin>nan</xmin><xmin>"), r"0001\.jpg.*DROP_BAD_BOXES True"),
    "voc: class is a number": (class_that_is_a_number, "CLASS_NAMES contains 3: use a text"),
    "voc: class is a path": (class_that_is_a_path, "'../owl': use a text without '/'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error_before_training(project, case):
    spoil, words = ERRORS[case]
    spoil(project)
    with pytest.raises(UsageError) as caught:
        project.read()
    assert re.search(words, str(caught.value)), str(caught.value)
    assert len(str(caught.value)) < 2000
    assert str(caught.value).isprintable()


def only_boxes(*boxes, **fields):
    """The first image has these boxes, xywh; the others have none."""

    def edit(content):
        content["annotations"] = [
            {"id": i, "image_id": 1, **BOX, **fields, "bbox": box} for i, box in enumerate(boxes)
        ]

    return edited(edit)


def drop_bad_boxes(spoil):
    def both(project):
        spoil(project)
        project.set("DATASETS.CHECKS.DROP_BAD_BOXES", True)

    return both


def outside_allowed(spoil):
    def both(project):
        spoil(project)
        project.set("DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS", True)

    return both


def images_are_a_link(project):
    """The folder leads elsewhere, and so does one image in it."""
    elsewhere = project.folder / "elsewhere"
    project.images.rename(elsewhere)
    (elsewhere / "0000.png").rename(project.folder / "first.png")
    (elsewhere / "0000.png").symlink_to(project.folder / "first.png")
    project.images.symlink_to(elsewhere)


def encoded(encoding):
    return lambda project: project.json.write_bytes(project.json.read_text().encode(encoding))


def unknown_image(content):
    content["annotations"] = [{"id": 1, "image_id": 1, **BOX}, {"id": 2, "image_id": 77, **BOX}]


def without_crowd_flag(content):
    content["annotations"] = [{"id": 1, "image_id": 1, **BOX}]
    del content["annotations"][0]["iscrowd"]


def classes(*ids):
    """The classes have these ids, and all images a box of the second one."""

    def edit(content):
        for category, new in zip(content["categories"], ids, strict=True):
            category["id"] = new
        content["annotations"] = [
            {"id": i, "image_id": image["id"], **BOX, "category_id": ids[1]}
            for i, image in enumerate(content["images"])
        ]

    def spoil(project):
        edit_json(project.json, edit)
        edit_json(project.test_json, edit)

    return spoil


ONE = [[8, 8, 28, 28]]
GOOD = [8, 8, 20, 20]
NAN, INFINITY = float("nan"), float("inf")
HANDLED = {
    # case: (edit of the project, xyxy boxes of the first image, class, text of the warning)
    "fractions": (only_boxes([0.5, 0.25, 10.5, 20.25]), [[0.5, 0.25, 11.0, 20.5]], 0, ""),
    "area of NaN": (only_boxes(GOOD, area=NAN), ONE, 0, ""),
    "no crowd flag": (edited(without_crowd_flag), ONE, 0, ""),
    "crowd flag is false": (only_boxes(GOOD, iscrowd=False), ONE, 0, ""),
    "the same box twice": (only_boxes(GOOD, GOOD), ONE * 2, 0, ""),
    "the whole image": (only_boxes([0, 0, 64, 64]), [[0, 0, 64, 64]], 0, ""),
    "beyond the right and lower edge": (only_boxes([50, 40, 90, 90]), [[50, 40, 64, 64]], 0, ""),
    "beyond the left and upper edge": (only_boxes([-9, -9, 19, 29]), [[0, 0, 10, 20]], 0, ""),
    "outside to the right": (only_boxes(GOOD, [64, 1, 5, 5]), ONE, 0, "1 boxes that lie outside"),
    "outside to the left": (only_boxes(GOOD, [-9, 1, 5, 5]), ONE, 0, "1 boxes that lie outside"),
    "no area": (only_boxes(GOOD, [5, 5, 0, 5]), ONE, 0, "1 boxes that have no area"),
    "a point": (only_boxes(GOOD, [5, 5, 0, 0]), ONE, 0, "1 boxes that have no area"),
    "NaN left out": (drop_bad_boxes(only_boxes(GOOD, [NAN, 1, 9, 9])), ONE, 0, "malformed, NaN"),
    "infinite left out": (drop_bad_boxes(only_boxes(GOOD, [1, 1, INFINITY, 9])), ONE, 0, "infin"),
    "inverted left out": (drop_bad_boxes(only_boxes(GOOD, [9, 9, -5, 5])), ONE, 0, "inverted"),
    "texts left out": (drop_bad_boxes(only_boxes(GOOD, ["1", 1, 5, 5])), ONE, 0, "malformed"),
    "annotation of an unknown image": (
        edited(unknown_image),
        ONE,
        0,
        "1 annotations are of 1 images",
    ),
    "sparse classes": (classes(7, 19, 901), ONE, 1, ""),
    "unsorted classes": (classes(901, 7, 19), ONE, 0, ""),
    "class zero": (classes(-1, 0, 1), ONE, 1, ""),
    "file name that leads up": (outside_allowed(named("../images/0000.png")), None, None, ""),
    "absolute file name": (outside_allowed(named_absolutely), None, None, ""),
    "name leads up inside": (named("a/../0000.png"), None, None, ""),
    "name on Windows": (named("C:\\images\\0000.png"), None, None, ""),
    "byte order mark": (encoded("utf-8-sig"), None, None, ""),
    "UTF-16": (encoded("utf-16"), None, None, ""),
    "images behind a link": (images_are_a_link, None, None, ""),
}


@pytest.mark.parametrize("case", HANDLED)
def test_boxes_of_unusual_annotations(project, case, caplog, monkeypatch):
    spoil, boxes, label, words = HANDLED[case]
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    written_down = json.loads(project.json.read_text())["annotations"]
    spoil(project)
    with caplog.at_level(logging.WARNING):
        sets, dataset = project.read()
    (record,) = (r for r in sets.labeled if r["image_id"] == 1)
    if boxes is None:  # the image is the same, by whatever name
        assert len(sets.labeled) == 4
        assert [a["bbox"] for a in record["annotations"]] == [
            a["bbox"] for a in written_down if a["image_id"] == 1
        ]
        assert os.path.samefile(record["file_name"], project.images / "0000.png")
    else:
        position = next(
            p
            for p in (StreamPosition(Stream.LABELED, i) for i in range(len(sets.labeled)))
            if dataset.record(p)["image_id"] == 1
        )
        instances = dataset[position][0]["instances"]
        assert instances.gt_boxes.tensor.tolist() == boxes
        assert instances.gt_classes.tolist() == [label] * len(boxes)
    assert words in caplog.text


def test_image_without_annotations_has_no_objects(project):
    only_boxes(GOOD)(project)
    project.set("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    sets, dataset = project.read()
    counts = [len(dataset[StreamPosition(Stream.LABELED, i)][0]["instances"]) for i in range(4)]
    assert sorted(counts) == [0, 0, 0, 1]
    project.set("DATALOADER.FILTER_EMPTY_ANNOTATIONS", True)
    sets, _ = project.read()
    assert [record["image_id"] for record in sets.labeled] == [1]


def test_crowds_are_left_out_of_training(project):
    def edit(content):
        content["annotations"] = [
            {"id": 1, "image_id": 1, **BOX, "iscrowd": 1},
            {"id": 2, "image_id": 1, **BOX, "category_id": 3},
            {"id": 3, "image_id": 2, **BOX, "iscrowd": 1},
        ]

    edit_json(project.json, edit)
    sets, dataset = project.read()
    assert [record["image_id"] for record in sets.labeled] == [1]
    instances = dataset[StreamPosition(Stream.LABELED, 0)][0]["instances"]
    assert instances.gt_classes.tolist() == [2]


def test_only_crowds_is_an_error(project):
    only_boxes(GOOD, iscrowd=1)(project)
    with pytest.raises(UsageError, match="no labeled image of .* has a box to train on"):
        project.read()


class TestVocNames:
    def listed(self, project, line):
        """The one listed image is that of the line, whatever behind its name."""
        folder = project.voc()
        name = "my image"
        (folder / "JPEGImages" / "0000.jpg").rename(folder / "JPEGImages" / f"{name}.jpg")
        write_voc_xml(folder / "Annotations" / f"{name}.xml", [("cat", 1, 1, 9, 9)])
        (folder / LIST).write_text(line)
        sets, _ = project.read()
        return [os.path.basename(record["file_name"]) for record in sets.labeled]

    @pytest.mark.parametrize(
        "line", ["my image", "my image  1\n", " my image -1", "my image 0\r\n"]
    )
    def test_names_with_spaces_and_flags(self, project, line):
        assert self.listed(project, line) == ["my image.jpg"]

    @pytest.mark.parametrize("annotated", [True, False])
    def test_names_that_end_like_flags(self, tmp_path, annotated):
        folder = make_voc(tmp_path / "voc", images=3)
        for i, name in enumerate(["photo", "photo 0", "photo 1"]):
            for file in (f"Annotations/{i:04d}.xml", f"JPEGImages/{i:04d}.jpg"):
                path = folder / file
                path.rename(path.with_stem(name))
        (folder / LIST).write_text("photo 1\nphoto 0\n")
        if not annotated:
            shutil.rmtree(folder / "Annotations")
        name = f"voc:{folder}:trainval"
        register([name], CLASSES, labeled=annotated)
        assert [record["image_id"] for record in DatasetCatalog.get(name)] == ["photo 1", "photo 0"]


class TestFolders:
    def names(self, project):
        sets, _ = project.read()
        return [os.path.relpath(r["file_name"], project.unlabeled) for r in sets.unlabeled]

    def test_linked_folder_is_searched_once(self, project):
        other = project.folder / "other"
        other.mkdir()
        (project.unlabeled / "0002.png").rename(other / "0009.png")
        (project.unlabeled / "b").symlink_to(other)
        (project.unlabeled / "c").symlink_to(other)
        assert self.names(project) == ["0000.png", "0001.png", "b/0009.png"]

    @pytest.mark.parametrize("target", [".", "..", "deep/../..", "loop"])
    def test_loops_of_links(self, project, target):
        (project.unlabeled / "deep").mkdir()
        (project.unlabeled / "deep" / "loop").symlink_to(target)
        found = self.names(project)
        assert found[:3] == ["0000.png", "0001.png", "0002.png"]
        assert len(found) == len(set(found))

    def test_folders_with_links_to_each_other(self, project):
        for ours, theirs in (("a", "b"), ("b", "a")):
            (project.unlabeled / ours).mkdir()
            (project.unlabeled / ours / "other").symlink_to(project.unlabeled / theirs)
        (project.unlabeled / "0002.png").rename(project.unlabeled / "b" / "0002.png")
        assert self.names(project) == ["0000.png", "0001.png", "a/other/0002.png"]

    def test_folder_name_with_undecodable_bytes(self, project):
        (project.unlabeled / "a\udcff\n b").mkdir()
        (project.unlabeled / "0002.png").rename(project.unlabeled / "a\udcff\n b" / "c.png")
        assert self.names(project)[-1] == "a\udcff\n b/c.png"


def test_undecodable_names_are_printed_on_one_line(project):
    named("a\udcff\nb.png")(project)
    with pytest.raises(UsageError, match=r"a\\udcff\\nb\.png") as caught:
        project.read()
    assert str(caught.value).encode().isascii()


def test_unlabeled_masks_need_no_boxes(project):
    other = project.folder / "other.json"
    other.write_text(project.test_json.read_text())
    edit_json(other, masks_without_boxes)
    project.set("DATASETS.UNLABELED", [f"coco:{other}:{project.test_images}"])
    assert len(project.read()[0].unlabeled) == len(json.loads(other.read_text())["images"])


def test_outside_paths_of_unlabeled_files_need_permission(project):
    other = project.folder / "other.json"
    content = json.loads(project.test_json.read_text())
    content["images"][0]["file_name"] = "/etc/passwd"
    other.write_text(json.dumps(content))
    project.set("DATASETS.UNLABELED", [f"coco:{other}:{project.test_images}"])
    with pytest.raises(UsageError, match=OUTSIDE):
        project.read()
