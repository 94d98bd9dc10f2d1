"""The script that keeps what notebooks show, and the site's view of a notebook."""

import re
import subprocess
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


def test_progress_bars_are_not_kept(page):
    "A bar of Jupyter's is drawn by a running kernel; where there is none its text stays at 0%."
    outputs, path = page
    notebook = nbformat.read(path, as_version=4)
    bar = '{"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "0%"}'
    notebook.cells[1].source = f"display({bar}, raw=True)\n1 + 1"
    notebook.metadata["widgets"] = {}
    nbformat.write(notebook, path)
    outputs.execute(path)
    notebook = nbformat.read(path, as_version=4)
    assert [output.data for output in notebook.cells[1].outputs] == [{"text/plain": "2"}]
    assert "widgets" not in notebook.metadata
    committed = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "nbs").rglob("*.ipynb")}
    assert [name for name, text in committed.items() if "jupyter.widget" in text] == []


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


def test_the_site_shows_markdown_that_a_cell_writes_as_text():
    "Inside an output a table stays source text, a heading joins no contents and a link to a notebook leads nowhere."
    site = script("site")
    table = ["| a |\n", "| --- |\n", "| [b](other.ipynb) |"]
    outputs = [
        {"output_type": "display_data", "data": {"text/markdown": text}, "metadata": {}} for text in ("# H", table)
    ]
    cell = {"cell_type": "code", "source": "#| echo: false\nx", "metadata": {}, "outputs": outputs}
    text = site.shown(dict(cell), site.NBS / "index.ipynb")
    assert text["cell_type"] == "markdown" and text["source"] == "# H\n\n| a |\n| --- |\n| [b](other.ipynb) |"
    figure = {"output_type": "display_data", "data": {"image/png": ""}, "metadata": {}}
    kept = site.shown(dict(cell, outputs=[figure], metadata={}), site.NBS / "index.ipynb")
    assert kept["cell_type"] == "code" and kept["metadata"]["tags"] == ["remove-input"]


def test_the_site_loads_nothing_from_a_network(tmp_path):
    pytest.importorskip("myst_nb")
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABh6FO1AAAAABJRU5ErkJggg=="
    figure = nbformat.v4.new_output("display_data", {"image/png": dot})
    cells = [nbformat.v4.new_markdown_cell("# Index\n\n$x^2$\n\nOne dot:")]
    cells += [nbformat.v4.new_code_cell("x = 1", outputs=[figure])]
    widgets = {
        "language_info": {"name": "python"},
        "widgets": {"application/vnd.jupyter.widget-state+json": {"state": {"1": {"model_name": "Bar"}}}},
    }
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=widgets), tmp_path / "index.ipynb")
    build = [sys.executable, "-m", "sphinx", "-q", "-c", str(ROOT / "site"), str(tmp_path), str(tmp_path / "html")]
    assert subprocess.run(build, cwd=ROOT).returncode == 0
    page = (tmp_path / "html" / "index.html").read_text(encoding="utf-8")
    assert 'alt="One dot:"' in page
    assert "mathjax" in page and re.findall(r"""<(?:script|link)[^>]*(?:src|href)=["']https?://""", page) == []


def test_the_reference_holds_every_public_name(tmp_path):
    import smlstm

    assert sys.modules["smlstm"] is smlstm
    pages = script("site").write_reference(tmp_path / "api")
    text = "".join((tmp_path / f"{page}.md").read_text() for page in pages)
    names = [name for name in dir(smlstm) if name[0] != "_" and hasattr(smlstm, name)]
    public = [name for name in names if getattr(getattr(smlstm, name), "__module__", "").startswith("smlstm.")]
    assert len(public) > 30 and all(f"## {name}\n" in text for name in public)


def test_the_reference_shows_comments_of_inherited_fields(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "site"))
    import sphinx_pages

    import smlstm

    assert sphinx_pages.comments_of(smlstm.SMLSTMConfig)["theta"] == "floor of the normalizer"
    lines = ["Docstring."]
    sphinx_pages.add_arguments(None, "class", "Forecaster", smlstm.Forecaster, None, lines)
    assert ":param device: where it is trained" in lines
    assert sphinx_pages.comments_of(smlstm.Mixing)["C"] == "[N] c"
    assert sphinx_pages.skip_fields(None, "class", "C", smlstm.Mixing.C, False, None)
