"""Reading, checking and splitting the data sets of a config."""

import logging
import shutil

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper
from tiny_data import CLASSES, edit_json, make_coco, make_folder, make_voc, write_voc_xml

from locreweight.config import load_config
from locreweight.data import training_sets
from locreweight.data.datasets.catalog import register
from locreweight.data.datasets.splits import split_indices
from locreweight.data.monitored import has_annotations
from locreweight.data.training_sets import TrainingSets, load_training_sets, register_datasets
from locreweight.errors import UsageError
from tests.tiny_formats import as_labelme, as_voc_folder


@pytest.fixture
def coco(tmp_path):
    """(json file, name) of ten labeled images."""
    json_file, images = make_coco(tmp_path / "labeled", images=10)
    return json_file, f"coco:{json_file}:{images}"


@pytest.fixture
def folder(tmp_path):
    """The name of three images without labels."""
    return f"folder:{make_folder(tmp_path / 'unlabeled', images=3)}"


def load(*options, train, unlabeled=()):
    names = ["DATASETS.TRAIN", str(tuple(train)), "DATASETS.UNLABELED", str(tuple(unlabeled))]
    classes = ["MODEL.ROI_HEADS.NUM_CLASSES", str(len(CLASSES))]
    cfg = load_config("", [*names, *classes, *options])
    register_datasets(cfg)
    return load_training_sets(cfg)


def files(records):
    return [record["file_name"] for record in records]


def boxes(record):
    return [[float(value) for value in a["bbox"]] for a in record["annotations"]]


def test_labeled_and_unlabeled_sets(coco, folder):
    sets = load(train=[coco[1]], unlabeled=[folder])
    assert len(sets.labeled) == 10
    assert all(record["annotations"] for record in sets.labeled)
    assert len(sets.unlabeled) == 3
    assert sets.class_names == list(CLASSES)


def test_several_data_sets_are_concatenated(tmp_path, coco, folder):
    voc = f"voc:{make_voc(tmp_path / 'voc', images=2)}:trainval"
    others = f"folder:{make_folder(tmp_path / 'others', images=2)}"
    sets = load(
        *("DATASETS.CLASS_NAMES", str(CLASSES)),
        train=[coco[1], voc],
        unlabeled=[folder, others],
    )
    assert [file[-4:] for file in files(sets.labeled)] == [".png"] * 10 + [".jpg"] * 2
    assert len(sets.unlabeled) == 5


@pytest.mark.parametrize("percent", ["0.1", "30.0", "80.0"])
def test_images_without_used_labels_become_unlabeled(coco, folder, percent):
    every = files(load(train=[coco[1]], unlabeled=[folder]).labeled)
    sets = load("DATASETS.LABELED_PERCENT", percent, train=[coco[1]], unlabeled=[folder])
    labeled, rest = split_indices(10, float(percent), 1)
    assert files(sets.labeled) == [every[i] for i in labeled]
    assert files(sets.unlabeled)[:-3] == [every[i] for i in rest]


def test_unlabeled_records_have_only_file_and_id(tmp_path, coco):
    json_file, images = make_coco(tmp_path / "other", images=4)
    sets = load(
        *("DATASETS.LABELED_PERCENT", "50.0"),
        train=[coco[1]],
        unlabeled=[f"coco:{json_file}:{images}"],
    )
    assert len(sets.unlabeled) == 9
    assert all(set(record) == {"file_name", "image_id"} for record in sets.unlabeled)
    assert [record["image_id"] for record in sets.unlabeled] == list(range(9))


def test_unlabeled_coco_file_without_annotations(tmp_path, coco):
    json_file, images = make_coco(tmp_path / "other", images=4)
    edit_json(json_file, lambda content: content.pop("annotations") and None)
    assert len(load(train=[coco[1]], unlabeled=[f"coco:{json_file}:{images}"]).unlabeled) == 4


def of_another_class(folder):
    write_voc_xml(folder / "Annotations/0001.xml", [("bird", 1, 1, 9, 9)])


def without_an_annotation(folder):
    (folder / "Annotations/0001.xml").unlink()


def without_any_annotation(folder):
    shutil.rmtree(folder / "Annotations")


@pytest.mark.parametrize("spoil", [of_another_class, without_an_annotation, without_any_annotation])
def test_unlabeled_voc_images_without_annotations(tmp_path, coco, spoil):
    voc = make_voc(tmp_path / "voc", images=3)
    spoil(voc)
    names = ("DATASETS.CLASS_NAMES", str(CLASSES))
    sets = load(*names, "VIS_PERIOD", "1", train=[coco[1]], unlabeled=[f"voc:{voc}:trainval"])
    assert files(sets.unlabeled) == [str(voc / f"JPEGImages/000{i}.jpg") for i in range(3)]
    assert files(sets.monitored) != [] and not any(
        has_annotations(record) for record in sets.monitored
    )


def test_broken_list_of_unlabeled_voc_images(tmp_path, coco):
    voc = make_voc(tmp_path / "voc", images=3)
    (voc / "ImageSets/Main/trainval.txt").write_text("0001\n0001\n")
    with pytest.raises(UsageError, match="lists .*0001.* more than once"):
        load(train=[coco[1]], unlabeled=[f"voc:{voc}:trainval"])


@pytest.mark.parametrize("kind", ["voc", "labelme"])
def test_class_names_of_the_config_that_are_repeated(tmp_path, folder, kind):
    source = tmp_path / "source"
    make_coco(source)
    convert = as_labelme if kind == "labelme" else as_voc_folder
    name = convert(source, tmp_path / "data")
    classes = ("DATASETS.CLASS_NAMES", str((*CLASSES, CLASSES[0])))
    with pytest.raises(UsageError, match="CLASS_NAMES has classes of the same name: cat"):
        load(*classes, train=[name], unlabeled=[folder])


@pytest.mark.parametrize("convert", [as_labelme, as_voc_folder])
def test_folder_with_annotations_of_some_images(tmp_path, convert):
    """Its other images are unlabeled, also if the folder is in TRAIN and UNLABELED."""
    source = tmp_path / "source"
    make_coco(source, images=4)
    name = convert(source, tmp_path / "data")
    for annotation in sorted((tmp_path / "data").rglob("*.[jx]*"))[1:]:
        annotation.unlink()
    options = ("DATASETS.CLASS_NAMES", str(CLASSES), "DATASETS.EXCLUDE_LABELED", "True")
    sets = load(*options, train=[name], unlabeled=[name])
    assert len(sets.labeled) == 1 and len(sets.unlabeled) == 3
    assert set(files(sets.labeled)).isdisjoint(files(sets.unlabeled))


def test_split_depends_on_its_own_seed_only(coco, folder):
    def labeled(*options):
        shares = ("DATASETS.LABELED_PERCENT", "40.0")
        return files(load(*shares, *options, train=[coco[1]], unlabeled=[folder]).labeled)

    assert labeled("DATASETS.SPLIT_SEED", "2") != labeled()
    assert labeled("SEED", "2") == labeled()


def test_images_without_boxes(coco, folder):
    def empty(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 3]

    edit_json(coco[0], empty)
    kept, filtered = (
        load("DATALOADER.FILTER_EMPTY_ANNOTATIONS", value, train=[coco[1]], unlabeled=[folder])
        for value in ("False", "True")
    )
    assert len(kept.labeled) == 10
    assert set(files(kept.labeled)) - set(files(filtered.labeled)) == {kept.labeled[2]["file_name"]}


def set_boxes(*given):
    """An edit that gives the first annotations these xywh boxes."""

    def edit(content):
        for annotation, box in zip(content["annotations"], given, strict=False):
            annotation["bbox"] = box

    return edit


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([5, 5, 0, 9], "have no area"),
        ([5, 5, 9, 0], "have no area"),
        ([5, 5.5, 0, 9], "have no area"),
        ([30.5, 5, 1e-7, 9], "have no area"),  # in the precision that boxes are trained in
        ([64, 5, 9, 9], "lie outside of their image"),
        ([5, 70, 9, 9], "lie outside of their image"),
        ([-9, 5, 9, 9], "lie outside of their image"),
        ([5, -20, 9, 9], "lie outside of their image"),
    ],
)
def test_unusable_boxes_are_left_out_with_a_warning(coco, folder, caplog, box, words):
    before = load(train=[coco[1]], unlabeled=[folder])
    edit_json(coco[0], set_boxes(box))
    with caplog.at_level(logging.WARNING):
        after = load(train=[coco[1]], unlabeled=[folder])
    assert boxes(after.labeled[0]) == boxes(before.labeled[0])[1:]
    assert [boxes(r) for r in after.labeled[1:]] == [boxes(r) for r in before.labeled[1:]]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert words in warning
    assert files(after.labeled)[0] in warning


NAN, INFINITY = float("nan"), float("inf")
BAD_BOXES = [
    [NAN, 5, 9, 9],
    [5, INFINITY, 9, 9],
    [5, 5, INFINITY, 9],
    [5, 5, -3, 9],
    [5, 5, 9, -3],
    [5, 5, 9],
    [5, 5, 9, 9, 9, 9],
    [None] * 4,
    ["5", "5", "9", "9"],
]


@pytest.mark.parametrize("box", BAD_BOXES, ids=str)
def test_drop_bad_boxes(coco, folder, caplog, box):
    edit_json(coco[0], set_boxes(box))
    drop = ("DATASETS.CHECKS.DROP_BAD_BOXES", "True")
    sets = load(*drop, train=[coco[1]], unlabeled=[folder])
    assert [len(record["annotations"]) for record in sets.labeled] == [1] + [2] * 9
    assert files(sets.labeled)[0] in caplog.text


def test_box_partly_outside_is_clipped(coco, folder):
    edit_json(coco[0], set_boxes([-10, 20, 30, 100]))
    record = load(train=[coco[1]], unlabeled=[folder]).labeled[0]
    sample = DatasetMapper(is_train=True, augmentations=[], image_format="RGB")(record)
    assert sample["instances"].gt_boxes.tensor[0].tolist() == [0, 20, 20, 64]


def test_exclude_labeled(tmp_path, coco, folder):
    images = tmp_path / "labeled" / "images"
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "same.png").symlink_to(images / "0000.png")
    make_folder(linked / "more", images=2)
    exclude = ("DATASETS.EXCLUDE_LABELED", "True")
    sets = load(*exclude, train=[coco[1]], unlabeled=[folder, f"folder:{linked}"])
    assert len(sets.unlabeled) == 5
    assert str(linked / "same.png") not in files(sets.unlabeled)


def test_unlabeled_images_are_used_once(tmp_path, coco, folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("locreweight"), "propagate", True)
    images = tmp_path / "labeled" / "images"
    options = ("DATASETS.LABELED_PERCENT", "30.0", "DATASETS.EXCLUDE_LABELED", "True")
    before = load(*options, train=[coco[1]], unlabeled=[folder])
    assert "repeated entries" not in caplog.text
    with caplog.at_level(logging.INFO):
        after = load(*options, train=[coco[1]], unlabeled=[folder, f"folder:{images}"])
    assert files(after.unlabeled) == files(before.unlabeled)
    assert after.fingerprint == before.fingerprint
    assert "left out 7 repeated entries of unlabeled images" in caplog.text


def list_first_image_again(content):
    content["images"].append(content["images"][0] | {"id": 99})


def test_labeled_images_that_are_listed_twice_give_a_warning(tmp_path, coco, folder, caplog):
    edit_json(coco[0], list_first_image_again)
    other, images = make_coco(tmp_path / "test", seed=1)
    edit_json(other, list_first_image_again)
    test = f"coco:{other}:{images}"
    with caplog.at_level(logging.WARNING):
        load("DATASETS.TEST", str((test,)), train=[coco[1]], unlabeled=[folder])
    first, second = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert first.startswith("DATASETS.TRAIN lists images more than once (1)")
    assert second.startswith(f"{test} lists images more than once (1)")
    assert "0000.png" in first and "0000.png" in second


@pytest.mark.parametrize("exclude", ["False", "True"])
def test_labeled_test_images_give_a_warning(coco, folder, caplog, exclude):
    options = ("DATASETS.TEST", str((coco[1],)), "DATASETS.EXCLUDE_LABELED", exclude)
    sets = load(*options, train=[coco[1]], unlabeled=[folder])
    assert len(sets.labeled) == 10
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert f"10 of 10 labeled images are also in the test sets {coco[1]}:" in warning


def test_supervised_training_needs_no_unlabeled_images(coco):
    options = ("SEMI.BURN_IN_ITERS", "100", "SOLVER.MAX_ITER", "100")
    assert len(load(*options, train=[coco[1]]).unlabeled) == 0


def test_split_does_not_change_random_generators(coco, folder):
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    load("DATASETS.LABELED_PERCENT", "50.0", train=[coco[1]], unlabeled=[folder])
    assert np.random.rand() == expected


def sets_of(*names):
    return TrainingSets([{"file_name": name} for name in names], [], [])


@pytest.mark.parametrize(
    ("names", "same"),
    [
        (("a/1.png", "a/2.png"), True),
        (("elsewhere/a/1.png", "b/2.png"), True),
        (("a/2.png", "a/1.png"), False),
        (("a/1.png",), False),
        (("a/1.png", "a/3.png"), False),
        (("a/1.png", "a/2.png", "a/2.png"), False),
        (("a/1.png\0a/2.png",), False),
        (("a/\udcff.png", "a/2.png"), False),
        ((), False),
    ],
)
def test_fingerprint_depends_on_files_and_order(names, same):
    known, other = sets_of("a/1.png", "a/2.png"), sets_of(*names)
    assert (other.fingerprint == known.fingerprint) == same
    if same:
        other.check_same(known.fingerprint, allow_changed=False)
    else:
        with pytest.raises(UsageError, match=f"labeled ones were 2 images .*, now {len(names)} "):
            other.check_same(known.fingerprint, allow_changed=False)


def test_run_without_fingerprint():
    sets_of("a.png").check_same({}, allow_changed=False)


class TestOneReaderPerMachine:
    """A COCO json is read first by one process, and by the others once it is done."""

    @pytest.mark.parametrize("content", ["valid", "{"])
    @pytest.mark.parametrize("rank", [0, 1])
    def test_order(self, tmp_path, monkeypatch, rank, content):
        json_file, images = make_coco(tmp_path)
        if content != "valid":
            json_file.write_text(content)
        events = []
        name = f"coco:{json_file}:{images}"
        register([name])
        read = DatasetCatalog.get
        monkeypatch.setattr(training_sets.comm, "get_local_rank", lambda: rank)
        monkeypatch.setattr(training_sets.comm, "synchronize", lambda: events.append("wait"))
        monkeypatch.setattr(
            training_sets.DatasetCatalog, "get", lambda name: (events.append("read"), read(name))[1]
        )
        if content == "valid":
            training_sets._load(name)
        else:
            with pytest.raises(UsageError, match="is not json"):
                training_sets._load(name)
        # An error of the first process does not leave the others waiting.
        assert events == (["read", "wait"] if rank == 0 else ["wait", "read"])
