"""Detections that are equal to the annotations have an AP of 100, whatever the files look like."""

import json
import logging
import math
import re

import pytest

from locreweight.data.datasets.catalog import register
from locreweight.errors import UsageError
from tests.perfect_detections import countable_by_class, evaluate_perfect
from tests.tiny_data import CLASSES, edit_json, make_coco, make_voc, write_voc_xml

MASKS = {
    "box corners": [8, 8, 20, 20],
    "nested points": [[[8, 8], [20, 8], [20, 20]]],
    "empty": [],
    "empty polygon": [[]],
    "odd length": [[8, 8, 20, 8, 20]],
    "two points": [[8, 8, 20, 20]],
    "points as objects": [{"x": 8, "y": 8}, {"x": 20, "y": 20}],
    "text": "8 8 20 20",
    "null": None,
    "RLE without counts": {"size": [64, 64]},
    "uncompressed RLE": {"size": [64, 64], "counts": [0, 4096]},
    "number": 3,
}


@pytest.fixture(autouse=True)
def _logs_reach_caplog(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("locreweight"), "propagate", True)
    caplog.set_level(logging.INFO, logger="locreweight")


@pytest.fixture
def coco(tmp_path):
    """A json whose content the test edits, and the name of the data set."""

    class Case:
        json_file, images = make_coco(tmp_path / "coco", images=6)
        name = f"coco:{json_file}:{images}"

        def edit(self, edit):
            edit_json(self.json_file, edit)

        def evaluate(self, settings=None):
            return evaluate_perfect(self.name, tmp_path / "output", settings)

    return Case()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_do_not_matter(coco, mask):
    def edit(content):
        for entry in content["annotations"][::2]:
            entry["segmentation"] = mask

    coco.edit(edit)
    assert coco.evaluate()["bbox"]["AP"] == pytest.approx(100)
    assert sum(countable_by_class(coco.name).values()) == 12


def ground_truth(tmp_path):
    (file,) = (tmp_path / "output" / "inference").glob("ground_truth_*.json")
    return json.loads(file.read_text())["annotations"]


@pytest.mark.parametrize(
    ("area", "expected"),
    [(30, 30), (12.5, 12.5), (None, 400), (0, 400), (-3, 400), ("30", 400), (math.nan, 400)],
)
def test_areas_are_those_of_the_file_if_it_has_them(coco, tmp_path, area, expected):
    def edit(content):
        content["annotations"][0].update(bbox=[8, 8, 20, 20], area=area)

    coco.edit(edit)
    coco.evaluate()
    assert ground_truth(tmp_path)[0]["area"] == pytest.approx(expected)


def test_a_missing_area_and_one_above_the_range_of_coco_count(coco):
    def edit(content):
        for i, entry in enumerate(content["annotations"]):
            if i % 2:
                del entry["area"]
            else:
                entry["area"] = 1e12

    coco.edit(edit)
    assert coco.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_boxes_that_nothing_can_find_are_left_out_of_evaluation(coco, caplog):
    def edit(content):
        for i, box in enumerate([[8, 8, 0, 10], [8, 8, 10, 0], [70, 8, 10, 10]]):
            content["annotations"][i]["bbox"] = box

    coco.edit(edit)
    assert coco.evaluate()["bbox"]["AP"] == pytest.approx(100)
    assert "left out 2 boxes that have no area" in caplog.text
    assert "left out 1 boxes that lie outside" in caplog.text


# -- crowds ----------------------------------------------------------------------------------------


def make_crowds(content, count):
    for entry in content["annotations"][:count]:
        entry["iscrowd"] = 1


def test_crowds_are_ignored_and_counted_in_the_log(coco, caplog):
    coco.edit(lambda content: make_crowds(content, 5))
    assert coco.evaluate()["bbox"]["AP"] == pytest.approx(100)
    assert "5 of 12 boxes of the test set" in caplog.text


def test_a_test_set_of_crowds_alone_is_an_error(coco):
    coco.edit(lambda content: make_crowds(content, 12))
    with pytest.raises(UsageError, match="all 12 boxes of the test set .* are crowds"):
        coco.evaluate()


def test_a_test_set_of_difficult_objects_alone_is_an_error(tmp_path):
    folder = make_voc(tmp_path / "voc", images=1)
    file = folder / "Annotations/0000.xml"
    write_voc_xml(file, [("cat", 3, 3, 20, 20)], difficult=True)
    with pytest.raises(UsageError, match="all 1 boxes .* difficult 1 in Pascal VOC"):
        evaluate_perfect(f"voc:{folder}:trainval", tmp_path / "output")


def test_a_test_set_of_boxes_without_area_alone_is_an_error(coco):
    def edit(content):
        for entry in content["annotations"]:
            entry["bbox"] = [8, 8, 0, 0]

    coco.edit(edit)
    with pytest.raises(UsageError, match="all 12 boxes .* have no area"):
        coco.evaluate()


# -- many objects in an image ----------------------------------------------------------------------


@pytest.fixture
def crowded(tmp_path):
    """One image with 150 objects of a class."""
    json_file, images = make_coco(tmp_path / "coco", images=1, size=192)

    def edit(content):
        content["annotations"] = [
            {
                "id": i + 1,
                "image_id": 1,
                "category_id": 1,
                "bbox": [12 * (i % 15), 12 * (i // 15), 8, 8],
                "iscrowd": 0,
            }
            for i in range(150)
        ]

    edit_json(json_file, edit)
    return f"coco:{json_file}:{images}"


def test_more_than_100_objects_in_an_image_count(crowded, tmp_path, caplog):
    results = evaluate_perfect(crowded, tmp_path, {"TEST.DETECTIONS_PER_IMAGE": 300})
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert "at most 300 detections per image" in caplog.text
    assert "have more boxes than" not in caplog.text


def test_the_number_of_detections_can_be_unlimited(crowded, tmp_path, caplog):
    results = evaluate_perfect(crowded, tmp_path, {"TEST.DETECTIONS_PER_IMAGE": -1})
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert "no limit" in caplog.text


def test_images_with_more_boxes_than_detections_are_reported(crowded, tmp_path, caplog):
    # COCO's curve has 101 points; 100 of 150 objects are found, so 67 of the points have 1.
    results = evaluate_perfect(crowded, tmp_path, {"TEST.DETECTIONS_PER_IMAGE": 100})
    assert results["bbox"]["AP"] == pytest.approx(100 * 67 / 101)
    assert "1 of 1 images of the test set" in caplog.text
    assert "with 150" in caplog.text
    assert "TEST.DETECTIONS_PER_IMAGE 150" in caplog.text


# -- Pascal VOC ------------------------------------------------------------------------------------


@pytest.fixture
def voc(tmp_path):
    """Two images; no object is an owl."""
    folder = make_voc(tmp_path / "voc", images=2)
    for i in range(2):
        objects = [("cat", 3, 3, 20, 20), ("dog", 30, 30, 60, 60)]
        write_voc_xml(folder / f"Annotations/{i:04d}.xml", objects)
    return folder


def assert_perfect(results):
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["voc_11_point"] == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})


def test_classes_that_do_not_occur_do_not_count(voc, tmp_path):
    assert_perfect(evaluate_perfect(f"voc:{voc}:trainval", tmp_path / "output"))


def test_the_first_class_need_not_occur(voc, tmp_path):
    """The remaining classes keep their own detections."""
    classes = ("owl", "dog", "cat")
    results = evaluate_perfect(f"voc:{voc}:trainval", tmp_path / "output", classes=classes)
    assert_perfect(results)


def test_a_class_whose_objects_are_all_difficult_does_not_count(voc, tmp_path):
    write_voc_xml(voc / "Annotations/0001.xml", [("owl", 3, 3, 20, 20)], difficult=True)
    assert_perfect(evaluate_perfect(f"voc:{voc}:trainval", tmp_path / "output"))


def test_flags_and_a_byte_order_mark_in_the_split_list(voc, tmp_path):
    listed = voc / "ImageSets/Main/trainval.txt"
    listed.write_text("\ufeff0000  1\n0001 -1\n\n", encoding="utf-8")
    assert_perfect(evaluate_perfect(f"voc:{voc}:trainval", tmp_path / "output"))


@pytest.mark.parametrize("number", [1, 2], ids=["one", "all"])
def test_spaces_around_class_names(voc, tmp_path, number, caplog):
    """Detectron2's 11-point AP would count such objects as those of another class."""
    for file in sorted((voc / "Annotations").iterdir())[:number]:
        file.write_text(re.sub("<name>(.*?)</name>", r"<name>\n  \1\n</name>", file.read_text()))
    results = evaluate_perfect(f"voc:{voc}:trainval", tmp_path / "output")
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert "voc_11_point" not in results
    assert "no 11-point AP" in caplog.text and "spaces around the class name" in caplog.text


# -- classes ---------------------------------------------------------------------------------------


def test_sets_are_compared_before_a_number_of_classes_is_advised(tmp_path, coco):
    """No number fits both, so none is advised."""
    from locreweight.data.training_sets import load_training_sets, register_datasets
    from tests.modeling.tiny_model import tiny_config

    def edit(content):
        content["categories"].pop()
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] < 3]

    json_file, images = make_coco(tmp_path / "test")
    edit_json(json_file, edit)
    test = f"coco:{json_file}:{images}"
    for count in (2, 3, 80):
        settings = {
            "DATASETS.TRAIN": [coco.name],
            "DATASETS.TEST": [test],
            "MODEL.ROI_HEADS.NUM_CLASSES": count,
        }
        cfg = tiny_config(settings)
        register_datasets(cfg)
        with pytest.raises(UsageError) as error:
            load_training_sets(cfg)
        message = str(error.value)
        assert "NUM_CLASSES" not in message
        assert f"{coco.name}: {', '.join(map(repr, CLASSES))}\n" in message
        assert f"{test}: 'cat', 'dog'; it lacks 'owl'" in message


def test_every_test_set_is_checked_before_the_first_is_evaluated(tmp_path, coco):
    other = make_coco(tmp_path / "other", classes=("cat", "dog"))
    names = [coco.name, "coco:{}:{}".format(*other)]
    register(names)
    with pytest.raises(UsageError, match=r"lacks 'owl'"):
        evaluate_perfect(coco.name, tmp_path / "output", {"DATASETS.TEST": names})
