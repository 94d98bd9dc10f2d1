"""What a reader relies on: badges, short cells, imports that run downhill, commented parameters, short commands."""

import ast
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(
    path for path in NBS.rglob("*.ipynb") if not any(part[0] in "_." for part in path.relative_to(NBS).parts)
)
NUMBERED = [path for path in NOTEBOOKS if path.name[0].isdigit() and path.parent != NBS]  # those that make a module
PICTURED = ("model", "data", "learning", "judging")  # Parts I to IV
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
    "Name of the module that a notebook generates, inside the package: `model.memory`."
    return f"{path.parent.name}.{path.stem.partition('_')[2]}"


def number(path):
    "Where a notebook comes in the order, as text that sorts: 06a, 06b, then 06 itself."
    text = path.stem.partition("_")[0]
    return f"{text}z" if text.isdigit() else text


def test_there_are_notebooks():
    assert len(NUMBERED) >= 15
    assert [path.stem for path in NUMBERED if not re.fullmatch(r"\d\d[a-z]?", number(path))] == []


@every
def test_opens_in_colab(path):
    first = cells(path, "markdown")[0].split("\n\n")
    assert re.fullmatch(r"# [^\n]+", first[0]) and re.fullmatch(r"> [^\n]+", first[1])
    assert first[2] == BADGE.format(path.relative_to(NBS))
    assert sum("colab-badge" in source for source in cells(path, "markdown")) == 1


@every
def test_installs_itself_once(path):
    installs = [source for source in cells(path) if re.search(r"pip install", source) and "google.colab" in source]
    assert installs == [INSTALL] and cells(path)[0] == INSTALL


@numbered
def test_names_its_module(path):
    assert [
        source
        for source in cells(path)
        if re.search(rf"^#\|\s*default_exp {re.escape(module(path))}$", source, re.MULTILINE)
    ]


@numbered
def test_exported_cells_are_short(path):
    lengths = {
        source: len([line for line in source.splitlines() if not line.startswith("#|")])
        for source in cells(path)
        if exported(source)
    }
    assert not {source[:80]: n for source, n in lengths.items() if n > 40}


def imported(source):
    "Modules of smlstm that a cell imports, wherever in it the import stands."
    python = "\n".join(re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in source.splitlines())
    for node in ast.walk(ast.parse(python)):
        names = (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        for name in names:
            if isinstance(node, ast.ImportFrom) and name:
                yield from (
                    f"{name}.{alias.name}".removeprefix("smlstm.")
                    for alias in node.names
                    if name.count(".") < 2 and name.startswith("smlstm.")
                )
            if name and name.startswith("smlstm."):
                yield name.removeprefix("smlstm.")


def uphill(limit, sources, numbers):
    "Imports that a notebook of this number must not make."
    return {name for source in sources for name in imported(source) if numbers.get(name, "") >= limit}


@numbered
def test_imports_run_downhill(path):
    numbers = {module(other): number(other) for other in NUMBERED}
    assert not uphill(number(path), cells(path), numbers)


def defined(source):
    "Names of functions and classes at the top of a module; a patched method with its class."
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            patched = any("patch" in ast.unparse(d) for d in node.decorator_list)
            yield f"{ast.unparse(node.args.args[0].annotation)}.{node.name}" if patched else node.name


@numbered
def test_no_name_is_defined_twice(path):
    names = list(defined((ROOT / "smlstm" / f"{module(path).replace('.', '/')}.py").read_text(encoding="utf-8")))
    assert [name for name in set(names) if names.count(name) > 1] == []


def test_a_second_definition_is_found():
    source = (
        "def f(x): 1\ndef g(): 2\nclass f: pass\n@patch\ndef g(self: A): 3\n@patch(cls_method=True)\ndef g(cls: B): 4"
    )
    assert list(defined(source)) == ["f", "g", "f", "A.g", "B.g"]


def test_uphill_imports_are_found():
    numbers = {"model.memory": "02", "model.mixing": "02a"}
    climbing = [
        "from smlstm.model.mixing import Mixing",
        "import smlstm.model.mixing",
        "def f():\n    from smlstm.model import mixing",
        "%pip x\nfrom smlstm.model.memory import recurrent",
    ]
    assert [uphill("02a", [source], numbers) for source in climbing] == [
        {"model.mixing"},
        {"model.mixing"},
        {"model.mixing"},
        set(),
    ]


PICTURES = {"image/png", "image/svg+xml"}


def figures(notebook):
    "How many pictures the committed outputs of a notebook show."
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    return sum(bool(PICTURES & set(output.get("data", {}))) for output in outputs)


@pytest.mark.parametrize(
    "path", [path for path in NUMBERED if path.parent.name in PICTURED], ids=lambda path: path.stem
)
def test_shows_a_figure(path):
    "Every notebook of Parts I to IV has a figure that is visible without running it."
    assert figures(json.loads(path.read_text(encoding="utf-8"))) >= 1, "draw one, and run .ci/outputs"


def test_figures_are_counted():
    shown, told = ({"outputs": [{"data": {kind: ""}}]} for kind in ("image/png", "text/plain"))
    assert [figures({"cells": cells}) for cells in ([{"source": "x"}, told], [shown, told, shown])] == [0, 2]


@every
def test_leaves_torch_as_it_was(path):
    "nbdev_test runs several notebooks in one process: what one leaves as default, the next one starts with."
    set_to = re.findall(r"torch\.set_default_dtype\(([\w.]+)\)", "\n".join(cells(path)))
    assert not set_to or set_to[-1] in ("torch.float32", "torch.float"), (
        "end with a hidden cell: torch.set_default_dtype(torch.float32)"
    )


def test_train_has_typed_commented_parameters():
    path = ROOT / "nbs" / "train.ipynb"
    if not path.exists():
        pytest.skip("nbs/train.ipynb is not there yet")
    tagged = [
        cell
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if "parameters" in cell["metadata"].get("tags", [])
    ]
    assert len(tagged) == 1
    lines = [line for line in "".join(tagged[0]["source"]).splitlines() if line and not line.startswith("#")]
    assert (
        len(lines) >= 19
        and [line for line in lines if not re.fullmatch(r"\w+: (str|int|float|bool) = .+  # \S.*", line)] == []
    )


def test_train_parameters_are_those_of_the_main_flow():
    from smlstm.using.parameters import check_parameters
    from smlstm.using.run import DEFAULTS

    parameters = {}
    exec(next(source for source in cells(ROOT / "nbs" / "train.ipynb") if source.startswith("ticker: ")), parameters)
    del parameters["__builtins__"], parameters["__annotations__"]
    assert parameters == DEFAULTS
    assert check_parameters(**parameters) == parameters


def test_readme_has_both_commands_each_on_one_line():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("./setup.sh")] == [
        "./setup.sh && .venv/bin/papermill nbs/train.ipynb runs/SPY.ipynb -p ticker SPY",
        "./setup.sh && .venv/bin/nbdev_test && .venv/bin/pytest",
    ]


@pytest.fixture
def clone(tmp_path):
    "A folder with what the set-up reads, and a Python that only notes how it was called."
    for name in ("setup.sh", "settings.ini", "setup.py", "constraints.txt"):
        shutil.copy2(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(PRETENDED.format(calls=tmp_path / "calls"))
    python.chmod(0o755)
    return tmp_path


PRETENDED = """#!/bin/sh
echo "$*" >> {calls}
[ "$1 $2" != "-m venv" ] || {{ mkdir -p .venv/bin && cp "$0" .venv/bin/python; }}
"""


def set_up(clone):
    "Run the set-up, as from another folder; what the pretended Python was called with."
    (clone / "calls").unlink(missing_ok=True)
    command, chosen = [str(clone / "setup.sh")], {"PYTHON": str(clone / "python"), "PATH": "/usr/bin:/bin"}
    subprocess.run(command, cwd=ROOT.parent, env=chosen, check=True)
    return (clone / "calls").read_text().splitlines()[1:] if (clone / "calls").exists() else []


def test_the_set_up_is_made_once_and_again_when_its_sources_change(clone):
    made = ["-m venv .venv", "-m pip install --editable .[dev] --constraint constraints.txt"]
    assert set_up(clone) == made and (clone / "runs").is_dir()
    assert set_up(clone) == []
    later = (clone / ".venv" / "ready").stat().st_mtime + 5
    for name in ("settings.ini", "setup.py", "constraints.txt"):
        os.utime(clone / name, (later, later))
        assert set_up(clone) == made
        os.utime(clone / ".venv" / "ready", (later + 5, later + 5))
        assert set_up(clone) == []
        later += 10


def test_an_old_python_is_refused_by_name(clone):
    (clone / "python").write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.6 || exit 1\n')
    done = subprocess.run(
        [clone / "setup.sh"],
        env={"PYTHON": str(clone / "python"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "needs Python 3.10 to 3.13" in done.stderr and "Python 3.9.6" in done.stderr
    assert not (clone / ".venv").exists()


ANIMATED = r"\b(listen\w*|told|believ\w*|says|said|speaks?|whisper\w*|shout\w*)\b"


@every
def test_prose_names_things(path):
    "A heading names its object and asks nothing; equations, memories and models neither speak nor believe."
    prose = "\n".join(cells(path, "markdown"))
    assert [line for line in prose.splitlines() if re.match(r"#+ .*\?$", line)] == []
    assert re.findall(ANIMATED, re.sub(r"`[^`]*`", "", prose), re.IGNORECASE) == []
