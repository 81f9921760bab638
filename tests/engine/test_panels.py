"""Panels show and measure what the teacher sees, and change nothing of the training."""

import json
import random

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image

from locreweight.data.monitored import MonitoredSample
from locreweight.data.transforms.views import UnlabeledSample, View
from locreweight.engine.panels import PanelStyle, PseudoLabelPanels, draw_pseudo_labels
from locreweight.modeling.meta_arch import TeacherOutput
from locreweight.visualization.drawing import quality_colors
from tests.engine.tiny_training import copy_of, detections_as_ground_truth, same, training_config
from tests.tiny_data import make_coco

STYLE = PanelStyle(["cat", "dog", "owl"], "RGB", 0.5)


def generators():
    """The state of all that training may draw from."""
    numpy = np.random.get_state()
    return numpy[1].tolist(), numpy[2], random.getstate(), torch.get_rng_state().tolist()


@pytest.fixture
def trained(make_trainer, tmp_path):
    """Trains with and without panels; both draw as they like."""

    def train(period, **settings):
        trainer = make_trainer({"VIS_PERIOD": period, "TEST.MONITORED_IMAGES": 3, **settings})
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        trainer.train()
        return trainer, generators()

    return train


def test_training_is_the_same_with_panels_and_without(trained, tmp_path):
    # Without burn-in: in it Detectron2 itself draws labeled images for VIS_PERIOD.
    with_panels, first = trained(1, **{"SEMI.BURN_IN_ITERS": 0})
    assert len(list((tmp_path / "panels").iterdir())) == 4
    without, second = trained(0, **{"SEMI.BURN_IN_ITERS": 0})
    assert first == second
    assert same(copy_of(with_panels.student), copy_of(without.student))
    assert same(copy_of(with_panels.teacher), copy_of(without.teacher))


def test_panels_come_every_period_and_at_the_end(trained, tmp_path):
    trained(3)
    files = sorted(file.name for file in (tmp_path / "panels").iterdir())
    assert files == ["iter_0000003.jpg", "iter_0000004.jpg"]
    with Image.open(tmp_path / "panels" / files[0]) as image:
        assert min(image.size) > 300


def test_period_0_is_never(trained, tmp_path):
    trained(0)
    assert not (tmp_path / "panels").exists()


def test_a_panel_goes_to_tensorboard(trained, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(4)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "pseudo_labels" in events.Tags()["images"]


def test_what_the_teacher_finds_is_measured_against_the_truth(make_trainer, tmp_path):
    """As truth what this very teacher finds: all pseudo-labels are right, by definition."""
    settings = {
        # Views that are the images themselves.
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
        "INPUT.RANDOM_FLIP": "none",
        "VIS_PERIOD": 1,
    }
    json_file, images = make_coco(tmp_path / "unlabeled", images=4, seed=9)
    settings["DATASETS.UNLABELED"] = [f"folder:{images}"]
    teacher = make_trainer(settings | {"DATASETS.UNLABELED_TRUTH": ()}).teacher
    truth = detections_as_ground_truth(
        teacher, f"coco:{json_file}:{images}", tmp_path / "truth.json"
    )
    trainer = make_trainer(settings | {"DATASETS.UNLABELED_TRUTH": [truth]})
    assert same(copy_of(trainer.teacher), copy_of(teacher))
    (hook,) = [h for h in trainer._hooks if isinstance(h, PseudoLabelPanels)]
    with EventStorage() as storage:
        trainer.storage = storage
        trainer.iter = 0
        hook.after_step()
        measured = {name: value for name, (value, _) in storage.latest().items()}
    assert measured["pseudo_truth/precision"] == 1.0
    assert measured["pseudo_truth/mean_iou"] == pytest.approx(1.0, abs=1e-3)
    found = json.loads((tmp_path / "truth.json").read_text())["annotations"]
    assert 0 < measured["pseudo_truth/recall"] <= 1.0 and found
    quarters = [measured[f"pseudo_truth/quality_quarter_{i}/recall"] for i in range(1, 5)]
    assert sum(quarters) == pytest.approx(measured["pseudo_truth/recall"])


def test_without_truth_nothing_is_measured(trained):
    trainer, _ = trained(4)
    assert not [name for name in trainer.storage.latest() if name.startswith("pseudo_truth")]


def test_of_many_images_without_truth_only_the_shown_ones_are_looked_at(datasets, tmp_path):
    looked = []

    class Teacher:
        device = torch.device("cpu")

        def detect(self, inputs):
            looked.extend(inputs)
            empty = Instances(
                (64, 64),
                pred_boxes=Boxes(torch.zeros(0, 4)),
                pred_classes=torch.zeros(0, dtype=torch.int64),
                scores=torch.zeros(0),
                localization_quality=torch.zeros(0),
            )
            return TeacherOutput({}, [empty] * len(inputs))

    from types import SimpleNamespace

    from locreweight.data.training_sets import load_training_sets, register_datasets

    _, images = make_coco(tmp_path / "many", images=20, seed=9)
    settings = {"DATASETS.UNLABELED": [f"folder:{images}"], "VIS_PERIOD": 1}
    cfg = training_config(datasets, tmp_path, settings)
    register_datasets(cfg)
    hook = PseudoLabelPanels.from_config(cfg, Teacher(), load_training_sets(cfg), torch.float16)
    with EventStorage() as storage:
        hook.trainer = SimpleNamespace(iter=0, max_iter=9, storage=storage)
        hook.after_step()
    assert len(looked) == 6


def test_boxes_of_a_panel_lie_at_the_same_place_in_both_views():
    gray = torch.full((3, 100, 100), 128, dtype=torch.uint8)
    shift = torch.tensor([[1, 0, 20], [0, 1, 10], [0, 0, 1]], dtype=torch.float64)
    views = UnlabeledSample("a", View(gray, torch.eye(3, dtype=torch.float64)), View(gray, shift))
    chosen = Instances(
        (100, 100),
        pred_boxes=Boxes(torch.tensor([[10.0, 40, 40, 70], [85, 5, 99, 20]])),
        pred_classes=torch.tensor([0, 1]),
        scores=torch.tensor([0.9, 0.8]),
        localization_quality=torch.tensor([0.5, 0.3]),
    )
    picture = draw_pseudo_labels(MonitoredSample(views, None), chosen, STYLE)
    weak, strong = picture[:300, :300], picture[:300, 304:604]
    best, worse = quality_colors(chosen.localization_quality)
    for view, left, bottom in ((weak, 30, 210), (strong, 90, 240)):
        rows, columns = np.nonzero((view == best).all(axis=2))
        assert columns.min() == pytest.approx(left, abs=4)
        assert rows.max() == pytest.approx(bottom, abs=4)
    # The other one has left the strong view.
    assert (weak == worse).all(axis=2).any() and not (strong == worse).all(axis=2).any()
