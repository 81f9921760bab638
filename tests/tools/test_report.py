"""The report: its content, missing parts, and how a browser shows it."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import report
from locreweight.engine.detection_analysis import ClassAnalysis, DetectionAnalysis
from locreweight.engine.run_folder import Curve, open_run, unique_names
from locreweight.errors import UsageError
from locreweight.visualization.figures import Line, line_figure, mean_curve
from locreweight.visualization.report import confusion_matrix, detect_test_images, write_report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Elements of a page with their attributes; checks that they are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["style"] else ""

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def pages(run, tmp_path_factory):
    """Reports of one run, of two runs, and of a run that has just started."""
    folder = tmp_path_factory.mktemp("pages")
    other = folder / "other"
    shutil.copytree(run.output, other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("LER: true", "LER: false"))
    started = folder / "started"
    started.mkdir()
    shutil.copy(run.output / "config.yaml", started)
    write_report([run.output], folder / "one.html", images=3, device="cpu")
    write_report([run.output, other], folder / "two.html", images=0)
    write_report([started], folder / "started.html", images=3)
    return folder


@pytest.fixture(params=["one", "two", "started"])
def page(request, pages):
    return Page((pages / f"{request.param}.html").read_text())


def test_elements_are_closed_and_ids_are_unique(page):
    assert not page.open
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in page.all("a")]
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)


def test_page_has_no_external_resources(page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:")), (tag, value[:80])
    assert not page.all("script") and not page.all("iframe")


def test_pictures_and_figures_have_text_alternatives(page):
    assert all(attributes.get("alt") for attributes in page.all("img"))
    for attributes in page.all("svg"):
        assert attributes["role"] == "img" and len(attributes["aria-label"]) > 20
    assert len(page.all("figcaption")) == len(page.all("figure"))


def test_headings_do_not_skip_a_level(page):
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_scrolling_elements_can_be_reached_by_keyboard(page):
    scrolling = [a for _, a in page.elements if a.get("class") == "scroll"]
    assert scrolling
    assert all(
        a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in scrolling
    )


def test_report_of_one_run(pages, run):
    page = Page((pages / "one.html").read_text())
    for part in (
        "final teacher",
        "after 2 iterations (burn-in)",
        "after 4 iterations",
        "Pearson",
        "python train_net.py --config-file tiny.yaml",
        "PyTorch",
        "MODEL.FPN.OUT_CHANNELS",
        "After 4 iterations, the teacher has an AP of",
        "End of burn-in, iteration 2",
        "Final teacher, iteration 4",
        "Results by class",
        "Precision against recall at IoU 0.5",
        "Confusion matrix",
        "best score threshold",
    ):
        assert part.lower() in page.text.lower()
    # Before and after, panels; of three images one is best, one is worst.
    assert len(page.all("img")) == 2 + 2 + 2 * 1
    assert len(page.all("svg")) > 8


def test_report_of_two_runs_compares_them(pages):
    text = Page((pages / "two.html").read_text()).text
    assert "Where the configs differ" in text and "SEMI.LER" in text
    assert "tiny" in text and "other" in text and "left out because of --images 0" in text


@pytest.fixture(scope="module")
def comparison(run, tmp_path_factory):
    """Folder of a comparison of two methods, one of them with two seeds."""
    folder = tmp_path_factory.mktemp("comparison")
    for name in ("good/seed-1", "good/seed-2", "bad/seed-1"):
        shutil.copytree(run.output, folder / name)
    return folder


def test_report_of_a_comparison_shows_means_and_the_first_seed(comparison):
    write_report([comparison], comparison / "report.html", images=0)
    page = Page((comparison / "report.html").read_text())
    headings = [a["id"] for tag, a in page.elements if tag == "h2"]
    assert headings == ["results", "compared", "run-1", "run-2"]
    tags = [tag for tag, _ in page.elements]
    first = tags[: tags.index("h2")]
    assert first.count("img") == 2, "the page opens with pictures of before and after"
    # Each of the two shown runs has two of them, and two panels.
    assert tags.count("img") == 2 * (2 + 2)
    for part in (
        "good, 2 seeds",
        "± 0.00",
        "All 3 runs",
        "has the highest final AP",
        "over the seeds",
    ):
        assert part in page.text
    assert "Warning" not in page.text


def test_different_test_sets_are_a_warning(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run.output, other)
    config = (other / "config.yaml").read_text()
    assert run.test_set in config
    (other / "config.yaml").write_text(config.replace(run.test_set, "coco:elsewhere.json:images"))
    write_report([run.output, other], tmp_path / "a.html", images=0)
    page = Page((tmp_path / "a.html").read_text())
    assert "Warning" in page.text and "different test sets" in page.text
    assert "coco:elsewhere.json:images" in page.text


def test_report_of_a_run_of_an_earlier_version(run, tmp_path):
    """Such a run has neither analyses nor pictures before and after, nor F1."""
    other = tmp_path / "earlier"
    shutil.copytree(run.output, other)
    shutil.rmtree(other / "analysis")
    for file in (other / "panels").glob("teacher_*"):
        file.unlink()
    lines = map(json.loads, (other / "metrics.json").read_text().splitlines())
    kept = [{key: value for key, value in line.items() if "F1" not in key} for line in lines]
    (other / "metrics.json").write_text("\n".join(map(json.dumps, kept)))
    write_report([other], tmp_path / "a.html", images=0)
    page = Page((tmp_path / "a.html").read_text())
    assert "by an earlier version" in page.text and "nan" not in page.text.lower()


def analysis_of(confusion):
    names = [f"class {i}" for i in range(len(confusion) - 1)]
    classes = [ClassAnalysis(name, 1, 50.0, 60.0, 40.0, 0.5, 0.5, [0.5] * 101) for name in names]
    return DetectionAnalysis(None, [], classes, confusion)


def test_confusion_matrix_has_shares_of_each_row():
    matrix = confusion_matrix(analysis_of([[6, 1, 1], [0, 0, 0], [2, 2, 0]]))
    assert matrix.names == ["class 0", "class 1"]
    assert matrix.rows == [
        ("class 0", [(6, 0.75), (1, 0.125), (1, 0.125)]),
        ("class 1", [(0, 0), (0, 0), (0, 0)]),
        ("nothing", [(2, 0.5), (2, 0.5), (0, 0)]),
    ]


def test_confusion_matrix_keeps_the_most_confused_classes():
    counts = np.zeros((5, 5), int)
    counts[np.arange(4), np.arange(4)] = 9
    counts[3, 1] = 5
    matrix = confusion_matrix(analysis_of(counts.tolist()), limit=2)
    assert (matrix.names, matrix.left_out) == (["class 1", "class 3"], 2)
    assert [name for name, _ in matrix.rows] == ["class 1", "class 3", "nothing"]


def test_mean_curve_has_the_iterations_of_all_curves():
    mean = mean_curve([Curve([1, 2, 4], [1.0, 2.0, 5.0]), Curve([2, 3, 4], [4.0, 9.0, 7.0])])
    assert mean == Curve([2, 4], [3.0, 6.0])


def test_report_of_a_started_run_names_missing_parts(pages):
    page = Page((pages / "started.html").read_text())
    for part in (
        "Nothing has been evaluated yet",
        "no metrics.json",
        "There are no panels",
        "has no checkpoint yet",
        "no run.json",
    ):
        assert part in page.text
    assert not page.all("svg")


def test_missing_checkpoint_is_reported(run, tmp_path):
    other = tmp_path / "moved"
    shutil.copytree(run.output, other)
    file = other / "gone.pth"
    (other / "last_checkpoint").write_text(file.name)
    for name in ("model_best.pth", "model_final.pth"):
        (other / name).unlink()
    detections = detect_test_images(open_run(other, "a"), 3, "cpu")
    assert "does not exist" in detections.missing


@pytest.mark.parametrize("folder", ["none", "empty"])
def test_folder_that_is_not_a_run_is_an_error(tmp_path, folder, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / folder)])
    with pytest.raises(SystemExit) as end:
        report.main()
    assert end.value.code.startswith("error: ") and folder in end.value.code
    with pytest.raises(UsageError):
        open_run(tmp_path / folder, "a")


def test_names_are_escaped(run, tmp_path):
    other = tmp_path / "<b>a & b"
    shutil.copytree(run.output, other)
    write_report([other], tmp_path / "a.html", images=0)
    page = Page((tmp_path / "a.html").read_text())
    assert "<b>a & b" in page.text and not page.all("b")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/model.pth", "b/model.pth"], ["a/model", "b/model"]),
        (["a/x.pth", "a/y.pth"], ["x", "y"]),
        (["output/v1.0", "output/v1.1"], ["v1.0", "v1.1"]),
        (["output/a"], ["a"]),
    ],
)
def test_unique_names(paths, names):
    assert unique_names(list(map(Path, paths))) == names


def test_curve_has_the_last_value_of_each_iteration(run, tmp_path):
    other = tmp_path / "resumed"
    shutil.copytree(run.output, other)
    lines = [{"iteration": 3, "x": 1.0}, {"iteration": 5, "x": 2.0}, {"iteration": 3, "x": 7.0}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"iteration": 9, "x"'  # incomplete
    (other / "metrics.json").write_text(text)
    assert open_run(other, "a").curve("x") == Curve([3, 5], [7.0, 2.0])


def test_figures_use_the_text_color_of_the_page():
    figure = line_figure([Line("a", Curve([1, 2], [0.5, 0.7]))], "share", "A <curve>", burn_in=1)
    assert "currentColor" in figure.svg and "#010203" not in figure.svg
    assert "burn-in" in figure.svg and "&lt;curve&gt;" in figure.svg
    assert "0.5 at iteration 1 to 0.7 at 2" in figure.alt


# --- in a browser ---------------------------------------------------------------------------------

PROBE = """<script>addEventListener("load", () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const shown = e => { const r = e.getBoundingClientRect(); return r.width > 50 && r.height > 20; };
  const style = getComputedStyle(document.body);
  parent.postMessage(JSON.stringify({
    images: [...document.images].map(i => shown(i) && i.complete && i.naturalWidth > 0),
    figures: [...document.querySelectorAll("svg")].map(
      s => shown(s) && s.querySelectorAll("path").length > 3 && s.getBBox().width > 50),
    width: innerWidth, content: document.documentElement.scrollWidth,
    ink: style.color, page: style.backgroundColor,
  }), "*");
});</script>"""

# Browser windows have a minimum width; frames have none.
FRAME = """<body></body><script>
addEventListener("message", message => { document.body.textContent = message.data; });
document.write('<iframe src="page.html" width="{width}" height="900" frameborder="0"></iframe>');
</script>"""


def inspect_page(folder, text, width, dark):
    """Return measurements of a page in a browser, and the errors on its console."""
    (folder / "page.html").write_text(text.replace("</head>", PROBE + "</head>"))
    (folder / "frame.html").write_text(FRAME.replace("{width}", str(width)))
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width + 100},1000",
            f"--blink-settings=preferredColorScheme={int(not dark)}",
            *("--virtual-time-budget=5000", "--dump-dom", f"file://{folder / 'frame.html'}"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    console_errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(re.search(r"<body>(\{.*\})", done.stdout)[1]), console_errors


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium or google-chrome on the PATH"
)


@needs_browser
@pytest.mark.parametrize(
    ("name", "width", "dark"), [("one", 390, True), ("one", 1200, False), ("two", 390, False)]
)
def test_browser_shows_all_pictures_and_figures(pages, tmp_path, name, width, dark):
    text = (pages / f"{name}.html").read_text()
    shown, console_errors = inspect_page(tmp_path, text, width, dark)
    assert not console_errors
    page = Page(text)
    assert len(shown["images"]) == len(page.all("img")) and all(shown["images"])
    assert len(shown["figures"]) == len(page.all("svg")) > 5 and all(shown["figures"])
    assert shown["content"] <= shown["width"] == width
    ink, paper = (sum(map(int, re.findall(r"\d+", shown[key])[:3])) for key in ("ink", "page"))
    assert (ink > paper + 300) if dark else (paper > ink + 300)


@needs_browser
def test_inspection_in_the_browser_detects_errors(pages, tmp_path):
    """The checks of the test above fail on a broken page."""
    text = (pages / "one.html").read_text()
    wide = '<p style="width: 2000px">wide</p><script>console.error("error")</script>'
    broken = text.replace("image/jpeg;base64,/9j/", "image/jpeg;base64,AAAA", 1)
    broken = re.sub(r"(<svg [^>]*>).*?</svg>", r"\1</svg>", broken, count=1, flags=re.DOTALL)
    shown, console_errors = inspect_page(
        tmp_path, broken.replace("</main>", wide + "</main>"), 390, False
    )
    assert console_errors
    assert shown["images"].count(False) == 1 and shown["figures"].count(False) == 1
    assert shown["content"] > shown["width"]
