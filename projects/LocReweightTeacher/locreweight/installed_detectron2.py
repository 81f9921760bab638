"""Which Detectron2 is installed, and whether it has the compiled kernels that a config needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import detectron2
from detectron2.config import CfgNode

from .errors import UsageError

_COPY = "+sal."  # in the version that tools/setup_env.py gives the copy from the package index
_ROTATED = {
    "MODEL.PROPOSAL_GENERATOR.NAME": "RRPN",
    "MODEL.ANCHOR_GENERATOR.NAME": "RotatedAnchorGenerator",
    "MODEL.ROI_HEADS.NAME": "RROIHeads",
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignRotated",
}


def describe_detectron2() -> str:
    """Version and source of the installed Detectron2, for the log and the run record."""
    version, source = _version_and_source()
    kernels = "" if has_compiled_kernels() else ", without compiled kernels"
    return f"{version} ({source}{kernels})"


def has_compiled_kernels() -> bool:
    return importlib.util.find_spec("detectron2._C") is not None


def check_compiled_kernels(cfg: CfgNode) -> None:
    """Check that the installed Detectron2 can build the model of a config.

    Raises:
        UsageError: if a config key needs compiled kernels and there are none.
    """
    if has_compiled_kernels():
        return
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE):
        raise missing_kernels("MODEL.RESNETS.DEFORM_ON_PER_STAGE (deformable convolutions)")
    for key, name in _ROTATED.items():
        node = cfg
        for part in key.split("."):
            node = node[part]
        if node == name:
            raise missing_kernels(f"{key} {name} (rotated boxes)")


def missing_kernels(what: str) -> UsageError:
    """The error for something that needs compiled kernels."""
    return UsageError(
        f"{what} needs Detectron2's compiled kernels, which this installation does not have. To "
        "compile the official Detectron2: make setup DETECTRON2=github (needs GitHub, git and a "
        "C++ compiler; for a GPU also nvcc)"
    )


def _version_and_source() -> tuple[str, str]:
    imported = Path(detectron2.__path__[0])
    packages = [
        package
        for package in importlib.metadata.distributions(name="detectron2")
        if Path(str(package.locate_file("detectron2"))).resolve() == imported.resolve()
    ]
    if not packages:
        return detectron2.__version__, "a folder on the Python path"
    package = packages[0]
    version, _, copy = package.version.partition(_COPY)
    if copy:
        return version, f"sal-detectron2 {copy} from the package index"
    origin = json.loads(package.read_text("direct_url.json") or "{}")
    commit = origin.get("vcs_info", {}).get("commit_id", "")
    return version, f"commit {commit[:12]}" if commit else "a local build"
