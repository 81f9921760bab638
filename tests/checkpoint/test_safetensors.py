"""Tests of reading and writing safetensors."""

import pytest
import torch
from safetensors.torch import save_file

from locreweight.checkpoint.checkpointer import CheckpointContents, TeacherCheckpointer
from locreweight.checkpoint.safe_loading import read_safetensors, write_safetensors
from locreweight.engine import load_for_evaluation
from locreweight.errors import UsageError
from tests.engine.tiny_training import same
from tests.modeling.tiny_model import tiny_config, tiny_model

WEIGHTS = {
    "half": torch.arange(3, dtype=torch.float16),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "view": torch.arange(12.0).view(3, 4).T[1:],  # not contiguous
}


def test_read_safetensors_returns_what_was_written(tmp_path):
    shared = torch.arange(4.0)
    weights = WEIGHTS | {"one": shared, "other": shared}
    write_safetensors(
        tmp_path / "a.safetensors", weights, class_names=["ä", "b"], corner_coding=True
    )
    content = read_safetensors(str(tmp_path / "a.safetensors"))
    assert same(content.pop("model"), weights)
    assert content == {"class_names": ["ä", "b"], "corner_coding": True}


def test_same_weights_give_the_same_file(tmp_path):
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for file in files:
        write_safetensors(file, WEIGHTS, class_names=["a"])
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("corners", [True, False])
def test_load_for_evaluation_loads_safetensors(tmp_path, corners):
    settings = {"MODEL.ROI_BOX_HEAD.CORNER_CODING": corners}
    model = tiny_model(settings)
    file = tmp_path / "a.safetensors"
    write_safetensors(file, model.state_dict(), corner_coding=corners)
    cfg = tiny_config(settings | {"MODEL.WEIGHTS": str(file)})
    other = tiny_model(settings)
    torch.nn.init.zeros_(other.roi_heads.box_predictor.bbox_pred.weight)
    assert load_for_evaluation(cfg, other) is CheckpointContents.DETECTOR
    assert same(other.state_dict(), model.state_dict())
    cfg.MODEL.ROI_BOX_HEAD.CORNER_CODING = not corners
    with pytest.raises(UsageError, match=f"CORNER_CODING {corners}"):
        load_for_evaluation(cfg, tiny_model({"MODEL.ROI_BOX_HEAD.CORNER_CODING": not corners}))


def test_safetensors_of_other_projects_are_plain_detectors(tmp_path):
    names = {n: v for n, v in tiny_model().state_dict().items() if "log_variance" not in n}
    save_file(names, tmp_path / "plain.safetensors")
    checkpointer = TeacherCheckpointer(tiny_model())
    checkpointer.load(str(tmp_path / "plain.safetensors"))
    assert checkpointer.contents is CheckpointContents.PLAIN_DETECTOR


@pytest.mark.parametrize("content", [b"", b"<html></html>", b"\xff" * 16])
def test_invalid_safetensors_raise_an_error_of_one_line(tmp_path, content):
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.safetensors is not a checkpoint") as error:
        TeacherCheckpointer(tiny_model()).load(str(file))
    assert "\n" not in str(error.value)


def test_truncated_safetensors_raise(tmp_path):
    file = tmp_path / "a.safetensors"
    write_safetensors(file, tiny_model().state_dict())
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"a\.safetensors is not a checkpoint"):
        TeacherCheckpointer(tiny_model()).load(str(file))
