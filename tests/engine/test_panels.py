"""Panels of pseudo-labels: pictures, measurements, and no influence on the training."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image

from locreweight.data.monitored import MonitoredSample
from locreweight.data.training_sets import load_training_sets, register_datasets
from locreweight.data.transforms.views import UnlabeledSample, View
from locreweight.engine.panels import PanelStyle, PseudoLabelPanels, draw_pseudo_labels
from locreweight.modeling.meta_arch import TeacherOutput
from locreweight.visualization.drawing import quality_colors
from tests.engine.tiny_training import copy_of, detections_as_ground_truth, same, training_config
from tests.tiny_data import make_coco

STYLE = PanelStyle(["cat", "dog", "owl"], "RGB", 0.5)


def generators():
    """Return the state of all random generators that training may use."""
    numpy = np.random.get_state()
    return numpy[1].tolist(), numpy[2], random.getstate(), torch.get_rng_state().tolist()


@pytest.fixture
def trained(make_trainer, tmp_path):
    """Train with and without panels, from the same random state."""

    def train(period, **settings):
        trainer = make_trainer({"VIS_PERIOD": period, "TEST.MONITORED_IMAGES": 3, **settings})
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        trainer.train()
        return trainer, generators()

    return train


def test_training_is_the_same_with_panels_and_without(trained, tmp_path):
    # Without burn-in, in which Detectron2 itself draws labeled images every VIS_PERIOD.
    with_panels, first = trained(1, **{"SEMI.BURN_IN_ITERS": 0})
    assert len(list((tmp_path / "panels").glob("iter_*.jpg"))) == 4
    without, second = trained(0, **{"SEMI.BURN_IN_ITERS": 0})
    assert first == second
    assert same(copy_of(with_panels.student), copy_of(without.student))
    assert same(copy_of(with_panels.teacher), copy_of(without.teacher))


def test_panels_are_written_every_period_and_at_the_ends(trained, tmp_path):
    trained(3)  # burn-in ends after 2 of 4 iterations
    files = sorted(file.name for file in (tmp_path / "panels").iterdir())
    assert files == [
        "iter_0000002.jpg",
        "iter_0000003.jpg",
        "iter_0000004.jpg",
        "teacher_0000002.jpg",
        "teacher_0000004.jpg",
    ]
    with Image.open(tmp_path / "panels" / files[0]) as image:
        assert min(image.size) > 300


def test_period_0_writes_no_panels(trained, tmp_path):
    trained(0)
    assert not (tmp_path / "panels").exists()


def test_first_row_is_written_to_tensorboard(trained, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(4)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "pseudo_labels" in events.Tags()["images"]


def test_pseudo_labels_are_compared_with_the_ground_truth(make_trainer, tmp_path):
    """With the teacher's own detections as ground truth, all pseudo-labels are correct."""
    settings = {
        # The weak view is the image itself.
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
        "INPUT.RANDOM_FLIP": "none",
        "VIS_PERIOD": 1,
    }
    json_file, images = make_coco(tmp_path / "unlabeled", images=4, seed=9)
    settings["DATASETS.UNLABELED"] = [f"folder:{images}"]
    teacher = make_trainer(settings | {"DATASETS.UNLABELED_TRUTH": ()}).teacher
    ground_truth = detections_as_ground_truth(
        teacher, f"coco:{json_file}:{images}", tmp_path / "truth.json"
    )
    trainer = make_trainer(settings | {"DATASETS.UNLABELED_TRUTH": [ground_truth]})
    assert same(copy_of(trainer.teacher), copy_of(teacher))
    (hook,) = [h for h in trainer._hooks if isinstance(h, PseudoLabelPanels)]
    with EventStorage() as storage:
        trainer.storage = storage
        trainer.iter = 0
        hook.after_step()
        measured = {name: value for name, (value, _) in storage.latest().items()}
    assert measured["pseudo_truth/precision"] == 1.0
    assert measured["pseudo_truth/mean_iou"] == pytest.approx(1.0, abs=1e-3)
    annotations = json.loads((tmp_path / "truth.json").read_text())["annotations"]
    assert 0 < measured["pseudo_truth/recall"] <= 1.0 and annotations
    quarters = [measured[f"pseudo_truth/quality_quarter_{i}/recall"] for i in range(1, 5)]
    assert sum(quarters) == pytest.approx(measured["pseudo_truth/recall"])


def test_nothing_is_measured_without_ground_truth(trained):
    trainer, _ = trained(4)
    assert not [name for name in trainer.storage.latest() if name.startswith("pseudo_truth")]


def test_without_ground_truth_only_images_of_the_panel_are_detected(datasets, tmp_path):
    detected = []

    class Teacher:
        device = torch.device("cpu")

        def detect(self, inputs):
            detected.extend(inputs)
            empty = Instances(
                (64, 64),
                pred_boxes=Boxes(torch.zeros(0, 4)),
                pred_classes=torch.zeros(0, dtype=torch.int64),
                scores=torch.zeros(0),
                localization_quality=torch.zeros(0),
            )
            return TeacherOutput({}, [empty] * len(inputs))

    _, images = make_coco(tmp_path / "many", images=20, seed=9)
    settings = {"DATASETS.UNLABELED": [f"folder:{images}"], "VIS_PERIOD": 1}
    cfg = training_config(datasets, tmp_path, settings)
    register_datasets(cfg)
    hook = PseudoLabelPanels.from_config(cfg, Teacher(), load_training_sets(cfg), torch.float16)
    with EventStorage() as storage:
        hook.trainer = SimpleNamespace(iter=0, max_iter=9, storage=storage, is_last_iteration=False)
        hook.after_step()
    assert len(detected) == 6


def test_boxes_are_projected_to_the_strong_view():
    gray = torch.full((3, 100, 100), 128, dtype=torch.uint8)
    shift = torch.tensor([[1, 0, 20], [0, 1, 10], [0, 0, 1]], dtype=torch.float64)
    views = UnlabeledSample("a", View(gray, torch.eye(3, dtype=torch.float64)), View(gray, shift))
    pseudo_labels = Instances(
        (100, 100),
        pred_boxes=Boxes(torch.tensor([[10.0, 40, 40, 70], [85, 5, 99, 20]])),
        pred_classes=torch.tensor([0, 1]),
        scores=torch.tensor([0.9, 0.8]),
        localization_quality=torch.tensor([0.5, 0.3]),
    )
    picture = draw_pseudo_labels(MonitoredSample(views, None), pseudo_labels, STYLE)
    weak, strong = picture[:300, :300], picture[:300, 304:604]
    best, worse = quality_colors(pseudo_labels.localization_quality)
    for view, left, bottom in ((weak, 30, 210), (strong, 90, 240)):
        rows, columns = np.nonzero((view == best).all(axis=2))
        assert columns.min() == pytest.approx(left, abs=4)
        assert rows.max() == pytest.approx(bottom, abs=4)
    # The other box is outside of the strong view.
    assert (weak == worse).all(axis=2).any() and not (strong == worse).all(axis=2).any()
