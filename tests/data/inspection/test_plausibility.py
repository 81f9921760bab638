"""Valid annotations that are probably not what they seem."""

import json
import shlex

import pytest
import yaml
from PIL import Image

import check_data
from locreweight.config import CONFIGS_FOLDER, load_config
from locreweight.config_scaling import scale_to_world_size
from locreweight.data.inspection.findings import Severity
from locreweight.engine import config_suggestion
from tests.checked_data import SIDE, Project
from tests.modeling.tiny_model import as_options
from tests.tiny_data import edit_json


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def text_with(project, words):
    """The only finding that contains these words."""
    (finding,) = (f for f in project.findings() if words in f.text)
    return finding


def as_corners(content):
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x, y, x + width, y + height]


def test_corners_in_a_file_of_widths(project):
    content = json.loads(project.json.read_text())
    boxes = [annotation["bbox"] for annotation in content["annotations"]]
    leaving = sum(2 * x + w > SIDE + 1 or 2 * y + h > SIDE + 1 for x, y, w, h in boxes)
    assert leaving / len(boxes) > 0.2
    edit_json(project.json, as_corners)
    finding = text_with(project, "seems to hold corners")
    assert finding.severity is Severity.WARNING
    assert f"{leaving} of {len(boxes)} boxes" in finding.text and len(finding.files) == leaving
    assert f"{SIDE} x {SIDE} pixels" in finding.text


def test_boxes_of_a_larger_image(project):
    def edit(content):
        for annotation in content["annotations"]:
            annotation["bbox"] = [80, 80, 30, 30]

    edit_json(project.json, edit)
    assert "images of another size" in text_with(project, "reach beyond").text


def test_few_boxes_beyond_the_edge_are_normal(project):
    edit_json(project.json, lambda c: c["annotations"][0].update(bbox=[90, 90, 20, 20]) or None)
    assert project.findings() == []


def test_fractions_of_the_image_size(project):
    def edit(content):
        for annotation in content["annotations"]:
            annotation["bbox"] = [value / SIDE for value in annotation["bbox"]]

    edit_json(project.json, edit)
    finding = text_with(project, "fractions of the image size")
    assert finding.severity is Severity.ERROR and "all 20 boxes" in finding.text


def test_boxes_that_vanish_when_images_are_resized(project):
    for file in project.images.iterdir():
        with Image.open(file) as image:
            image.resize((4000, 3000)).save(file)

    def edit(content):
        for image in content["images"]:
            image.update(width=4000, height=3000)
        content["annotations"][0]["bbox"] = [8, 8, 20, 14]
        for annotation in content["annotations"][1:]:
            annotation["bbox"] = [100, 100, 2000, 2000]

    edit_json(project.json, edit)
    project.settings |= {"INPUT.MIN_SIZE_TEST": 96, "INPUT.MAX_SIZE_TEST": 96}
    finding = text_with(project, "after resizing")
    # The long side of 4000 pixels becomes 96, so 14 pixels become 0.336.
    assert "1 of 20 boxes" in finding.text and "14 pixels that becomes 0.34" in finding.text


def test_repeated_boxes(project):
    def edit(content):
        first, *others = content["annotations"]
        copies = [first, first, others[7], others[8] | {"category_id": first["category_id"] + 1}]
        others[8]["category_id"] = first["category_id"]
        content["annotations"] += [x | {"id": 100 + i} for i, x in enumerate(copies)]

    edit_json(project.json, edit)
    finding = text_with(project, "repeat a box")
    assert finding.severity is Severity.WARNING
    assert "3 of 24 boxes" in finding.text
    assert finding.files == [str(project.images / f"000{i}.png") for i in (0, 2)]


@pytest.mark.parametrize("entry", [{"rotation": 30}, {"attributes": {"rotation": 30.5}}])
def test_rotated_boxes(project, entry):
    edit_json(project.json, lambda c: c["annotations"][2].update(entry) or None)
    assert "1 boxes have a rotation, which is ignored" in text_with(project, "rotation").text


@pytest.mark.parametrize("entry", [{"rotation": 0}, {"attributes": {"rotation": 360}}])
def test_upright_boxes(project, entry):
    edit_json(project.json, lambda c: c["annotations"][2].update(entry) or None)
    assert project.findings() == []


@pytest.mark.parametrize("variable", [False, True])
def test_image_types_that_are_not_read(project, monkeypatch, variable):
    if variable:
        monkeypatch.setenv("PHOTOS", str(project.unlabeled))
        project.settings |= {"DATASETS.UNLABELED": ["folder:$PHOTOS"]}
    for i in range(3):
        (project.unlabeled / f"photo{i}.HEIC").write_bytes(b"")
    (project.unlabeled / "notes.txt").write_text("")
    finding = text_with(project, "a type that is not read")
    assert "3 of 7 images" in finding.text and "3 .heic" in finding.text
    assert len(finding.files) == 3


@pytest.fixture
def _no_download(monkeypatch):
    monkeypatch.setattr("locreweight.engine.config_suggestion.find_pretrained", lambda cfg: "")


@pytest.mark.usefixtures("_no_download")
def test_write_config(project, tmp_path, capsys):
    file = tmp_path / "my.yaml"
    with pytest.raises(SystemExit) as exit_:
        check_data.main(["--write-config", str(file), *project.arguments])
    assert exit_.value.code == 0
    assert f"python train_net.py --num-gpus 1 --config-file {file}" in capsys.readouterr().out
    cfg = load_config(str(file), [])
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert list(cfg.DATASETS.CLASS_NAMES) == ["cat", "dog", "owl"]
    assert list(cfg.DATASETS.UNLABELED) == project.settings["DATASETS.UNLABELED"]
    assert cfg.SEMI.BURN_IN_ITERS < cfg.SOLVER.MAX_ITER
    assert list(cfg.SOLVER.STEPS) == []
    assert cfg.SEMI.EMA_KEEP_RATE == 0.99


def test_existing_config_is_an_error_before_images_are_read(project, tmp_path, monkeypatch):
    (tmp_path / "my.yaml").touch()
    monkeypatch.setattr(check_data, "check_data", lambda *_: pytest.fail("images were read"))
    with pytest.raises(SystemExit, match="already exists"):
        check_data.main(["--write-config", str(tmp_path / "my.yaml"), *project.arguments])


@pytest.mark.parametrize("has_weights", [False, True])
def test_other_weights_than_usual_are_a_note(project, tmp_path, capsys, monkeypatch, has_weights):
    base = ("bccd-small.yaml", "no network")
    monkeypatch.setattr("locreweight.engine.config_suggestion.choose_base", lambda weights: base)
    data = {key: x for key, x in project.settings.items() if key.startswith("DATASETS.")}
    if has_weights:
        data["MODEL.WEIGHTS"] = str(tmp_path / "weights.pth")
        (tmp_path / "weights.pth").touch()
    file = tmp_path / "my.yaml"
    with pytest.raises(SystemExit):
        check_data.main(["--write-config", str(file), *as_options(data)])
    start = "is based on configs/bccd-small.yaml" if has_weights else "trains from random weights"
    note = (
        f"{start}: no network. To do so, remove {file} and repeat the command with "
        "MODEL.TIMM.PRETRAINED <file>"
    )
    assert f"\nnote: {note}\n" in capsys.readouterr().out
    comment = " ".join(x[2:] for x in file.read_text().splitlines() if x.startswith("# "))
    assert f"It {note}." in comment


def test_only_the_command_of_the_written_config_is_printed(project, tmp_path, capsys, monkeypatch):
    """The config that it is derived from has another schedule and number of classes."""
    base = ("bccd-small.yaml", "no pretrained weights")
    monkeypatch.setattr("locreweight.engine.config_suggestion.choose_base", lambda weights: base)
    for split in (project.json, project.test_json):
        edit_json(split, lambda c: c["categories"].append({"id": 4, "name": "hen"}))
    data = {key: x for key, x in project.settings.items() if key.startswith("DATASETS.")}
    file = str(tmp_path / "my.yaml")
    options = {"SOLVER.OPTIMIZER": "AdamW", "INPUT.MIN_SIZE_TRAIN": [80, 96]} | data
    with pytest.raises(SystemExit):
        check_data.main(["--method", "mixpl", "--write-config", file, *as_options(options)])
    printed = capsys.readouterr().out
    assert printed.count("train_net.py") == 1 and "burn-in" not in printed
    assert f"--config-file {file} --method mixpl" in printed
    cfg = load_config(file, [])
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 4
    assert cfg.SOLVER.OPTIMIZER == "AdamW"
    assert list(cfg.INPUT.MIN_SIZE_TRAIN) == [80, 96]


@pytest.mark.usefixtures("_no_download")
def test_written_config_keeps_settings_of_the_data(project, tmp_path):
    file = tmp_path / "my.yaml"
    project.settings |= {
        "DATASETS.LABELED_PERCENT": 50.0,
        "DATASETS.SPLIT_SEED": 7,
        "DATASETS.CHECKS.DECODE_IMAGES": False,
    }
    with pytest.raises(SystemExit) as exit_:
        check_data.main(["--write-config", str(file), *project.arguments])
    assert exit_.value.code == 0
    cfg = load_config(str(file), [])
    assert cfg.DATASETS.LABELED_PERCENT == 50.0
    assert cfg.DATASETS.SPLIT_SEED == 7
    assert cfg.DATASETS.CHECKS.DECODE_IMAGES is False


@pytest.mark.usefixtures("_no_download")
def test_keys_that_the_written_config_does_not_contain_are_named(project, tmp_path, capsys):
    base = ["--config-file", str(CONFIGS_FOLDER / "bccd-small.yaml")]
    data = {key: x for key, x in project.settings.items() if key.startswith("DATASETS.")}
    data |= {"DATASETS.SPLIT_SEED": 7, "DATASETS.CLASS_NAMES": ["cat", "dog", "owl"]}
    same = {"MODEL.ROI_HEADS.NUM_CLASSES": 3}
    others = {"SOLVER.MAX_ITER": 77, "INPUT.MIN_SIZE_TRAIN": [80, 96]}
    options = as_options(data | others | same)
    with pytest.raises(SystemExit) as exit_:
        check_data.main([*base, "--write-config", str(tmp_path / "my.yaml"), *options])
    assert exit_.value.code == 0
    (note,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("note: it does"))
    assert "the values of SOLVER.MAX_ITER, INPUT.MIN_SIZE_TRAIN, which belong to" in note
    assert load_config(str(tmp_path / "my.yaml"), []).SOLVER.MAX_ITER != 77


@pytest.fixture
def write_with(project, tmp_path, monkeypatch, capsys):
    """Write a config with further settings; returns exit code or message, config and output."""
    # Steps that do not fit the written schedules.
    steps = {"_BASE_": str(CONFIGS_FOLDER / "detectors/cpu-mobilenetv2.yaml")}
    steps |= {"SOLVER": {"STEPS": [1000, 1300]}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(steps))
    base = (str(tmp_path / "base.yaml"), "")
    monkeypatch.setattr("locreweight.engine.config_suggestion.choose_base", lambda weights: base)
    monkeypatch.setattr("locreweight.engine.startup_checks.load_pretrained", lambda *_: None)
    data = {key: x for key, x in project.settings.items() if key.startswith("DATASETS.")}

    def write(settings, *arguments):
        file = tmp_path / "my.yaml"
        with pytest.raises(SystemExit) as exit_:
            options = as_options(data | settings)
            check_data.main([*arguments, "--write-config", str(file), *options])
        cfg = load_config(str(file), []) if file.exists() else None
        return exit_.value.code, cfg, capsys.readouterr().out

    return write


# Without settings, 300 iterations of burn-in and 900 in all are suggested.
@pytest.mark.parametrize(
    ("settings", "burn_in", "iterations", "steps"),
    [
        ({"SOLVER.MAX_ITER": 200}, 66, 200, []),
        ({"SOLVER.MAX_ITER": 1000}, 300, 1000, []),
        ({"SEMI.BURN_IN_ITERS": 1000}, 1000, 1600, []),
        ({"SOLVER.MAX_ITER": 800, "SOLVER.STEPS": [50]}, 266, 800, [50]),
    ],
)
def test_written_schedule_follows_from_the_settings(
    write_with, settings, burn_in, iterations, steps
):
    code, cfg, printed = write_with(settings)
    assert code == 0 and "warning:" not in printed
    assert (cfg.SEMI.BURN_IN_ITERS, cfg.SOLVER.MAX_ITER) == (burn_in, iterations)
    assert list(cfg.SOLVER.STEPS) == steps
    scale_to_world_size(cfg, 1)


def test_batch_sizes_of_the_user_decide_on_the_number_of_iterations(write_with, monkeypatch):
    for limit in ("MIN_BURN_IN", "MIN_MUTUAL"):
        monkeypatch.setattr(config_suggestion, limit, 1)
    code, cfg, _ = write_with({"SOLVER.IMS_PER_BATCH": 2, "SOLVER.IMS_PER_BATCH_UNLABELED": 1})
    assert code == 0
    # 50 epochs of 5 labeled images, and 30 epochs of 4 unlabeled ones.
    assert (cfg.SEMI.BURN_IN_ITERS, cfg.SOLVER.MAX_ITER) == (125, 125 + 120)


def test_burn_in_that_uses_no_unlabeled_images_is_named(write_with):
    code, cfg, printed = write_with({"SEMI.BURN_IN_ITERS": 90, "SOLVER.MAX_ITER": 90})
    assert code == 0 and cfg.SEMI.BURN_IN_ITERS == 90
    assert "warning: unlabeled images are not used: SEMI.BURN_IN_ITERS 90 is not" in printed


def test_config_with_which_training_would_not_start_is_not_written(write_with, tmp_path):
    code, cfg, _ = write_with({"SOLVER.STEPS": [100, 900]})  # 900 iterations are suggested
    assert code.startswith(
        f"error: {tmp_path / 'my.yaml'} was not written: SOLVER.STEPS (100, 900)"
    )
    assert cfg is None


def test_command_for_the_written_config_has_the_number_of_gpus(write_with, tmp_path):
    settings = {"SOLVER.REFERENCE_WORLD_SIZE": 2}
    _, _, printed = write_with(settings, "--num-gpus", "2")
    command = f"python train_net.py --num-gpus 2 --config-file {tmp_path / 'my.yaml'}\n"
    assert command in printed


def test_no_config_is_written_if_the_data_have_errors(project, tmp_path):
    edit_json(project.json, lambda c: c["annotations"][0].update(bbox=[9, 9, -5, 5]) or None)
    with pytest.raises(SystemExit, match="fix the errors above"):
        check_data.main(["--write-config", str(tmp_path / "my.yaml"), *project.arguments])
    assert not (tmp_path / "my.yaml").exists()


def test_command_with_the_fixes_writes_the_config(project, tmp_path, capsys, monkeypatch):
    base = ("bccd-small.yaml", "no pretrained weights")
    monkeypatch.setattr("locreweight.engine.config_suggestion.choose_base", lambda weights: base)
    edit_json(project.json, lambda c: c["annotations"][0].update(bbox=[9, 9, -5, 5]))
    data = {key: x for key, x in project.settings.items() if key.startswith("DATASETS.")}
    file = tmp_path / "my.yaml"
    with pytest.raises(SystemExit, match="fix the errors above"):
        check_data.main(["--write-config", str(file), *as_options(data)])
    printed = capsys.readouterr().out
    assert "train_net.py" not in printed and "\n1 error, " in printed
    _, _, command = printed.partition("to repeat this with the fixes:\n  ")
    python, tool, *arguments = shlex.split(command.splitlines()[0])
    assert (python, tool) == ("python", "tools/check_data.py")
    with pytest.raises(SystemExit) as exit_:
        check_data.main(arguments)
    assert exit_.value.code == 0
    assert load_config(str(file), []).DATASETS.CHECKS.DROP_BAD_BOXES
