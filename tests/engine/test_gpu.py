"""Training on a real GPU: ``make test-gpu``. For all machines: test_on_a_device.py."""

import json
import math

import pytest
import torch

from tests.engine.tiny_training import METHODS, build_trainer, copy_of, training_config

if not torch.cuda.is_available():
    pytest.skip("needs a GPU and TEST_ON_GPU=1", allow_module_level=True)

GPU = {"MODEL.DEVICE": "cuda"}
# All anchors and proposals are used: from fewer, a GPU would draw other random samples.
NO_SAMPLING = {
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 100000,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 1000,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
}


@pytest.fixture(autouse=True)
def log_every_iteration(monkeypatch):
    monkeypatch.setattr("locreweight.engine.writers.PERIOD", 1)


def train(datasets, folder, settings):
    """Train two steps, the first of which is burn-in; returns the trainer."""
    schedule = {"SEMI.BURN_IN_ITERS": 1, "SOLVER.MAX_ITER": 2}
    trainer = build_trainer(training_config(datasets, folder, schedule | settings), resume=True)
    trainer.train()
    return trainer


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


@pytest.mark.parametrize("amp", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_train_on_a_gpu(datasets, tmp_path, name, amp):
    settings = {"SEMI.METHOD": name, "SOLVER.AMP.ENABLED": amp != "float32"}
    if amp != "float32":
        settings["SOLVER.AMP.DTYPE"] = amp
    trainer = train(datasets, tmp_path, METHODS[name] | settings | GPU)
    assert all(x.isfinite().all() for x in copy_of(trainer.student).values())
    assert all(parameter.is_cuda for parameter in trainer.teacher.parameters())
    losses = {key: x for key, x in metrics(tmp_path)[-1].items() if "loss" in key}
    assert losses and all(map(math.isfinite, losses.values()))


@pytest.mark.parametrize("method", ["LocReweight", "MeanLocReweight"])
def test_losses_are_those_of_the_cpu(datasets, tmp_path, monkeypatch, method):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    settings = NO_SAMPLING | {"SEMI.METHOD": method}
    train(datasets, tmp_path / "cpu", settings)
    train(datasets, tmp_path / "gpu", settings | GPU)
    for on_cpu, on_gpu in zip(metrics(tmp_path / "cpu"), metrics(tmp_path / "gpu"), strict=True):
        losses = {key: x for key, x in on_cpu.items() if "loss" in key}
        assert losses
        assert {key: on_gpu[key] for key in losses} == pytest.approx(losses, rel=1e-3, abs=1e-5)


def test_training_resumes_and_evaluates_on_a_gpu(datasets, tmp_path):
    settings = {"DATASETS.TEST": datasets["DATASETS.TEST"], "TEST.EVAL_PERIOD": 2}
    settings |= {"SOLVER.CHECKPOINT_PERIOD": 1} | GPU
    first = train(datasets, tmp_path, settings | {"SOLVER.MAX_ITER": 1, "DATASETS.TEST": ()})
    settings |= {"SEMI.BURN_IN_ITERS": 1, "SOLVER.MAX_ITER": 2}
    resumed = build_trainer(training_config(datasets, tmp_path, settings), resume=True)
    assert resumed.start_iter == 1
    trained, loaded = copy_of(first.student), copy_of(resumed.student)
    assert all(torch.equal(trained[key], loaded[key]) for key in trained)
    resumed.train()
    assert "bbox/AP" in metrics(tmp_path)[-1]


def test_results_are_those_of_the_cpu(datasets, tmp_path):
    trainer = train(datasets, tmp_path, GPU | {"DATASETS.TEST": datasets["DATASETS.TEST"]})
    image = {"image": torch.randint(256, (3, 64, 64), dtype=torch.uint8), "height": 64, "width": 64}
    teacher = trainer.teacher.eval()
    with torch.no_grad():
        on_gpu = teacher([image])[0]["instances"].to("cpu")
        on_cpu = teacher.cpu()([image])[0]["instances"]
    assert len(on_cpu)
    torch.testing.assert_close(on_gpu.pred_boxes.tensor, on_cpu.pred_boxes.tensor, atol=0.1, rtol=0)
    torch.testing.assert_close(on_gpu.scores, on_cpu.scores, atol=1e-3, rtol=0)
