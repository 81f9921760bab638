"""Training on unreadable, unusual and changed data."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from locreweight.data import unreadable
from locreweight.engine import evaluate
from locreweight.errors import UsageError
from tests.engine.tiny_training import build_trainer, make_datasets, training_config
from tests.tiny_data import edit_json

LONG = {"SOLVER.MAX_ITER": 8, "SEMI.BURN_IN_ITERS": 0}


@pytest.fixture
def own(tmp_path):
    """Data sets of this test alone, to be spoiled; and their folder."""
    folder = tmp_path / "data"
    return make_datasets(folder), folder


def train(named, tmp_path, settings=None, resume=False):
    cfg = training_config(named, tmp_path / "output", settings)
    trainer = build_trainer(cfg, resume=resume)
    trainer.train()
    return trainer


def spoil(folder, count):
    """Makes some of the five unlabeled images unreadable; returns their names."""
    files = sorted((folder / "unlabeled").iterdir())[:count]
    for file in files:
        file.write_text("not an image")
    return [file.name for file in files]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_unlabeled_image(own, tmp_path, caplog, num_workers):
    named, folder = own
    (name,) = spoil(folder, 1)
    with caplog.at_level(logging.WARNING):
        trainer = train(named, tmp_path, LONG | {"DATALOADER.NUM_WORKERS": num_workers})
    assert trainer.iter == trainer.max_iter
    warnings = [r.getMessage() for r in caplog.records if "skipped an unlabeled" in r.getMessage()]
    assert len(warnings) == 1
    assert str(folder / "unlabeled" / name) in warnings[0]
    assert trainer.storage.latest()["data/unreadable"][0] == 1
    assert '"data/unreadable": 1.0' in (tmp_path / "output" / "metrics.json").read_text()


def test_too_many_unreadable_images(own, tmp_path, monkeypatch):
    named, folder = own
    monkeypatch.setattr(unreadable, "MIN_DRAWN", 6)
    spoil(folder, 3)
    with pytest.raises(UsageError, match=r"DATASETS\.CHECKS\.MAX_UNREADABLE_SHARE 0\.1.*--resume"):
        train(named, tmp_path, LONG)
    train(named, tmp_path, LONG | {"DATASETS.CHECKS.MAX_UNREADABLE_SHARE": 0.9})


def test_image_of_one_pixel_height(own, tmp_path):
    """Resized to the greatest long side its short side would be nothing."""
    named, folder = own
    for part in ("labeled", "test"):
        image = folder / part / "images" / "0000.png"
        Image.fromarray(np.zeros((1, 4000, 3), np.uint8)).save(image)

        def edit(content):
            content["images"][0].update(height=1, width=4000)
            content["annotations"][0]["bbox"] = [0, 0, 4000, 1]

        edit_json(folder / part / "annotations.json", edit)
    Image.fromarray(np.zeros((1, 4000, 3), np.uint8)).save(folder / "unlabeled" / "0000.png")
    settings = {"DATASETS.TEST": named["DATASETS.TEST"]}
    trainer = train(named, tmp_path, LONG | settings)
    assert trainer.iter == trainer.max_iter
    assert trainer.unreadable.files == 0


def test_16_bit_images_in_evaluation(own, tmp_path):
    """The same picture with 8 and with 16 bits is the same to the model."""
    named, folder = own
    settings = {"DATASETS.TEST": named["DATASETS.TEST"]}
    trainer = build_trainer(training_config(named, tmp_path / "output", settings))
    seen = []
    trainer.teacher.register_forward_pre_hook(
        lambda _, inputs: seen.extend(x["image"] for x in inputs[0])
    )
    first = sorted((folder / "test" / "images").iterdir())
    grays = [np.asarray(Image.open(file).convert("L")) for file in first]
    for scale, dtype in ((1, np.uint8), (256, np.uint16)):
        for file, gray in zip(first, grays, strict=True):
            Image.fromarray(gray.astype(dtype) * dtype(scale)).save(file)
        evaluate(trainer.cfg, trainer.teacher)
    half = len(seen) // 2
    assert half == len(first)
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
    assert any(image.float().std() > 1 for image in seen)


class TestChangedBetweenRuns:
    def resume(self, named, tmp_path, **settings):
        return build_trainer(
            training_config(named, tmp_path / "output", LONG | settings), resume=True
        )

    def test_moved_images(self, own, tmp_path):
        named, folder = own
        train(named, tmp_path, LONG)
        folder.rename(tmp_path / "moved")
        old, new = str(folder), str(tmp_path / "moved")
        moved = {key: [n.replace(old, new) for n in names] for key, names in named.items()}
        assert self.resume(moved, tmp_path).start_iter == LONG["SOLVER.MAX_ITER"]

    def test_other_number_of_annotated_images(self, own, tmp_path):
        named, folder = own
        train(named, tmp_path, LONG)
        edit_json(
            folder / "labeled" / "annotations.json",
            lambda content: content["images"].pop() and None,
        )
        words = (
            r"the labeled ones were 5 images .*, now 4 images.*DATASETS\.CHECKS\.ALLOW_CHANGED True"
        )
        with pytest.raises(UsageError, match=words):
            self.resume(named, tmp_path)

    def test_more_unlabeled_images(self, own, tmp_path):
        named, folder = own
        train(named, tmp_path, LONG)
        shutil.copy(folder / "unlabeled" / "0000.png", folder / "unlabeled" / "0009.png")
        with pytest.raises(UsageError, match=r"the unlabeled ones were 5 images .*, now 6 images"):
            self.resume(named, tmp_path)

    def test_other_unlabeled_images(self, own, tmp_path):
        named, folder = own
        train(named, tmp_path, LONG)
        file = folder / "unlabeled" / "0000.png"
        file.rename(file.with_name("9999.png"))
        with pytest.raises(UsageError, match=r"the unlabeled ones were 5 images .*, now 5 images"):
            self.resume(named, tmp_path)

    def test_allow_changed(self, own, tmp_path, caplog):
        named, folder = own
        train(named, tmp_path, LONG)
        (folder / "unlabeled" / "0000.png").unlink()
        with caplog.at_level(logging.WARNING):
            trainer = self.resume(named, tmp_path, **{"DATASETS.CHECKS.ALLOW_CHANGED": True})
        assert trainer.start_iter == LONG["SOLVER.MAX_ITER"]
        assert "now 4 images" in caplog.text

    def test_checkpoint_without_fingerprint(self, own, tmp_path):
        named, _ = own
        train(named, tmp_path, LONG)
        file = Path(tmp_path / "output" / "model_final.pth")
        content = torch.load(file, weights_only=False)
        del content["trainer"]["data"]
        torch.save(content, file)
        assert self.resume(named, tmp_path).start_iter == LONG["SOLVER.MAX_ITER"]
