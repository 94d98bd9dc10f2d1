"""What installing the library brings along, and what it leaves alone."""

import ast
import runpy
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
COLAB = {"numpy": "2.1.3", "pandas": "2.2.3", "scikit-learn": "1.6.1", "torch": "2.9.0+cpu", "torch-xla": "2.9.0", "accelerate": "1.14.0"}  # of its image for TPUs, on Python 3.13


def requirements(kind="requirements"):
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    wanted = [Requirement(text) for text in config["DEFAULT"][kind].split()]
    return {canonicalize_name(r.name): r for r in wanted if not r.marker}


def test_bounds_admit_what_colab_has():
    wanted = {**requirements(), **requirements("tpu_requirements")}
    assert [name for name, version in COLAB.items() if name in wanted and version not in wanted[name].specifier] == []
    assert {"torch", "torch-xla", "numpy", "pandas", "scikit-learn"} <= set(wanted)
    assert [str(r) for r in wanted.values() if any(bound.operator != ">=" for bound in r.specifier)] == []


def test_a_bound_that_does_not_admit_it_would_be_seen():
    assert COLAB["torch"] not in Requirement("torch>=2.10").specifier


def test_every_import_is_declared():
    owners, declared, imports = {"sklearn": ["scikit-learn"]} | packages_distributions(), requirements(), set()
    for path in (ROOT / "smlstm").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imports |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imports.add(node.module.split(".")[0])
    optional = {"torch_xla", "jax", "jaxlib", "libtpu", "lightgbm", "mlstm_kernels", "IPython", "ray", "dask", "distributed", "onnx", "onnxruntime"}  # IPython comes with ipykernel; the rest are the extras' and imported where they are
    foreign = imports - set(sys.stdlib_module_names) - optional - {"smlstm"}
    assert {name for name in foreign if not {canonicalize_name(o) for o in owners.get(name, [name])} & set(declared)} == set()
    assert {"torch", "numpy", "pandas"} <= foreign


def test_extras_are_what_settings_say(monkeypatch):
    "What setup.py tells setuptools, which here only listens: what is installed may be older than the settings."
    told = {}
    monkeypatch.setattr(setuptools, "setup", lambda **facts: told.update(facts))
    runpy.run_path(str(ROOT / "setup.py"))
    assert {"dev", "tpu", "preflight", "bench", "ray", "dask", "onnx"} <= set(told["extras_require"])
    for extra, wanted in told["extras_require"].items():
        assert {canonicalize_name(Requirement(text).name) for text in wanted} >= set(requirements(f"{extra}_requirements"))
    assert {"nbdev", "fastcore", "execnb", "pytest", "hypothesis"} <= set(requirements("dev_requirements"))


def test_the_set_up_stamp_is_ignored_by_git():
    ignored = subprocess.run(["git", "check-ignore", ".venv/ready", "runs/SPY/report.html"], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout.split() == [".venv/ready", "runs/SPY/report.html"]
