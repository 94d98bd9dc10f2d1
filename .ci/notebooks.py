"""What the scripts beside this file do with a notebook: run it, keep what it shows, and leave out its housekeeping."""

import re
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
SKIPPED = {"eval: false", "slow", "notest"}  # as nbdev_test skips them


def directives(cell):
    return set(re.findall(r"^#\|\s*(.*?)\s*$", cell["source"], re.MULTILINE)) if cell["cell_type"] == "code" else set()


def is_run(cell):
    return not directives(cell) & SKIPPED


def installs(cell):
    "Whether a cell is the one that installs the library in Colab."
    return "google.colab" in cell["source"] and "%pip" in cell["source"]


def bare(source):
    "Code without directives."
    return re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip()


def is_widget(output):
    "Whether an output is a progress bar of Jupyter's, which only a running kernel can draw."
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def keep(cell):
    "The cell without what differs from run to run: counts, addresses in memory, progress bars and log lines."
    cell.metadata.pop("execution", None)
    if cell.cell_type != "code":
        return
    cell.execution_count = None
    cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr" and not is_widget(output)]
    for output in cell.outputs:
        if "execution_count" in output:
            output.execution_count = None
        data = output.get("data", {})
        if "text/html" in data or "text/markdown" in data or "image/png" in data:
            data.pop("text/plain", None)


def run(notebook, folder, timeout):
    "Fill in the outputs of the cells that nbdev_test runs; the others stay as they are."
    part = nbformat.v4.new_notebook(cells=[cell for cell in notebook.cells if is_run(cell)], metadata=notebook.metadata)
    ExecutePreprocessor(timeout=timeout).preprocess(part, {"metadata": {"path": folder}})
    for cell in part.cells:
        keep(cell)
    notebook.metadata.pop("widgets", None)
