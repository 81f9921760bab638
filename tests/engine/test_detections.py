"""Detections: selection, drawing, crops; and the files that they are written to."""

import io
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from locreweight.data.datasets.catalog import register
from locreweight.engine.detection_files import (
    CocoDataset,
    CropWriter,
    LabelStudioTasks,
    PictureWriter,
    YoloLabels,
    common_folder,
)
from locreweight.engine.detections import Detections
from locreweight.engine.inference import Frame, InputFile
from locreweight.errors import UsageError

CLASSES = ["cat", "dog"]
BOXES = [[0.0, 0.0, 10.0, 20.0], [4.5, 3.25, 30.0, 15.75], [39.5, 0.0, 40.0, 20.0]]


def detections_of(boxes=BOXES, classes=(0, 1, 1), scores=(0.9, 0.6, 0.3), quality=True):
    image = np.arange(20 * 40 * 3, dtype=np.uint8).reshape(20, 40, 3)
    instances = Instances((20, 40))
    instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    instances.pred_classes = torch.tensor(classes, dtype=torch.long)
    instances.scores = torch.tensor(scores)
    instances.localization_quality = torch.full((len(scores),), 0.4)
    return Detections(image, instances, CLASSES, quality)


NOTHING = {"boxes": [], "classes": (), "scores": ()}


def test_arrays_and_names():
    found = detections_of()
    assert found.boxes.tolist() == BOXES and found.classes.tolist() == [0, 1, 1]
    assert found.names == ["cat", "dog", "dog"] and len(found) == 3
    assert found.localization_quality == pytest.approx([0.4] * 3)
    assert repr(found) == "image: 2 dog, 1 cat"


def test_plain_detectors_have_no_localization_quality():
    assert detections_of(quality=False).localization_quality is None


def test_select_by_score_and_class():
    found = detections_of()
    assert found.select(0.5).names == ["cat", "dog"]
    assert found.select(classes=["dog"]).scores.tolist() == pytest.approx([0.6, 0.3])
    assert len(found.select(0.9, ["dog"])) == 0
    assert found.select(0.3).scores.tolist() == pytest.approx([0.9, 0.6]), "above, not equal"


@pytest.mark.parametrize("classes", [["dog", "cow"], "dog"])
def test_select_of_an_unknown_class_is_an_error(classes):
    with pytest.raises(UsageError, match="the model has no class .*; its classes are cat, dog"):
        detections_of().select(classes=classes)


def test_image_without_objects():
    found = detections_of(**NOTHING)
    assert repr(found) == "image: no objects" and found.names == [] and found.crops() == []
    assert found.select(0.5, ["cat"]).boxes.shape == (0, 4)
    assert found.draw().shape == (240, 480, 3)


def test_crops_are_rounded_outwards_and_not_empty():
    crops = detections_of().crops()
    image = detections_of().image
    assert np.array_equal(crops[0], image[:, :10])
    assert np.array_equal(crops[1], image[3:16, 4:30])
    assert np.array_equal(crops[2], image[:, 39:])


def test_pictures(tmp_path):
    found = detections_of()
    found.save(tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert picture.size == (480, 240)
        assert np.array_equal(np.asarray(picture), found.draw())
    assert found.draw(side=100).shape == (50, 100, 3)
    with Image.open(io.BytesIO(found._repr_png_())) as picture:
        assert picture.size == (480, 240)


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    """Two images, one of them in a subfolder, and their detections."""
    found = {"a.png": detections_of(), "sub/b.png": detections_of(**NOTHING)}
    for name, detections in found.items():
        file = tmp_path / "images" / name
        file.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(detections.image).save(file)
    frames = [Frame(InputFile(tmp_path / "images" / n, Path(n))) for n in found]
    return list(zip(frames, found.values(), strict=True))


def write(writer, images):
    for frame, detections in images:
        writer.add(frame, detections)
    writer.close()


def read(name):
    """Boxes (xyxy) and class names of a data set, by file name."""
    register([name])
    records = DatasetCatalog.get(name)
    classes = MetadataCatalog.get(name).thing_classes
    return {
        Path(record["file_name"]).name: [
            (
                BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS),
                classes[a["category_id"]],
            )
            for a in record["annotations"]
        ]
        for record in records
    }


def check(annotations):
    assert annotations["b.png"] == []
    for (box, name), expected, label in zip(
        annotations["a.png"], BOXES, ("cat", "dog", "dog"), strict=True
    ):
        assert box == pytest.approx(expected, abs=0.01) and name == label


def test_coco_file_can_be_read_again(tmp_path, images):
    root = common_folder(frame.file.path for frame, _ in images)
    assert root == tmp_path / "images"
    write(CocoDataset(tmp_path / "new/a.json", CLASSES, root), images)
    check(read(f"coco:{tmp_path}/new/a.json:{root}"))


def test_yolo_files_can_be_read_again(tmp_path, images):
    write(YoloLabels(tmp_path / "labels", CLASSES, [frame.file for frame, _ in images]), images)
    check(read(f"yolo:{tmp_path}/images:{tmp_path}/labels"))


def test_two_images_do_not_share_a_yolo_file(tmp_path):
    files = [InputFile(Path(name), Path(name)) for name in ("a.jpg", "a.png")]
    with pytest.raises(UsageError, match=r"a\.jpg and a\.png"):
        YoloLabels(tmp_path / "labels", CLASSES, files)
    assert not (tmp_path / "labels").exists()


def test_image_called_classes_is_not_overwritten_by_the_class_names(tmp_path):
    with pytest.raises(UsageError, match=r"classes\.jpg would be classes\.txt"):
        YoloLabels(
            tmp_path / "labels", CLASSES, [InputFile(Path("classes.jpg"), Path("classes.jpg"))]
        )
    assert not (tmp_path / "labels").exists()


def test_label_studio_tasks(tmp_path, images):
    write(LabelStudioTasks(tmp_path / "tasks.json", ["cat", 'd"<og'], tmp_path, "best"), images)
    first, second = json.loads((tmp_path / "tasks.json").read_text())
    assert first["data"]["image"] == "/data/local-files/?d=images/a.png"
    assert second["data"]["image"] == "/data/local-files/?d=images/sub/b.png"
    (prediction,) = first["predictions"]
    assert prediction["model_version"] == "best"
    assert prediction["score"] == pytest.approx(0.6, abs=1e-4)
    result = prediction["result"][1]
    assert result["value"] == {
        "x": 11.25,
        "y": 16.25,
        "width": 63.75,
        "height": 62.5,
        "rotation": 0,
        "rectanglelabels": ["dog"],
    }
    assert (result["original_width"], result["original_height"]) == (40, 20)
    assert second["predictions"][0]["result"] == []
    view = ElementTree.parse(tmp_path / "tasks.xml").getroot()
    assert [label.get("value") for label in view.iter("Label")] == ["cat", 'd"<og']
    (tag,) = view.iter("RectangleLabels")
    assert (tag.get("name"), tag.get("toName")) == (result["from_name"], result["to_name"])


def test_crops_have_a_folder_for_each_class(tmp_path, images):
    write(CropWriter(tmp_path / "crops"), images)
    files = {str(f.relative_to(tmp_path / "crops")) for f in (tmp_path / "crops").rglob("*.png")}
    assert files == {"cat/a-1.png", "dog/a-2.png", "dog/a-3.png"}
    with Image.open(tmp_path / "crops/cat/a-1.png") as crop:
        assert np.array_equal(np.asarray(crop), images[0][1].crops()[0])


def test_each_video_is_written_to_its_own_file(tmp_path):
    files = [InputFile(Path(name), Path(name)) for name in ("a.mp4", "b.mp4")]
    frames = [(Frame(file, i, 5.0), detections_of()) for file in files for i in range(2)]
    write(PictureWriter(tmp_path), frames)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]
