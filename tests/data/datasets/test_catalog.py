"""Data sets named by their location."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASSES
from detectron2.structures import BoxMode
from PIL import Image
from tiny_data import CLASSES, edit_json, make_coco, make_folder, make_voc, write_voc_xml

from locreweight.config import load_config
from locreweight.data.checks import check_boxes
from locreweight.data.datasets.catalog import register
from locreweight.data.datasets.splits import annotation_file
from locreweight.data.mapper import ViewMapper
from locreweight.errors import UsageError


def read(name, class_names=()):
    register([name], class_names)
    return DatasetCatalog.get(name)


def xyxy(annotation):
    return BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)


class TestCoco:
    def test_records(self, tmp_path):
        json_file, images = make_coco(tmp_path, images=3, boxes_per_image=2, size=(40, 60))
        content = json.loads(json_file.read_text())
        records = read(f"coco:{json_file}:{images}")
        assert [r["file_name"] for r in records] == [
            str(images / entry["file_name"]) for entry in content["images"]
        ]
        assert {(r["height"], r["width"]) for r in records} == {(40, 60)}
        annotations = [a for r in records for a in r["annotations"]]
        assert [a["category_id"] for a in annotations] == [
            entry["category_id"] - 1 for entry in content["annotations"]
        ]
        for annotation, entry in zip(annotations, content["annotations"], strict=True):
            x, y, width, height = entry["bbox"]
            assert xyxy(annotation) == pytest.approx([x, y, x + width, y + height])

    def test_metadata_for_evaluation(self, tmp_path):
        json_file, images = make_coco(tmp_path)
        name = f"coco:{json_file}:{images}"
        read(name)
        metadata = MetadataCatalog.get(name)
        assert metadata.evaluator_type == "coco"
        # Evaluation writes the ground truth itself: annotations may lack areas.
        assert not hasattr(metadata, "json_file")
        assert metadata.image_root == str(images)
        assert metadata.thing_classes == list(CLASSES)

    def test_category_ids_with_gaps(self, tmp_path):
        json_file, images = make_coco(tmp_path, boxes_per_image=9)
        original = json.loads(json_file.read_text())["annotations"]

        def spread(content):
            for entry in content["annotations"]:
                entry["category_id"] = 10 * entry["category_id"] + 7
            for entry in content["categories"]:
                entry["id"] = 10 * entry["id"] + 7
            content["categories"].reverse()

        edit_json(json_file, spread)
        name = f"coco:{json_file}:{images}"
        found = [a["category_id"] for r in read(name) for a in r["annotations"]]
        assert found == [entry["category_id"] - 1 for entry in original]
        assert MetadataCatalog.get(name).thing_classes == list(CLASSES)

    def test_crowds(self, tmp_path):
        json_file, images = make_coco(tmp_path, images=1, boxes_per_image=2)
        edit_json(json_file, lambda content: content["annotations"][0].update(iscrowd=1))
        (record,) = read(f"coco:{json_file}:{images}")
        assert [a["iscrowd"] for a in record["annotations"]] == [1, 0]
        (sample,) = ViewMapper(load_config("", [])).labeled(record)
        assert len(sample["instances"]) == 1

    def test_colons_in_the_path_of_the_file(self, tmp_path):
        folder = tmp_path / "run:3" / "a:b"
        folder.mkdir(parents=True)
        json_file, _ = make_coco(folder, images=2)
        images = make_folder(tmp_path / "images", images=2)
        records = read(f"coco:{json_file}:{images}")
        assert [r["file_name"] for r in records] == [
            str(images / "0000.png"),
            str(images / "0001.png"),
        ]

    def test_registration_reads_nothing(self, tmp_path):
        (tmp_path / "not.json").write_text("broken")
        register([f"coco:{tmp_path / 'not.json'}:{tmp_path}"])


class TestVoc:
    def write(self, folder, *objects, difficult=False):
        make_voc(folder, images=1, boxes_per_image=0, size=(40, 60))
        write_voc_xml(folder / "Annotations" / "0000.xml", objects, (40, 60), difficult)
        return f"voc:{folder}:trainval"

    def test_records(self, tmp_path):
        folder = make_voc(tmp_path / "voc", images=3, boxes_per_image=2, size=(40, 60))
        records = read(f"voc:{folder}:trainval", CLASSES)
        assert [r["image_id"] for r in records] == ["0000", "0001", "0002"]
        assert {(r["height"], r["width"]) for r in records} == {(40, 60)}
        for record in records:
            assert record["file_name"] == str(folder / "JPEGImages" / f"{record['image_id']}.jpg")
            assert len(record["annotations"]) == 2

    @pytest.mark.parametrize(
        ("corners", "box"),
        [
            # Corners are pixels counted from 1, and both belong to the box.
            ((1, 1, 60, 40), (0, 0, 60, 40)),
            ((11, 6, 20, 15), (10, 5, 20, 15)),
            ((5, 7, 6, 8), (4, 6, 6, 8)),
            ((5.5, 7.5, 10.5, 8.5), (4.5, 6.5, 10.5, 8.5)),
        ],
    )
    def test_corners_are_pixel_numbers_from_one(self, tmp_path, corners, box):
        (record,) = read(self.write(tmp_path / "voc", ("cat", *corners)), CLASSES)
        (annotation,) = record["annotations"]
        assert annotation["bbox_mode"] == BoxMode.XYXY_ABS
        assert tuple(annotation["bbox"]) == box

    @pytest.mark.parametrize("corners", [(5, 3, 5, 9), (3, 5, 9, 5), (5, 5, 5, 5)])
    def test_box_with_equal_corners_is_empty(self, tmp_path, corners):
        name = self.write(tmp_path / "voc", ("cat", *corners), ("dog", 1, 1, 9, 9))
        records = read(name, CLASSES)
        (record,) = check_boxes(records, drop_bad=False)
        assert [a["category_id"] for a in record["annotations"]] == [1]

    def test_difficult_objects_are_crowds(self, tmp_path):
        (record,) = read(self.write(tmp_path / "a", ("cat", 1, 1, 9, 9), difficult=True), CLASSES)
        assert [a["iscrowd"] for a in record["annotations"]] == [1]
        (sample,) = ViewMapper(load_config("", [])).labeled(record)
        assert len(sample["instances"]) == 0
        (record,) = read(self.write(tmp_path / "b", ("cat", 1, 1, 9, 9)), CLASSES)
        assert [a["iscrowd"] for a in record["annotations"]] == [0]

    @pytest.mark.parametrize(
        ("text", "is_crowd"),
        [("1", 1), (" 1 ", 1), ("true", 1), ("True\n", 1), ("0", 0), (" 0 ", 0), ("", 0)],
    )
    def test_spellings_of_difficult(self, tmp_path, text, is_crowd):
        name = self.write(tmp_path / "voc", ("cat", 1, 1, 9, 9))
        xml = tmp_path / "voc/Annotations/0000.xml"
        marked = xml.read_text().replace("<difficult>0<", f"<difficult>{text}<")
        xml.write_text(marked)
        (record,) = read(name, CLASSES)
        assert [a["iscrowd"] for a in record["annotations"]] == [is_crowd]

    @pytest.mark.parametrize(("given", "known"), [((), VOC_CLASSES), (CLASSES, CLASSES)])
    def test_default_class_names(self, tmp_path, given, known):
        name = self.write(tmp_path / "voc", (known[2], 1, 1, 9, 9))
        (record,) = read(name, given)
        assert record["annotations"][0]["category_id"] == 2
        assert MetadataCatalog.get(name).thing_classes == list(known)

    def test_metadata_for_evaluation(self, tmp_path):
        name = self.write(tmp_path / "voc", ("cat", 1, 1, 9, 9))
        register([name], CLASSES)
        metadata = MetadataCatalog.get(name)
        assert metadata.evaluator_type == "pascal_voc"
        assert (metadata.dirname, metadata.split) == (str(tmp_path / "voc"), "trainval")
        assert metadata.year == 2007

    def test_optional_entries(self, tmp_path):
        name = self.write(tmp_path / "voc")
        (tmp_path / "voc" / "Annotations" / "0000.xml").write_text(
            "<annotation><size><width> 60 </width><height>40</height></size><object><name> cat "
            "</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>8</ymax></bndbox>"
            "</object></annotation>"
        )
        (record,) = read(name, CLASSES)
        assert record["annotations"][0]["bbox"] == [0, 0, 9, 8]

    def test_split_with_blank_lines_and_flags(self, tmp_path):
        folder = make_voc(tmp_path / "voc", images=3)
        (folder / "ImageSets" / "Main" / "trainval.txt").write_text("0002  1\n\n0000 -1\n")
        records = read(f"voc:{folder}:trainval", CLASSES)
        assert [r["image_id"] for r in records] == ["0002", "0000"]

    def test_colons_in_the_path(self, tmp_path):
        (tmp_path / "a:b").mkdir()
        folder = make_voc(tmp_path / "a:b" / "voc", images=2)
        assert len(read(f"voc:{folder}:trainval", CLASSES)) == 2


class TestFolder:
    def test_images_in_subfolders_in_order(self, tmp_path):
        image = Image.new("RGB", (8, 8))
        names = ["b.png", "a.jpg", "deep/er/c.JPEG", "deep/d.bmp", "e.webp", "f.tif"]
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / name)
        for name in ("notes.txt", "deep/labels.json", "png", ".hidden"):
            (tmp_path / name).write_text("no image")
        records = read(f"folder:{tmp_path}")
        assert [r["file_name"] for r in records] == sorted(str(tmp_path / n) for n in names)
        assert [r["image_id"] for r in records] == list(range(len(names)))

    def test_colons_in_the_path(self, tmp_path):
        folder = make_folder(tmp_path / "a:b", images=2)
        assert len(read(f"folder:{folder}")) == 2

    def test_folder_cannot_be_evaluated_on(self, tmp_path):
        name = f"folder:{make_folder(tmp_path / 'images')}"
        register([name])
        assert MetadataCatalog.get(name).get("thing_classes") is None


class TestColons:
    """Paths of data sets that have two of them, both with colons."""

    @pytest.fixture
    def coco(self, tmp_path):
        folder = tmp_path / "run:3" / "a:b"
        folder.mkdir(parents=True)
        return make_coco(folder, images=2)

    def test_coco(self, coco):
        json_file, images = coco
        name = f"coco:{json_file}:{images}"
        assert [r["file_name"] for r in read(name)] == [
            str(images / "0000.png"),
            str(images / "0001.png"),
        ]
        assert annotation_file(name) == json_file

    def test_list(self, coco):
        json_file, images = coco
        listed = json_file.with_suffix(".txt")
        listed.write_text("0001.png\n")
        (record,) = read(f"list:{listed}:{images}")
        assert record["file_name"] == str(images / "0001.png")

    def test_yolo(self, coco):
        json_file, images = coco
        labels = json_file.with_name("labels")
        labels.mkdir()
        (labels / "0000.txt").write_text("2 0.5 0.5 1 1\n")
        assert len(read(f"yolo:{images}:{labels}", CLASSES)) == 2
        (json_file.with_name("data.yaml")).write_text("train: images\nnames: [cat, dog, owl]\n")
        assert len(read(f"yolo:{json_file.with_name('data.yaml')}:train")) == 2

    def test_missing_folders_are_named(self, coco, tmp_path):
        json_file, images = coco
        with pytest.raises(UsageError, match=rf"the folder '{images}2' of"):
            register([f"coco:{json_file}:{images}2"])
        with pytest.raises(UsageError, match=rf"the folder '{json_file.parent}/voc' of"):
            register([f"voc:{json_file.parent}/voc:trainval"])


@pytest.mark.parametrize("name", ["coco:a.json", "coco:a.json:", "list::images", "yolo:images"])
def test_names_without_a_second_path(name):
    with pytest.raises(UsageError, match="does not have the form"):
        register([name])


def test_registered_data_set(tmp_path):
    name = f"registered in {tmp_path.name}: by a plugin"
    DatasetCatalog.register(name, lambda: [{"file_name": "here.png"}])
    assert read(name) == [{"file_name": "here.png"}]


@pytest.mark.parametrize(
    ("metadata", "file"),
    [
        ({"json_file": "coco/instances.json"}, "coco/instances.json"),
        ({"dirname": "VOC2007", "split": "test"}, "VOC2007/ImageSets/Main/test.txt"),
    ],
)
def test_registered_data_set_without_files(tmp_path, metadata, file):
    name = f"registered in {tmp_path.name}"
    DatasetCatalog.register(name, lambda: [])
    MetadataCatalog.get(name).set(**metadata)
    with pytest.raises(UsageError) as error:
        register([name])
    assert f"the file '{file}' of the data set '{name}' does not exist" in str(error.value)
    assert "DETECTRON2_DATASETS" in str(error.value)


def test_repeated_registration(tmp_path):
    name = f"folder:{make_folder(tmp_path / 'images', images=3)}"
    register([name, name])
    assert len(read(name)) == 3
