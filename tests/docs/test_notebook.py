"""The notebook: what it keeps is the output of these very cells, and it runs top to bottom (extra docs)."""

import json
import re

import pytest

from benchmarks.numbers import ROOT

NOTEBOOK = ROOT / "notebooks" / "specformer_colab.ipynb"


def texts(notebook) -> str:
    """Everything that the code cells printed or showed, pictures left out."""
    found = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            found += [output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")]
    return "\n".join("".join(text) for text in found)


def kappas(notebook) -> list[float]:
    """Of the tiny head on answers it was not trained on, at k = 1 and 2."""
    line = re.search(r"kappa on new answers.*", texts(notebook))[0]
    return [float(value) for value in re.findall(r"(\d\.\d+) at k", line)]


def test_the_kept_outputs_are_whole_and_name_no_machine():
    notebook = json.loads(NOTEBOOK.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "keep the outputs of one run"
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"]) == 3
    assert not re.search(r"/(home|root|tmp|usr|work|Users)/", texts(notebook))
    assert min(kappas(notebook)) > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own libraries
def test_it_runs_top_to_bottom(builtin_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources).execute()
    assert min(kappas(notebook)) > 1.05
