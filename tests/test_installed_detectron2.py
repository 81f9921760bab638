"""The record of which Detectron2 is used, and errors where its compiled kernels are missing."""

import json

import detectron2
import pytest
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.utils.develop import create_dummy_class

import locreweight.modeling  # noqa: F401  (registers the model)
from locreweight import installed_detectron2
from locreweight.config import load_config
from locreweight.config_checks import check_supported
from locreweight.errors import UsageError
from locreweight.installed_detectron2 import check_compiled_kernels, describe_detectron2

DEFORMABLE = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, True, True, True]"]
ROTATED = [
    ["MODEL.PROPOSAL_GENERATOR.NAME", "RRPN"],
    ["MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"],
    ["MODEL.ROI_HEADS.NAME", "RROIHeads"],
    ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignRotated"],
]


@pytest.fixture
def kernels(monkeypatch):
    """Sets whether Detectron2 has compiled kernels."""

    def set_to(present):
        monkeypatch.setattr(installed_detectron2, "has_compiled_kernels", lambda: present)

    set_to(False)
    return set_to


# --- what is recorded -----------------------------------------------------------------------------


@pytest.fixture
def install(tmp_path, monkeypatch, kernels):
    """Makes a folder with the metadata of an installed package look like the imported one."""

    def install(version, origin=None):
        info = tmp_path / f"detectron2-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: detectron2\nVersion: {version}"
        )
        if origin:
            (info / "direct_url.json").write_text(json.dumps(origin))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(detectron2, "__path__", [str(tmp_path / "detectron2")])

    return install


def test_the_copy_from_the_package_index(install):
    install("0.6+sal.0.7.2", {"url": "file:///tmp/x", "dir_info": {}})
    expected = "0.6 (sal-detectron2 0.7.2 from the package index, without compiled kernels)"
    assert describe_detectron2() == expected


def test_the_official_commit(install, kernels):
    kernels(True)
    install(
        "0.6", {"url": "https://x", "vcs_info": {"vcs": "git", "commit_id": "02b5c4e295e99004"}}
    )
    assert describe_detectron2() == "0.6 (commit 02b5c4e295e9)"


@pytest.mark.parametrize("origin", [None, {"url": "file:///home/somebody/clone", "dir_info": {}}])
def test_a_wheel_or_a_clone_without_its_path(install, kernels, origin):
    kernels(True)
    install("0.6", origin)
    assert describe_detectron2() == "0.6 (a local build)"


def test_metadata_of_another_copy_does_not_count(install, tmp_path, monkeypatch):
    install("0.6+sal.0.7.2")
    monkeypatch.setattr(detectron2, "__path__", [str(tmp_path / "elsewhere" / "detectron2")])
    expected = f"{detectron2.__version__} (a folder on the Python path, without compiled kernels)"
    assert describe_detectron2() == expected


def test_the_installed_one_can_be_described():
    assert describe_detectron2().startswith("0.")


# --- what needs compiled kernels ------------------------------------------------------------------


@pytest.mark.parametrize("options", [DEFORMABLE, *ROTATED], ids=lambda options: options[0])
def test_keys_that_need_compiled_kernels(options, kernels):
    cfg = load_config("", options)
    message = rf"^{options[0]} .*needs Detectron2's compiled kernels.* DETECTRON2=github"
    for check in (check_compiled_kernels, check_supported, build_model):
        if check is build_model:
            cfg.MODEL.META_ARCHITECTURE = "SemiSupervisedRCNN"
            cfg.MODEL.DEVICE = "cpu"
        with pytest.raises(UsageError, match=message):
            check(cfg)
    kernels(True)
    check_compiled_kernels(cfg)


def test_other_configs_do_not_need_them(kernels):
    check_compiled_kernels(load_config("", []))


def test_a_new_backbone_that_needs_them(kernels):
    """Without kernels, Detectron2 replaces its deformable convolutions by a class like this one."""
    convolution = create_dummy_class("ModulatedDeformConv", "detectron2._C")

    def build_deformable_backbone(cfg, input_shape: ShapeSpec):
        return convolution(3, 8)

    BACKBONE_REGISTRY.register(build_deformable_backbone)
    try:
        cfg = load_config("", ["MODEL.BACKBONE.NAME", "build_deformable_backbone"])
        cfg.MODEL.META_ARCHITECTURE = "SemiSupervisedRCNN"
        with pytest.raises(UsageError, match="MODEL.BACKBONE.NAME build_deformable_backbone needs"):
            build_model(cfg)
    finally:
        del BACKBONE_REGISTRY._obj_map["build_deformable_backbone"]
