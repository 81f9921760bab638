"""The example on torchvision: every part of it, and short runs."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import v2

from examples import torchvision_reference as reference
from examples.torchvision_reference import (
    Detector,
    SampledProposals,
    Settings,
    UnlabeledImages,
    View,
)
from locreweight.errors import UsageError
from locreweight.losses.localization import localization_quality
from tests.tiny_data import edit_json, make_coco, make_folder

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/torchvision_reference.py"
TINY = {"channels": 16, "sampled": 16}
K = 3


# --- the file -------------------------------------------------------------------------------------


def test_the_file_is_short_and_imports_nothing_of_detectron2():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 500
    assert max(map(len, text.splitlines())) <= 100
    names = {
        name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", ""), *(alias.name for alias in node.names)]
    }
    assert "locreweight.losses" in names
    assert not [name for name in names if name and re.match("detectron2|fvcore", name)]


def test_it_runs_without_detectron2(tmp_path):
    (tmp_path / "detectron2.py").write_text("raise ImportError('not here')")
    result = run("--help", PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert result.returncode == 0, result.stderr
    assert "--labeled" in result.stdout


def test_every_option_has_help_and_a_default():
    for field in dataclasses.fields(Settings):
        assert field.metadata["help"]
        assert field.default is not dataclasses.MISSING
    shown = run("--help", COLUMNS="300").stdout
    assert shown.count("(default: ") == len(dataclasses.fields(Settings))
    for field in dataclasses.fields(Settings):
        assert f"--{field.name.replace('_', '-')}" in shown


def test_every_option_of_the_file_for_photographs_is_one():
    options = (ROOT / "examples/photographs.txt").read_text().split()
    names = {option[2:].partition("=")[0].replace("-", "_") for option in options}
    assert len(names) == len(options)
    assert all(hasattr(Settings, name) for name in names)


# --- boxes and losses -----------------------------------------------------------------------------


def test_boxes_are_coded_by_their_corners_and_back():
    coder = reference.CornerCoder((10.0, 10.0, 10.0, 10.0))
    proposals = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    target = torch.tensor([[12.0, 16.0, 29.0, 64.0]])
    coded = coder.encode_single(target, proposals)
    assert_close(coded, torch.tensor([[1.0, -1.0, -0.5, 1.0]]))
    assert_close(coder.decode_single(coded, proposals), target)
    crossed = coder.decode_single(torch.tensor([[20.0, 0.0, 0.0, 0.0]]), proposals)
    assert_close(crossed, torch.tensor([[30.0, 20.0, 50.0, 60.0]]))


def rois(labels, **numbers):
    foreground = sum(label < K for label in labels)
    values = {
        "logits": torch.randn(len(labels), K + 1),
        "mean": torch.randn(foreground, 4),
        "log_variance": torch.randn(foreground, 4),
    }
    values = {name: x.requires_grad_() for name, x in values.items()}
    fixed = {"target": torch.randn(foreground, 4), "quality": torch.rand(foreground)}
    return SampledProposals(boxes=[], labels=torch.tensor(labels), **values | fixed | numbers)


@pytest.mark.parametrize("literal", [False, True])
def test_the_box_losses_are_sums_over_the_foreground_divided_as_asked(literal):
    found = rois([0, K, 2, K, K])
    count = 2 if literal else 5
    error = (found.mean - found.target).abs()
    smooth = torch.where(error < 1, error**2 / 2, error - 0.5)
    _, supervised = found.supervised_losses(literal)
    expected = smooth / found.log_variance.exp() + found.log_variance / 2
    assert_close(supervised, expected.sum() / count)
    _, unsupervised = found.unsupervised_losses(torch.rand(5), literal)
    assert_close(unsupervised, (smooth * found.quality[:, None]).sum() / count)


@pytest.mark.parametrize("literal", [False, True])
def test_the_classification_losses(literal):
    found = rois([0, K, 2, K, K])
    reliability = torch.rand(5)
    each = -found.logits.log_softmax(1)[torch.arange(5), found.labels]
    assert_close(found.supervised_losses(literal)[0], each.mean())
    weighted, foreground = each * reliability, found.labels < K
    separate = weighted[foreground].mean() + weighted[~foreground].mean()
    expected = separate if literal else weighted.mean()
    assert_close(found.unsupervised_losses(reliability, literal)[0], expected)


@pytest.mark.parametrize("literal", [False, True])
def test_without_foreground_the_box_losses_are_zero_and_keep_the_graph(literal):
    found = rois([K, K])
    for _, loss in (
        found.supervised_losses(literal),
        found.unsupervised_losses(torch.rand(2), literal),
    ):
        assert loss.item() == 0
        loss.backward()


# --- the detector ---------------------------------------------------------------------------------


def random_view(size=64):
    image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    return View(image, torch.eye(3, dtype=torch.float64))


def target(boxes, labels):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor(labels), "quality": torch.ones(len(boxes))}


@pytest.fixture
def detector():
    """Its predictions differ from proposal to proposal, as those of random weights hardly do."""
    detector = Detector(K, Settings(**TINY)).to(reference.DEVICE)
    for branch in detector.roi_heads.box_predictor.values():
        torch.nn.init.normal_(branch.weight, std=0.5)
    return detector


@torch.no_grad()
def test_detections_are_torchvisions_and_have_the_quality_of_their_proposal(detector):
    detector.eval()
    images, features = detector.extract_features([random_view(), random_view(48)])
    proposals, _ = detector.rpn(images, features)
    logits, deltas, log_variance = detector.predict_rois(images, features, proposals)
    no_box = torch.zeros(len(deltas), 4)
    boxes, scores, labels = detector.roi_heads.postprocess_detections(
        logits.roll(1, dims=1),
        torch.cat([no_box, deltas.flatten(1)], dim=1),
        proposals,
        images.image_sizes,
    )
    quality = localization_quality(log_variance)
    for found, *theirs in zip(
        detector.detect(images, features), boxes, scores, labels, strict=True
    ):
        assert len(found["boxes"]) > 3
        assert_close([found["boxes"], found["scores"], found["labels"]], list(theirs))
        rows = (logits.softmax(1)[:, :-1, None] == found["scores"]).nonzero()
        known = {(label + 1, i): quality[row, label] for row, label, i in rows.tolist()}
        for i, label in enumerate(found["labels"].tolist()):
            assert found["quality"][i] == known[label, i]


def test_strides_are_those_of_padded_images(detector):
    """Torchvision infers them from the images it sees first, which would be wrong for these."""
    detector.eval()
    images, features = detector.extract_features([random_view(33)])
    detector.predict_rois(images, features, [torch.zeros(1, 4)])
    assert images.tensors.shape[-1] == 64
    assert detector.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


@pytest.mark.parametrize("threshold", [0.05, 1.0], ids=["pseudo-labels", "none"])
@pytest.mark.parametrize("boxes", [[[4, 6, 40, 44]], []], ids=["labeled", "without objects"])
def test_every_parameter_takes_part_in_every_step(detector, threshold, boxes):
    """Where one does not, processes of a distributed run would wait for it without end."""
    settings = Settings(**TINY, threshold=threshold)
    teacher = Detector(K, settings).to(reference.DEVICE).eval()
    teacher.load_state_dict(detector.state_dict())
    teacher.requires_grad_(False)
    labeled = [(random_view(), target(boxes, [1] * len(boxes))) for _ in range(2)]
    pairs = [[random_view(), random_view()] for _ in range(2)]
    loss, count = reference.training_step(detector, teacher, labeled, pairs, settings)
    assert (count > 0) == (threshold < 1)
    loss.backward()
    assert loss.isfinite()
    assert [name for name, p in detector.named_parameters() if p.grad is None] == []


def test_burn_in_does_not_ask_the_teacher(detector):
    labeled = [(random_view(), target([[4, 6, 40, 44]], [1]))]
    loss, count = reference.training_step(detector, None, labeled, [], Settings(**TINY))
    assert loss.isfinite() and count == 0


# --- views ----------------------------------------------------------------------------------------


def geometry_of(transform):
    """A transform without what changes colors."""
    kept = (v2.RandomShortestSize, v2.RandomHorizontalFlip)
    kinds = [t for t in transform.transforms if isinstance(t, kept) or moves(t)]
    return v2.Compose(kinds)


def moves(transform):
    inner = getattr(transform, "transforms", [])
    return bool(inner) and isinstance(inner[0], v2.RandomAffine)


@pytest.mark.parametrize("kind", range(4), ids=["test", "labeled", "weak", "strong"])
def test_a_views_matrix_says_where_things_are_in_the_image(kind):
    """A white disc on the colour that moves are filled with, found in the view by its centroid."""
    height, width, x, y = 90, 70, 44.5, 31.5
    rows, columns = np.mgrid[:height, :width] + 0.5
    disc = (columns - x) ** 2 + (rows - y) ** 2 < 10**2
    image = Image.fromarray(np.where(disc[..., None], 255, [124, 116, 104]).astype(np.uint8))
    transform = reference.build_transforms(64)[kind]
    transform = geometry_of(transform) if kind else transform
    seen = set()
    for _ in range(25):
        view = View.make(image, transform)
        weight = (view.image[0].double() - 124).clamp(min=0)
        h, w = weight.shape
        centroid = torch.stack(
            [
                (weight.sum(0) * (torch.arange(w) + 0.5)).sum(),
                (weight.sum(1) * (torch.arange(h) + 0.5)).sum(),
            ]
        )
        expected = view.matrix @ torch.tensor([x, y, 1.0], dtype=torch.float64)
        assert_close(centroid / weight.sum(), expected[:2], rtol=0, atol=0.3)
        seen.add(bool(view.matrix.det() < 0))
    assert seen == ({False, True} if kind else {False})


def test_boxes_are_projected_there_and_back():
    image = Image.new("RGB", (80, 60))
    weak, strong = (View.make(image, reference.build_transforms(64)[2]) for _ in range(2))
    boxes = torch.tensor([[3.0, 4.0, 20.0, 30.0], [10.0, 1.0, 44.0, 40.0]])
    there = weak.project_boxes(boxes, strong)
    assert_close(strong.project_boxes(there, weak), boxes, rtol=0, atol=1e-3)


def test_sizes_of_views():
    image = Image.new("RGB", (300, 100))
    test, _, weak, _ = reference.build_transforms(60)
    assert View.make(image, test).image.shape == (3, 33, 100)  # the long side is at its limit
    sides = {View.make(image.crop((0, 0, 100, 100)), weak).image.shape[1] for _ in range(200)}
    assert (min(sides), max(sides)) == (45, 60)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (80, 60))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(folder_file(tmp_path / "turned" / "a.jpg"), exif=exif)
    images = UnlabeledImages(str(tmp_path / "turned"), lambda x: [View.make(x, v2.Identity())])
    assert images[0][0].image.shape == (3, 80, 60)


# --- data -----------------------------------------------------------------------------------------


def folder_file(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def load(file, folder):
    return reference.load_labeled(str(file), str(folder), v2.Identity())


def test_ground_truth_with_sparse_ids_crowds_and_empty_images(tmp_path):
    file, folder = make_coco(tmp_path, images=2, boxes_per_image=3)

    def edit(content):
        for category in content["categories"]:
            category["id"] = 7 * category["id"] + 4
        for a in content["annotations"]:
            a["category_id"] = 7 * a["category_id"] + 4
        first, second, third, *others = content["annotations"]
        content["annotations"] = [first, second | {"iscrowd": 1}, third | {"bbox": [5, 5, 0, 9]}]
        return content | {"kept": [first], "left out": others}

    original = json.loads(file.read_text())["annotations"][0]
    edit_json(file, edit)
    images = load(file, folder)
    view, truth = images[0]
    x, y, w, h = original["bbox"]
    assert view.image.shape == (3, 64, 64)
    assert_close(truth["boxes"], torch.tensor([[x, y, x + w, y + h]], dtype=torch.float32))
    assert truth["labels"].tolist() == [original["category_id"]]
    assert truth["quality"].tolist() == [1]
    assert images[1][1]["boxes"].shape == (0, 4)


def test_boxes_outside_of_the_image_are_left_out(tmp_path):
    file, folder = make_coco(tmp_path, images=1, boxes_per_image=1)
    edit_json(file, lambda c: c["annotations"][0].update(bbox=[64, 10, 20, 20]))
    assert len(load(file, folder)[0][1]["boxes"]) == 0


def test_what_is_wrong_with_annotations_is_said(tmp_path):
    file, folder = make_coco(tmp_path, images=2)
    next(folder.iterdir()).unlink()
    with pytest.raises(UsageError, match=r"1 images of .*annotations.json are not in .*images"):
        load(file, folder)
    file.write_text("{")
    with pytest.raises(UsageError, match="annotations.json cannot be read as COCO"):
        load(file, folder)
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        load(tmp_path / "elsewhere.json", folder)


def test_a_bad_unlabeled_image_is_skipped_and_named(tmp_path, capsys):
    folder = make_folder(tmp_path / "some" / "deep" / "folder", images=1)
    (folder / "0009.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("")
    images = UnlabeledImages(str(tmp_path / "some"), lambda x: [View.make(x, v2.Identity())])
    assert len(images) == 2
    assert images[0] and images[1] is None
    assert "0009.png" in capsys.readouterr().err


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        UnlabeledImages(str(tmp_path))


# --- runs -----------------------------------------------------------------------------------------


def run(*options, launcher=(sys.executable,), **variables):
    return subprocess.run(
        [*launcher, str(SCRIPT), *options],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    labeled, labeled_images = make_coco(folder / "labeled", images=4, seed=1)
    val, val_images = make_coco(folder / "val", images=2, seed=2)
    unlabeled = make_folder(folder / "unlabeled", images=4, seed=3)
    (unlabeled / "bad.jpg").write_bytes(b"no image")
    sizes = {**TINY, "labeled_batch": 2, "unlabeled_batch": 4, "threshold": 0.3}
    steps = {"iterations": 4, "burn_in": 2, "period": 2, "learning_rate": 1e-3}
    paths = {
        "labeled": labeled,
        "labeled_images": labeled_images,
        "val": val,
        "val_images": val_images,
        "unlabeled": unlabeled,
    }
    pairs = (sizes | steps | paths).items()
    return [f"--{name.replace('_', '-')}={value}" for name, value in pairs]


@pytest.mark.parametrize("processes", [1, 2])
def test_it_trains_evaluates_and_saves_a_teacher_that_loads_again(options, processes, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launcher = (sys.executable,) if processes == 1 else launch
    result = run(*options, f"--output={tmp_path}", launcher=launcher)
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^(teacher|student) +(\d+) +(\d+\.\d\d)", result.stdout, re.MULTILINE)
    assert [(name, step) for name, step, _ in rows] == [
        ("teacher", "2"),
        ("teacher", "4"),
        ("student", "4"),
    ]
    each = "[2, 4]" if processes == 1 else "[1, 2]"
    assert f"{processes} process(es) x {each} images" in result.stderr
    assert "100%" in result.stderr
    assert "bad.jpg" in result.stderr

    settings, weights = torch.load(tmp_path / "teacher.pt", weights_only=True)
    classes = len(weights["roi_heads.box_predictor.logits.bias"]) - 1
    assert classes == 3
    teacher = Detector(classes, Settings(**settings)).to(reference.DEVICE).eval()
    teacher.load_state_dict(weights)
    with torch.no_grad():
        teacher.detect(*teacher.extract_features([random_view()]))


def test_the_same_seed_gives_the_same_teacher(options, tmp_path, monkeypatch):
    def trained(seed, name):
        arguments = [*options, f"--seed={seed}", "--iterations=3", f"--output={tmp_path / name}"]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        reference.main()
        return torch.load(tmp_path / name / "teacher.pt", weights_only=True)[1]

    first, again, other = (trained(seed, name) for seed, name in ((1, "a"), (1, "b"), (2, "c")))
    weight = "roi_heads.box_predictor.deltas.weight"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[weight], other[weight])


def test_a_backbones_weights_are_read_and_batch_norm_is_frozen(options, tmp_path, monkeypatch):
    body = reference.models.resnet18(weights=None)
    body.bn1.running_mean += 3
    torch.save(body.state_dict(), tmp_path / "resnet18.pth")
    more = [f"--backbone-weights={tmp_path / 'resnet18.pth'}", "--iterations=1", "--burn-in=1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options, *more, f"--output={tmp_path}"])
    reference.main()
    _, weights = torch.load(tmp_path / "teacher.pt", weights_only=True)
    assert_close(weights["backbone.body.bn1.running_mean"], torch.full((64,), 3.0))
    distance = (weights["backbone.body.conv1.weight"] - body.conv1.weight).abs().max()
    assert distance < 0.05, "it was trained for one step, from these weights"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--labeled=/nowhere.json", "error: .*/nowhere.json"),
        ("--unlabeled=/nowhere", "error: .*/nowhere"),
        ("--backbone-weights=/nowhere.pth", "error: .*/nowhere.pth"),
    ],
)
def test_mistakes_end_with_one_line(options, option, message, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options, option, f"--output={tmp_path}"])
    with pytest.raises(SystemExit, match=message):
        reference.main()


def test_other_categories_are_refused(options, monkeypatch, tmp_path):
    file, folder = make_coco(tmp_path, images=1, classes=("cat", "dog"))
    more = [f"--val={file}", f"--val-images={folder}"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options, *more])
    with pytest.raises(SystemExit, match="different categories"):
        reference.main()


def test_a_perfect_detector_scores_100(tmp_path):
    """Through the test view, back into the original image, and past categories with gaps."""
    file, folder = make_coco(tmp_path, images=3, size=(96, 128), boxes_per_image=2)

    def spread(content):
        for item in content["categories"]:
            item["id"] *= 10
        for item in content["annotations"]:
            item["category_id"] *= 10

    edit_json(file, spread)
    images = reference.load_labeled(str(file), str(folder), reference.build_transforms(64)[0])
    answers = iter([truth for _, truth in images])

    class Oracle(torch.nn.Module):
        def extract_features(self, views):
            return (views,)

        def detect(self, views):
            truths = [next(answers) for _ in views]
            return [truth | {"scores": torch.ones(len(truth["labels"]))} for truth in truths]

    assert reference.evaluate(Oracle(), images) == pytest.approx([100] * 3)
