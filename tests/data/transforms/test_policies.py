"""Augmentation policies: fill color, and the fixed weak view of STAC."""

import numpy as np
import pytest
import torch

from locreweight.config import load_config
from locreweight.data.mapper import ViewMapper
from locreweight.data.transforms.policies import build_augmentation_policy
from tests.modeling.tiny_model import tiny_config
from tests.tiny_data import make_folder


@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("policy", ["SoftTeacherPolicy", "UnbiasedTeacherPolicy"])
def test_fill_color_is_the_pixel_mean(policy, order):
    mean = (10.0, 20.0, 30.0)  # in the channel order of the model
    options = ["INPUT.AUGMENTATION_POLICY", policy, "INPUT.FORMAT", order]
    options += ["MODEL.PIXEL_MEAN", str(mean)]
    strong = build_augmentation_policy(load_config("", options)).strong
    fills = {
        tuple(inner.fill)
        for augmentation in strong
        for inner in (augmentation, getattr(augmentation, "aug", None))
        if hasattr(inner, "fill")
    }
    assert fills == {mean if order == "RGB" else mean[::-1]}  # augmentations work in RGB


def test_stac_policy_has_a_fixed_weak_view_and_random_strong_views(tmp_path):
    make_folder(tmp_path / "images", images=1, seed=0)
    (file,) = (tmp_path / "images").iterdir()
    mapper = ViewMapper(
        tiny_config({"INPUT.AUGMENTATION_POLICY": "STACPolicy", "INPUT.MIN_SIZE_TEST": 48})
    )
    samples = []
    for seed in range(8):
        np.random.seed(seed)
        samples.append(mapper.unlabeled({"file_name": str(file)}))
    first = samples[0]
    assert min(first.weak.image_size) == 48
    assert all(torch.equal(s.weak.image, first.weak.image) for s in samples)
    assert all(torch.equal(s.weak.matrix, first.weak.matrix) for s in samples)
    assert len({tuple(s.strong.matrix.flatten().tolist()) for s in samples}) > 4


def test_instant_teaching_policy_changes_the_appearance_of_the_strong_view_only():
    policy = build_augmentation_policy(
        load_config("", ["INPUT.AUGMENTATION_POLICY", "InstantTeachingPolicy"])
    )
    (labeled,) = policy.labeled
    names = [type(getattr(x, "aug", x)).__name__ for x in policy.strong]
    assert names[len(labeled) :] == ["Cutout", "PhotometricOperations"]
    assert [type(x).__name__ for x in labeled] == names[: len(labeled)]
    assert not policy.strong_on_weak
