#!/usr/bin/env python
"""One page about a run, or one that compares several: results, curves, pictures, how to repeat it.

    python tools/report.py output/quickstart [output/another ...]

The page is a single HTML file that needs neither a server nor a network. What a run has not written
yet is said in its place, so that a run can be looked at while it goes on.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from locreweight.engine.localization_analysis import annotated_records, localize
from locreweight.engine.predictor import load_predictor
from locreweight.engine.run_folder import RunFolder, differing_keys, read_runs
from locreweight.errors import UsageError
from locreweight.visualization.figures import (
    WebFigure,
    compared_figures,
    localization_figures,
    run_figures,
)
from locreweight.visualization.ranking import draw_ranked, rank
from plot_localization_quality import measure
from summarize import METRICS

TEMPLATE = Path(__file__).with_name("report.html.j2")
SHOWN_SCORE = 0.5  # least score of the detections in pictures
BEST_AND_WORST = 4  # images of each
PANELS = 6
PANEL_WIDTH = 1000  # pixels


@dataclass(frozen=True)
class WebPicture:
    """A picture within the page; ``data`` is a data URL."""

    data: str
    alt: str
    caption: str


@dataclass
class Detections:
    """What a run's last checkpoint finds in test images; ``missing`` says why there is nothing."""

    missing: str = ""
    checkpoint: str = ""
    images: int = 0
    best: list[WebPicture] = field(default_factory=list)
    worst: list[WebPicture] = field(default_factory=list)
    figures: list[WebFigure] = field(default_factory=list)
    correlations: list[tuple[str, str, str, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """All that the page says of one run."""

    run: RunFolder
    figures: list[WebFigure]
    panels: list[WebPicture]
    detections: Detections


def look_at_test_images(run: RunFolder, count: int, device: str) -> Detections:
    """Best and worst detections, and Fig. 3, of the last checkpoint on the test images.

    Args:
        run: the run.
        count: so many images at most; 0 leaves it all out.
        device: "cuda", "cpu", or empty for a GPU if there is one.
    """
    if not count:
        return Detections(missing="left out, by --images 0")
    if not run.has_checkpoint:
        return Detections(missing="the run has no checkpoint yet")
    try:
        detector = load_predictor(str(run.path), device=device)
        records = annotated_records(detector, "", count)
        ranked = rank(detector, records, SHOWN_SCORE)
        data = localize(detector, records)
    except (OSError, UsageError) as error:
        return Detections(missing=str(error))
    threshold = detector.cfg.SEMI.PSEUDO_LABEL_THRESHOLD

    def pictures(images: Iterable) -> list[WebPicture]:
        return [
            _picture(
                draw_ranked(detector, one, SHOWN_SCORE),
                f"F1 {one.f1:.2f}, mean IoU {one.mean_iou:.2f}",
                f"Ground truth and detections in {Path(one.record['file_name']).name}",
            )
            for one in images
        ]

    half = min(BEST_AND_WORST, len(ranked) // 2)
    return Detections(
        checkpoint=Path(detector.cfg.MODEL.WEIGHTS).name,
        images=len(records),
        best=pictures(ranked[:half]),
        worst=pictures(ranked[::-1][:half]),
        figures=localization_figures(data, threshold),
        correlations=[
            (name, f"{c.pearson:.3f}", f"{c.spearman:.3f}", c.count)
            for name, c in measure(data, threshold).items()
        ],
    )


def panels_of(run: RunFolder) -> list[WebPicture]:
    """Some of the panels, from the first to the last."""
    count = min(PANELS, len(run.panels))
    chosen = [run.panels[round(i)] for i in np.linspace(0, len(run.panels) - 1, count)]
    pictures = []
    for file in chosen:
        iteration = int(file.stem.removeprefix("iter_"))
        caption = f"after {iteration} iterations" + (
            " (burn-in)" if iteration <= run.burn_in else ""
        )
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        alt = f"Pseudo-labels of the monitored images {caption}: weak and strong views with boxes"
        pictures.append(_picture(pixels, caption, alt))
    return pictures


def render(runs: Sequence[RunFolder], images: int, device: str) -> str:
    """The page.

    Args:
        runs: one, or several to compare.
        images: as ``count`` of :func:`look_at_test_images`.
        device: likewise.
    """
    sections = [
        Section(run, run_figures(run), panels_of(run), look_at_test_images(run, images, device))
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
        title=" and ".join(run.name for run in runs) if several else runs[0].name,
        sections=sections,
        several=several,
        metrics=METRICS,
        results=[result for run in runs for result in run.results],
        compared=compared_figures(runs) if several else [],
        differing=differing_keys(runs) if several else [],
    )


def _picture(pixels: np.ndarray, caption: str, alt: str) -> WebPicture:
    image = Image.fromarray(pixels)
    image.thumbnail((PANEL_WIDTH, 10 * PANEL_WIDTH))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    encoded = base64.b64encode(file.getvalue()).decode()
    return WebPicture(f"data:image/jpeg;base64,{encoded}", alt, caption)


def write_report(folders: Sequence[Path], output: Path, images: int, device: str = "") -> None:
    """Write the page about some runs.

    Raises:
        UsageError: for a folder that is not that of a run.
    """
    page = render(read_runs(folders), images, device)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="OUTPUT_DIR of each run")
    parser.add_argument("--output", type=Path, help="else report.html in the first OUTPUT_DIR")
    parser.add_argument("--images", type=int, default=200, help="test images to look at, at most")
    parser.add_argument("--device", default="", help="cuda or cpu; a GPU is used if there is one")
    args = parser.parse_args()
    output = args.output or args.runs[0] / "report.html"
    try:
        write_report(args.runs, output, args.images, args.device)
    except UsageError as error:
        sys.exit(f"error: {error}")
    print(f"report: {output}")


if __name__ == "__main__":
    main()
