"""The synthetic set: files, boxes compared with the drawn pixels, reproducibility."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

SCRIPT = Path(__file__).resolve().parents[1] / "datasets" / "make_synthetic.py"
SMALL = {"labeled": 4, "unlabeled": 6, "val": 5, "size": 96, "seed": 3}


def load_script():
    """Import the script, which is not in a package."""
    spec = importlib.util.spec_from_file_location("make_synthetic", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # needed by dataclasses
    spec.loader.exec_module(module)
    return module


maker = load_script()
STYLE = maker.SceneStyle()


def contents(root: Path) -> dict[str, bytes]:
    """All files in a folder: relative path -> content."""
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def inside(outline: np.ndarray, low: float, high: float, per_pixel: int) -> np.ndarray:
    """Bool grid over ``[low, high]`` in x and y: whether the center of a cell is in the polygon.

    Counts the edges that a ray to the right crosses, independently of OpenCV.
    """
    steps = low + (np.arange(round((high - low) * per_pixel)) + 0.5) / per_pixel
    x, y = steps[None, :], steps[:, None]
    mask = np.zeros((len(steps), len(steps)), bool)
    for (x1, y1), (x2, y2) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        if y1 != y2:
            mask ^= ((y1 > y) != (y2 > y)) & (x < x1 + (x2 - x1) * (y - y1) / (y2 - y1))
    return mask


def tight_xyxy(mask: np.ndarray, per_pixel: int) -> np.ndarray:
    """``(4,)`` xyxy box in pixels around a mask."""
    y, x = np.nonzero(mask)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / per_pixel


def scenes(count: int, style=STYLE, size: int = 96):
    """Lists of pieces, front to back."""
    return [maker.compose(np.random.default_rng([7, i]), size, style) for i in range(count)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("made") / "set"
    maker.make_dataset(root, **SMALL)
    return root


@pytest.mark.parametrize("split", maker.SPLITS)
def test_coco_json_is_complete_and_matches_the_images(dataset, split):
    path = dataset / f"{maker.ANNOTATIONS[split]}.json"
    coco = COCO(str(path))
    assert set(json.loads(path.read_text())) >= {"info", "images", "annotations", "categories"}
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(STYLE.classes)
    assert coco.getCatIds() == list(range(1, len(STYLE.classes) + 1))
    assert len(coco.imgs) == SMALL[split]
    on_disk = sorted(file.name for file in (dataset / split).iterdir())
    assert on_disk == sorted(image["file_name"] for image in coco.imgs.values())
    for image in coco.imgs.values():
        pixels = cv2.imread(str(dataset / split / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3) == (96, 96, 3)
        assert 1 <= len(coco.getAnnIds(imgIds=image["id"])) <= 6
    for annotation in coco.anns.values():
        x, y, w, h = annotation["bbox"]
        assert x >= 0 and y >= 0 and w > 2 and h > 2 and x + w <= 96 and y + h <= 96
        assert annotation["area"] == w * h
        assert annotation["iscrowd"] == 0
        assert annotation["category_id"] in coco.cats


def test_json_has_the_boxes_of_the_drawn_pieces(dataset):
    coco = COCO(str(dataset / "val.json"))
    for image in coco.imgs.values():
        _, pieces = maker.make_image(SMALL["seed"], "val", image["id"] - 1, 96)
        objects = [(piece.category, piece.box) for piece in pieces if piece.category]
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        assert [(a["category_id"], a["bbox"]) for a in annotations] == objects


def test_boxes_are_tight_on_the_shapes():
    for piece in (piece for pieces in scenes(12) for piece in pieces if piece.category):
        x, y, w, h = piece.box
        expected = tight_xyxy(inside(piece.outline, 0, 96, per_pixel=8), per_pixel=8)
        # One cell of each grid: 1/4 pixel in the drawing, 1/8 in the reference.
        np.testing.assert_allclose([x, y, x + w, y + h], expected, atol=0.25 + 0.125)


def test_boxes_match_the_rendered_pixels():
    """A single square without blur, noise and texture is found in the image."""
    plain = {name: (0.0, 0.0) for name in ("relief", "texture", "noise")}
    style = replace(STYLE, **plain, gain=(1.0, 1.0), blur=(0.01, 0.01), classes=("square",))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        outline = rng.uniform(20, 40) + np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * 30.0
        piece = maker.Piece(outline, maker.rasterize(outline, 96), 1)
        image = maker.render([piece], rng, 96, style).astype(int)
        changed = tight_xyxy(np.abs(image - image[0, 0]).sum(axis=2) > 0, per_pixel=1)
        x, y, w, h = piece.box
        # all pixels that the square touches
        box = [np.floor(x), np.floor(y), np.ceil(x + w), np.ceil(y + h)]
        np.testing.assert_array_equal(changed, box)


def test_visibility_of_objects():
    shares = []
    for pieces in scenes(12):
        covered = np.zeros((4 * 192, 4 * 192), bool)  # from -48 to 144, so that shapes are complete
        covered[: 4 * 48], covered[4 * 144 :] = True, True
        covered[:, : 4 * 48], covered[:, 4 * 144 :] = True, True
        for piece in pieces:
            mask = inside(piece.outline, -48, 144, per_pixel=4)
            if piece.category:
                shares.append((mask & ~covered).sum() / mask.sum())
            covered |= mask
    assert min(shares) > STYLE.min_visibility - 0.03  # the two masks differ along edges
    assert np.mean(np.array(shares) < 0.95) > 0.2
    assert np.mean(np.array(shares) > 0.95) > 0.2


def test_invisible_object_is_left_out():
    style = replace(STYLE, objects=(6, 6), extent=(0.8, 0.9), min_visibility=0.7)
    for pieces in scenes(5, style):
        assert 0 < sum(piece.category > 0 for piece in pieces) < 6


def test_sizes_and_class_balance():
    objects = [piece for pieces in scenes(200) for piece in pieces if piece.category]
    count = np.bincount([piece.category for piece in objects], minlength=len(STYLE.classes) + 1)[1:]
    assert count.min() > 0.75 * count.mean() and count.max() < 1.25 * count.mean()
    whole = np.array([np.ptp(piece.outline, axis=0).max() for piece in objects]) / 96
    assert STYLE.extent[0] - 1e-9 <= whole.min() < 1.1 * STYLE.extent[0]
    assert 0.9 * STYLE.extent[1] < whole.max() <= STYLE.extent[1] + 1e-9
    assert any(piece.category == 0 for piece in scenes(1)[0])


def test_reproducible_and_seeded(dataset, tmp_path):
    maker.make_dataset(tmp_path / "again", **SMALL)
    maker.make_dataset(tmp_path / "other", **SMALL | {"seed": 4})
    again, other, made = map(contents, (tmp_path / "again", tmp_path / "other", dataset))
    assert again == made
    assert other.keys() == made.keys()
    assert all(other[name] != made[name] for name in made)


def test_larger_set_contains_the_smaller(dataset, tmp_path):
    maker.make_dataset(tmp_path / "more", **SMALL | {"labeled": 7, "val": 6})
    more, made = contents(tmp_path / "more"), contents(dataset)
    pictures = [name for name in made if name.endswith(".jpg")]
    assert all(more[name] == made[name] for name in pictures)
    assert more["unlabeled_truth.json"] == made["unlabeled_truth.json"]
    for name in ("labeled.json", "val.json"):
        longer, shorter = json.loads(more[name]), json.loads(made[name])
        for key in ("images", "annotations"):
            assert longer[key][: len(shorter[key])] == shorter[key]


def test_all_images_differ(dataset):
    pictures = [data for name, data in contents(dataset).items() if name.endswith(".jpg")]
    assert len(set(pictures)) == len(pictures) == 15


def test_existing_set_is_kept(dataset, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    monkeypatch.setattr(maker, "write_split", None)  # calling it would fail
    maker.make_dataset(dataset, **SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}


@pytest.fixture
def tiny(tmp_path) -> Path:
    root = tmp_path / "sets" / "tiny"
    maker.make_dataset(root, 1, 1, 1, 64, 0)
    return root


@pytest.mark.parametrize("change", ["arguments", "format", "style"])
def test_other_set_needs_force(tiny, change, monkeypatch):
    before, labeled = contents(tiny), 1
    if change == "arguments":
        labeled = 2
    elif change == "format":
        monkeypatch.setattr(maker, "FORMAT", maker.FORMAT + 1)
    else:
        monkeypatch.setattr(maker, "SceneStyle", lambda: replace(STYLE, objects=(2, 3)))
    with pytest.raises(FileExistsError, match="--force or another --output"):
        maker.make_dataset(tiny, labeled, 1, 1, 64, 0)
    assert contents(tiny) == before
    maker.make_dataset(tiny, labeled, 1, 1, 64, 0, force=True)
    assert contents(tiny) != before
    assert list(tiny.parent.iterdir()) == [tiny]


@pytest.mark.parametrize("force", [False, True])
def test_other_folders_are_never_replaced(tmp_path, force):
    (tmp_path / "thesis.tex").write_text("years of work")
    for output in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(FileExistsError, match="not a synthetic data set"):
            maker.make_dataset(output, 1, 1, 1, 64, 0, force=force)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_empty_folder(tmp_path):
    maker.make_dataset(tmp_path, 1, 0, 0, 64, 0)
    assert (tmp_path / "labeled" / "000000.jpg").is_file()
    assert json.loads((tmp_path / "val.json").read_text())["images"] == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("had_one", [False, True])
def test_interrupted_run(tmp_path, monkeypatch, error, had_one):
    output = tmp_path / "set"
    if had_one:
        maker.make_dataset(output, 1, 1, 1, 64, 0)
    before = contents(tmp_path)
    make_image = maker.make_image

    def fails_at_the_third(seed, split, index, size):
        if index == 2:
            raise error
        return make_image(seed, split, index, size)

    monkeypatch.setattr(maker, "make_image", fails_at_the_third)
    with pytest.raises(type(error)):
        maker.make_dataset(output, 1, 3, 1, 64, 0, force=True)
    assert contents(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([output] if had_one else [])


@pytest.mark.parametrize("wrong", [{"labeled": -1}, {"seed": -1}, {"size": 8}])
def test_numbers_out_of_range(tmp_path, wrong):
    with pytest.raises(ValueError, match="at least"):
        maker.make_dataset(tmp_path / "set", **SMALL | wrong)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path, capsys):
    few = ["--labeled", "1", "--unlabeled", "2", "--val", "1", "--size", "64"]
    arguments = ["--output", str(tmp_path / "set"), *few]
    maker.main(arguments)
    assert "1 + 2 + 1 images" in capsys.readouterr().out
    assert len(list((tmp_path / "set" / "unlabeled").iterdir())) == 2
    with pytest.raises(SystemExit):
        maker.main([*arguments, "--seed", "1"])
    assert "--force" in capsys.readouterr().err
    maker.main([*arguments, "--seed", "1", "--force"])


def test_hues_of_classes_and_clutter():
    rng, ground = np.random.default_rng(0), np.zeros(3)
    for category, expected in enumerate(np.arange(len(STYLE.classes)) * 120.0, start=1):
        colors = [maker.pick_color(rng, category, ground, STYLE) for _ in range(400)]
        hues = cv2.cvtColor(np.float32([colors]), cv2.COLOR_BGR2HSV)[0, :, 0]
        off = (hues - expected + 180) % 360 - 180
        assert abs(off.mean()) < 8 and 0.8 < off.std() / STYLE.hue_spread < 1.2
    colors = [maker.pick_color(rng, 0, ground, STYLE) for _ in range(400)]
    hues = cv2.cvtColor(np.float32([colors]), cv2.COLOR_BGR2HSV)[0, :, 0]
    assert np.histogram(hues, bins=6, range=(0, 360))[0].min() > 40


def test_output_that_cannot_be_written_is_an_error(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_:
        maker.main(["--output", str(tmp_path / "file/sub/data")])
    assert exit_.value.code == 1
    expected = f"error: cannot write {tmp_path}/file/sub/data: Not a directory\n"
    assert capsys.readouterr().err == expected
