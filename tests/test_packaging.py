"""What installing the library brings along, and what it leaves alone."""

import ast
import json
import os
import runpy
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
COLAB = {"numpy": "2.1.3", "pandas": "2.2.3", "scikit-learn": "1.6.1", "torch": "2.9.0"}  # of its image for TPUs, on Python 3.13


def requirements(kind="requirements"):
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    wanted = [Requirement(text) for text in config["DEFAULT"][kind].split()]
    return {canonicalize_name(r.name): r for r in wanted if not r.marker}


def test_bounds_admit_what_colab_has():
    wanted = requirements()
    assert [name for name, version in COLAB.items() if version not in wanted[name].specifier] == []
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


def python313():
    "A Python 3.13 that starts, or None."
    versions = sorted(Path(os.environ.get("PYENV_ROOT", "none")).glob("versions/3.13*/bin/python3.13"))
    for candidate in [sys.executable, shutil.which("python3.13"), *versions]:
        asked = [candidate, "-c", "import sys, venv; print(*sys.version_info[:2])"]
        if candidate and subprocess.run(asked, capture_output=True, text=True).stdout.split() == ["3", "13"]:
            return candidate
    return None


def pretend(site, name, version):
    "An installed distribution that pip believes in: it plans by these files alone, and torch has gigabytes of others."
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text(f"{info.name}/METADATA,,\n{info.name}/INSTALLER,,\n{info.name}/RECORD,,\n")


@pytest.mark.slow
def test_installing_changes_nothing_that_colab_has(tmp_path):
    python = python313() or pytest.skip("there is no Python 3.13 here")
    subprocess.run([python, "-m", "venv", tmp_path / "colab"], check=True)
    pip, site = tmp_path / "colab" / "bin" / "pip", next((tmp_path / "colab").glob("lib/python*/site-packages"))
    for name, version in COLAB.items():
        pretend(site, name, version)
    subprocess.run([pip, "install", "-q", "--dry-run", "--report", tmp_path / "report.json", ROOT], check=True)
    planned = {canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"] for item in json.loads((tmp_path / "report.json").read_text())["install"]}
    assert "smlstm" in planned and "statsmodels" in planned
    assert set(planned) & set(COLAB) == set()
