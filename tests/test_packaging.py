"""What installing the library brings along, and what it leaves alone."""

import ast
import re
import runpy
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
COLAB = {
    "numpy": "2.1.3",
    "pandas": "2.2.3",
    "scikit-learn": "1.6.1",
    "torch": "2.9.0+cpu",
    "torch-xla": "2.9.0",
    "accelerate": "1.14.0",
}  # of its image for TPUs, on Python 3.13


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
    for path in (ROOT / "smlstm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imports |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imports.add(node.module.split(".")[0])
    optional = {
        "torch_xla",
        "jax",
        "jaxlib",
        "libtpu",
        "lightgbm",
        "mlstm_kernels",
        "IPython",
        "ray",
        "dask",
        "distributed",
        "onnx",
        "onnxruntime",
        "papermill",
        "chronos",
        "timesfm",
        "tirex",
        "optuna",
    }  # IPython comes with ipykernel, foundation models from their makers; the rest are the extras'
    foreign = imports - set(sys.stdlib_module_names) - optional - {"smlstm"}
    assert {
        name for name in foreign if not {canonicalize_name(o) for o in owners.get(name, [name])} & set(declared)
    } == set()
    assert {"torch", "numpy", "pandas"} <= foreign


def facts_for_setuptools():
    "What setup.py gives to setuptools, which does nothing here: what is installed may be older than the settings."
    facts = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **given: facts.update(given))
        runpy.run_path(str(ROOT / "setup.py"))
    return facts


def test_extras_are_those_of_the_settings():
    facts = facts_for_setuptools()
    assert {"dev", "notebooks", "tpu", "preflight", "bench", "ray", "dask", "onnx"} <= set(facts["extras_require"])
    for extra, wanted in facts["extras_require"].items():
        assert {canonicalize_name(Requirement(text).name) for text in wanted} >= set(
            requirements(f"{extra}_requirements")
        )
    assert {"nbdev", "fastcore", "execnb", "pytest", "hypothesis"} <= set(requirements("dev_requirements"))


def test_the_set_up_stamp_is_ignored_by_git():
    ignored = subprocess.run(
        ["git", "check-ignore", ".venv/ready", "runs/SPY/report.html"], cwd=ROOT, capture_output=True, text=True
    )
    assert ignored.stdout.split() == [".venv/ready", "runs/SPY/report.html"]


def test_every_place_has_the_version():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    version = config["DEFAULT"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    assert re.search(
        rf"^## {re.escape(version)}( |$)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert f'__version__ = "{version}"' in (ROOT / "smlstm" / "__init__.py").read_text(encoding="utf-8")


def test_archives_hold_what_the_set_up_reads():
    manifest = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    assert {"settings.ini", "README.md", "LICENSE", "nbs/train.ipynb"} <= set(manifest.split())
    assert [
        name for name in re.findall(r"include (.*)", manifest) for name in name.split() if not (ROOT / name).exists()
    ] == []


def test_notebook_tools_are_an_extra_that_developers_have():
    tools = {"jupyterlab", "papermill", "ipykernel", "ipywidgets"}
    assert tools <= set(requirements("notebooks_requirements")) and not tools & set(requirements())
    assert tools <= {
        canonicalize_name(Requirement(text).name) for text in facts_for_setuptools()["extras_require"]["dev"]
    }


def test_links_work_where_the_package_is_shown():
    page, url = facts_for_setuptools()["long_description"], "https://github.com/smlstm/smlstm"
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", page) == []
    assert f"]({url}/blob/main/nbs/train.ipynb)" in page
    assert f"]({url}/raw/main/nbs/images/regimes.png)" in page and page.count("/raw/") == page.count("![") - page.count(
        "[!["
    )
