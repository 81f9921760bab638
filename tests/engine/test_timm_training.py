"""Trainings that start from weights of timm, and trained models that do not need them any more."""

from itertools import chain

import pytest
import timm
import torch

from locreweight.checkpoint.safe_loading import write_safetensors
from locreweight.checkpoint.timm_weights import timm_backbone
from locreweight.config import load_config
from locreweight.config_checks import check_supported
from locreweight.engine import config_suggestion
from locreweight.engine.predictor import Predictor
from locreweight.engine.startup_checks import config_findings, untrained_random_layers
from locreweight.errors import UsageError
from locreweight.modeling.committee import members_of
from tests.engine.tiny_training import build_trainer, copy_of, same, training_config
from tests.modeling.tiny_model import TIMM_BACKBONES

EFFICIENTNET = TIMM_BACKBONES["timm_efficientnet"]


@pytest.fixture
def weights(tmp_path):
    """File of a timm model, and its weights."""
    torch.manual_seed(7)
    state = timm.create_model("test_efficientnet").state_dict()
    write_safetensors(tmp_path / "start.safetensors", state)
    return tmp_path / "start.safetensors", state


@pytest.fixture
def config(datasets, tmp_path, weights):
    def make(settings=None, start=weights[0]):
        timms = EFFICIENTNET | {"MODEL.TIMM.PRETRAINED": str(start)}
        return training_config(datasets, tmp_path / "output", timms | (settings or {}))

    return make


@pytest.mark.parametrize("method", ["LocReweight", "STAC", "CST"])
def test_all_models_start_from_the_file(config, weights, method):
    trainer = build_trainer(config({"SEMI.METHOD": method}))
    models = trainer.models
    every = (models.students, models.teachers, models.pseudo_labelers)
    for model in chain(*map(members_of, every)):
        stem = timm_backbone(model).net.conv_stem.weight
        assert torch.equal(stem, weights[1]["conv_stem.weight"])


def test_resumed_and_trained_models_do_not_need_the_file(config, weights, tmp_path):
    trainer = build_trainer(config())
    trainer.train()
    weights[0].unlink()
    resumed = build_trainer(config({"SOLVER.MAX_ITER": 6}), resume=True)
    assert resumed.start_iter == 4
    assert same(copy_of(resumed.teacher), copy_of(trainer.teacher))
    predictor = Predictor(tmp_path / "output", device="cpu")
    assert same(copy_of(predictor.model), copy_of(trainer.teacher))


def test_missing_file_is_an_error_before_data_are_read(config, monkeypatch):
    def fail(cfg):
        raise AssertionError("data were read")

    monkeypatch.setattr("locreweight.engine.trainer.load_training_sets", fail)
    with pytest.raises(UsageError, match=r"MODEL.TIMM.PRETRAINED .*no\.pth' does not exist"):
        build_trainer(config(start="no.pth"))


def test_model_weights_have_precedence(config, tmp_path):
    first = build_trainer(config())
    first.train()
    settings = {
        "MODEL.WEIGHTS": str(tmp_path / "output/model_final.pth"),
        "OUTPUT_DIR": str(tmp_path / "second"),
    }
    second = build_trainer(config(settings, start="no.pth"))
    assert same(copy_of(second.student), copy_of(first.teacher))


# --- the config that check_data.py writes ---------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (0, "detectors/cpu-mobilenetv2.yaml"),
        (1, "detectors/gpu-resnet50.yaml"),
        (8, "detectors/eight-gpus-convnext-small.yaml"),
    ],
)
def test_base_of_a_written_config_fits_the_machine(monkeypatch, weights, gpus, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert config_suggestion.choose_base(str(weights[0])) == (expected, "")
    with pytest.raises(UsageError, match="does not exist"):
        config_suggestion.choose_base("no.pth")


def test_base_of_a_written_config_without_weights(monkeypatch):
    def fail(cfg):
        raise UsageError("no network")

    monkeypatch.setattr(config_suggestion, "find_pretrained", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base, reason = config_suggestion.choose_base("")
    assert (base, reason) == ("bccd-small.yaml", "no network")
    # Nothing of the data of this example may get into the user's config.
    file, options = config_suggestion.base_and_options(["DATASETS.TRAIN", "('voc:mine:train',)"])
    assert file.name == base
    default = load_config("", []).DATASETS
    default.TRAIN = ("voc:mine:train",)
    assert load_config(str(file), options).DATASETS == default


@pytest.mark.parametrize(
    ("has_detectron2_weights", "expected"),
    [(True, "gpu-resnet50-detectron2.yaml"), (False, "gpu-random-weights.yaml")],
)
def test_base_of_a_written_config_on_a_gpu_without_weights(
    monkeypatch, has_detectron2_weights, expected
):
    def find_pretrained(cfg):
        if cfg.MODEL.TIMM.PRETRAINED:
            raise UsageError("no network")

    def check_weights_exist(path):
        assert path.endswith("R-50.pkl")
        if not has_detectron2_weights:
            raise UsageError("no network either")

    monkeypatch.setattr(config_suggestion, "find_pretrained", find_pretrained)
    monkeypatch.setattr(config_suggestion, "check_weights_exist", check_weights_exist)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    base, reason = config_suggestion.choose_base("")
    assert (base, reason) == (f"detectors/{expected}", "no network")
    cfg = load_config(str(config_suggestion.CONFIGS_FOLDER / base), [])
    check_supported(cfg)
    assert untrained_random_layers(cfg) == {}
    assert bool(cfg.MODEL.WEIGHTS) == has_detectron2_weights


@pytest.mark.parametrize("content", [b"", b"no weights"])
def test_check_data_finds_a_damaged_file(config, weights, content):
    assert config_findings(config(), 1) == []
    weights[0].write_bytes(content)
    (error,) = config_findings(config(), 1)
    assert "start.safetensors is not a checkpoint" in error.text
