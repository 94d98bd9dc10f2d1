"""A replay of the install cell in Colab: pip on Python 3.13, beside the versions of its image for TPUs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from test_packaging import COLAB, ROOT


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


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    "What pip would install beside what Colab has: a function from requirements to names and versions."
    folder, python = tmp_path_factory.mktemp("colab"), python313() or pytest.skip("there is no Python 3.13 here")
    subprocess.run([python, "-m", "venv", folder], check=True)
    for name, version in COLAB.items():
        pretend(next(folder.glob("lib/python*/site-packages")), name, version)

    def plan(*wanted):
        subprocess.run(
            [folder / "bin" / "pip", "install", "-q", "--dry-run", "--report", folder / "report.json", *wanted],
            check=True,
        )
        report = json.loads((folder / "report.json").read_text())
        return {canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"] for item in report["install"]}

    return plan


def test_installing_changes_nothing_that_colab_has(colab):
    planned = colab(ROOT)
    assert "smlstm" in planned and "statsmodels" in planned
    assert set(planned) & set(COLAB) == set()


def test_a_change_to_what_colab_has_would_be_seen(colab):
    assert "numpy" in colab("numpy>2.1.3") and "numpy" not in colab("numpy>=2.1")
