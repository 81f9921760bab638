"""Split files: the same images again, or a clear error."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog
from tiny_data import CLASSES, edit_json, make_coco, make_folder, make_voc

from locreweight.config import load_config
from locreweight.data.datasets.splits import split_annotated, split_indices, write_split_file
from locreweight.data.training_sets import load_training_sets, register_datasets
from locreweight.errors import UsageError

ROOT = Path(__file__).parents[3]
IMAGES = 20


class Case:
    """A COCO set and a VOC set, and what the config says of them."""

    def __init__(self, folder):
        self.folder = folder
        self.json, images = make_coco(folder / "coco", images=IMAGES)
        voc = make_voc(folder / "voc", images=IMAGES, seed=1)
        self.coco, self.voc = f"coco:{self.json}:{images}", f"voc:{voc}:trainval"
        self.file = folder / "splits/mine.json"

    def cfg(self, names, percent, seed, file=None):
        cfg = load_config("", [])
        cfg.DATASETS.TRAIN = tuple(names)
        cfg.DATASETS.CLASS_NAMES = CLASSES
        cfg.DATASETS.LABELED_PERCENT, cfg.DATASETS.SPLIT_SEED = percent, seed
        cfg.DATASETS.SPLIT_FILE = str(file or "")
        register_datasets(cfg)
        return cfg

    def records(self, *names):
        self.cfg(names, 10.0, 1)
        return {name: DatasetCatalog.get(name) for name in names}

    def split(self, names, percent, seed, file=None):
        records = self.records(*names)
        return split_annotated(self.cfg(names, percent, seed, file), records)


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


def names_of(records):
    return [record["file_name"] for record in records]


@pytest.mark.parametrize("kinds", [["coco"], ["voc"], ["coco", "voc"]])
@pytest.mark.parametrize(("percent", "seed"), [(10.0, 1), (50.0, 1), (10.0, 2)])
def test_stored_split_equals_the_drawn_one(case, kinds, percent, seed):
    names = [getattr(case, kind) for kind in kinds]
    write_split_file(case.file, case.records(*names), [10, 50.0], [1, 2])
    drawn, rest = case.split(names, percent, seed)
    stored, stored_rest = case.split(names, percent, seed, case.file)
    assert names_of(stored) == names_of(drawn)
    assert names_of(stored_rest) == names_of(rest)
    assert len(stored) == len(names) * IMAGES * percent / 100


def test_images_without_boxes_can_be_drawn(case):
    edit_json(case.json, lambda content: content.update(annotations=[]))
    write_split_file(case.file, case.records(case.coco), [50.0], [1])
    labeled, rest = case.split([case.coco], 50.0, 1, case.file)
    assert (len(labeled), len(rest)) == (10, 10)


def test_file_has_the_checksum_of_the_annotations(case):
    write_split_file(case.file, case.records(case.coco), [10.0], [1, 2])
    content = json.loads(case.file.read_text())
    (entry,) = content["sets"]
    assert content["nested"] is True
    assert entry["annotations"] == "annotations.json"
    assert entry["sha256"] == hashlib.sha256(case.json.read_bytes()).hexdigest()
    assert entry["images"] == IMAGES
    expected = [i + 1 for i in split_indices(IMAGES, 10.0, 2)[0]]  # ids count from 1
    assert entry["labeled"]["10.0"]["2"] == expected


def test_training_uses_the_stored_split(case):
    write_split_file(case.file, case.records(case.coco), [25.0], [3])
    cfg = case.cfg([case.coco], 25.0, 3, case.file)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(CLASSES)
    sets = load_training_sets(cfg)
    assert names_of(sets.labeled) == names_of(case.split([case.coco], 25.0, 3)[0])
    assert len(sets.unlabeled) == 15


def test_failed_write_keeps_the_previous_file(case, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_split_file(case.file, case.records(case.coco), [25.0], [3])
    before = case.file.read_bytes()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UsageError, match="No space left"):
        write_split_file(case.file, case.records(case.coco), [50.0], [3])
    assert case.file.read_bytes() == before


def test_another_process_writes_the_same_file(case):
    write_split_file(case.file, case.records(case.coco), [10.0, 20.0], [1, 2, 3])
    other = case.folder / "other.json"
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "datasets/make_split.py"), "--percent", "10", "20"),
            *("--seeds", "1", "2", "3", "--output", str(other)),
            *("DATASETS.TRAIN", f"['{case.coco}']"),
        ],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        check=True,
    )
    assert other.read_bytes() == case.file.read_bytes()


# --- what does not fit ----------------------------------------------------------------------------


def changed_annotations(case):
    edit_json(case.json, lambda content: content["annotations"][0].update(category_id=2))


def fewer_images(content):
    content["sets"][0]["images"] = 7


def unknown_image(content):
    content["sets"][0]["labeled"]["10.0"]["1"] = [1, 999]


def repeated_image(content):
    content["sets"][0]["labeled"]["10.0"]["1"] = [1, 2, 1]


def two_sets(content):
    content["sets"] *= 2


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (fewer_images, f"of 7 images, coco:.* has {IMAGES}"),
        (unknown_image, "lists 1 images that coco:.* lacks, such as 999"),
        (repeated_image, "lists 1 images of coco:.* more than once"),
        (two_sets, r"of 2 data sets, DATASETS\.TRAIN has 1"),
        (lambda content: content["sets"][0].pop("sha256"), "is not a split file"),
        (lambda content: content.update(sets=3), "is not a split file"),
    ],
)
def test_file_that_does_not_match(case, edit, message):
    write_split_file(case.file, case.records(case.coco), [10.0], [1])
    edit_json(case.file, lambda content: edit(content) and None)
    with pytest.raises(UsageError, match=message) as error:
        case.split([case.coco], 10.0, 1, case.file)
    assert str(case.file) in str(error.value)


def test_other_annotations(case):
    write_split_file(case.file, case.records(case.coco), [10.0], [1])
    before = hashlib.sha256(case.json.read_bytes()).hexdigest()
    changed_annotations(case)
    after = hashlib.sha256(case.json.read_bytes()).hexdigest()
    with pytest.raises(UsageError, match=f"{before}, .*annotations.json has {after}"):
        case.split([case.coco], 10.0, 1, case.file)


@pytest.mark.parametrize(
    ("percent", "seed", "message"),
    [
        (5.0, 1, "no split of 5 %; set DATASETS.LABELED_PERCENT to one of 10, 50"),
        (10.0, 3, "no split of seed 3; set DATASETS.SPLIT_SEED to one of 1, 2"),
    ],
)
def test_missing_split(case, percent, seed, message):
    write_split_file(case.file, case.records(case.coco), [10.0, 50.0], [1, 2])
    with pytest.raises(UsageError, match=message):
        case.split([case.coco], percent, seed, case.file)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"10.0": 3}', '{"a": {"1": [2]}}'])
def test_malformed_file(case, content):
    case.file.parent.mkdir()
    case.file.write_text(content)
    with pytest.raises(UsageError, match=r"mine\.json"):
        case.split([case.coco], 10.0, 1, case.file)


def test_missing_file(case):
    with pytest.raises(UsageError, match=r"none\.json"):
        case.split([case.coco], 10.0, 1, case.folder / "none.json")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_invalid_seed(case, seed):
    with pytest.raises(UsageError, match=rf"^DATASETS\.SPLIT_SEED must .* got {seed}$"):
        case.split([case.coco], 10.0, seed)
    with pytest.raises(UsageError, match=rf"^DATASETS\.SPLIT_SEED must .* got {seed}$"):
        write_split_file(case.file, case.records(case.coco), [10.0], [1, seed])
    assert not case.file.exists()


def test_no_images(case):
    with pytest.raises(UsageError, match=r"no images to split: .*DATASETS\.TRAIN"):
        write_split_file(case.file, {}, [10.0], [1])
    assert not case.file.exists()


@pytest.mark.parametrize("place", ["", "coco/annotations.json/split.json"])
def test_unwritable_file(case, place):
    file = case.folder / place  # a folder, and a file in a file
    with pytest.raises(UsageError, match=f"^cannot write {file}: "):
        write_split_file(file, case.records(case.coco), [10.0], [1])


def test_images_without_annotations(case):
    name = f"folder:{make_folder(case.folder / 'plain')}"
    with pytest.raises(UsageError, match="has no annotations"):
        write_split_file(case.file, case.records(name), [50.0], [1])


# --- the file of Unbiased Teacher -----------------------------------------------------------------


@pytest.fixture
def published(case):
    """Positions among the images with objects: the first and the fourth have none, or a crowd."""

    def edit(content):
        kept = [a for a in content["annotations"] if a["image_id"] != 1]
        for annotation in kept:
            annotation["iscrowd"] = int(annotation["image_id"] == 4)
        content.update(annotations=kept)
        content["images"].reverse()  # the order is that of the ids, not of the file

    edit_json(case.json, edit)
    file = case.folder / "COCO_supervision.txt"
    file.write_text(json.dumps({"10.0": {"0": [3], "1": [1]}, "20.0": {"1": [17, 0, 2]}}))
    return file


def ids_of(records):
    return [record["image_id"] for record in records]


def test_published_positions_skip_images_without_objects(case, published):
    # 18 images are left, with the ids 2, 3, 5, 6, ... 20: 10 % of them, rounded down, is 1.
    labeled, rest = case.split([case.coco], 10.0, 1, published)
    assert ids_of(labeled) == [3]
    assert ids_of(rest) == [2, *range(5, 21)]
    labeled, rest = case.split([case.coco], 20.0, 1, published)
    assert ids_of(labeled) == [2, 5, 20]
    assert ids_of(case.split([case.coco], 10.0, 0, published)[0]) == [6]


def test_published_split_of_other_annotations(case, published):
    edit_json(case.json, lambda content: content.update(annotations=content["annotations"][:4]))
    with pytest.raises(UsageError, match="1 images for 10 %, but 10 % of the 2 images .* are 0"):
        case.split([case.coco], 10.0, 1, published)


@pytest.mark.parametrize("positions", [[18], [-1], [1, 1]])
def test_invalid_positions(case, published, positions):
    published.write_text(json.dumps({"10.0": {"1": positions}}))
    with pytest.raises(UsageError, match=r"COCO_supervision\.txt"):
        case.split([case.coco], 10.0, 1, published)
