"""The views of STAC: the pseudo_labeler always sees the same image."""

import numpy as np
import torch

from locreweight.data.mapper import ViewMapper
from tests.modeling.tiny_model import tiny_config
from tests.tiny_data import make_folder


def test_the_weak_view_is_that_of_testing_and_the_strong_view_varies(tmp_path):
    make_folder(tmp_path / "images", images=1, seed=0)
    (file,) = (tmp_path / "images").iterdir()
    mapper = ViewMapper(
        tiny_config({"INPUT.AUGMENTATION_POLICY": "StacPolicy", "INPUT.MIN_SIZE_TEST": 48})
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
