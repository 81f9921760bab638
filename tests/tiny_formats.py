"""The same tiny data set in each format that can be read.

All functions take the folder of a data set of :func:`.make_coco` and a folder to write into, and
return the name of the new data set.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.tiny_data import CLASSES, edit_json, write_voc_xml


def as_coco(source: Path, folder: Path) -> str:
    """The data set itself."""
    shutil.copytree(source, folder)
    return f"coco:{folder}/annotations.json:{folder}/images"


def as_cvat(source: Path, folder: Path) -> str:
    """As CVAT exports: attributes, empty licenses, and images in a folder of the subset."""
    shutil.copytree(source, folder)
    (folder / "images").rename(folder / "default")
    (folder / "images").mkdir()
    (folder / "default").rename(folder / "images" / "default")

    def edit(content):
        content |= {"licenses": [{"name": "", "id": 0, "url": ""}], "info": {"year": ""}}
        for image in content["images"]:
            image |= {"license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0}
        for entry in content["annotations"]:
            entry["segmentation"] = []
            entry["attributes"] = {"occluded": False, "rotation": 0.0, "track_id": 1}

    edit_json(folder / "annotations.json", edit)
    return f"coco:{folder}/annotations.json:{folder}/images"


def as_label_studio(source: Path, folder: Path) -> str:
    """As Label Studio exports: ids from 0, and paths on its server with a prefix."""
    shutil.copytree(source, folder)

    def edit(content):
        for i, image in enumerate(content["images"]):
            name = image["file_name"]
            place = ("images/upload/1/", "../../label-studio/data/media/upload/1/")[i % 2]
            image |= {"id": i, "file_name": f"{place}{i + 16:08x}-{name}"}
            # Downloaded images have the prefix as well, images of the user do not.
            if i % 3:
                file = folder / "images" / name
                file.rename(file.with_name(f"{i + 16:08x}-{name}"))
        for entry in content["annotations"]:
            entry |= {"id": entry["id"] - 1, "image_id": entry["image_id"] - 1, "ignore": 0}
            entry |= {"segmentation": [], "category_id": entry["category_id"] - 1}
        for category in content["categories"]:
            category["id"] -= 1

    edit_json(folder / "annotations.json", edit)
    return f"coco:{folder}/annotations.json:{folder}/images"


def as_voc(source: Path, folder: Path) -> str:
    """Pascal VOC's layout with PNG images."""
    shutil.copytree(source / "images", folder / "JPEGImages")
    for stem, image, boxes in _contents(source):
        _write_xml(folder / "Annotations" / f"{stem}.xml", image, boxes)
    listed = folder / "ImageSets" / "Main" / "all.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("".join(f"{stem}\n" for stem, _, _ in _contents(source)))
    return f"voc:{folder}:all"


def as_voc_folder(source: Path, folder: Path) -> str:
    """The xml files of labelImg beside the images."""
    shutil.copytree(source / "images", folder)
    for stem, image, boxes in _contents(source):
        _write_xml(folder / f"{stem}.xml", image, boxes)
    return f"voc:{folder}"


def as_yolo(source: Path, folder: Path) -> str:
    """The layout of Ultralytics with a yaml file."""
    as_yolo_folders(source, folder)
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASSES))
    (folder / "data.yaml").write_text(f"path: .\ntrain: images\nval: images\nnames:\n{names}")
    return f"yolo:{folder}/data.yaml"


def as_yolo_folders(source: Path, folder: Path) -> str:
    """Images and labels, with the names of the classes beside the labels."""
    shutil.copytree(source / "images", folder / "images")
    (folder / "labels").mkdir()
    for stem, image, boxes in _contents(source):
        lines = []
        for label, x, y, width, height in boxes:
            fractions = (
                (x + width / 2) / image["width"],
                (y + height / 2) / image["height"],
                width / image["width"],
                height / image["height"],
            )
            lines.append(f"{label} " + " ".join(f"{value:.6f}" for value in fractions))
        if lines:
            (folder / "labels" / f"{stem}.txt").write_text("\n".join(lines) + "\n")
    (folder / "labels" / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return f"yolo:{folder}/images:{folder}/labels"


def as_labelme(source: Path, folder: Path) -> str:
    """A json of rectangles beside each image."""
    shutil.copytree(source / "images", folder)
    for stem, image, boxes in _contents(source):
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": [
                {
                    "label": CLASSES[label],
                    "points": [[x + width, y], [x, y + height]],  # any two opposite corners
                    "group_id": None,
                    "shape_type": "rectangle",
                    "flags": {},
                }
                for label, x, y, width, height in boxes
            ],
            "imagePath": image["file_name"],
            "imageData": None,
            "imageHeight": image["height"],
            "imageWidth": image["width"],
        }
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return f"labelme:{folder}"


FORMATS: dict[str, Callable[[Path, Path], str]] = {
    "coco": as_coco,
    "CVAT": as_cvat,
    "Label Studio": as_label_studio,
    "voc": as_voc,
    "voc folder": as_voc_folder,
    "yolo": as_yolo,
    "yolo folders": as_yolo_folders,
    "labelme": as_labelme,
}


def _contents(source: Path) -> Iterator[tuple[str, dict, list[tuple[int, ...]]]]:
    """Stem, COCO entry and boxes (class from 0, x, y, width, height) of each image."""
    content = json.loads((source / "annotations.json").read_text())
    for image in content["images"]:
        boxes = [
            (entry["category_id"] - 1, *entry["bbox"])
            for entry in content["annotations"]
            if entry["image_id"] == image["id"]
        ]
        yield Path(image["file_name"]).stem, image, boxes


def _write_xml(file: Path, image: dict, boxes: list[tuple[int, ...]]) -> None:
    objects = [(CLASSES[c], x + 1, y + 1, x + w, y + h) for c, x, y, w, h in boxes]
    write_voc_xml(file, objects, (image["height"], image["width"]))
