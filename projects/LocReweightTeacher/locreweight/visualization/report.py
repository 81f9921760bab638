"""Build the HTML report of one or several runs.

The report is one file that needs neither a server nor a network. Parts that a run has not written
yet are replaced by a note, so that a report can be made during training.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ..engine.localization_analysis import annotated_records, correlations, localize
from ..engine.predictor import Predictor
from ..engine.run_folder import SUMMARY_METRICS, RunFolder, differing_keys, open_runs
from ..errors import UsageError
from .detections import RankedImage, draw_comparison, rank_images
from .figures import WebFigure, comparison_figures, localization_figures, run_figures

TEMPLATE = Path(__file__).with_name("report.html.j2")
SCORE_THRESHOLD = 0.5  # of detections in pictures
NUM_EXAMPLES = 4  # best images, and as many worst images
EXAMPLE_SIDE = 320  # pixels of the longer side
NUM_PANELS = 6
PICTURE_WIDTH = 1000  # largest width in pixels


@dataclass(frozen=True)
class WebPicture:
    """A picture for a web page; ``data`` is a data URL."""

    data: str
    alt: str
    caption: str


@dataclass
class TestDetections:
    """Detections of a run's last checkpoint in test images.

    Attributes:
        missing: the reason why there are none; empty if there are.
        checkpoint: file name.
        images: number of images.
        best, worst: images with the highest and the lowest F1.
        figures: the paper's Fig. 3.
        correlations: name, Pearson's coefficient, Spearman's coefficient, number of detections.
    """

    missing: str = ""
    checkpoint: str = ""
    images: int = 0
    best: list[WebPicture] = field(default_factory=list)
    worst: list[WebPicture] = field(default_factory=list)
    figures: list[WebFigure] = field(default_factory=list)
    correlations: list[tuple[str, str, str, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """The part of the report about one run."""

    run: RunFolder
    figures: list[WebFigure]
    panels: list[WebPicture]
    detections: TestDetections


def write_report(folders: Sequence[Path], output: Path, images: int, device: str = "") -> None:
    """Write the report of one run, or one that compares several runs.

    Args:
        folders: ``OUTPUT_DIR`` of each run.
        output: HTML file.
        images: largest number of test images; 0 leaves out all detections.
        device: "cuda" or "cpu"; if empty, a GPU is used if there is one.

    Raises:
        UsageError: for a folder that is not the ``OUTPUT_DIR`` of a run.
    """
    page = render(open_runs(folders), images, device)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")


def render(runs: Sequence[RunFolder], images: int, device: str) -> str:
    """Return the HTML of the report. Arguments are those of :func:`write_report`."""
    sections = [
        Section(run, run_figures(run), select_panels(run), detect_test_images(run, images, device))
        for run in runs
    ]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["two_digits"] = "{:.2f}".format
    several = len(runs) > 1
    return environment.get_template(TEMPLATE.name).render(
        title=" and ".join(run.name for run in runs),
        sections=sections,
        several=several,
        metrics=SUMMARY_METRICS,
        score_threshold=SCORE_THRESHOLD,
        results=[row for run in runs for row in run.summary()],
        compared=comparison_figures(runs) if several else [],
        differing=differing_keys(runs) if several else [],
    )


def detect_test_images(run: RunFolder, count: int, device: str) -> TestDetections:
    """Evaluate a run's last checkpoint on test images: examples and localization quality.

    Args:
        run: run with a checkpoint.
        count: largest number of images; 0 for none.
        device: "cuda" or "cpu"; if empty, a GPU is used if there is one.
    """
    if not count:
        return TestDetections(missing="left out because of --images 0")
    if not run.has_checkpoint:
        return TestDetections(missing="the run has no checkpoint yet")
    try:
        detector = Predictor(run.path, device=device)
        records = annotated_records(detector, "", count)
        ranked = rank_images(detector, records, SCORE_THRESHOLD)
        data = localize(detector, records)
    except (OSError, UsageError) as error:
        return TestDetections(missing=str(error))
    threshold = detector.cfg.SEMI.PSEUDO_LABEL_THRESHOLD
    half = min(NUM_EXAMPLES, len(ranked) // 2)
    return TestDetections(
        checkpoint=Path(detector.cfg.MODEL.WEIGHTS).name,
        images=len(records),
        best=[_draw_example(detector, image) for image in ranked[:half]],
        worst=[_draw_example(detector, image) for image in ranked[::-1][:half]],
        figures=localization_figures(data, threshold),
        correlations=[
            (name, f"{c.pearson:.3f}", f"{c.spearman:.3f}", c.count)
            for name, c in correlations(data, threshold).items()
        ],
    )


def select_panels(run: RunFolder) -> list[WebPicture]:
    """Select panels of pseudo-labels, evenly spaced from the first to the last."""
    panels = run.panels
    indices = np.linspace(0, len(panels) - 1, min(NUM_PANELS, len(panels)))
    pictures = []
    for file in (panels[round(i)] for i in indices):
        iteration = int(file.stem.removeprefix("iter_"))
        note = " (burn-in)" if iteration <= run.burn_in else ""
        caption = f"after {iteration} iterations{note}"
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        alt = f"Pseudo-labels of the monitored images {caption}: weak and strong views with boxes"
        pictures.append(_web_picture(pixels, caption, alt))
    return pictures


def _draw_example(detector: Predictor, image: RankedImage) -> WebPicture:
    return _web_picture(
        draw_comparison({"detections": detector}, [image.record], SCORE_THRESHOLD, EXAMPLE_SIDE),
        f"F1 {image.f1:.2f}, mean IoU {image.mean_iou:.2f}",
        f"Ground truth and detections in {Path(image.record['file_name']).name}",
    )


def _web_picture(pixels: np.ndarray, caption: str, alt: str) -> WebPicture:
    image = Image.fromarray(pixels)
    image.thumbnail((PICTURE_WIDTH, 10 * PICTURE_WIDTH))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    encoded = base64.b64encode(file.getvalue()).decode()
    return WebPicture(f"data:image/jpeg;base64,{encoded}", alt, caption)
