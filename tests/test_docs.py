"""The documentation names only files, functions, config keys, options and messages that exist."""

import ast
import configparser
import csv
import itertools
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from scipy.stats import ttest_1samp

from locreweight.config import METHODS_FOLDER, load_config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "projects/LocReweightTeacher/locreweight"
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "datasets/README.md",
    ROOT / "projects/LocReweightTeacher/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# The changelog names former files and keys.
CURRENT_PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]
CODE_FOLDERS = (
    "benchmarks",
    "configs",
    "datasets",
    "docs",
    "examples",
    "projects",
    "tests",
    "tools",
)
SECTIONS = "DATALOADER|DATASETS|INPUT|MODEL|SEMI|SOLVER|TEST"
# python or torchrun with a module or a script
SCRIPT = re.compile(
    r"(?:\w+=\S+ )*(?:srun )?(?:python|torchrun.*?) (?:-m ((?:benchmarks|tests)\.\w+)|(\S+\.py))"
)
# Files that a reader creates while following the docs.
CREATED = {
    "configs/mine.yaml",
    "configs/methods/score_weighted.yaml",
    "locreweight/methods/score_weighted.py",
}


def for_each(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def expand_braces(path):
    """``a/{b,c}.yaml`` -> ``a/b.yaml``, ``a/c.yaml``, as a shell does."""
    parts = re.split(r"\{([^}]*)\}", path)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(combination) for combination in itertools.product(*choices)]


def commands(page):
    """The shell commands of a page, each in one line."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    inline = re.findall(r"`(python [^`]*)`", page.read_text())
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in [*lines, *inline] if line.strip()]


def anchor(heading):
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"^#+ (.*)$", text, re.MULTILINE)


@cache
def names_in(file):
    """Functions and classes of a Python file, and methods and attributes as ``Class.name``."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{x.name}" for x in node.body if isinstance(x, ast.FunctionDef)}
    return names


@for_each(PAGES)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if fragment:
            assert fragment in map(anchor, headings(file)), target


@for_each(CURRENT_PAGES)
def test_named_functions_and_classes_exist(page):
    for path, names in re.findall(r"`([\w/]+\.py): ([\w., ]+)`", page.read_text()):
        file = next(
            (f for f in (PACKAGE / path, PACKAGE.parent / path, ROOT / path) if f.is_file()), None
        )
        assert file, path
        for name in names.split(", "):
            assert name in names_in(file), f"{path}: {name}"


def test_equation_table_is_found():
    page = (ROOT / "projects/LocReweightTeacher/README.md").read_text()
    assert len(re.findall(r"`[\w/]+\.py: [\w., ]+`", page)) > 15


@for_each(CURRENT_PAGES)
def test_named_files_exist(page):
    pattern = rf"(?<![\w/.$-])(?:{'|'.join(CODE_FOLDERS)})/[\w./{{}},*-]*\.(?:md|py|yaml|csv|txt)\b"
    for path in set(re.findall(pattern, page.read_text())) - CREATED:
        if path.startswith("datasets/") and not path.endswith((".py", "README.md")):
            continue  # data, which is not part of the repository
        for name in expand_braces(path):
            assert list(ROOT.glob(name)) or list(page.parent.glob(name)), name
    for path in set(re.findall(r"`(tests/[\w/]+)`", page.read_text())):
        assert (ROOT / path).exists(), path
    for path in (
        set(re.findall(r"`([a-z_]+/(?:[a-z_]+/)*[a-z_]+\.py)`", page.read_text())) - CREATED
    ):
        assert (ROOT / path).is_file() or (PACKAGE / path).is_file(), path


@for_each(CURRENT_PAGES)
def test_config_keys_exist(page):
    cfg = load_config("", [])
    for key in set(re.findall(rf"\b(?:{SECTIONS})(?:\.[A-Z][A-Z0-9_]*)+", page.read_text())):
        node = cfg
        for part in key.split("."):
            assert isinstance(node, CfgNode) and part in node, key
            node = node[part]


@for_each(CURRENT_PAGES)
def test_config_files_in_the_text_can_be_loaded(page, tmp_path):
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)):
        if "ScoreWeighted" not in block:  # the name of a method that a reader adds
            content = yaml.safe_load(block)
            base = content.get("_BASE_")
            if base:
                content["_BASE_"] = str(next((ROOT / "configs").rglob(Path(base).name)))
            file = tmp_path / f"{number}.yaml"
            file.write_text(yaml.safe_dump(content))
            load_config(str(file), [])


@for_each(CURRENT_PAGES)
def test_methods_of_the_command_line_exist(page):
    for method in re.findall(r"--method ([a-z_/-]+)", page.read_text()):
        if method != "score_weighted":
            assert (METHODS_FOLDER / f"{method}.yaml").is_file(), method


@for_each(CURRENT_PAGES)
def test_options_of_scripts_exist(page):
    for command in commands(page):
        found = SCRIPT.match(command)
        if not found:
            continue
        script = ROOT / (found[1].replace(".", "/") + ".py" if found[1] else found[2])
        assert script.is_file(), command
        # Tools share some of their options.
        files = [script, *(ROOT / "tools").glob("*.py"), PACKAGE / "engine/launch.py"]
        source = "".join(file.read_text() for file in files)
        source += default_argument_parser().format_help()
        for option in re.findall(r"(?<=\s)--([a-z][\w-]*)", command[found.end() :]):
            # The options of the reference example are the fields of a class.
            is_field = script.parent.name == "examples" and option.replace("-", "_") in source
            assert f"--{option}" in source or is_field, f"--{option} in {command}"


@cache
def messages():
    """All string literals of the package, with ``\\0`` for inserted values."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [x.value if isinstance(x, ast.Constant) else "\0" for x in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[\d.]*[sdrgf]", "\0", node.value))
    return "\n".join(found)


def quoted_messages():
    pages = [ROOT / f"docs/{name}.md" for name in ("troubleshooting", "several_machines")]
    text = "".join(page.read_text() for page in pages)
    blocks = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    table = re.findall(r"^\| `([a-z][^`]* [^`]*)` \|", text, re.MULTILINE)
    return [" ".join(text.split()) for text in [*blocks, *table]]


@pytest.mark.parametrize("message", quoted_messages(), ids=lambda text: text[:40].replace(" ", "_"))
def test_quoted_messages_exist(message):
    for part in filter(None, map(str.strip, message.split("..."))):
        assert part in messages(), part


@pytest.mark.parametrize(
    "page", [ROOT / "projects/LocReweightTeacher/README.md", ROOT / "docs/troubleshooting.md"]
)
def test_metric_names_exist(page):
    prefixes = "pseudo_labels|proposals|data"
    names = re.findall(rf"`((?:{prefixes})/[a-z_]+)`", page.read_text())
    assert names
    for name in {*names, "skipped_steps", "loss_scale", "data_time"}:
        assert name in messages(), name


def test_all_files_have_the_version_of_the_changelog():
    (version,) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[:1]
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["version"] == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


def result_rows():
    with (ROOT / "docs/results.csv").open() as file:
        return list(csv.DictReader(file))


def test_results_have_one_row_per_run():
    rows = result_rows()
    keys = ("config", "labeled images", "method", "changes", "seed", "iterations", "burn-in")
    runs = [tuple(row[key] for key in keys) for row in rows]
    assert len(set(runs)) == len(runs) > 50
    for row in rows:
        assert (ROOT / f"configs/{row['config']}.yaml").is_file()
        assert (METHODS_FOLDER / f"{row['method']}.yaml").is_file()


LARGER_IMAGES = (
    "INPUT.MIN_SIZE_TRAIN (192, 256) INPUT.MAX_SIZE_TRAIN 384 "
    "INPUT.MIN_SIZE_TEST 224 INPUT.MAX_SIZE_TEST 384"
)


def test_means_in_the_results_are_those_of_the_rows():
    rows = result_rows()
    text = "\n".join((ROOT / f"docs/{page}.md").read_text() for page in ("results", "ablations"))
    # Supervised runs have an empty burn-in.
    for config, labeled, iterations, burn_in, heading, column in (
        ("quickstart", "40", "800", ("300", ""), "## Synthetic data set", 4),
        ("bccd-small", "20", "600", ("300", ""), "## Blood cells (BCCD)", 4),
        ("bccd-mobilenetv2", "10", "700", ("300",), "### Five percent of the labels", 4),
        ("bccd-mobilenetv2", "10", "2000", ("300",), "### Longer training", 6),
        ("bccd-mobilenetv2", "20", "700", ("300", ""), "## Ten percent of the labels, one seed", 3),
        ("bccd-mobilenetv2", "20", "1000", ("500",), "### Ten percent of the labels", 4),
        ("bccd-mobilenetv2", "20", "1000", ("500",), "### Larger images", 4),
        ("neu-mobilenetv2", "62", "2250", ("1500",), "### Steel defects (NEU)", 4),
        ("neu-mobilenetv2", "123", "2250", ("1500",), "### NEU, ten percent of the labels", 4),
    ):
        section = text.split(f"\n{heading}\n")[1]
        changes = LARGER_IMAGES if heading == "### Larger images" else ""
        wanted = (config, labeled, iterations, changes)
        keys = ("config", "labeled images", "iterations", "changes")
        group = [row for row in rows if tuple(row[key] for key in keys) == wanted]
        group = [row for row in group if row["burn-in"] in burn_in]
        assert group
        for method in {row["method"] for row in group}:
            values = [float(row["AP"]) for row in group if row["method"] == method]
            line = next(x for x in section.splitlines() if f"| `{method}` |" in x)
            mean = float(line.split("|")[column].strip(" *").split(" ± ")[0])
            assert mean == pytest.approx(sum(values) / len(values), abs=0.011)


def test_overview_of_the_results_has_the_means_of_the_rows():
    rows = result_rows()
    text = (ROOT / "docs/results.md").read_text()
    table = text.split("| labeled images |")[1].split("\n\n")[0]
    columns = (
        ("quickstart", "40", "800", "300", ""),
        ("bccd-small", "20", "600", "300", ""),
        ("bccd-mobilenetv2", "10", "700", "300", ""),
        ("bccd-mobilenetv2", "20", "1000", "500", ""),
        ("bccd-mobilenetv2", "20", "1000", "500", LARGER_IMAGES),
        ("neu-mobilenetv2", "62", "2250", "1500", ""),
        ("neu-mobilenetv2", "123", "2250", "1500", ""),
    )
    no_voting = "MODEL.ROI_BOX_HEAD.VOTING_SIGMA 0.0"
    keys = ("config", "labeled images", "iterations", "burn-in", "changes", "method")
    for name, method, voting in (
        ("**LER mix**", "loc_reweight_mix", ""),
        ("LER mix, no voting", "loc_reweight_mix", no_voting),
        ("Unbiased Teacher v2", "unbiased_teacher_v2", ""),
        ("Unbiased Teacher", "unbiased_teacher", ""),
        ("MixPL", "mixpl", ""),
        ("Soft Teacher", "soft_teacher", ""),
        ("LER + PRC", "loc_reweight", ""),
        ("unweighted losses", "teacher_student", ""),
    ):
        line = next(x for x in table.splitlines() if x.startswith(f"| {name} |"))
        for column, cell in zip(columns, line.split("|")[2:-1], strict=True):
            wanted = (*column[:4], f"{column[4]} {voting}".strip(), method)
            values = [float(r["AP"]) for r in rows if tuple(r[key] for key in keys) == wanted]
            if values:
                mean = float(cell.replace("*", " ").replace("(", " ").split()[0])
                assert mean == pytest.approx(sum(values) / len(values), abs=0.011)
            else:
                assert not cell.strip()


def test_pooled_differences_are_those_of_the_rows():
    """One difference per data set and seed: the mean over both numbers of labels."""
    settings = {
        "BCCD": [
            ("bccd-mobilenetv2", "10", "700", "300"),
            ("bccd-mobilenetv2", "20", "1000", "500"),
        ],
        "NEU": [
            ("neu-mobilenetv2", "62", "2250", "1500"),
            ("neu-mobilenetv2", "123", "2250", "1500"),
        ],
    }
    methods = {
        "LER + PRC": "loc_reweight",
        "LER": "ablation/ler",
        "PRC": "ablation/prc",
        "mean weights": "ablation/mean",
        "shuffled weights": "ablation/shuffled",
        "EMA without pseudo-labels": "ablation/ema",
        "unweighted losses": "teacher_student",
        "Soft Teacher": "soft_teacher",
        "Unbiased Teacher": "unbiased_teacher",
        "Unbiased Teacher v2": "unbiased_teacher_v2",
        "MixPL": "mixpl",
        "LER mix": "loc_reweight_mix",
    }
    keys = ("config", "labeled images", "iterations", "burn-in", "seed", "method", "changes")
    results = {tuple(row[key] for key in keys): float(row["AP"]) for row in result_rows()}
    section = (ROOT / "docs/results.md").read_text().split("\n### All pretrained comparisons")[1]
    table = section.split("| difference |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) >= 15
    for line in table:
        name, mean, interval, p, bccd, neu = (cell.strip() for cell in line.split("|")[1:-1])
        first, second = (methods[x.removesuffix(", no voting")] for x in name.split(" - "))
        changes = "MODEL.ROI_BOX_HEAD.VOTING_SIGMA 0.0" if "no voting" in name else ""
        values = [
            np.mean(
                [
                    results[(*setting, seed, first, changes)]
                    - results[(*setting, seed, second, "")]
                    for setting in pair
                ]
            )
            for pair in settings.values()
            for seed in "123"
        ]
        shown = [float(x) for x in f"{bccd}, {neu}".split(", ")]
        assert shown == pytest.approx(values, abs=0.051)
        expected = ttest_1samp(values, 0)
        assert float(mean) == pytest.approx(np.mean(values), abs=0.006)
        low, high = (float(x) for x in interval.split(" to "))
        assert (low, high) == pytest.approx(tuple(expected.confidence_interval()), abs=0.051)
        if p.startswith("< "):
            assert expected.pvalue < float(p[2:])
        else:
            assert float(p) == pytest.approx(expected.pvalue, abs=0.51 * 10 ** (2 - len(p)))
