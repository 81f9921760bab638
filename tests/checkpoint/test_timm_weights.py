"""Pretrained weights of timm backbones: where they come from, what is loaded, what is written."""

import os
import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch.testing import assert_close

from locreweight.checkpoint import timm_weights
from locreweight.checkpoint.safe_loading import write_safetensors
from locreweight.checkpoint.timm_weights import (
    find_pretrained,
    load_pretrained,
    load_timm_weights,
    mobilenet_v2_from_torchvision,
    read_timm_weights,
    timm_backbone,
    write_timm_weights,
)
from locreweight.errors import UsageError
from locreweight.modeling import build_detector
from tests.modeling.tiny_model import TIMM_BACKBONES, tiny_config, tiny_model

ROOT = Path(__file__).parents[2]
MOBILENET = Path(
    os.environ.get("LOCREWEIGHT_MOBILENET_V2")
    or ROOT.parent / "shared/weights/mobilenet_v2_imagenet.pth"
)
EFFICIENTNET = TIMM_BACKBONES["timm_efficientnet"]
BY_KIND = pytest.mark.parametrize("settings", TIMM_BACKBONES.values(), ids=TIMM_BACKBONES)


def random_weights(name, **arguments):
    """Weights of a whole timm model, with values unlike those of a new one."""
    torch.manual_seed(5)
    weights = timm.create_model(name, **arguments).state_dict()
    return {
        k: torch.rand_like(v) / 10 + 0.5 if v.is_floating_point() else v for k, v in weights.items()
    }


def config(settings, file):
    return tiny_config(settings | {"MODEL.TIMM.PRETRAINED": str(file)})


# --- loading --------------------------------------------------------------------------------------


@BY_KIND
@pytest.mark.parametrize("suffix", ["pth", "safetensors", "checkpoint"])
def test_features_equal_those_of_timm_with_the_same_file(settings, suffix, tmp_path):
    """In the formats of torch.save and safetensors, and from a training checkpoint of timm."""
    name = settings["MODEL.TIMM.NAME"]
    torch.manual_seed(5)
    whole = timm.create_model(name, **vit_arguments(settings))
    file = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        write_safetensors(file, whole.state_dict())
    else:
        content = whole.state_dict()
        is_checkpoint = suffix == "checkpoint"
        named = {f"module.{k}": v for k, v in content.items()} if is_checkpoint else content
        torch.save({"epoch": 3, "state_dict": named} if is_checkpoint else named, file)
    cfg = config(settings, file)
    model = build_detector(cfg).eval()
    load_pretrained(cfg, model)
    images = torch.rand(1, 3, 64, 96)
    expected = whole.eval().forward_intermediates(images, intermediates_only=True)[-1]
    *_, actual = timm_backbone(model)(images).values()
    assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def vit_arguments(settings):
    is_plain = "simple" in settings["MODEL.BACKBONE.NAME"]
    return {"dynamic_img_size": True} if is_plain else {}


@BY_KIND
def test_every_weight_of_the_backbone_is_loaded(settings):
    """Also from a model with another number of classes."""
    name = settings["MODEL.TIMM.NAME"]
    weights = random_weights(name, num_classes=7, **vit_arguments(settings))
    backbone = timm_backbone(tiny_model(settings))
    load_timm_weights(tiny_config(settings), backbone, weights, "file")
    for key, value in backbone.net.state_dict().items():
        assert not value.is_floating_point() or value.min() >= 0.5, key


def test_patch_and_position_embeddings_are_resampled():
    """DINOv2 has patches of 14 pixels."""
    settings = TIMM_BACKBONES["timm_vit"]
    weights = random_weights("test_vit", patch_size=8)
    backbone = timm_backbone(tiny_model(settings))
    load_timm_weights(tiny_config(settings), backbone, weights, "file")
    assert backbone.net.model.patch_embed.proj.weight.shape[-1] == 16


def test_original_names_of_convnext_are_converted():
    """The classifier, too, has another name in the files of its authors."""
    settings = TIMM_BACKBONES["timm_convnext"]
    weights = random_weights("test_convnext")
    old_names = (
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
        ("conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"^head\.(fc\.)?", ""),
        (r"^(weight|bias)$", r"head.\1"),
    )
    original = {}
    for name, value in weights.items():
        for pattern, replacement in old_names:
            name = re.sub(pattern, replacement, name)
        original[name] = value
    assert {"head.weight", "norm.weight", "downsample_layers.0.0.weight"} < set(original)
    backbone = timm_backbone(tiny_model(settings))
    load_timm_weights(tiny_config(settings), backbone, original, "file")
    for key, value in backbone.net.state_dict().items():
        assert value.min() >= 0.5, key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.0.bn2.bias"), r"lacks 1 weights of the backbone.*bn2\.bias"),
        (lambda w: w.update(extra=torch.ones(1)), "does not fit MODEL.TIMM.NAME test_eff.*extra"),
        (lambda w: w.update({"conv_stem.weight": torch.ones(8, 3, 3, 3)}), "size mismatch"),
        (lambda w: w["conv_stem.weight"].fill_(torch.nan), "or they are NaN"),
    ],
)
def test_weights_that_do_not_fit(change, message):
    weights = random_weights("test_efficientnet")
    change(weights)
    with pytest.raises(UsageError, match=message):
        load_timm_weights(
            tiny_config(EFFICIENTNET), timm_backbone(tiny_model(EFFICIENTNET)), weights, "file"
        )


@pytest.mark.parametrize("content", [{}, {"epoch": 1}, [1, 2], {"state_dict": {"a": 1}}])
def test_files_without_weights(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UsageError, match=r"a\.pth holds no weights"):
        read_timm_weights(str(tmp_path / "a.pth"))


def test_files_with_code_are_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"a": Evil()}, tmp_path / "a.pth")
    with pytest.raises(UsageError, match="can run arbitrary code"):
        read_timm_weights(str(tmp_path / "a.pth"))


def test_detector_without_timm_backbone():
    with pytest.raises(UsageError, match="not from timm"):
        timm_backbone(tiny_model())


# --- where the file is ----------------------------------------------------------------------------


def test_no_file_is_needed_with_weights_of_a_detector_or_another_backbone():
    missing = {"MODEL.TIMM.PRETRAINED": "/nowhere/a.pth"}
    assert find_pretrained(tiny_config(missing)) == ""
    assert find_pretrained(tiny_config(EFFICIENTNET)) == ""
    assert find_pretrained(tiny_config(EFFICIENTNET | missing | {"MODEL.WEIGHTS": "a.pth"})) == ""


def test_missing_file():
    with pytest.raises(UsageError, match=r"MODEL.TIMM.PRETRAINED '/nowhere/a\.pth' does not exist"):
        find_pretrained(config(EFFICIENTNET, "/nowhere/a.pth"))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr(timm_weights, "_why_unreachable", lambda address: "no network")
    return tmp_path


def test_weights_of_the_hub_without_network(hub_cache):
    with pytest.raises(UsageError, match=r"not in this machine's cache.*no network.*copy it here"):
        find_pretrained(config(EFFICIENTNET, "hub"))


def test_cached_weights_of_the_hub_need_no_network(hub_cache):
    repository = hub_cache / "models--timm--test_efficientnet.r160_in1k"
    file = repository / "snapshots/abc/model.safetensors"
    file.parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    weights = random_weights("test_efficientnet")
    write_safetensors(file, weights)
    cfg = config(EFFICIENTNET, "hub")
    assert find_pretrained(cfg) == str(file)
    model = build_detector(cfg)
    load_pretrained(cfg, model)
    assert torch.equal(timm_backbone(model).net.conv_stem.weight, weights["conv_stem.weight"])


def test_weights_that_timm_also_publishes_in_another_format(hub_cache):
    """timm itself reads the file on the hub, although its description names a loader for others."""
    settings = TIMM_BACKBONES["timm_vit"] | {
        "MODEL.TIMM.NAME": "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    }
    assert timm.get_pretrained_cfg(settings["MODEL.TIMM.NAME"]).custom_load
    with pytest.raises(UsageError, match="not in this machine's cache"):
        find_pretrained(config(settings, "hub"))


def test_model_without_weights_on_the_hub():
    settings = {k: v for k, v in EFFICIENTNET.items() if k != "MODEL.PIXEL_STD"}
    settings |= {"MODEL.TIMM.NAME": "test_mambaout", "MODEL.PIXEL_STD": [58.395, 57.12, 57.375]}
    with pytest.raises(UsageError, match="publishes no PyTorch weights"):
        find_pretrained(config(settings, "hub"))


# --- writing --------------------------------------------------------------------------------------


@BY_KIND
def test_written_backbone_gives_the_same_features_in_timm(settings, tmp_path):
    cfg, model = tiny_config(settings), tiny_model(settings).eval()
    file = tmp_path / "backbone.safetensors"
    write_timm_weights(file, cfg, model)
    whole = timm.create_model(
        settings["MODEL.TIMM.NAME"],
        pretrained=True,
        pretrained_cfg_overlay={"file": str(file), "num_classes": 1000},
        num_classes=0,
        **vit_arguments(settings),
    ).eval()
    images = torch.rand(1, 3, 64, 96)
    expected = whole.forward_intermediates(images, intermediates_only=True)[-1]
    *_, actual = timm_backbone(model)(images).values()
    assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    other = build_detector(cfg)
    load_timm_weights(cfg, timm_backbone(other), read_timm_weights(str(file)), str(file))
    for key, value in timm_backbone(model).net.state_dict().items():
        assert torch.equal(value, timm_backbone(other).net.state_dict()[key]), key


def test_written_file_must_be_safetensors(tmp_path):
    with pytest.raises(UsageError, match=r"must end with \.safetensors"):
        write_timm_weights(tmp_path / "a.pth", tiny_config(EFFICIENTNET), tiny_model(EFFICIENTNET))


# --- torchvision's MobileNetV2 --------------------------------------------------------------------

MOBILENET_SETTINGS = EFFICIENTNET | {"MODEL.TIMM.NAME": "mobilenetv2_100.ra_in1k"}
FEATURES_OF_STRIDES = {"res2": 3, "res3": 6, "res4": 13, "res5": 17}  # torchvision's layers


def check_mobilenet(weights, file):
    torchvisions = torchvision.models.mobilenet_v2().eval()
    missing = torchvisions.load_state_dict(weights, strict=False).missing_keys
    assert all(name.startswith("classifier.") for name in missing)
    cfg = config(MOBILENET_SETTINGS, file)
    model = build_detector(cfg).eval()
    load_pretrained(cfg, model)
    images = torch.randn(2, 3, 96, 128)
    actual = timm_backbone(model)(images)
    features = images
    for i, layer in enumerate(torchvisions.features):
        features = layer(features)
        for name, last in FEATURES_OF_STRIDES.items():
            if i == last:
                scale = features.abs().max()
                assert_close(actual[name] / scale, features / scale, rtol=0, atol=1e-5)


def test_torchvisions_mobilenet_v2_gives_torchvisions_features(tmp_path):
    torch.manual_seed(2)
    weights = torchvision.models.mobilenet_v2().state_dict()
    torch.save(weights, tmp_path / "mobilenet.pth")
    converted = mobilenet_v2_from_torchvision(weights)
    expected = timm.create_model("mobilenetv2_100").state_dict()
    expected = {k: v for k, v in expected.items() if not k.startswith("classifier.")}
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in expected.items()}
    check_mobilenet(weights, tmp_path / "mobilenet.pth")


@pytest.mark.skipif(
    not MOBILENET.is_file(),
    reason=f"{MOBILENET} does not exist; LOCREWEIGHT_MOBILENET_V2 can name torchvision's file",
)
def test_imagenet_weights_of_torchvision_give_torchvisions_features():
    check_mobilenet(torch.load(MOBILENET, weights_only=True), MOBILENET)
