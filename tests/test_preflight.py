"""Preflight: refusals without the tools, and with them (run .ci/xla) what the TPU compiler really says."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import papermill
import pytest
import torch
from torch import nn
from training_kit import Outputs

from smlstm.model.backends import XLA_STEPS
from smlstm.model.model import SMLSTM, SMLSTMConfig
from smlstm.using.compiler import (
    CHIPS,
    PINS,
    DoesNotFit,
    PreflightError,
    capture_program,
    compile_program,
    graph_size,
    installed_tools,
    load_program,
    xla_device,
)
from smlstm.using.preflight import (
    PROGRAMS,
    Report,
    check_fits,
    preflight,
    preflight_apart,
    report_text,
    run_request,
    training_programs,
    watched_figures,
)

ROOT = Path(__file__).resolve().parent.parent
TINY = SMLSTMConfig(n_features=3, hidden_size=8, n_heads=2, n_layers=1)
here = pytest.mark.skipif(
    installed_tools() != PINS or os.environ.get("PJRT_DEVICE", "CPU") != "CPU",
    reason="needs smlstm[preflight]: run .ci/xla",
)
elsewhere = pytest.mark.skipif(installed_tools() == PINS, reason="the tools are here")


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "smlstm.using.preflight", *arguments], capture_output=True, text=True, timeout=900
    )


# ---- without the tools


@elsewhere
def test_the_command_says_what_is_missing():
    done = command()
    assert (
        done.returncode == 1
        and "preflight needs" in done.stderr
        and "smlstm[preflight]" in done.stderr
        and "Traceback" not in done.stderr
    )


@elsewhere
def test_the_main_job_refuses_before_any_work(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="preflight needs"):
        papermill.execute_notebook(
            ROOT / "nbs/train.ipynb",
            tmp_path / "out.ipynb",
            {"preflight": True, "source": "sample", "output_dir": str(tmp_path / "runs")},
            progress_bar=False,
            cwd=tmp_path,
        )
    assert not (tmp_path / "runs").exists()


def test_pins_are_those_of_the_extra():
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert f"preflight_requirements = {' '.join(f'{name}=={version}' for name, version in PINS.items())}\n" in settings


def test_recorded_figures_are_of_these_versions():
    figures = json.loads((ROOT / "nbs/using/preflight.json").read_text(encoding="utf-8"))
    assert figures["versions"] == PINS and set(figures["recorded"]) == set(PROGRAMS)


@pytest.mark.parametrize(
    "wrong, text",
    [({"batch_size": 0}, "batch_size=0"), ({"seq_length": -1}, "seq_length=-1"), ({"chip": "v99"}, "chip='v99'")],
)
def test_refuses_impossible_questions(wrong, text):
    with pytest.raises(ValueError, match=text):
        preflight(TINY, **{"batch_size": 2, "seq_length": 8, **wrong})


# ---- what the compiler says


@pytest.fixture(scope="module")
def report():
    return preflight(TINY, 2, 8)


@here
def test_the_report_has_everything(report):
    assert report.fits and [p.name for p in report.programs] == [*PROGRAMS]
    for p in report.programs:
        assert (
            0 < p.hbm < 2**30
            and p.available == CHIPS["v5e"].hbm
            and p.flops > 0
            and p.bytes > 0
            and p.cycles > 0
            and p.graph > 50
        )
        assert len(p.costliest) == len(p.largest) == 10 and 0 < p.padding < 1 and p.emulated == {}
    assert report.program("gradient").cycles > report.program("optimizer").cycles
    assert (
        "fits" in report_text(report)
        and Report.from_dict(json.loads(json.dumps(report.to_dict()))).programs == report.programs
    )


@here
def test_cost_is_traced_to_modules_forward_and_backward(report):
    modules = {module for *_, module in report.program("gradient").costliest}
    assert {"cells.0", "cells.0 backward"} <= modules


@here
def test_the_same_question_has_the_same_answer(report):
    """The same compiled program; torch_xla writes a constant or two more or less in a process that has asked before."""
    again = preflight(TINY, 2, 8)
    assert [(p.cycles, p.hbm) for p in again.programs] == [(p.cycles, p.hbm) for p in report.programs]
    assert all(abs(p.graph / old.graph - 1) < 0.01 for p, old in zip(again.programs, report.programs))


@here
@pytest.mark.slow
def test_other_processes_say_the_same():
    assert watched_figures(preflight_apart(TINY, 2, 8)) == watched_figures(preflight_apart(TINY, 2, 8))


TORCH_XLA_FIRST = """
import torch_xla
from smlstm.using.preflight import SMLSTMConfig, preflight
report = preflight(SMLSTMConfig(n_features=3, hidden_size=8, n_layers=1), 2, 8)
print({module for *_, module in report.program("gradient").costliest})
"""


@here
def test_cost_is_traced_where_torch_xla_came_first():
    """It reads whether to keep names when it is imported, which may be before preflight is."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_IR_DEBUG", "XLA_HLO_DEBUG")}
    done = subprocess.run(
        [sys.executable, "-c", TORCH_XLA_FIRST],
        env=environment | {"PJRT_DEVICE": "CPU"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert "'cells.0'" in done.stdout and "'cells.0 backward'" in done.stdout, done.stdout + done.stderr[-3000:]


@here
@pytest.mark.slow
def test_a_host_without_memory_is_named():
    """The true process, in less than the compiler takes."""
    limited = ["bash", "-c", f'ulimit -v 7000000; exec {sys.executable} -m smlstm.using.preflight --request "$0"']
    request = {
        "model": asdict(SMLSTMConfig(n_heads=1, hidden_size=64)),
        "training": {},
        "batch_size": 64,
        "seq_length": 512,
        "chip": "v5e",
    }
    with pytest.raises(
        PreflightError,
        match="host ran out of memory while compiling .* batch_size=64, seq_length=512, "
        "hidden_size=64, n_heads=1, n_layers=2: ask for a smaller",
    ):
        run_request(limited, request)


@here
def test_the_model_asked_about_is_left_alone():
    model = SMLSTM(TINY)
    before = [p.clone() for p in model.parameters()]
    preflight(model, 1, 4, programs=("optimizer",))
    assert (
        all(p.device.type == "cpu" and torch.equal(p, old) for p, old in zip(model.parameters(), before))
        and model.training
    )


@here
@pytest.mark.parametrize("chip", CHIPS)
def test_memory_is_what_the_compiler_says(chip):
    """A product too large for any chip is refused, with the memory that CHIPS names."""
    large = torch.zeros(1, device=xla_device()).expand(200_000, 200_000) + torch.ones(200_000, device=xla_device())
    with pytest.raises(DoesNotFit) as refusal:
        compile_program(load_program(capture_program([large @ large, large @ large.T + large])), chip)
    assert refusal.value.available == CHIPS[chip].hbm < refusal.value.needed


class Wide(nn.Module):
    """A forecaster whose inner layer is far too wide."""

    def __init__(self):
        super().__init__()
        self.config, self.inner, self.heads = TINY, nn.Linear(TINY.n_features, 400_000), nn.Linear(400_000, 3)

    def forward(self, x, state=None):
        return Outputs(*self.heads(self.inner(x).tanh()).unbind(-1)), state


@here
def test_a_model_that_does_not_fit_is_refused():
    report = preflight(Wide(), 64, 256, programs=("gradient",))
    program = report.program("gradient")
    assert not program.fits and program.hbm > program.available == CHIPS["v5e"].hbm and program.largest[0][0] > 2**30
    with pytest.raises(PreflightError, match="batch_size=64 and seq_length=256"):
        check_fits(report)


@here
def test_the_graph_does_not_grow_with_the_length():
    config = SMLSTMConfig(n_features=3, hidden_size=8, n_heads=2, n_layers=1)
    programs = (training_programs(SMLSTM(config), 1, XLA_STEPS * times)["gradient"] for times in (1, 2, 4))
    once, loop, longer = (graph_size(str(load_program(program))) for program in programs)
    assert once < loop and longer <= 1.01 * loop, (once, loop, longer)


@here
def test_the_check_fails_when_figures_rise(tmp_path):
    """The whole command on the default step, against a record that is a tenth lower and one that is not."""
    figures = json.loads((ROOT / "nbs/using/preflight.json").read_text(encoding="utf-8"))
    figures["recorded"]["stream"]["cycles"] = int(figures["recorded"]["stream"]["cycles"] / 1.1)
    (tmp_path / "lower.json").write_text(json.dumps(figures))
    done = command("check", str(tmp_path / "lower.json"))
    assert done.returncode == 1 and "+10.0% <" in done.stderr and "record nbs/using/preflight.json" in done.stderr


@here
@pytest.mark.slow
def test_the_command_reports():
    done = command(
        "--n_features", "3", "--hidden_size", "8", "--n_layers", "1", "--batch_size", "2", "--seq_length", "8"
    )
    assert done.returncode == 0 and "v5e, batch 2, 8 steps: fits" in done.stdout, done.stderr
