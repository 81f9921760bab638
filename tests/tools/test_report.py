"""The page says what the run left, whatever is missing, and a real browser shows all of it."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

import report
from locreweight.engine.run_folder import Curve, read_run, unique_names
from locreweight.errors import UsageError
from locreweight.visualization.figures import Line, line_figure

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Elements by name, with their attributes; and whether all were closed in order."""

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
    """The page of one run, that of two, and that of a run that has just begun."""
    folder = tmp_path_factory.mktemp("pages")
    other = folder / "other"
    shutil.copytree(run.output, other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("LER: true", "LER: false"))
    begun = folder / "begun"
    begun.mkdir()
    shutil.copy(run.output / "config.yaml", begun)
    report.write_report([run.output], folder / "one.html", images=3, device="cpu")
    report.write_report([run.output, other], folder / "two.html", images=0)
    report.write_report([begun], folder / "begun.html", images=3)
    return folder


@pytest.fixture(params=["one", "two", "begun"])
def page(request, pages):
    return Page((pages / f"{request.param}.html").read_text())


def test_elements_are_closed_and_names_are_unique(page):
    assert not page.open
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in page.all("a")]
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)


def test_nothing_is_fetched(page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:")), (tag, value[:80])
    assert not page.all("script") and not page.all("iframe")


def test_every_figure_has_words_for_those_who_do_not_see_it(page):
    assert all(attributes.get("alt") for attributes in page.all("img"))
    for attributes in page.all("svg"):
        assert attributes["role"] == "img" and len(attributes["aria-label"]) > 20
    assert len(page.all("figcaption")) == len(page.all("figure"))


def test_headings_do_not_skip_a_level(page):
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_what_scrolls_can_be_reached_by_keyboard(page):
    scrolling = [a for _, a in page.elements if a.get("class") == "scroll"]
    assert scrolling
    assert all(
        a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in scrolling
    )


def test_one_run(pages, run):
    page = Page((pages / "one.html").read_text())
    for part in (
        "final teacher",
        "after 2 iterations (burn-in)",
        "after 4 iterations",
        "Pearson",
        "python train_net.py --config-file tiny.yaml",
        "PyTorch",
        "MODEL.FPN.OUT_CHANNELS",
    ):
        assert part.lower() in page.text.lower()
    assert len(page.all("img")) == 2 + 2 * 1  # panels; of three images one is best, one is worst
    assert len(page.all("svg")) > 8


def test_two_runs_are_compared(pages):
    text = Page((pages / "two.html").read_text()).text
    assert "Where the configs differ" in text and "SEMI.LER" in text
    assert "tiny" in text and "other" in text and "left out, by --images 0" in text


def test_a_run_that_has_just_begun_says_what_is_missing(pages):
    page = Page((pages / "begun.html").read_text())
    for part in (
        "Nothing has been evaluated yet",
        "no metrics.json",
        "There are no panels",
        "has no checkpoint yet",
        "no run.json",
    ):
        assert part in page.text
    assert not page.all("svg")


def test_test_images_that_are_gone_are_told(run, tmp_path):
    other = tmp_path / "moved"
    shutil.copytree(run.output, other)
    file = other / "gone.pth"
    (other / "last_checkpoint").write_text(file.name)
    seen = report.look_at_test_images(read_run(other, "a"), 3, "cpu")
    assert "does not exist" in seen.missing


@pytest.mark.parametrize("folder", ["none", "empty"])
def test_a_folder_that_is_no_run_is_told(tmp_path, folder, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / folder)])
    with pytest.raises(SystemExit) as end:
        report.main()
    assert end.value.code.startswith("error: ") and folder in end.value.code
    with pytest.raises(UsageError):
        read_run(tmp_path / folder, "a")


def test_what_a_name_contains_cannot_break_the_page(run, tmp_path):
    other = tmp_path / "<b>a & b"
    shutil.copytree(run.output, other)
    report.write_report([other], tmp_path / "a.html", images=0)
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
def test_runs_and_checkpoints_are_named_by_what_tells_them_apart(paths, names):
    assert unique_names(list(map(Path, paths))) == names


def test_a_number_that_was_measured_twice_holds_as_it_was_last(run, tmp_path):
    other = tmp_path / "resumed"
    shutil.copytree(run.output, other)
    lines = [{"iteration": 3, "x": 1.0}, {"iteration": 5, "x": 2.0}, {"iteration": 3, "x": 7.0}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"iteration": 9, "x"'  # still being written
    (other / "metrics.json").write_text(text)
    assert read_run(other, "a").curve("x") == Curve([3, 5], [7.0, 2.0])


def test_figures_take_their_ink_from_the_page():
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

# Browsers have a least width of their own; a frame in them has none.
FRAME = """<body></body><script>
addEventListener("message", message => { document.body.textContent = message.data; });
document.write('<iframe src="page.html" width="{width}" height="900" frameborder="0"></iframe>');
</script>"""


def inspect_page(folder, text, width, dark):
    """What a browser makes of a page, and what it complains about."""
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
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(re.search(r"<body>(\{.*\})", done.stdout)[1]), complaints


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium or google-chrome on the PATH"
)


@needs_browser
@pytest.mark.parametrize(
    ("name", "width", "dark"), [("one", 390, True), ("one", 1200, False), ("two", 390, False)]
)
def test_a_browser_shows_all_of_it(pages, tmp_path, name, width, dark):
    text = (pages / f"{name}.html").read_text()
    seen, complaints = inspect_page(tmp_path, text, width, dark)
    assert not complaints
    page = Page(text)
    assert len(seen["images"]) == len(page.all("img")) and all(seen["images"])
    assert len(seen["figures"]) == len(page.all("svg")) > 5 and all(seen["figures"])
    assert seen["content"] <= seen["width"] == width
    ink, paper = (sum(map(int, re.findall(r"\d+", seen[key])[:3])) for key in ("ink", "page"))
    assert (ink > paper + 300) if dark else (paper > ink + 300)


@needs_browser
def test_a_browser_would_notice(pages, tmp_path):
    """What the test above looks for is seen where it is wrong."""
    text = (pages / "one.html").read_text()
    wide = '<p style="width: 2000px">wide</p><script>console.error("complaint")</script>'
    broken = text.replace("image/jpeg;base64,/9j/", "image/jpeg;base64,AAAA", 1)
    broken = re.sub(r"(<svg [^>]*>).*?</svg>", r"\1</svg>", broken, count=1, flags=re.DOTALL)
    seen, complaints = inspect_page(
        tmp_path, broken.replace("</main>", wide + "</main>"), 390, False
    )
    assert complaints
    assert seen["images"].count(False) == 1 and seen["figures"].count(False) == 1
    assert seen["content"] > seen["width"]
