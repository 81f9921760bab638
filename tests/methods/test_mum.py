"""MUM: tiles are exchanged within groups, and put back in the feature maps."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from locreweight.config import load_config
from locreweight.errors import UsageError
from locreweight.methods import build_method
from locreweight.methods.mum import MUM, TileMixing
from tests.modeling.tiny_model import tiny_config


def make_mum(images=8, **settings):
    keys = {"SEMI.METHOD": "MUM", "SOLVER.IMS_PER_BATCH_UNLABELED": images}
    return build_method(tiny_config(keys | settings))


def identity_order(groups=1, size=4, tiles=4):
    return torch.arange(size).view(1, size, 1, 1).expand(groups, size, tiles, tiles)


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (4, 8)])
@pytest.mark.parametrize("count", [4, 8, 12])
def test_unmix_is_the_exact_inverse_of_mix(size, count):
    images = torch.randn(count, 3, *size)
    mixing = make_mum().backbone_mixing(count)
    mixed = mixing.mix(images)
    assert not torch.equal(mixed, images)
    assert torch.equal(mixing.unmix(mixed), images)
    assert torch.equal(mixing.mix(mixing.unmix(images)), images)


def test_every_tile_comes_from_the_image_in_the_order():
    """Compared with a loop over tiles."""
    images = torch.randn(8, 2, 16, 32)
    order = torch.rand(2, 4, 4, 4).argsort(dim=1)
    mixed = TileMixing(order).mix(images)
    for group, i, row, column in itertools.product(range(2), range(4), range(4), range(4)):
        rows, columns = slice(4 * row, 4 * row + 4), slice(8 * column, 8 * column + 8)
        source = 4 * group + order[group, i, row, column]
        assert torch.equal(mixed[4 * group + i, :, rows, columns], images[source, :, rows, columns])


def test_tiles_of_constant_images_are_a_bijection_at_every_place():
    colors = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 64, 64)
    mixed = make_mum().backbone_mixing(8).mix(colors)
    tiles = mixed.unflatten(3, (4, 16)).unflatten(2, (4, 16))
    assert (tiles == tiles[:, :1, :, :1, :, :1]).all()  # one color per tile
    places = tiles[:, 0, :, 0, :, 0].sort(dim=0).values  # (8, T, T)
    assert torch.equal(places, torch.arange(8.0).view(8, 1, 1).expand(8, 4, 4))
    # Groups exchange nothing with each other.
    assert set(tiles[:4].unique().tolist()) == {0.0, 1.0, 2.0, 3.0}


def test_permutations_are_uniform_and_independent():
    mum = make_mum()
    orders = torch.cat([mum.backbone_mixing(8).order for _ in range(150)])  # (300, 4, 4, 4)
    all_permutations = list(itertools.permutations(range(4)))
    drawn = [tuple(p) for p in orders.permute(0, 2, 3, 1).flatten(0, 2).tolist()]
    counts = [drawn.count(p) for p in all_permutations]
    assert sum(counts) == 4800 and chisquare(counts).pvalue > 0.001
    # Two places of the same group: 16 pairs of sources of the first image.
    pairs = (4 * orders[:, 0, 0, 0] + orders[:, 0, 0, 1]).bincount(minlength=16)
    assert chisquare(pairs.tolist()).pvalue > 0.001


def test_pointwise_backbone_gives_the_features_of_unmixed_images():
    images = torch.randn(8, 3, 64, 64)
    backbone = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.AvgPool2d(4), nn.Conv2d(5, 7, 1))
    mixing = make_mum().backbone_mixing(8)
    assert_close(mixing.unmix(backbone(mixing.mix(images))), backbone(images))


@pytest.mark.parametrize(("size", "divisible"), [((6, 8), (4, 8)), ((21, 13), (20, 12))])
def test_tiles_of_resized_levels_are_put_back(size, divisible):
    """Compared with a loop over tiles."""
    features = torch.randn(4, 2, *size)
    order = torch.rand(1, 4, 4, 4).argsort(dim=1)
    resized = F.interpolate(features, divisible, mode="bilinear")
    expected = torch.empty_like(resized)
    height, width = divisible[0] // 4, divisible[1] // 4
    for i, row, column in itertools.product(range(4), range(4), range(4)):
        rows = slice(height * row, height * (row + 1))
        columns = slice(width * column, width * (column + 1))
        expected[order[0, i, row, column], :, rows, columns] = resized[i, :, rows, columns]
    expected = F.interpolate(expected, size, mode="bilinear")
    assert_close(TileMixing(order).unmix(features), expected)


@pytest.mark.parametrize("size", [(2, 2), (1, 3), (6, 8), (5, 7), (21, 13)])
def test_levels_that_tiles_do_not_divide_are_resized(size):
    """Smooth features come back approximately, and constant ones up to rounding."""
    rows = torch.linspace(0, 1, size[0]).view(1, 1, -1, 1)
    features = (rows + torch.arange(4.0).view(4, 1, 1, 1)).expand(4, 3, *size)
    mixing = TileMixing(identity_order())
    found = mixing.unmix(features)
    assert found.shape == features.shape
    assert (found - features).abs().max() <= 0.5
    constant = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, *size)
    assert_close(mixing.unmix(constant), constant)


def test_images_that_do_not_fill_a_group_are_not_mixed():
    images = torch.randn(7, 3, 64, 64)
    mixing = make_mum().backbone_mixing(7)
    mixed = mixing.mix(images)
    assert torch.equal(mixed[4:], images[4:]) and not torch.equal(mixed[:4], images[:4])
    assert torch.equal(mixing.unmix(mixed), images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_pass_unchanged(dtype):
    images = torch.randn(4, 3, 8, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 3, 8, 8).to(dtype)
    mixing = make_mum().backbone_mixing(4)
    (mixing.mix(images) * mixing.mix(weight)).sum().backward()
    assert torch.equal(images.grad, weight)


def test_too_few_images_per_process_are_an_error():
    message = r"groups of 4 .* each GPU has 3: raise SOLVER.IMS_PER_BATCH_UNLABELED"
    with pytest.raises(UsageError, match=message):
        make_mum(images=3)
    with pytest.raises(UsageError, match="each GPU has 2"):
        make_mum(images=4, **{"SOLVER.REFERENCE_WORLD_SIZE": 2})
    make_mum(images=4)


def test_recipe_is_that_of_unbiased_teacher():
    mum, base = (load_config("", [], name) for name in ("mum", "unbiased_teacher"))
    base.SEMI.METHOD, base.OUTPUT_DIR = mum.SEMI.METHOD, mum.OUTPUT_DIR
    assert mum == base
    assert MUM.box_loss(make_mum(), SimpleNamespace()) is None
