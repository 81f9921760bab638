"""Localization quality against IoU: correlations, calibration, and the figure."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import plot_localization_quality
from locreweight.engine.localization_analysis import (
    annotated_records,
    calibration,
    correlation,
    localize,
    partial_correlation,
)
from locreweight.engine.predictor import Predictor
from locreweight.errors import UsageError
from tests.engine.tiny_training import detections_as_ground_truth
from tests.tiny_data import make_coco


@pytest.fixture
def detector(run):
    return Predictor(str(run.output), device="cpu")


def test_correlation_of_a_line_and_of_a_curve():
    x = np.linspace(0.1, 1, 50)
    line, curve = correlation(x, 3 * x + 1), correlation(x, -(x**7))
    assert (line.pearson, line.spearman, line.count) == (pytest.approx(1), pytest.approx(1), 50)
    assert curve.spearman == pytest.approx(-1)
    assert curve.pearson == pytest.approx(np.corrcoef(x, -(x**7))[0, 1])
    assert -0.95 < curve.pearson < -0.5


@pytest.mark.parametrize("values", [[], [0.5, 0.6], [0.5] * 9])
def test_correlation_of_constant_values_is_nan(values):
    result = correlation(np.array(values), np.arange(len(values)))
    assert math.isnan(result.pearson) and math.isnan(result.spearman)


def test_partial_correlation_is_that_of_the_residuals():
    rng = np.random.default_rng(0)
    given = rng.normal(size=400)
    other, iou = given + rng.normal(size=400), given + rng.normal(size=400)
    iou += 0.3 * other
    residuals = (x - np.polyval(np.polyfit(given, x, 1), given) for x in (iou, other))
    partial = partial_correlation(iou, other, given)
    assert partial.pearson == pytest.approx(correlation(*residuals).pearson)
    ranks = [x.argsort().argsort().astype(float) for x in (iou, other, given)]
    assert partial.spearman == pytest.approx(partial_correlation(*ranks).pearson)
    assert partial.count == 400


def test_partial_correlation_of_what_is_known_already():
    rng = np.random.default_rng(0)
    given = rng.normal(size=4000)
    iou, other = given + rng.normal(size=4000), given + rng.normal(size=4000)
    assert correlation(iou, other).pearson > 0.4
    assert abs(partial_correlation(iou, other, given).pearson) < 0.05
    assert math.isnan(partial_correlation(iou, given, given).pearson)
    assert math.isnan(partial_correlation(iou[:2], other[:2], given[:2]).spearman)


def test_errors_with_the_predicted_variance_are_calibrated():
    rng = np.random.default_rng(0)
    variance = rng.uniform(0.01, 0.1, size=(50_000, 4))
    groups = calibration(variance, rng.normal(0, np.sqrt(variance)))
    assert len(groups.variance) == 10
    assert (np.diff(groups.variance) > 0).all()
    np.testing.assert_allclose(groups.squared_error, groups.variance, rtol=0.05)
    # Nearly all errors are below 1, where the loss fits the square.
    np.testing.assert_allclose(groups.fitted_error, groups.squared_error, rtol=0.01)


def test_fitted_error_grows_linearly_beyond_1():
    groups = calibration(np.ones((1, 4)), np.array([[0.5, -1.0, 3.0, -3.0]]), groups=1)
    assert groups.squared_error.tolist() == [(0.25 + 1 + 9 + 9) / 4]
    assert groups.fitted_error.tolist() == [(0.25 + 1 + 5 + 5) / 4]


@pytest.mark.parametrize("side", [64, 96])
def test_detections_as_ground_truth_have_no_error(run, tmp_path, side):
    """At any input size."""
    sizes = ["INPUT.MIN_SIZE_TEST", str(side), "INPUT.MAX_SIZE_TEST", str(side)]
    detector = Predictor(str(run.output), options=sizes, device="cpu")

    def detect(inputs):
        image = inputs[0]["image"].flip(0).permute(1, 2, 0).contiguous().numpy()
        return [{"instances": detections} for detections in detector.detect([image])]

    detect.eval = lambda: detect
    name = detections_as_ground_truth(detect, run.test_set, tmp_path / "truth.json")
    data = localize(detector, annotated_records(detector, name))
    assert len(data.iou) > 5 and data.iou.min() > 0.98
    assert data.variance.shape == data.error.shape == (len(data.iou), 4)
    # The median, because some boxes were clipped at the border of the image.
    assert np.median(np.abs(data.error)) < 1e-3
    assert np.allclose(data.quality, 1 / (1 + np.exp(data.variance.mean(axis=1))), atol=1e-5)


def test_images_without_objects_have_zero_iou(run, detector, tmp_path):
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    data = localize(detector, [{"file_name": str(tmp_path / "a.png"), "annotations": []}])
    assert not data.iou.any() and data.variance.shape == (0, 4)


def test_dataset_with_other_classes_is_an_error(detector, tmp_path):
    other = make_coco(tmp_path / "other", classes=("emu", "fox", "gnu"))
    with pytest.raises(UsageError, match="emu"):
        annotated_records(detector, "coco:{}:{}".format(*other))


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_tool_writes_the_figure_and_its_numbers(run, tmp_path, monkeypatch, capsys, suffix):
    files = [str(tmp_path / f"fig3{suffix}"), str(tmp_path / "numbers.json")]
    arguments = ["--weights", str(run.output), "--output", files[0], "--json", files[1]]
    monkeypatch.setattr(sys, "argv", ["plot", *arguments, "--device", "cpu"])
    plot_localization_quality.main()
    assert Path(files[0]).stat().st_size > 10_000
    numbers = json.loads(Path(files[1]).read_text())
    printed = capsys.readouterr().out
    for name, values in numbers["correlations"].items():
        assert name in printed and f"{values['count']}" in printed
    assert len(numbers["calibration"]["variance"]) == len(numbers["calibration"]["fitted_error"])


def test_nan_prediction_is_an_error(detector, run):
    with torch.no_grad():
        detector.model.roi_heads.box_predictor.log_variance.bias.fill_(math.nan)
    with pytest.raises(UsageError, match="NaN"):
        localize(detector, annotated_records(detector, ""))
