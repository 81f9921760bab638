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

from ..engine.detection_analysis import ClassAnalysis, DetectionAnalysis
from ..engine.localization_analysis import annotated_records, correlations, localize
from ..engine.predictor import Predictor
from ..engine.run_folder import (
    RunFolder,
    Summary,
    describe_test_sets,
    differing_keys,
    group_seeds,
    open_runs,
)
from ..errors import UsageError
from .detections import RankedImage, draw_comparison, rank_images
from .figures import (
    WebFigure,
    analysis_figures,
    comparison_figures,
    localization_figures,
    run_figures,
)
from .outcome import describe_comparison, describe_run

TEMPLATE = Path(__file__).with_name("report.html.j2")
SCORE_THRESHOLD = 0.5  # of detections in pictures, if the checkpoint does not know the best one
NUM_EXAMPLES = 4  # best images, and as many worst images
EXAMPLE_SIDE = 320  # pixels of the longer side
NUM_PANELS = 6
MAX_CONFUSED = 15  # classes in the confusion matrix
PICTURE_WIDTH = 1000  # largest width in pixels


@dataclass(frozen=True)
class WebPicture:
    """A picture for a web page; ``data`` is a data URL."""

    data: str
    alt: str
    caption: str


@dataclass
class TestDetections:
    """Detections of a run's best checkpoint in test images.

    Attributes:
        missing: the reason why there are none; empty if there are.
        checkpoint: file name.
        score_threshold: detections above it are drawn and count for F1.
        images: number of images.
        best, worst: images with the highest and the lowest F1.
        figures: the paper's Fig. 3; none if the model was not trained to predict localization
            quality.
        correlations: name, Pearson's coefficient, Spearman's coefficient, number of detections.
    """

    missing: str = ""
    checkpoint: str = ""
    score_threshold: float = SCORE_THRESHOLD
    images: int = 0
    best: list[WebPicture] = field(default_factory=list)
    worst: list[WebPicture] = field(default_factory=list)
    figures: list[WebFigure] = field(default_factory=list)
    correlations: list[tuple[str, str, str, int]] = field(default_factory=list)


@dataclass(frozen=True)
class ConfusionMatrix:
    """A confusion matrix as a table.

    Attributes:
        names: classes, the most confused ones if there are many.
        rows: name, and number of boxes and its share in the row for each class and "missed".
        left_out: number of classes that are not shown.
    """

    names: list[str]
    rows: list[tuple[str, list[tuple[int, float]]]]
    left_out: int


@dataclass(frozen=True)
class ClassResults:
    """Analysis of the last evaluation on one test set."""

    test_set: str
    iteration: int
    analysis: DetectionAnalysis
    figures: list[WebFigure]
    confusion: ConfusionMatrix

    @property
    def table(self) -> list[list[str]]:
        """Results of each class, the lowest AP first."""
        classes = sorted(self.analysis.classes, key=lambda c: (c.ap is None, c.ap))
        return [_class_row(each) for each in classes]


@dataclass(frozen=True)
class Section:
    """The part of the report about one run.

    Attributes:
        run: the run.
        outcome: a sentence on what came out.
        before_and_after: the teacher's pseudo-labels at the end of burn-in and of training.
        figures: metrics over the iterations.
        results: analyses by class.
        panels: pseudo-labels over time.
        detections: examples.
    """

    run: RunFolder
    outcome: str
    before_and_after: list[WebPicture]
    figures: list[WebFigure]
    results: list[ClassResults]
    panels: list[WebPicture]
    detections: TestDetections


def write_report(folders: Sequence[Path], output: Path, images: int, device: str = "") -> None:
    """Write the report of one run, or one that compares several runs.

    Args:
        folders: ``OUTPUT_DIR`` of each run, or folders of comparisons.
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
    groups = group_seeds(runs)
    # The details of the other seeds are much the same.
    sections = [_section(group.runs[0], images, device) for group in groups]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    several = len(groups) > 1
    names = [group.name for group in groups]
    return environment.get_template(TEMPLATE.name).render(
        title=" and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        if len(names) < 4
        else f"{names[0]} and {len(names) - 1} others",
        outcome=describe_comparison(groups) if several else sections[0].outcome,
        warning=describe_test_sets(runs),
        sections=sections,
        several=several,
        num_runs=len(runs),
        summary=Summary.of(runs),
        several_test_sets=any(len(run.config.get("DATASETS.TEST", [])) > 1 for run in runs),
        compared=comparison_figures(groups) if several else [],
        differing=differing_keys([section.run for section in sections]) if several else [],
    )


def _section(run: RunFolder, images: int, device: str) -> Section:
    return Section(
        run=run,
        outcome=describe_run(run),
        before_and_after=_before_and_after(run),
        figures=run_figures(run),
        results=_class_results(run),
        panels=select_panels(run),
        detections=detect_test_images(run, images, device),
    )


def _before_and_after(run: RunFolder) -> list[WebPicture]:
    pictures = []
    for iteration, file in run.before_and_after:
        when = "End of burn-in" if iteration <= run.burn_in else "Final teacher"
        caption = f"{when}, iteration {iteration}"
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        pictures.append(_web_picture(pixels, caption, "Pseudo-labels of the teacher"))
    return pictures


def _class_results(run: RunFolder) -> list[ClassResults]:
    iteration, analyses = run.last_analysis
    return [
        ClassResults(name, iteration, each, analysis_figures(each), confusion_matrix(each))
        for name, each in analyses.items()
    ]


def confusion_matrix(analysis: DetectionAnalysis, limit: int = MAX_CONFUSED) -> ConfusionMatrix:
    """Select the classes that occur, the most confused ones if there are more than a limit.

    Detections and boxes of the other classes are left out.
    """
    counts = np.array(analysis.confusion)
    classes = np.arange(len(analysis.classes))
    occurring = classes[(counts[:-1].sum(axis=1) + counts[:, :-1].sum(axis=0)) > 0]
    errors = (counts - np.diag(np.diag(counts)))[:-1, :-1]
    confused = (errors.sum(axis=0) + errors.sum(axis=1))[occurring]
    shown = np.sort(occurring[np.argsort(-confused, kind="stable")[:limit]])
    names = [analysis.classes[i].name for i in shown]
    selected = [*shown, len(classes)]
    rows = [
        (name, [(int(n), float(n / max(1, counts[i].sum()))) for n in counts[i, selected]])
        for name, i in zip([*names, "nothing"], selected, strict=True)
    ]
    return ConfusionMatrix(names, rows, len(occurring) - len(shown))


def _class_row(each: ClassAnalysis) -> list[str]:
    percentages = [each.ap, each.ap50, each.ap75]
    shares = [each.precision, each.recall]
    return [
        each.name,
        str(each.boxes),
        *("" if value is None else f"{value:.2f}" for value in percentages),
        *("" if value is None else f"{value:.3f}" for value in shares),
    ]


def detect_test_images(run: RunFolder, count: int, device: str) -> TestDetections:
    """Evaluate a run's best checkpoint on test images: examples and localization quality.

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
        known = detector.score_threshold
        score_threshold = SCORE_THRESHOLD if known is None else known
        ranked = rank_images(detector, records, score_threshold)
        data = localize(detector, records) if detector.has_localization_quality else None
    except (OSError, UsageError) as error:
        return TestDetections(missing=str(error))
    threshold = detector.cfg.SEMI.PSEUDO_LABEL_THRESHOLD
    half = min(NUM_EXAMPLES, len(ranked) // 2)
    return TestDetections(
        checkpoint=Path(detector.cfg.MODEL.WEIGHTS).name,
        score_threshold=score_threshold,
        images=len(records),
        best=[_draw_example(detector, image, score_threshold) for image in ranked[:half]],
        worst=[_draw_example(detector, image, score_threshold) for image in ranked[::-1][:half]],
        figures=localization_figures(data, threshold) if data else [],
        correlations=[
            (name, f"{c.pearson:.3f}", f"{c.spearman:.3f}", c.count)
            for name, c in (correlations(data, threshold) if data else {}).items()
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


def _draw_example(detector: Predictor, image: RankedImage, score_threshold: float) -> WebPicture:
    return _web_picture(
        draw_comparison({"detections": detector}, [image.record], score_threshold, EXAMPLE_SIDE),
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
