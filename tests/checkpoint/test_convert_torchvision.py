"""Converted torchvision ResNets compute the same features in Detectron2."""

import pickle
import shlex
import sys

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.modeling import ShapeSpec, build_resnet_backbone

import convert_torchvision
from locreweight.checkpoint.checkpointer import CheckpointContents, TeacherCheckpointer
from locreweight.checkpoint.conversion import (
    resnet_from_torchvision,
    torchvision_resnet_settings,
)
from locreweight.errors import UsageError
from tests.modeling.tiny_model import tiny_model


def random_resnet(name):
    """Build a ResNet with batch statistics similar to those of a trained one."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def backbone_of(settings):
    cfg = get_cfg()
    cfg.merge_from_list([part for pair in settings.items() for part in pair])
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    return build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_converted_resnet_has_the_same_features(name):
    original = random_resnet(name)
    weights = original.state_dict()
    converted = backbone_of(torchvision_resnet_settings(weights))
    missing, unused = converted.load_state_dict(resnet_from_torchvision(weights), strict=False)
    assert not missing and all(key.endswith("num_batches_tracked") for key in unused)
    image = torch.randn(1, 3, 64, 96)
    features = original.maxpool(original.relu(original.bn1(original.conv1(image))))
    actual = converted(image)
    for stage in (1, 2, 3, 4):
        features = getattr(original, f"layer{stage}")(features)
        # Features of the last stage are in the hundreds, so the tolerance is relative.
        torch.testing.assert_close(
            actual[f"res{stage + 1}"], features, rtol=0, atol=1e-5 * features.abs().max().item()
        )


@pytest.mark.parametrize(
    ("name", "depth"), [("resnet34", 34), ("resnet101", 101), ("wide_resnet50_2", 50)]
)
def test_settings_build_a_model_with_the_same_shapes(name, depth):
    weights = getattr(torchvision.models, name)(weights=None).state_dict()
    settings = torchvision_resnet_settings(weights)
    assert settings["MODEL.RESNETS.DEPTH"] == depth
    shapes = {
        n: v.shape for n, v in resnet_from_torchvision(weights).items() if "num_batches" not in n
    }
    assert {n: v.shape for n, v in backbone_of(settings).state_dict().items()} == shapes


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert_torchvision.py", *map(str, arguments)])
    convert_torchvision.main()


def test_convert_torchvision_writes_weights_to_train_from(tmp_path, monkeypatch, capsys):
    weights = random_resnet("resnet18").state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    output = tmp_path / "new/R-18.pkl"
    run(monkeypatch, tmp_path / "resnet18.pth", output)
    _, settings_line, weights_line = capsys.readouterr().out.splitlines()
    options = shlex.split(settings_line) + shlex.split(weights_line)
    assert options[-2:] == ["MODEL.WEIGHTS", str(output)]
    cfg = get_cfg()
    cfg.merge_from_list(options)
    assert cfg.INPUT.FORMAT == "RGB" and cfg.MODEL.RESNETS.DEPTH == 18
    settings = {
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.RESNETS.DEPTH": 18,
    }
    model = tiny_model(settings)
    checkpointer = TeacherCheckpointer(model)
    checkpointer.load(str(output))
    assert checkpointer.contents is CheckpointContents.BACKBONE
    loaded = model.backbone.bottom_up.state_dict()
    assert not [
        name for name in checkpointer.mismatched_weights if name.startswith("backbone.bottom_up.")
    ]
    for name, value in resnet_from_torchvision(weights).items():
        if "num_batches" not in name:
            assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize(
    "content",
    [{"conv1.weight": torch.zeros(1)}, {"epoch": 3}, 3, {"layer1.0.conv1.weight": torch.zeros(1)}],
    ids=["one layer", "no weights", "a number", "no stem"],
)
def test_convert_torchvision_rejects_other_files(tmp_path, monkeypatch, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(SystemExit, match="error: ") as error:
        run(monkeypatch, tmp_path / "other.pth", tmp_path / "a.pkl")
    assert "\n" not in str(error.value)


def test_convert_torchvision_rejects_invalid_arguments(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="none.pth is not a checkpoint"):
        run(monkeypatch, tmp_path / "none.pth", tmp_path / "a.pkl")
    with pytest.raises(SystemExit, match="must end with .pkl"):
        run(monkeypatch, tmp_path / "none.pth", tmp_path / "a.pth")
    weights = torchvision.models.resnet18(weights=None).state_dict()
    arrays = {name: value.numpy() for name, value in weights.items()}
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps(arrays))
    with pytest.raises(SystemExit, match="arrays.pkl does not only hold tensors"):
        run(monkeypatch, tmp_path / "arrays.pkl", tmp_path / "a.pkl")
    with pytest.raises(UsageError, match="not the weights of a torchvision ResNet"):
        torchvision_resnet_settings(torchvision.models.mobilenet_v2(weights=None).state_dict())
