"""The house rules that a reader relies on: badges, short cells, imports that only run downhill, commented parameters."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").glob("*.ipynb") if path.name[0] not in "_.")
NUMBERED = [path for path in NOTEBOOKS if path.name[0].isdigit()]
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/smlstm/smlstm/blob/main/nbs/{})"
INSTALL = """#| eval: false
import sys
if "google.colab" in sys.modules:
    %pip install -q "smlstm @ git+https://github.com/smlstm/smlstm\""""

every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
numbered = pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)


def cells(path, kind="code"):
    "Sources of a notebook's cells of one kind."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def exported(source):
    return re.match(r"(#\|.*\n)*#\|\s*exporti?\b", source)


def module(path):
    return path.stem[3:]


def test_there_are_notebooks():
    assert len(NUMBERED) >= 15


@every
def test_opens_in_colab(path):
    first = cells(path, "markdown")[0].split("\n\n")
    assert re.fullmatch(r"# [^\n]+", first[0]) and re.fullmatch(r"> [^\n]+", first[1])
    assert first[2] == BADGE.format(path.name)
    assert sum("colab-badge" in source for source in cells(path, "markdown")) == 1


@every
def test_installs_itself_once(path):
    installs = [source for source in cells(path) if re.search(r"pip install", source) and "google.colab" in source]
    assert installs == [INSTALL] and cells(path)[0] == INSTALL


@numbered
def test_names_its_module(path):
    assert [source for source in cells(path) if re.search(rf"^#\|\s*default_exp {module(path)}$", source, re.MULTILINE)]


@numbered
def test_exported_cells_are_short(path):
    lengths = {source: len([line for line in source.splitlines() if not line.startswith("#|")]) for source in cells(path) if exported(source)}
    assert not {source[:80]: n for source, n in lengths.items() if n > 40}


def imported(source):
    "Modules of smlstm that a cell imports, wherever in it the import stands."
    python = "\n".join(re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in source.splitlines())
    for node in ast.walk(ast.parse(python)):
        names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name == "smlstm":
                yield from (alias.name for alias in node.names)
            elif name and name.startswith("smlstm."):
                yield name.split(".")[1]


def uphill(number, sources, numbers):
    "Imports that a notebook of this number must not make."
    return {name for source in sources for name in imported(source) if numbers.get(name, 0) >= number}


@numbered
def test_imports_run_downhill(path):
    numbers = {module(other): int(other.stem[:2]) for other in NUMBERED}
    assert not uphill(int(path.stem[:2]), cells(path), numbers)


def defined(source):
    "Names of functions and classes at the top of a module; a patched method with its class."
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            patched = any("patch" in ast.unparse(d) for d in node.decorator_list)
            yield f"{ast.unparse(node.args.args[0].annotation)}.{node.name}" if patched else node.name


@numbered
def test_no_name_is_defined_twice(path):
    names = list(defined((ROOT / "smlstm" / f"{module(path)}.py").read_text(encoding="utf-8")))
    assert [name for name in set(names) if names.count(name) > 1] == []


def test_a_second_definition_is_found():
    source = "def f(x): 1\ndef g(): 2\nclass f: pass\n@patch\ndef g(self: A): 3\n@patch(cls_method=True)\ndef g(cls: B): 4"
    assert list(defined(source)) == ["f", "g", "f", "A.g", "B.g"]


def test_uphill_imports_are_found():
    numbers = {"memory": 2, "mixing": 5}
    climbing = ["from smlstm.mixing import Mixing", "import smlstm.mixing", "def f():\n    from smlstm import mixing", "%pip x\nfrom smlstm.memory import recurrent"]
    assert [uphill(3, [source], numbers) for source in climbing] == [{"mixing"}, {"mixing"}, {"mixing"}, set()]


@every
def test_leaves_torch_as_it_was(path):
    "nbdev_test runs several notebooks in one process: a default that one leaves behind is what the next one starts with."
    set_to = re.findall(r"torch\.set_default_dtype\(([\w.]+)\)", "\n".join(cells(path)))
    assert not set_to or set_to[-1] in ("torch.float32", "torch.float"), "end with a hidden cell: torch.set_default_dtype(torch.float32)"


def test_train_has_typed_commented_parameters():
    path = ROOT / "nbs" / "train.ipynb"
    if not path.exists():
        pytest.skip("nbs/train.ipynb is not there yet")
    tagged = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    lines = [line for line in "".join(tagged[0]["source"]).splitlines() if line and not line.startswith("#")]
    assert len(lines) >= 19 and [line for line in lines if not re.fullmatch(r"\w+: (str|int|float|bool) = .+  # \S.*", line)] == []


def test_train_parameters_are_the_checked_ones():
    from smlstm.report import check_parameters

    path = ROOT / "nbs" / "train.ipynb"
    if not path.exists():
        pytest.skip("nbs/train.ipynb is not there yet")
    parameters = {}
    exec(next(source for source in cells(path) if source.startswith("ticker: ")), parameters)
    del parameters["__builtins__"], parameters["__annotations__"]
    call = next(source for source in cells(path) if "check_parameters(" in source)
    checked = {keyword.arg for node in ast.walk(ast.parse(call)) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check_parameters" for keyword in node.keywords}
    assert checked == set(parameters)
    assert check_parameters(**parameters) == parameters


def test_readme_has_both_commands_each_on_one_line():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    train = [line for line in lines if line.endswith("papermill nbs/train.ipynb runs/SPY.ipynb -p ticker SPY")]
    test = [line for line in lines if line.endswith(".venv/bin/nbdev_test && .venv/bin/pytest")]
    assert len(train) == len(test) == 1
    set_up = train[0].split(" && mkdir ")[0]
    assert test[0].startswith(set_up) and "python3 -m venv .venv" in set_up
