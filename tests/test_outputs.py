"""The script that keeps what notebooks show, and the site's view of a notebook."""

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(name):
    "A script of .ci as a module; it imports what stands beside it."
    if str(ROOT / ".ci") not in sys.path:
        sys.path.append(str(ROOT / ".ci"))
    loader = SourceFileLoader(f"ci_{name}", str(ROOT / ".ci" / name))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def page(tmp_path, monkeypatch):
    "A notebook that shows 2, with a cell that must not run, and the script that runs it."
    code = [
        "import sys; print('noise', file=sys.stderr)",
        "1 + 1",
        "#| slow\nraise SystemExit",
        "#| eval: false\n1 / 0",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in code])
    nbformat.write(notebook, tmp_path / "page.ipynb")
    outputs = script("outputs")
    monkeypatch.setattr(outputs, "NBS", tmp_path)
    return outputs, tmp_path / "page.ipynb"


def test_outputs_are_kept_and_found_stale(page):
    outputs, path = page
    assert "no outputs" in outputs.fault(path)
    outputs.execute(path)
    notebook = nbformat.read(path, as_version=4)
    assert [[output.data["text/plain"] for output in cell.outputs] for cell in notebook.cells] == [[], ["2"], [], []]
    assert all(cell.execution_count is None for cell in notebook.cells) and outputs.fault(path) is None
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("Prose changes no output."))
    nbformat.write(notebook, path)
    assert outputs.fault(path) is None
    notebook.cells[2].source = "1 + 2"
    nbformat.write(notebook, path)
    assert "changed since" in outputs.fault(path)


def test_a_notebook_that_fails_is_left_as_it_was(page):
    outputs, path = page
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source = "1 / 0"
    nbformat.write(notebook, path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        outputs.execute(path)
    assert path.read_bytes() == before


def test_large_outputs_are_refused(page, monkeypatch):
    outputs, path = page
    outputs.execute(path)
    monkeypatch.setattr(outputs, "LARGEST", 100)
    assert "smaller" in outputs.fault(path)


def test_the_site_shows_no_housekeeping():
    site = script("site")
    cell = lambda source: {"cell_type": "code", "source": source, "metadata": {}, "outputs": []}
    page = site.NBS / "index.ipynb"
    assert site.shown(cell("#| hide\nx = 1"), page) is None
    assert site.shown(cell("#| export\nx = 1"), page)["source"] == "x = 1"
    text = {"cell_type": "markdown", "source": ["[a](../LICENSE)"], "metadata": {}}
    assert site.shown(text, page)["source"] == "[a](https://github.com/smlstm/smlstm/blob/main/LICENSE)"


def test_the_reference_holds_every_public_name(tmp_path):
    import smlstm

    assert sys.modules["smlstm"] is smlstm
    pages = script("site").write_reference(tmp_path / "api")
    text = "".join((tmp_path / f"{page}.md").read_text() for page in pages)
    names = [name for name in dir(smlstm) if name[0] != "_" and hasattr(smlstm, name)]
    public = [name for name in names if getattr(getattr(smlstm, name), "__module__", "").startswith("smlstm.")]
    assert len(public) > 30 and all(f"## {name}\n" in text for name in public)
