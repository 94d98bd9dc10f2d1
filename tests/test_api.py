"""What `import smlstm` offers and what it costs: every public name, in milliseconds, without torch."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import smlstm

ROOT = Path(__file__).resolve().parent.parent
NAMES = {name: module for module, names in smlstm._EXPORTS.items() for name in names}
PUBLISHED = {  # of the model's description and of the published sources: outside checks call them
    *(
        "recurrent",
        "chunkwise",
        "cumulative",
        "Mixing",
        "mixed_chunkwise",
        "mixed_recurrent",
        "MemoryState",
        "MixedState",
    ),
    *("ParallelSMLSTMCell", "StructuredStateSpace", "stabilize_gates", "AsymmetricDirectionalLoss", "MetaNetwork"),
    *("safe_fetch", "fetch_chunk", "get_stock_data", "merge_datasets", "prepare_data", "add_technical_indicators"),
    *("create_sequences", "create_tpu_dataloader", "lr_schedule"),
    *("Forecaster", "load_prices", "SMLSTM", "SMLSTMConfig", "audit_causality", "run"),
}


def in_a_process(code):
    "What this code prints as JSON, in a new interpreter."
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_public_name_is_that_of_its_module(name):
    assert getattr(smlstm, name) is getattr(importlib.import_module(f"smlstm.{NAMES[name]}"), name)


def test_what_outside_checks_call_is_there():
    assert PUBLISHED - set(NAMES) == set()
    assert set(NAMES) | {"__version__"} == set(smlstm.__all__) <= set(dir(smlstm))


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "smlstm" / "__init__.py").read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {(alias.name, alias.asname): node.module for node in checked.body for alias in node.names}
    assert seen == {(name, name): module for name, module in NAMES.items()}


def test_every_exported_name_has_one_place():
    names = [name for module in smlstm._EXPORTS.values() for name in module]
    assert sorted(names) == sorted(set(names))
    assert {path.stem for path in (ROOT / "smlstm").iterdir()} & set(names) == set()  # a sub-package would hide it


def test_a_misspelled_name_is_refused():
    with pytest.raises(AttributeError, match="'smlstm' has no attribute 'Forcaster'"):
        smlstm.Forcaster  # noqa: B018


def test_importing_the_package_is_cheap():
    code = "import sys, time; began = time.process_time(); import smlstm; spent = time.process_time() - began\n"
    code += "import json; print(json.dumps([spent, sorted({name.partition('.')[0] for name in sys.modules})]))"
    spent, loaded = min(in_a_process(code) for _ in range(3))
    assert spent < 0.05
    assert {"torch", "numpy", "pandas"} & set(loaded) == set()


def test_a_name_is_imported_when_it_is_asked_for():
    code = "import sys, json, smlstm; before = 'numpy' in sys.modules; smlstm.add_technical_indicators\n"
    code += "print(json.dumps([before, 'numpy' in sys.modules, 'add_technical_indicators' in vars(smlstm)]))"
    assert in_a_process(code) == [False, True, True]
