"""What runs elsewhere: workflows that can be read, with actions of one major version, and hooks that fetch nothing."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yaml"))


def steps(path):
    "Every step of a workflow's jobs."
    return [step for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values() for step in job["steps"]]


def test_there_is_a_workflow_for_changes_nights_and_releases():
    assert {"ci", "nightly", "release"} <= {path.stem for path in WORKFLOWS}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_their_major_version(path):
    used = [step["uses"] for step in steps(path) if "uses" in step]
    assert used and [name for name in used if not re.fullmatch(r"[\w.-]+/[\w.-]+@(v\d+|release/v\d+)", name)] == []
    assert all(set(step) & {"run", "uses"} for step in steps(path))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_workflow_runs_exists(path):
    commands = " ".join(step.get("run", "") for step in steps(path))
    files = re.findall(r"(?:^|\s)(?:bash )?(\.ci/\w+|\./\w+\.sh)\b", commands)
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_ci_covers_the_pythons_that_the_library_promises():
    matrix = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yaml").read_text())["jobs"]["test"]["strategy"][
        "matrix"
    ]
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"] and matrix["os"] == ["ubuntu-latest"]
    assert {"macos-latest"} == {extra["os"] for extra in matrix["include"]}


def test_hooks_fetch_nothing():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {repository["repo"] for repository in config["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}
    assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks)
    assert {"ruff-check", "ruff-format", "nbdev-clean", "nbdev-export"} <= {hook["id"] for hook in hooks}


@pytest.mark.parametrize("name", [".ci/run", ".ci/xla", ".ci/package", "Makefile", "CONTRIBUTING.md"])
def test_files_that_a_script_names_exist(name):
    named = re.findall(
        r"\b(?:nbs|tests|\.ci)/[\w./]*\w\.(?:ipynb|py|json|png)\b", (ROOT / name).read_text(encoding="utf-8")
    )
    assert [file for file in named if not (ROOT / file).exists()] == []


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")
def test_make_gives_the_readme_commands_short_names():
    def steps(*target):
        done = subprocess.run(["make", "-n", *target], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    assert steps("test") == ["./setup.sh", ".venv/bin/nbdev_test", ".venv/bin/pytest"]
    flow = '.venv/bin/papermill nbs/train.ipynb "runs/QQQ.ipynb" -p ticker "QQQ" -p epochs 5'
    assert steps("train", "ticker=QQQ", "options=-p epochs 5") == ["./setup.sh", flow]
