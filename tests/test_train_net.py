"""The command line of train_net.py."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import detectron2
import pytest

from locreweight.checkpoint.files import choose_checkpoint
from locreweight.engine.run_record import read_run_records
from locreweight.file_io import sha256_of
from locreweight.installed_detectron2 import describe_detectron2
from tests.engine.tiny_training import TRAINING, make_datasets, restored_loggers_and_signals
from tests.modeling.tiny_model import TINY, as_options

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train_net.py"
BASE = ROOT / "configs/Base-LocReweight.yaml"


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return make_datasets(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def make_arguments(datasets, tmp_path):
    """Builds a command line that trains the tiny detector into the test's folder."""
    settings = TINY | TRAINING | datasets | {"OUTPUT_DIR": tmp_path, "SOLVER.MAX_ITER": 3}

    def make(*flags, **changed):
        return ["--config-file", str(BASE), *flags, *as_options(settings | changed)]

    return make


def run_script(*arguments: str) -> None:
    """Run the script in this process, as ``python train_net.py`` does."""
    with pytest.MonkeyPatch.context() as patch, restored_loggers_and_signals():
        patch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        # Locks that are kept here only, so that they end with the run.
        patch.setattr("locreweight.engine.output_folder._locks", {})
        runpy.run_path(str(SCRIPT), run_name="__main__")


def error_of(*arguments: str) -> str:
    """The message that the script exits with. Python prints it and exits with code 1."""
    with pytest.raises(SystemExit) as exit_:
        run_script(*arguments)
    assert isinstance(exit_.value.code, str)
    return exit_.value.code


def test_train_resume_and_evaluate(make_arguments, tmp_path):
    log = tmp_path / "log.txt"

    def metrics():
        return [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]

    run_script(*make_arguments())
    files = {"model_final.pth", "config.yaml", "log.txt", "metrics.json", "run.json"}
    assert files <= set(os.listdir(tmp_path))
    (results,) = [line for line in metrics() if "bbox/AP" in line]
    assert "student/bbox/AP" in results
    assert "Effective values on 1 process(es)" in log.read_text()
    assert f"Detectron2 {describe_detectron2()}" in log.read_text()

    run_script(*make_arguments("--resume", **{"SOLVER.MAX_ITER": 5}))
    assert "resumed after iteration 3" in log.read_text()
    assert metrics()[-1]["iteration"] == 4

    before = content_of(tmp_path)
    weights = {"MODEL.WEIGHTS": tmp_path, "TEST.DETECTIONS_PER_IMAGE": 9}
    run_script(*make_arguments("--eval-only", **weights))
    assert content_of(tmp_path) == before, "--eval-only changed the record of the run"
    evaluation = tmp_path / "evaluation"
    log = evaluation / "log.txt"
    best = choose_checkpoint(tmp_path)
    assert f"evaluating the teacher of {best}" in log.read_text()
    assert "copypaste: AP,AP50,AP75" in log.read_text()
    assert "DETECTIONS_PER_IMAGE: 9" in (evaluation / "config.yaml").read_text()
    assert json.loads((evaluation / "inference/coco_instances_results.json").read_text())


def content_of(folder: Path) -> dict[str, str]:
    """Relative path -> checksum of all files, without those of an evaluation."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    names = [f for f in files if "evaluation" not in f.parts]
    return {str(f.relative_to(folder)): sha256_of(f) for f in names}


def test_training_never_replaces_a_run(make_arguments, datasets, tmp_path):
    run = tmp_path / "run"
    arguments = make_arguments(**{"OUTPUT_DIR": run, "DATASETS.TEST": ()})
    run_script(*arguments)
    before = content_of(run)

    error = error_of(*arguments)
    assert "holds a run with model_final.pth" in error and "--overwrite" in error
    assert content_of(run) == before

    # Flags can follow the KEY VALUE pairs.
    run_script(*arguments, "--overwrite")
    assert content_of(tmp_path / "run-old-1") == before
    assert len(read_run_records(run)) == 1
    assert (
        f"moved the earlier run in OUTPUT_DIR {run} to {run}-old-1" in (run / "log.txt").read_text()
    )

    run_script(*arguments, "SOLVER.MAX_ITER", "4", "--resume")
    assert "resumed after iteration 3" in (run / "log.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-old-1"]


def test_failed_start_can_be_repeated(make_arguments, tmp_path):
    assert "NUM_CLASSES 3" in error_of(*make_arguments(**{"MODEL.ROI_HEADS.NUM_CLASSES": 4}))
    assert (tmp_path / "config.yaml").exists()
    run_script(*make_arguments(**{"SOLVER.MAX_ITER": 1}))
    assert (tmp_path / "model_final.pth").exists()


def test_resume_with_nothing_to_resume_warns_of_the_weights_of_a_run(make_arguments, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    short = {"SOLVER.MAX_ITER": 1, "DATASETS.TEST": ()}
    run_script(*make_arguments("--resume", OUTPUT_DIR=first, **short))
    assert "NOTHING TO RESUME" not in (first / "log.txt").read_text()
    weights = {"MODEL.WEIGHTS": first / "model_final.pth"}
    run_script(*make_arguments("--resume", OUTPUT_DIR=second, **short, **weights))
    assert (
        f"NOTHING TO RESUME: there is no checkpoint in OUTPUT_DIR '{second}'"
        in (second / "log.txt").read_text()
    )


def test_output_below_the_unlabeled_images(make_arguments, datasets, tmp_path):
    _, _, source = datasets["DATASETS.UNLABELED"][0].partition(":")
    images = shutil.copytree(source, tmp_path / "images")
    settings = {
        "DATASETS.UNLABELED": [f"folder:{images}"],
        "OUTPUT_DIR": images / "any name",
        "VIS_PERIOD": 3,
        "DATASETS.TEST": (),
    }
    run_script(*make_arguments(**settings))
    assert list((images / "any name/panels").glob("*.jpg"))
    run_script(*make_arguments("--resume", **settings | {"SOLVER.MAX_ITER": 4}))
    log = (images / "any name/log.txt").read_text()
    assert "resumed after iteration 3" in log
    assert log.count("5 labeled and 5 unlabeled images") == 2
    assert log.count(f"left out 1 folders of runs in the image folder {images}") == 2


def test_no_checkpoints_with_period_0(make_arguments, tmp_path):
    never = {"SOLVER.CHECKPOINT_PERIOD": 0, "TEST.EVAL_PERIOD": 0, "VIS_PERIOD": 0}
    run_script(*make_arguments(**never, **{"DATASETS.TEST": ()}))
    assert [file.name for file in tmp_path.glob("*.pth")] == ["model_final.pth"]


# --- evaluation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(datasets, tmp_path_factory):
    """OUTPUT_DIR of a run of one iteration."""
    output = tmp_path_factory.mktemp("trained")
    short = {"OUTPUT_DIR": output, "SOLVER.MAX_ITER": 1}
    settings = TINY | TRAINING | datasets | short | {"DATASETS.TEST": ()}
    run_script("--config-file", str(BASE), *as_options(settings))
    return output


@pytest.fixture
def evaluate_on(make_arguments, datasets, trained, tmp_path):
    """Arguments that evaluate the run on an edited copy of the test set."""
    _, json_file, images = datasets["DATASETS.TEST"][0].split(":")

    def arguments(edit=lambda content: None, **changed):
        content = json.loads(Path(json_file).read_text())
        edit(content)
        (tmp_path / "edited.json").write_text(json.dumps(content))
        settings = {
            "DATASETS.TEST": [f"coco:{tmp_path / 'edited.json'}:{images}"],
            "MODEL.WEIGHTS": trained / "model_final.pth",
        }
        return make_arguments("--eval-only", **settings | changed)

    return arguments


def rename_classes(*names):
    def edit(content):
        for category, name in zip(content["categories"], names, strict=True):
            category["name"] = name

    return edit


def edit_box(box):
    def edit(content):
        if box is None:
            del content["annotations"][1]["bbox"]
        else:
            content["annotations"][1]["bbox"] = box

    return edit


def widen_image(content):
    content["images"][0]["width"] += 7


def drop_boxes(content):
    content["annotations"] = []


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_box([1, 2, 3]), "1 boxes of the test set .*malformed.*[1, 2, 3]"),
        (edit_box(None), "1 boxes of the test set .*malformed.*: None"),
        (edit_box([30, 30, -10, -5]), "1 boxes of the test set .*inverted"),
        (edit_box([30, 30, float("nan"), 5]), "1 boxes of the test set .*NaN"),
        (widen_image, "annotation says"),
        (drop_boxes, "no annotated box"),
    ],
)
def test_evaluation_checks_its_data(evaluate_on, capfd, edit, message):
    error = error_of(*evaluate_on(edit))
    assert error.startswith("error: ") and re.search(
        message.replace("[1, 2, 3]", ".1, 2, 3."), error
    )
    assert "\n" not in error
    assert "Traceback" not in "".join(capfd.readouterr())


def test_evaluation_needs_a_test_set(evaluate_on):
    assert "DATASETS.TEST is empty" in error_of(*evaluate_on(**{"DATASETS.TEST": ()}))


def test_evaluation_does_not_overwrite(evaluate_on):
    assert "--overwrite is for training" in error_of("--overwrite", *evaluate_on())


def class_names(datasets):
    _, json_file, _ = datasets["DATASETS.TEST"][0].split(":")
    return [category["name"] for category in json.loads(Path(json_file).read_text())["categories"]]


def test_evaluation_on_other_class_names(evaluate_on, datasets, tmp_path):
    names = class_names(datasets)
    arguments = evaluate_on(rename_classes(names[0], "horse", names[2]))
    error = error_of(*arguments)
    for word in (*names, "horse", "edited.json", "model_final.pth", "ALLOW_OTHER_CLASS_NAMES True"):
        assert word in error
    assert f"Class 1 is {names[1]!r} in the checkpoint, 'horse' in the test set" in error
    run_script(*arguments, "DATASETS.CHECKS.ALLOW_OTHER_CLASS_NAMES", "True")
    assert "copypaste: AP" in (tmp_path / "evaluation/log.txt").read_text()


def test_evaluation_on_another_order_of_classes(evaluate_on, datasets):
    error = error_of(*evaluate_on(rename_classes(*reversed(class_names(datasets)))))
    assert "the same classes in another order" in error and "Sort the classes" in error


def test_evaluation_on_another_number_of_classes(evaluate_on, datasets):
    """The checkpoint is compared first: no advice that something else refuses."""

    def edit(content):
        content["categories"].append({"id": 9, "name": "horse"})

    error = error_of(*evaluate_on(edit))
    assert "Class 3 is '(none)' in the checkpoint, 'horse' in the test set" in error
    assert "NUM_CLASSES" not in error


def test_fine_tuning_on_other_classes_is_possible(make_arguments, datasets, trained, tmp_path):
    _, json_file, images = datasets["DATASETS.TRAIN"][0].split(":")
    content = json.loads(Path(json_file).read_text())
    rename_classes("horse", "cow", "hen")(content)
    (tmp_path / "other.json").write_text(json.dumps(content))
    settings = {
        "DATASETS.TRAIN": [f"coco:{tmp_path / 'other.json'}:{images}"],
        "DATASETS.TEST": (),
        "MODEL.WEIGHTS": trained / "model_final.pth",
        "SOLVER.MAX_ITER": 1,
    }
    run_script(*make_arguments(**settings))
    assert (tmp_path / "model_final.pth").exists()


def test_resume_with_another_copy_of_detectron2(make_arguments, tmp_path):
    """A checkpoint depends neither on Detectron2's version nor on its folder."""
    run_script(*make_arguments())
    copy = tmp_path / "copy" / "detectron2"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(detectron2.__file__).parent, copy, ignore=ignored)
    text = (copy / "__init__.py").read_text()
    (copy / "__init__.py").write_text(re.sub('__version__ = ".*"', '__version__ = "9.8"', text))
    path = os.pathsep.join([str(copy.parent), os.environ.get("PYTHONPATH", "")])
    arguments = make_arguments("--resume", **{"SOLVER.MAX_ITER": 5})
    command = [sys.executable, str(SCRIPT), *arguments]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True)
    assert "resumed after iteration 3" in (tmp_path / "log.txt").read_text()
    starts = read_run_records(tmp_path)
    assert starts[0].versions["Detectron2"] == describe_detectron2()
    assert starts[1].versions["Detectron2"].startswith("9.8 (a folder on the Python path")


def test_method_is_found_by_its_short_name(make_arguments, tmp_path):
    run_script(*make_arguments("--method", "published/stac-coco", **{"SOLVER.MAX_ITER": 1}))
    assert "AUGMENTATION_POLICY: STACPolicy" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("flags", "changed", "message"),
    [
        ([], {"SEMI.BURNIN_ITERS": 1}, "unknown config key SEMI.BURNIN_ITERS; did you mean"),
        ([], {"SOLVER.MAX_ITER": "many"}, "wrong type"),
        ([], {"DATASETS.TRAIN": ["coco:none.json:none"]}, "'none.json'"),
        ([], {"DATASETS.UNLABELED": ()}, "no unlabeled images"),
        ([], {"MODEL.ROI_HEADS.NUM_CLASSES": 4}, "MODEL.ROI_HEADS.NUM_CLASSES 3"),
        ([], {"MODEL.WEIGHTS": "none.pth"}, "'none.pth' does not exist"),
        (["--eval-only"], {"MODEL.WEIGHTS": "none.pth"}, "'none.pth' does not exist"),
        ([], {"OUTPUT_DIR": "/dev/null/run"}, "cannot write to OUTPUT_DIR '/dev/null/run'"),
        (["--eval-only"], {"MODEL.WEIGHTS": "docs"}, "the folder docs has no checkpoint"),
        (["--eval-only"], {"MODEL.WEIGHTS": ""}, "--eval-only needs MODEL.WEIGHTS"),
        (["--method", "stca"], {}, "method 'stca' does not exist"),
        ([], {"MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16]]}, "2 lists for 5 feature levels"),
        (["--eval-only"], {"MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16]]}, "2 lists for 5"),
        (["--eval-only"], {"TEST.AUG.ENABLED": True}, "TEST.AUG.ENABLED is not supported"),
        ([], {"SOLVER.STEPS": (2, 1)}, "increasing order"),
        ([], {"SOLVER.LR_SCHEDULER_NAME": "WarmupMultistepLR"}, "known names: WarmupMultiStepLR"),
        ([], {"MODEL.DEVICE": "cdua"}, "no device 'cdua'"),
        (["--resume", "--overwrite"], {}, "use one of them"),
    ],
)
def test_mistakes_end_with_one_line(make_arguments, capfd, flags, changed, message):
    error = error_of(*make_arguments(*flags, **changed))
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert "Traceback" not in "".join(capfd.readouterr())


def test_missing_config_file_is_named():
    error = error_of("--config-file", "none.yaml")
    assert error == "error: config file 'none.yaml' does not exist"


@pytest.mark.slow
def test_mistakes_end_with_one_line_and_code_1_in_two_processes(make_arguments):
    flags = ("--num-gpus", "2", "--dist-url", "auto")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *make_arguments(*flags, **{"DATASETS.UNLABELED": ()})],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert "error: there are no unlabeled images" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
