"""Detection in images and videos: inputs, pictures, json, unreadable files."""

import functools
import http.server
import io
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import predict
from locreweight.engine import inference
from locreweight.engine.inference import InputFile, find_inputs
from locreweight.errors import UsageError
from tests.modeling.tiny_model import write_plain_run


def picture(file: Path, value=128, size=(40, 60)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(file)
    return file


def names(inputs, outputs=()):
    return [str(file.name) for file in find_inputs([str(i) for i in inputs], outputs)]


# --- inputs ---------------------------------------------------------------------------------------


def test_pictures_keep_the_folder_structure(tmp_path):
    for name in ("in/b.jpg", "in/a.png", "in/sub/a.jpg", "in/notes.txt", "c.jpg"):
        picture(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text("")
    assert names([tmp_path / "in", tmp_path / "c.jpg"]) == ["a.png", "b.jpg", "sub/a.jpg", "c.jpg"]


def test_linked_folders_are_searched_once(tmp_path):
    for name in ("far/a.jpg", "in/b.jpg"):
        picture(tmp_path / name)
    (tmp_path / "far/film.mp4").touch()
    (tmp_path / "in/link").symlink_to(tmp_path / "far")
    (tmp_path / "in/again").symlink_to(tmp_path / "far")
    (tmp_path / "far/cycle").symlink_to(tmp_path / "in")
    assert names([tmp_path / "in"]) == ["again/a.jpg", "again/film.mp4", "b.jpg"]


def test_hidden_files_and_folders_of_runs_are_not_inputs(tmp_path):
    for name in ("a", ".hidden", ".cache/a", "__MACOSX/a", "run/panels/a"):
        picture(tmp_path / f"{name}.jpg")
        (tmp_path / f"{name}.mp4").touch()
    for name in ("config.yaml", "metrics.json"):
        (tmp_path / "run" / name).touch()
    assert names([tmp_path]) == ["a.jpg", "a.mp4"]
    assert names([tmp_path / "run/panels"]) == ["a.jpg", "a.mp4"]


def test_pipes_in_folders_are_not_inputs(tmp_path):
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    os.mkfifo(tmp_path / "c.mp4")
    (tmp_path / "missing.mp4").symlink_to("none")
    assert names([tmp_path]) == ["a.png", "missing.mp4"]


def test_names_of_pictures_are_unique(tmp_path):
    files = [picture(tmp_path / folder / "a.jpg") for folder in ("x", "y", "z")]
    assert names(files) == ["a.jpg", "a-2.jpg", "a-3.jpg"]


def test_pictures_have_a_known_suffix(tmp_path):
    """Videos become .mp4, images without a suffix .jpg."""
    files = [tmp_path / name for name in ("film.avi", "film.mp4", "photo", "photo.JPG")]
    for file in files:
        file.touch()
    assert names(files) == ["film.mp4", "film-2.mp4", "photo.jpg", "photo.JPG"]
    assert names([files[2], tmp_path / "photo"]) == ["photo.jpg", "photo-2.jpg"]


def test_patterns_and_standard_input(tmp_path, monkeypatch):
    files = [picture(tmp_path / f"{i}.png") for i in range(3)]
    assert names([tmp_path / "[01].png"]) == ["0.png", "1.png"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{files[2]}\n\n{files[0]}\n"))
    assert names(["-"]) == ["2.png", "0.png"]


def test_existing_file_is_not_treated_as_a_pattern(tmp_path):
    picture(tmp_path / "1.png")
    assert names([picture(tmp_path / "[1].png")]) == ["[1].png"]


def test_pictures_in_the_output_folder_are_not_inputs(tmp_path):
    picture(tmp_path / "a.jpg")
    outputs = [tmp_path / "found", tmp_path / "crops"]
    for output in outputs:
        picture(output / "cat" / "a.jpg")
    assert names([tmp_path], outputs) == ["a.jpg"]


def test_input_folder_as_output_folder_is_an_error(tmp_path):
    picture(tmp_path / "a.jpg")
    with pytest.raises(UsageError, match="are ignored"):
        find_inputs([str(tmp_path)], [tmp_path])


@pytest.mark.parametrize("given", ["none.jpg", "none/*.jpg", "empty"])
def test_missing_input_is_an_error(tmp_path, given):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=given.replace("*", r"\*")):
        find_inputs([str(tmp_path / given)])


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture
def predict_call(run, call, tmp_path):
    """Call the tool on the tiny run; returns its exit code or message, and the output."""
    weights = ["--weights", run.output / "model_final.pth", "--device", "cpu"]
    output = ["--output", tmp_path / "out", "--threshold", "0.1"]
    return lambda *arguments: call(predict, *weights, *output, *arguments)


def test_pictures_and_json(run, predict_call, tmp_path):
    code, printed = predict_call("--input", run.test_images, "--json", tmp_path / "found.json")
    assert code == 0
    pictures = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert pictures == sorted(file.name for file in run.test_images.iterdir())
    entries = json.loads((tmp_path / "found.json").read_text())
    assert f"{len(entries)} detections in 3 images" in printed.out
    assert {entry["image_id"] for entry in entries} == {1, 2, 3}
    for entry in entries:
        x, y, width, height = entry["bbox"]
        assert x >= 0 and y >= 0 and x + width <= 64.01 and y + height <= 64.01
        assert entry["category_name"] == ("cat", "dog", "owl")[entry["category_id"] - 1]
        assert 0 < entry["localization_quality"] < 0.5
        assert Path(entry["file_name"]).is_file()


def test_plain_detectron2_run(run, call, tmp_path):
    write_plain_run(tmp_path / "plain")
    arguments = ["--weights", tmp_path / "plain", "--device", "cpu", "--threshold", 0.1]
    arguments += ["--input", run.unlabeled, "--output", tmp_path / "out"]
    assert call(predict, *arguments, "--save-json", tmp_path / "found.json")[0] == 0
    assert len(list((tmp_path / "out").iterdir())) == 5
    found = json.loads((tmp_path / "found.json").read_text())
    assert found and {detection["localization_quality"] for detection in found} == {None}


def test_no_progress_bar_without_a_terminal(run, predict_call):
    assert "images" not in predict_call("--input", run.test_images)[1].err


def test_results_do_not_depend_on_the_batch_size(run, predict_call, tmp_path):
    results = []
    for batch in (1, 2):
        predict_call("--input", run.test_images, "--json", tmp_path / "a.json", "--batch", batch)
        results.append(json.loads((tmp_path / "a.json").read_text()))
    assert len(results[0]) == len(results[1])
    for one, other in zip(*results, strict=True):
        assert one["file_name"] == other["file_name"]
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.05)


def test_unreadable_files_are_skipped_and_listed(run, predict_call, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    code, printed = predict_call(
        "--input", tmp_path / "broken.png", tmp_path / "broken.mp4", run.test_images
    )
    assert code == "error: 2 of 5 inputs could not be read"
    assert "\nskipped: cannot read" in f"\n{printed.err}"
    assert "broken.png" in printed.err and "broken.mp4" in printed.err
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_video_with_detections(run, predict_call, tmp_path):
    make_film(tmp_path / "film.mp4")
    code, _ = predict_call(
        "--input", tmp_path / "film.mp4", "--json", tmp_path / "a.json", "--batch", "2"
    )
    assert code == 0
    film = cv2.VideoCapture(str(tmp_path / "out" / "film.mp4"))
    assert film.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert (film.get(cv2.CAP_PROP_FRAME_WIDTH), film.get(cv2.CAP_PROP_FRAME_HEIGHT)) == (64, 48)
    frames = {entry["frame"] for entry in json.loads((tmp_path / "a.json").read_text())}
    assert frames <= {0, 1, 2} and frames


def make_film(file, frames=3):
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"mp4v"), 5, (64, 48))
    for i in range(frames):
        writer.write(np.full((48, 64, 3), 60 + 30 * i, np.uint8))
    writer.release()
    return file


def test_frames_limits_the_length_of_a_video(predict_call, tmp_path):
    film = make_film(tmp_path / "film.mp4")
    code, printed = predict_call("--input", film, "--frames", 2)
    assert code == 0 and "in 2 frames" in printed.out
    written = cv2.VideoCapture(str(tmp_path / "out" / "film.mp4"))
    assert written.get(cv2.CAP_PROP_FRAME_COUNT) == 2


@pytest.mark.parametrize(
    ("item", "name"),
    [
        ("0", "camera-0.mp4"),
        ("rtsp://user:secret@camera.example:554/live/door?channel=1", "door.mp4"),
        ("http://camera.example/", "camera.example.mp4"),
    ],
)
def test_cameras_and_addresses_are_streams(item, name):
    (file,) = find_inputs([item])
    assert (file.stream, file.name, file.is_video) == (item, Path(name), True)


def test_file_whose_name_is_a_number_is_not_a_camera(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "0" / "a.png")
    assert names(["0"]) == ["a.png"]


@pytest.mark.parametrize(
    ("stream", "shown"),
    [
        ("rtsp://user:pass@word@host:554/live", "rtsp://host:554/live"),
        ("http://host/a@b", "http://host/a@b"),
        ("0", "0"),
        ("", "a/b.mp4"),
    ],
)
def test_passwords_of_streams_are_not_shown(stream, shown):
    assert str(InputFile(Path("a/b.mp4"), Path("b.mp4"), stream)) == shown


def test_stream_of_a_server(predict_call, tmp_path):
    film = make_film(tmp_path / "film.mp4")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{film.name}"
        code, printed = predict_call("--input", address, "--json", tmp_path / "a.json")
        server.shutdown()
    assert code == 0 and "in 3 frames" in printed.out
    assert {e["file_name"] for e in json.loads((tmp_path / "a.json").read_text())} == {address}


def test_camera_that_does_not_exist_is_reported(predict_call):
    code, printed = predict_call("--input", "77")
    assert code == "error: 1 of 1 inputs could not be read"
    assert "77: no frame of the stream can be read" in printed.err


def test_interrupt_ends_a_stream_and_keeps_its_results(run, predict_call, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "_frames", interrupted_frames)
    code, printed = predict_call("--input", "0", "--json", tmp_path / "a.json", "--batch", 1)
    assert code == 0 and "in 2 frames" in printed.out and "stopped by Ctrl-C" in printed.out
    assert (tmp_path / "a.json").is_file() and (tmp_path / "out/camera-0.mp4").is_file()
    code, _ = predict_call("--input", make_film(tmp_path / "film.mp4"))
    assert code == 130, "a file that is not finished is not a success"


def interrupted_frames(video):
    yield from [np.zeros((48, 64, 3), np.uint8)] * 2
    raise KeyboardInterrupt


# --- what is written ------------------------------------------------------------------------------


@pytest.fixture
def without_pictures(run, call):
    """Call the tool on the tiny run, without --output."""
    usual = ["--weights", run.output, "--device", "cpu", "--threshold", 0.1]
    return lambda *arguments: call(predict, *usual, "--input", run.test_images, *arguments)


def test_json_alone_writes_no_pictures(without_pictures, tmp_path):
    code, printed = without_pictures("--save-json", tmp_path / "a.json")
    assert code == 0 and [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert "model_best.pth: objects with a score above 0.1" in printed.out


def test_two_outputs_in_one_file_are_an_error(without_pictures, tmp_path):
    code, printed = without_pictures("--save-json", tmp_path / "a", "--save-coco", tmp_path / "a")
    assert code == 2 and "name the same file" in printed.err


def test_nothing_to_write_is_an_error(without_pictures):
    code, printed = without_pictures()
    assert code == 2 and "--save-json" in printed.err


def test_coco_yolo_and_crops_have_the_same_objects(run, without_pictures, tmp_path):
    outputs = [("--save-coco", "c.json"), ("--save-yolo", "labels"), ("--save-crops", "crops")]
    words = [word for flag, name in outputs for word in (flag, tmp_path / name)]
    code, printed = without_pictures(*words)
    count = int(re.search(r"(\d+) detections", printed.out)[1])
    assert code == 0 and count
    assert f"coco:{tmp_path / 'c.json'}:{run.test_images}" in printed.out
    assert len(json.loads((tmp_path / "c.json").read_text())["annotations"]) == count
    assert len(list((tmp_path / "crops").rglob("*.png"))) == count
    labels = sorted((tmp_path / "labels").glob("0*.txt"))
    assert [file.stem for file in labels] == ["0000", "0001", "0002"]
    assert sum(len(file.read_text().splitlines()) for file in labels) == count


def test_crops_in_the_input_folder_are_not_inputs_of_the_next_call(run, call, tmp_path):
    images = shutil.copytree(run.test_images, tmp_path / "in")
    arguments = ["--weights", run.output, "--device", "cpu", "--threshold", 0.1, "--input", images]
    for _ in range(2):
        code, printed = call(predict, *arguments, "--save-crops", images / "crops")
        assert code == 0 and "in 3 images" in printed.out
    assert list((images / "crops").rglob("*.png"))


def test_crops_above_the_input_folder(run, call, tmp_path):
    images = shutil.copytree(run.test_images, tmp_path / "in")
    arguments = ["--weights", run.output, "--device", "cpu", "--threshold", 0.1, "--input", images]
    code, printed = call(predict, *arguments, "--save-crops", tmp_path)
    assert code == 0 and "in 3 images" in printed.out


def test_only_chosen_classes_are_kept(without_pictures, tmp_path):
    file = tmp_path / "a.json"
    without_pictures("--json", file)
    expected = [e for e in json.loads(file.read_text()) if e["category_name"] in ("cat", "owl")]
    assert without_pictures("--json", file, "--classes", "cat", "owl")[0] == 0
    assert json.loads(file.read_text()) == expected != []


def test_unknown_class_is_an_error_and_writes_nothing(without_pictures, tmp_path):
    output = tmp_path / "json.json", tmp_path / "yolo"
    files = "--json", output[0], "--save-yolo", output[1]
    code, _ = without_pictures(*files, "--classes", "cat", "cow")
    assert code == "error: the model has no class 'cow'; its classes are cat, dog, owl"
    assert not any(file.exists() for file in output)


def test_annotations_of_videos_are_an_error(predict_call, tmp_path):
    code, _ = predict_call("--input", make_film(tmp_path / "a.mp4"), "--save-yolo", tmp_path / "y")
    assert "--save-json" in code


@pytest.mark.parametrize(
    "words",
    [
        ("--threshold", "1.5"),
        ("--threshold", "-0.1"),
        ("--threshold", "nan"),
        ("--threshold", "high"),
        ("--batch", "0"),
        ("--count", "-3"),
        ("--frames", "2.5"),
    ],
)
def test_numbers_out_of_range_are_an_error(predict_call, words):
    code, printed = predict_call("--input", "a.jpg", *words)
    assert code == 2 and f"argument {words[0]}: '{words[1]}' is not" in printed.err


def test_note_if_the_threshold_of_the_model_is_higher(without_pictures, tmp_path):
    _, printed = without_pictures("--json", tmp_path / "a.json", "--threshold", 0.01)
    assert "note: the model itself drops objects with a score below 0.05" in printed.out


def test_output_that_cannot_be_written_is_an_error(without_pictures, tmp_path):
    (tmp_path / "file").touch()
    code, _ = without_pictures("--json", tmp_path / "file" / "a.json")
    assert code.startswith("error: cannot read or write") and "file" in code


@pytest.mark.parametrize("flag", ["--save-json", "--save-coco"])
def test_folder_instead_of_a_file_is_an_error_before_the_work(predict_call, tmp_path, flag):
    code, _ = predict_call("--input", "none.jpg", flag, tmp_path)
    assert code == f"error: cannot read or write {tmp_path}: Is a directory"


@pytest.mark.parametrize("flag", ["--output", "--save-yolo", "--save-crops"])
def test_file_instead_of_a_folder_is_an_error_before_the_work(predict_call, tmp_path, flag):
    (tmp_path / "file").touch()
    code, _ = predict_call("--input", "none.jpg", flag, tmp_path / "file")
    assert code == f"error: cannot read or write {tmp_path / 'file'}: Not a directory"


def test_full_disk_is_an_error_that_names_the_file(without_pictures):
    code, _ = without_pictures("--save-json", "/dev/full")
    assert code == "error: cannot read or write /dev/full: No space left on device"


def test_error_is_one_line(predict_call):
    code, _ = predict_call("--input", "none.jpg")
    assert code == "error: the input 'none.jpg' does not exist"


@pytest.mark.parametrize("width", ["0", "-1", "wide", "1000"])
def test_invalid_line_width_is_an_error(call, width):
    code, printed = call(
        predict, "--weights", "a", "--input", "b", "--output", "c", f"--line-width={width}"
    )
    assert code == 2 and "is not a width from 1 to 100 pixels" in printed.err


def test_labels_and_line_width_change_the_pictures(run, call, tmp_path):
    contents = set()
    for name, flags in {
        "score": [],
        "class": ["--labels", "class"],
        "none": ["--labels", "none"],
        "wide": ["--labels", "none", "--line-width", 6],
    }.items():
        image = run.test_images / "0000.png"
        arguments = ["--weights", run.output, "--input", image, "--output", tmp_path / name]
        assert call(predict, *arguments, "--threshold", 0, "--device", "cpu", *flags)[0] == 0
        contents.add((tmp_path / name / "0000.png").read_bytes())
    assert len(contents) == 4
