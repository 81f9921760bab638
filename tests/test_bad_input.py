"""Mistakes in data, config and command line end with a message that names cause and fix."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_data import edit_json, make_coco, write_voc_xml

import locreweight.modeling  # noqa: F401  (registers the model)
from locreweight.checkpoint.loading import check_weights_exist
from locreweight.config import load_config
from locreweight.config_scaling import scale_to_world_size
from locreweight.data.mapper import ViewMapper
from locreweight.engine import SemiSupervisedTrainer, evaluate, load_for_evaluation
from locreweight.errors import UsageError
from tests.tiny_project import Project

ROOT = Path(__file__).parents[1]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def set_to(key, value):
    return lambda project: project.set(key, value)


def first(key, **values):
    """Spoils the first entry of a list in the labeled json; None takes a field away."""

    def edit(content):
        for field, value in values.items():
            content[key][0].update({field: value})
            if value is None:
                del content[key][0][field]

    return lambda project: edit_json(project.json, edit)


def without(key):
    return lambda project: edit_json(project.json, lambda content: content.pop(key) and None)


def written(text):
    return lambda project: project.json.write_bytes(text)


def edit_test(edit):
    return lambda project: edit_json(project.test_json, edit)


def box(*xywh):
    return first("annotations", bbox=list(xywh))


def edit_voc(edit):
    def spoil(project):
        file = project.voc() / "Annotations" / "0001.xml"
        file.write_text(edit(file.read_text()))

    return spoil


def other_voc_class(project):
    file = project.voc() / "Annotations" / "0001.xml"
    write_voc_xml(file, [("emu", 1, 1, 9, 9)])


def missing_voc_annotation(project):
    (project.voc() / "Annotations" / "0001.xml").unlink()


def missing_images(project):
    for name in ("0001.png", "0003.png"):
        (project.images / name).unlink()


def linked_images(project):
    (project.folder / "link").symlink_to(project.images, target_is_directory=True)
    project.set("DATASETS.UNLABELED", [f"folder:{project.folder / 'link'}"])


def same_images(project):
    project.set("DATASETS.UNLABELED", [f"folder:{project.images}"])


def empty_folder(project):
    for file in project.unlabeled.iterdir():
        file.rename(file.with_suffix(".txt"))


def listed(content, folder=None, key="DATASETS.UNLABELED"):
    """A list of images with this content."""

    def spoil(project):
        index = project.folder / "index.txt"
        index.write_text(content)
        project.set(key, [f"list:{index}:{folder or project.unlabeled}"])

    return spoil


def repeated_class(project):
    for file in (project.json, project.test_json):
        edit_json(file, lambda content: content["categories"][1].update(name="cat"))


def rename_class(content):
    content["categories"][0]["name"] = "emu"


def swap_classes(content):
    one, two, _ = content["categories"]
    one["name"], two["name"] = two["name"], one["name"]


def add_class(content):
    content["categories"].append({"id": 4, "name": "emu"})


NAN, INFINITY = math.nan, math.inf
WAYS_TO_NAME = ["coco:<annotations.json>", "voc:<folder>", "folder:<image folder>", "list:<index"]
NO_COCO = ["annotations.json is not a COCO annotation file"]
DROP = ["0000.png", "DATASETS.CHECKS.DROP_BAD_BOXES True"]
NO_UNLABELED = ["no unlabeled images", "DATASETS.UNLABELED", "DATASETS.LABELED_PERCENT"]
OVERLAP = ["4 unlabeled images", "0000.png", "DATASETS.EXCLUDE_LABELED True"]

SPOILED = {
    # name of the case: (what is wrong, what the message has to say)
    "unknown train set": (set_to("DATASETS.TRAIN", ["nowhere"]), ["'nowhere'", *WAYS_TO_NAME]),
    "unknown unlabeled set": (set_to("DATASETS.UNLABELED", ["not_here"]), ["not_here"]),
    "unknown test set": (set_to("DATASETS.TEST", ["not_there"]), ["not_there"]),
    "coco without folder": (set_to("DATASETS.TRAIN", ["coco:a.json"]), ["form coco:<annotations"]),
    "voc without split": (set_to("DATASETS.TRAIN", ["voc:here"]), ["'here'", "not exist"]),
    "no json": (set_to("DATASETS.TRAIN", ["coco:/no/a.json:/tmp"]), ["'/no/a.json'", "not exist"]),
    "no coco folder": (
        lambda p: p.set("DATASETS.TRAIN", [f"coco:{p.json}:/no/images"]),
        ["'/no/images'", "not exist"],
    ),
    "no folder": (set_to("DATASETS.UNLABELED", ["folder:/no/images"]), ["'/no/images'", "not ex"]),
    "no list": (
        set_to("DATASETS.UNLABELED", ["list:/no/index.txt:/tmp"]),
        ["'/no/index.txt'", "not exist"],
    ),
    "list without folder": (
        set_to("DATASETS.UNLABELED", ["list:index.txt"]),
        ["form list:<index.txt>:<image folder>"],
    ),
    "no list folder": (
        lambda p: p.set("DATASETS.UNLABELED", [f"list:{p.json}:/no/images"]),
        ["'/no/images'", "not exist"],
    ),
    "list that leads out": (
        listed("0000.png\n/etc/passwd\n"),
        ["index.txt", "/etc/passwd", "DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS True"],
    ),
    "list of nothing": (listed("\n"), ["index.txt", "no image"]),
    "list of another folder": (listed("other/0000.png\n"), ["index.txt", "other/0000.png"]),
    "list with an image twice": (listed("0000.png\n" * 2), ["0000.png", "more than once"]),
    "list of labeled images": (
        lambda p: listed("".join(f"000{i}.png\n" for i in range(4)), folder=p.images)(p),
        OVERLAP,
    ),
    "test set by a list": (
        lambda p: listed("0000.png\n", key="DATASETS.TEST")(p),
        ["index.txt", "no annotat"],
    ),
    "no voc folder": (set_to("DATASETS.TRAIN", ["voc:/no/voc:train"]), ["'/no/voc'", "not exist"]),
    "no voc split": (
        lambda p: p.set("DATASETS.TRAIN", [f"voc:{p.voc()}:other"]),
        ["other.txt", "not exist"],
    ),
    "no train set": (set_to("DATASETS.TRAIN", []), ["DATASETS.TRAIN is empty"]),
    # what is in them
    "text for json": (written(b"hello"), [*NO_COCO, "not json"]),
    "half of a json": (written(b'{"images": ['), [*NO_COCO, "not json"]),
    "bytes for json": (written(b"\xff\xfe\x00"), [*NO_COCO, "not json"]),
    "empty file for json": (written(b""), [*NO_COCO, "not json"]),
    "list at top level": (written(b"[]"), [*NO_COCO, "list"]),
    "no images in json": (without("images"), [*NO_COCO, "no list named 'images'"]),
    "no categories": (without("categories"), [*NO_COCO, "'categories'"]),
    "empty categories": (
        written(b'{"images":[],"annotations":[],"categories":[]}'),
        [*NO_COCO, "categories is empty"],
    ),
    "no annotations in json": (without("annotations"), ["annotations.json", "no labeled image"]),
    "image without id": (first("images", id=None), [*NO_COCO, "'images' lacks ['id']"]),
    "image without file": (first("images", file_name=None), [*NO_COCO, "['file_name']"]),
    "image without width": (first("images", width=None), [*NO_COCO, "['width']"]),
    "annotation without id": (first("annotations", id=None), [*NO_COCO, "'annotations' lacks"]),
    "annotation without image": (first("annotations", image_id=None), [*NO_COCO, "['image_id']"]),
    "annotation without class": (first("annotations", category_id=None), ["['category_id']"]),
    "annotation without box": (first("annotations", bbox=None), DROP),
    "annotation with empty box": (
        first("annotations", bbox=[]),
        [*NO_COCO, "'bbox' that is not a list of numbers"],
    ),
    "category without name": (first("categories", name=None), [*NO_COCO, "['name']"]),
    "unknown category": (first("annotations", category_id=99), [*NO_COCO, "category_id=99"]),
    "ids twice": (first("annotations", id=2), [*NO_COCO, "not unique"]),
    "unknown voc class": (other_voc_class, ["0001.xml", "'emu'", "DATASETS.CLASS_NAMES"]),
    "no voc annotation": (missing_voc_annotation, ["0001.xml", "not exist"]),
    "broken xml": (edit_voc(lambda text: text[:-20]), ["0001.xml", "malformed"]),
    "no size in xml": (edit_voc(lambda text: text.replace("width>", "w>")), ["size/width"]),
    "no corner in xml": (edit_voc(lambda text: text.replace("xmin>", "x>")), ["bndbox/xmin"]),
    "word for a corner": (edit_voc(lambda text: text.replace("<xmin>", "<xmin>x")), ["0001.xml"]),
    # classes
    "classes of the model": (
        set_to("MODEL.ROI_HEADS.NUM_CLASSES", 5),
        ["labeled", "3 classes", "MODEL.ROI_HEADS.NUM_CLASSES 3"],
    ),
    "number of test classes": (edit_test(add_class), ["test", "classes", "emu"]),
    "names of test classes": (edit_test(rename_class), ["do not have the same classes", "emu"]),
    "order of test classes": (
        edit_test(swap_classes),
        ["in a different order", "'dog', 'cat', 'owl'", "DATASETS.CLASS_NAMES sets that of"],
    ),
    "names of the config": (
        set_to("DATASETS.CLASS_NAMES", ["cat", "dgo", "owl"]),
        [
            "do not have the same classes",
            "DATASETS.CLASS_NAMES: 'cat', 'dgo', 'owl'",
            "lacks 'dog'",
        ],
    ),
    "order of the config": (
        set_to("DATASETS.CLASS_NAMES", ["dog", "cat", "owl"]),
        ["in a different order", "DATASETS.CLASS_NAMES: 'dog', 'cat', 'owl'"],
    ),
    "class named twice": (repeated_class, ["classes of the same name", "cat"]),
    "test set without classes": (
        lambda p: p.set("DATASETS.TEST", [f"folder:{p.unlabeled}"]),
        ["unlabeled", "no annotat"],
    ),
    "train set without classes": (
        lambda p: p.set("DATASETS.TRAIN", [f"folder:{p.images}"]),
        ["has no annotations", "DATASETS.UNLABELED"],
    ),
    # images
    "missing images": (missing_images, ["2 of 4 images are missing", "0001.png", "0003.png"]),
    "no image in a folder": (empty_folder, ["no image", ".png", "unlabeled"]),
    "same images": (same_images, OVERLAP),
    "same images by a link": (linked_images, [*OVERLAP, "link"]),
    "no unlabeled images": (set_to("DATASETS.UNLABELED", []), NO_UNLABELED),
    "no unlabeled batch": (set_to("SOLVER.IMS_PER_BATCH_UNLABELED", 0), NO_UNLABELED),
    "no labels": (
        set_to("DATASETS.LABELED_PERCENT", 0.0),
        ["DATASETS.LABELED_PERCENT", "(0, 100]", "0.0"],
    ),
    "too many labels": (
        set_to("DATASETS.LABELED_PERCENT", 101.0),
        ["DATASETS.LABELED_PERCENT", "(0, 100]", "101.0"],
    ),
    # boxes
    "NaN": (box(NAN, 1, 9, 9), DROP),
    "infinite corner": (box(1, INFINITY, 9, 9), DROP),
    "infinite width": (box(1, 1, INFINITY, 9), DROP),
    "inverted in x": (box(9, 1, -5, 9), DROP),
    "inverted in y": (box(9, 1, 5, -9), DROP),
    "three numbers": (box(1, 1, 9), DROP),
    "no numbers": (box(None, None, None, None), DROP),
    # the rest
    "weights": (set_to("MODEL.WEIGHTS", "/no/model.pth"), ["'/no/model.pth'", "does not exist"]),
}


@pytest.mark.parametrize("case", SPOILED)
def test_training_does_not_start(project, case):
    spoil, words = SPOILED[case]
    spoil(project)
    with pytest.raises(UsageError) as caught:
        SemiSupervisedTrainer(project.config())
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"not in the message: {missing}; it is: {caught.value}"
    assert not (project.folder / "output").exists()


def test_unchanged_project_is_valid(project, monkeypatch):
    reached = []
    build = "locreweight.engine.models.build_members"
    monkeypatch.setattr(build, lambda cfg, method: reached.append(cfg))
    with pytest.raises(AttributeError):  # there is no model to continue with
        SemiSupervisedTrainer(project.config())
    assert reached


@pytest.mark.parametrize("count", [6, 40])
def test_many_faults_are_counted_and_some_named(project, count):
    project.json, project.images = make_coco(project.folder / "many", images=count)
    project.set("DATASETS.TRAIN", [f"coco:{project.json}:{project.images}"])
    for file in project.images.iterdir():
        file.unlink()
    with pytest.raises(UsageError, match=rf"{count} of {count} images are missing") as caught:
        SemiSupervisedTrainer(project.config())
    assert str(caught.value).count(".png") == 5
    assert str(caught.value).endswith("...")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["SEMI.EMA_KEEP_RAT", "0.9"], ["SEMI.EMA_KEEP_RAT", "did you mean SEMI.EMA_KEEP_RATE"]),
        (["SOLVER.BASELR", "0.1"], ["SOLVER.BASELR", "did you mean SOLVER.BASE_LR"]),
        (["DATASETS.TRIAN", "()"], ["DATASETS.TRIAN", "did you mean DATASETS.TRAIN"]),
        (["SOLVER.BASE_LR.X", "1"], ["SOLVER.BASE_LR.X", "did you mean SOLVER.BASE_LR"]),
        (["QQQQQ", "1"], ["unknown config key QQQQQ"]),
        (["SEMI.LER"], ["in pairs, KEY VALUE", "SEMI.LER"]),
        (["SEMI.EMA_KEEP_RATE", "much"], ["SEMI.EMA_KEEP_RATE", "much", "float", "str"]),
        (["SOLVER.MAX_ITER", "1.5"], ["SOLVER.MAX_ITER", "1.5"]),
        (["DATASETS.LABELED_PERCENT", "10"], ["DATASETS.LABELED_PERCENT", "(10.0, not 10)"]),
        (["DATASETS.TRAIN", "folder:here"], ["DATASETS.TRAIN", "['a'], not a"]),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else "",
)
def test_wrong_option(options, words):
    with pytest.raises(UsageError) as caught:
        load_config("", options)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("SEMI: {EMA_KEEP_RAT: 0.9}", ["SEMI.EMA_KEEP_RAT", "did you mean SEMI.EMA_KEEP_RATE"]),
        ("SEMI: {EMA_KEEP_RATE: much}", ["SEMI.EMA_KEEP_RATE", "much"]),
        ("SOLVER: {MAX_ITER: [1]}", ["SOLVER.MAX_ITER"]),
        ("SOLVER: 3", ["SOLVER"]),
        ("SOLVER: [1", ["spoiled.yaml", "cannot read"]),
        ("- 1", ["spoiled.yaml", "cannot read"]),
        ("", ["spoiled.yaml", "cannot read"]),
        ("VERSION: 9", ["spoiled.yaml", "v9"]),
        ("_BASE_: nowhere.yaml", ["spoiled.yaml", "nowhere.yaml"]),
    ],
)
def test_wrong_config_file(tmp_path, text, words):
    (tmp_path / "spoiled.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(str(tmp_path / "spoiled.yaml"), [])
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.yaml", "."])
def test_missing_config_file(name):
    with pytest.raises(UsageError, match=rf"'{name}' does not exist"):
        load_config(name, [])


@pytest.mark.parametrize(
    ("key", "images", "reference", "world_size", "words"),
    [
        ("IMS_PER_BATCH", 4, 0, 3, ["SOLVER.IMS_PER_BATCH = 4", "3 GPUs", "multiple of 3"]),
        ("IMS_PER_BATCH", 5, 0, 2, ["SOLVER.IMS_PER_BATCH = 5", "2 GPUs", "multiple of 2"]),
        ("IMS_PER_BATCH", 3, 2, 2, ["SOLVER.IMS_PER_BATCH = 3", "2 GPUs"]),
        ("IMS_PER_BATCH", 3, 2, 4, ["SOLVER.IMS_PER_BATCH = 3", "2 GPUs"]),
        ("IMS_PER_BATCH", 1, 0, 2, ["SOLVER.IMS_PER_BATCH = 1", "for example 2"]),
        ("IMS_PER_BATCH", 0, 0, 2, ["at least one labeled image"]),
        ("IMS_PER_BATCH_UNLABELED", 5, 0, 2, ["SOLVER.IMS_PER_BATCH_UNLABELED = 5", "2 GPUs"]),
        ("IMS_PER_BATCH_UNLABELED", 7, 2, 3, ["SOLVER.IMS_PER_BATCH_UNLABELED = 7", "2 GPUs"]),
    ],
)
def test_batch_that_cannot_be_divided(key, images, reference, world_size, words):
    batches = {"IMS_PER_BATCH": 6, "IMS_PER_BATCH_UNLABELED": 12} | {key: images}
    options = [str(part) for pair in batches.items() for part in (f"SOLVER.{pair[0]}", pair[1])]
    cfg = load_config("", ["SOLVER.REFERENCE_WORLD_SIZE", str(reference), *options])
    with pytest.raises(UsageError) as caught:
        scale_to_world_size(cfg, world_size)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


@pytest.mark.parametrize("rate", ["-0.1", "1.1"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_keep_rate_out_of_range(rate, world_size):
    cfg = load_config(str(ROOT / "configs/Base-LocReweight.yaml"), ["SEMI.EMA_KEEP_RATE", rate])
    with pytest.raises(UsageError, match=f"SEMI.EMA_KEEP_RATE is {rate}"):
        scale_to_world_size(cfg, world_size)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("INPUT.FORMAT", "YUV-BT.601", ["INPUT.FORMAT", "RGB or BGR", "YUV-BT.601"]),
        ("INPUT.FORMAT", "L", ["INPUT.FORMAT", "RGB or BGR"]),
        (
            "INPUT.AUGMENTATION_POLICY",
            "Souffle",
            ["INPUT.AUGMENTATION_POLICY", "'Souffle'", "SoftTeacherPolicy"],
        ),
        (
            "INPUT.AUGMENTATION_POLICY",
            "",
            ["INPUT.AUGMENTATION_POLICY", "UnbiasedTeacherPolicy", "AUGMENTATION_POLICY_REGISTRY"],
        ),
    ],
)
def test_invalid_view_settings(key, value, words):
    with pytest.raises(UsageError) as caught:
        ViewMapper(load_config("", [key, value]))
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


@pytest.mark.parametrize("path", ["/no/model.pth", "model_final.pth", "ftp.example://model.pth"])
def test_missing_weights(path):
    with pytest.raises(UsageError) as caught:
        check_weights_exist(path)
    assert repr(path) in str(caught.value)
    assert "MODEL.WEIGHTS" in str(caught.value)


def test_folder_as_weights(tmp_path):
    with pytest.raises(UsageError, match=r"MODEL\.WEIGHTS"):
        check_weights_exist(str(tmp_path))


def test_empty_weights():
    check_weights_exist("")


def test_evaluation_without_weights(project):
    with pytest.raises(UsageError, match=r"--eval-only needs MODEL\.WEIGHTS"):
        load_for_evaluation(project.config(), model=None)


@pytest.mark.parametrize("case", ["number of test classes", "test set without classes"])
def test_evaluation_does_not_start(project, case):
    spoil, words = SPOILED[case]
    spoil(project)
    with pytest.raises(UsageError) as caught:
        evaluate(project.config(), model=None)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


class TestCommandLine:
    def run(self, *arguments):
        return subprocess.run(
            [sys.executable, str(ROOT / "train_net.py"), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    def test_one_line_and_nothing_written(self, project):
        project.set("DATASETS.TRAIN", ["nowhere"])
        result = self.run(*project.options)
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1].startswith("error: unknown data set 'nowhere'")
        assert "Traceback" not in result.stderr
        assert not (project.folder / "output").exists()

    def test_earlier_run_is_not_changed(self, project):
        (project.images / "0001.png").unlink()
        output = project.folder / "output"
        output.mkdir()
        earlier = {"last_checkpoint": "model_0000009.pth", "metrics.json": '{"iteration": 9}\n'}
        earlier["model_0000009.pth"] = "weights"
        for name, text in earlier.items():
            (output / name).write_text(text)
        result = self.run(*project.options)
        assert result.returncode == 1
        assert "holds a run with model_0000009.pth" in result.stderr.splitlines()[-1]
        assert {name: (output / name).read_text() for name in earlier} == earlier
