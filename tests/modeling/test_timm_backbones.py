"""Backbones from timm: feature maps, normalization, frozen layers, and bad settings."""

import pytest
import timm
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch.testing import assert_close

from locreweight.config import load_config
from locreweight.config_checks import check_supported
from locreweight.engine.optimizer import SkipNonFiniteOptimizer
from locreweight.errors import UsageError
from locreweight.methods import build_members, build_method
from locreweight.modeling import Committee, build_detector
from tests.modeling.tiny_model import ROOT, TIMM_BACKBONES, as_options, labeled_inputs, tiny_config

BASE = str(ROOT / "configs/Base-LocReweight.yaml")
EFFICIENTNET, CONVNEXT, VIT = TIMM_BACKBONES.values()


def build(settings):
    torch.manual_seed(0)
    return build_detector(tiny_config(settings))


def trained_parts(net):
    return {name for name, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", TIMM_BACKBONES)
def test_pyramid_has_the_strides_of_detectron2(kind):
    backbone = build(TIMM_BACKBONES[kind]).backbone
    features = backbone(torch.rand(1, 3, 96, 160))
    assert backbone.size_divisibility == 32
    assert list(features) == ["p2", "p3", "p4", "p5", "p6"]
    for i, (name, feature) in enumerate(features.items(), start=2):
        size = (-(-96 // 2**i), -(-160 // 2**i))
        assert tuple(feature.shape) == (1, 32, *size)
        assert backbone.output_shape()[name].stride == 2**i


@pytest.mark.parametrize("settings", [EFFICIENTNET, CONVNEXT], ids=["efficientnet", "convnext"])
def test_features_of_a_photo_equal_those_of_timms_own_preprocessing(settings):
    """Pixels are normalized exactly once, as timm does it."""
    model = build(settings).eval()
    net = model.backbone.bottom_up.net
    image = labeled_inputs(1)[0]["image"]
    timms = timm.create_model(settings["MODEL.TIMM.NAME"], features_only=True).eval()
    timms.load_state_dict(net.state_dict())
    data = timm.data.resolve_data_config(pretrained_cfg=timms.pretrained_cfg)
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = timms(((image / 255 - mean) / std)[None])
    actual = model.backbone.bottom_up(model.preprocess_image([{"image": image}]).tensor)
    for name, feature in zip(reversed(actual), reversed(expected), strict=False):
        assert_close(actual[name], feature, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("freeze_at", [0, 2])
def test_frozen_norm_computes_the_same_as_evaluation(freeze_at):
    """Including the activation that timm's norm layers contain."""
    settings = EFFICIENTNET | {"MODEL.BACKBONE.FREEZE_AT": freeze_at}
    plain = build(settings).backbone.eval()
    for name, buffer in plain.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    frozen = build(settings | {"MODEL.TIMM.NORM": "FrozenBN"}).backbone.train()
    frozen.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 64, 64)
    for name, expected in plain(images).items():
        assert_close(frozen(images)[name], expected)
    norms = [m for m in frozen.modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase)]
    assert not norms
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in frozen.modules()) > 10
    assert not any(".bn" in name for name in trained_parts(frozen))


@pytest.mark.parametrize(
    ("settings", "freeze_at", "first_trained"),
    [
        (EFFICIENTNET, 0, "conv_stem."),
        (EFFICIENTNET, 1, "blocks.1."),
        (EFFICIENTNET, 2, "blocks.2."),
        (EFFICIENTNET, 5, None),
        (CONVNEXT, 1, "stages_0."),
        (CONVNEXT, 2, "stages_1."),
    ],
)
def test_freeze_at_freezes_the_first_stages(settings, freeze_at, first_trained):
    net = build(settings | {"MODEL.BACKBONE.FREEZE_AT": freeze_at}).backbone.bottom_up.net
    names = [name for name, _ in net.named_parameters()]
    trained = [name for name in names if name in trained_parts(net)]
    cut = [i for i, name in enumerate(names) if first_trained and name.startswith(first_trained)]
    assert trained == (names[cut[0] :] if first_trained else [])


@pytest.mark.parametrize("freeze_at", [0, 1, 3, 99])
def test_freeze_at_freezes_the_first_blocks_of_a_transformer(freeze_at):
    net = build(VIT | {"MODEL.BACKBONE.FREEZE_AT": freeze_at}).backbone.net.net
    trained = trained_parts(net)
    assert ("model.pos_embed" in trained) == (freeze_at == 0)
    for i in range(len(net.model.blocks)):
        block = {name for name in trained if name.startswith(f"model.blocks.{i}.")}
        assert bool(block) == (i >= freeze_at - 1)


def test_drop_path_is_active_in_training_only():
    model = build(CONVNEXT | {"MODEL.TIMM.DROP_PATH": 0.5})
    net, images = model.backbone.bottom_up, torch.rand(2, 3, 64, 64)
    assert_close(net.eval()(images)["res5"], net(images)["res5"], rtol=0, atol=0)
    net.train()
    outputs = [net(images)["res5"] for _ in range(4)]
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])


# --- pixel mean, standard deviation and channel order ---------------------------------------------


def options(settings):
    return as_options({"MODEL.WEIGHTS": ""} | settings)


def test_normalization_follows_from_the_model():
    settings = {k: v for k, v in CONVNEXT.items() if k != "MODEL.PIXEL_STD"}
    cfg = load_config("", options(settings))
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == cfg.MODEL.PIXEL_STD == [127.5] * 3
    plain = load_config("", [])
    assert plain.INPUT.FORMAT == "BGR" and plain.MODEL.PIXEL_STD == [1.0] * 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53]),  # of another model
        ("MODEL.PIXEL_STD", [57.4, 57.1, 58.4]),
        ("MODEL.PIXEL_STD", [127.5]),
    ],
)
def test_other_normalization_is_an_error(key, value):
    with pytest.raises(UsageError, match=rf"{key} is .*test_convnext was trained with .*leave"):
        load_config("", options(CONVNEXT | {key: value}))


# --- bad settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MODEL.TIMM.NAME": ""}, "timm .* has no such model"),
        ({"MODEL.TIMM.NAME": "rsnet50"}, "did you mean resnet50"),
        ({"MODEL.TIMM.NAME": "resnet18.no_such"}, "no weights 'no_such' .*it has a1_in1k"),
        ({"MODEL.TIMM.NAME": "test_vit"}, "build_timm_simple_pyramid_backbone"),
        ({"MODEL.TIMM.NORM": "GN"}, "MODEL.TIMM.NORM is 'GN'; it must be FrozenBN, BN or SyncBN"),
        ({"MODEL.BACKBONE.FREEZE_AT": 6}, r"FREEZE_AT 6.* no such stage.*\(it has res1, res2"),
        ({"MODEL.FPN.IN_FEATURES": ["res2", "res9"]}, "choose the last of these maps"),
        ({"MODEL.FPN.IN_FEATURES": ["res2", "res3"]}, "choose the last of these maps"),
        ({"MODEL.FPN.IN_FEATURES": []}, "choose the last of these maps"),
        (
            {"MODEL.BACKBONE.NAME": VIT["MODEL.BACKBONE.NAME"]},
            "test_efficientnet is not a plain vision transformer",
        ),
        (  # a convolutional stem instead of patches
            {
                "MODEL.BACKBONE.NAME": VIT["MODEL.BACKBONE.NAME"],
                "MODEL.TIMM.NAME": "vitamin_small_224",
            },
            "vitamin_small_224 is not a plain vision transformer",
        ),
    ],
)
def test_bad_settings_are_named(settings, message):
    plain = {key: value for key, value in EFFICIENTNET.items() if key != "MODEL.PIXEL_STD"}
    with pytest.raises(UsageError, match=message):
        build_detector(load_config(BASE, options(plain | {"MODEL.DEVICE": "cpu"} | settings)))


def test_weights_of_a_resnet_are_an_error():
    settings = EFFICIENTNET | {"MODEL.WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-50.pkl"}
    with pytest.raises(UsageError, match=r"set MODEL\.WEIGHTS ''"):
        check_supported(tiny_config(settings))


def test_name_of_a_timm_model_with_another_backbone():
    settings = EFFICIENTNET | {"MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone"}
    message = (
        r"MODEL\.TIMM\.NAME is test_eff.*NORM is BN.* or MODEL.TIMM.NAME '' MODEL.TIMM.NORM 'Fr"
    )
    with pytest.raises(UsageError, match=message):
        check_supported(tiny_config(settings))


@pytest.mark.parametrize(
    ("key", "value"), [("PRETRAINED", "hub"), ("NORM", "BN"), ("DROP_PATH", 0.1)]
)
def test_settings_of_timm_with_another_backbone(key, value):
    message = rf"TIMM\.{key} is {value}, .* set MODEL\.BACKBONE\.NAME build_timm_fpn_backbone and"
    with pytest.raises(UsageError, match=message):
        check_supported(tiny_config({f"MODEL.TIMM.{key}": value}))
    check_supported(tiny_config(EFFICIENTNET | {f"MODEL.TIMM.{key}": value}))


# --- learning rates -------------------------------------------------------------------------------


def rates(settings):
    """Name of each parameter -> its learning rate as a multiple of the base rate."""
    cfg = tiny_config(settings)
    model = build_members(cfg, build_method(cfg))
    optimizer = SkipNonFiniteOptimizer(cfg, model, torch.float32).torch_optimizer
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = optimizer.param_groups
    return {names[p]: g["lr"] / cfg.SOLVER.BASE_LR for g in groups for p in g["params"]}


@pytest.mark.parametrize("settings", [{}, EFFICIENTNET, VIT], ids=["resnet", "fpn", "pyramid"])
def test_learning_rate_factor_of_the_backbone(settings):
    found = rates(settings | {"SOLVER.BACKBONE_LR_FACTOR": 0.25})
    assert set(found) == set(rates(settings))  # no parameter is lost
    for name, rate in found.items():
        is_pretrained = name.startswith(("backbone.bottom_up.", "backbone.net."))
        assert rate == pytest.approx(0.25 if is_pretrained else 1.0), name
    assert set(found.values()) != {1.0}


@pytest.mark.parametrize("method", ["CST", "ISMT"])
def test_learning_rate_factors_apply_to_all_students(method):
    factors = {"SOLVER.BACKBONE_LR_DECAY": 0.5, "SOLVER.BACKBONE_LR_FACTOR": 0.1}
    one, several = rates(VIT | factors), rates(VIT | factors | {"SEMI.METHOD": method})
    assert {name.split(".", 2)[2] for name in several} == set(one)
    assert all(rate == one[name.split(".", 2)[2]] for name, rate in several.items())


def test_learning_rate_decay_of_a_transformer():
    found = rates(VIT | {"SOLVER.BACKBONE_LR_DECAY": 0.5, "SOLVER.BACKBONE_LR_FACTOR": 0.1})
    depth = len({n.split(".blocks.")[1].split(".")[0] for n in found if ".blocks." in n})
    prefix = "backbone.net.net.model."
    last = found[f"{prefix}blocks.{depth - 1}.attn.qkv.weight"]
    assert last == pytest.approx(0.05)
    assert found[f"{prefix}blocks.0.attn.qkv.weight"] == pytest.approx(0.1 * 0.5**depth)
    assert found[f"{prefix}patch_embed.proj.weight"] == pytest.approx(0.1 * 0.5 ** (depth + 1))
    assert found["backbone.simfp_2.0.weight"] == 1.0


def test_learning_rates_of_several_members():
    settings = VIT | {"SOLVER.BACKBONE_LR_DECAY": 0.5, "SOLVER.BACKBONE_LR_FACTOR": 0.1}
    cfg = tiny_config(settings)
    members = Committee([build_detector(cfg) for _ in range(2)])
    optimizer = SkipNonFiniteOptimizer(cfg, members, torch.float32).torch_optimizer
    names = {parameter: name for name, parameter in members.named_parameters()}
    found = {
        names[p]: g["lr"] / cfg.SOLVER.BASE_LR for g in optimizer.param_groups for p in g["params"]
    }
    expected = rates(settings)
    assert found == {f"members.{i}.{n}": rate for i in range(2) for n, rate in expected.items()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SOLVER.BACKBONE_LR_DECAY": 0.8}, "BACKBONE_LR_DECAY 0.8 is for plain vision trans"),
        ({"SOLVER.BACKBONE_LR_FACTOR": -1.0}, "BACKBONE_LR_FACTOR is -1"),
    ],
)
def test_bad_learning_rate_factors(settings, message):
    with pytest.raises(UsageError, match=message):
        rates(settings)
