"""The examples run as they stand."""

import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from pudnet import PredictedNetwork

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_own_images(tmp_path):
    """Without images of one's own: five classes of digits, through the shipped model."""
    command = [sys.executable, str(EXAMPLES / "own_images.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent, check=True)
    assert "digit 0, digit 1, digit 2, digit 3, digit 4" in done.stdout
    right = float(done.stdout.split(" % right")[0].split()[-1])
    assert right > 70
    for name in ("filters.png", "confusion.png"):
        assert min(Image.open(tmp_path / name).size) > 200
    assert (
        PredictedNetwork.load(tmp_path / "weights.safetensors").card.provenance["support_images"] == 100
    )  # all there are


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)


def test_the_notebook_is_the_script_with_what_it_shows(notebook):
    script = jupytext.read(EXAMPLES / "quickstart.py")
    cells = [[(cell.cell_type, cell.source) for cell in each.cells] for each in (notebook, script)]
    assert cells[0] == cells[1], "run `make notebook`"
    assert sum("image/png" in shown.get("data", ()) for shown in outputs(notebook)) == 4  # figures
    assert (EXAMPLES / "quickstart.ipynb").stat().st_size < 300_000


def test_the_notebook_runs(notebook, tmp_path):
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    said = "".join(shown.text for shown in outputs(notebook) if shown.output_type == "stream")
    right = {line.split(":")[0]: float(line.split(":")[1].split()[0]) for line in said.splitlines() if " % in" in line}
    assert right["predicted"] > 90 and right["trained"] > 85
    assert said.count("gives the same logits: True") == 2
    assert {file.name for file in (tmp_path / "example").iterdir()} == {"digits.safetensors", "digits.pt2"}


def outputs(notebook):
    return [shown for cell in notebook.cells for shown in cell.get("outputs", ())]
