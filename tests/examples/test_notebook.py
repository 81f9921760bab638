"""The notebook from a folder to predictions runs, with few images and iterations."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples/folder_to_predictions.ipynb"


def test_notebook_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings = next(cell for cell in notebook.cells if "ITERATIONS = 400" in cell.source)
    replacements = {
        'Path("datasets/notebook")': f"Path({str(tmp_path / 'data')!r})",
        'Path("output/notebook")': f"Path({str(tmp_path / 'out')!r})",
        "ITERATIONS = 400": "ITERATIONS = 4",
        "--labeled 40 --unlabeled 500 --val 200": "--labeled 8 --unlabeled 8 --val 4",
    }
    for text, other in replacements.items():
        assert text in settings.source
        settings.source = settings.source.replace(text, other)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": ROOT}}).execute()
    pictures = sorted(file.name for file in (tmp_path / "out/pictures").iterdir())
    assert pictures == [f"{i:06d}.jpg" for i in range(4)]
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert any("final teacher" in output.get("text", "") for output in shown)
