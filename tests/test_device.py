"""Devices: names, generators, replicas."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import smlstm.learning.device as device
from smlstm.learning.device import (
    DeviceError,
    Replicas,
    all_sum,
    autocast,
    get_rng_state,
    launch,
    pick_device,
    replicas,
    seed_everything,
    set_rng_state,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["", "gpu", "tpu3", "cuda:x", "CPU:"])
def test_unknown_names_are_refused(name):
    with pytest.raises(DeviceError, match="use 'auto'"):
        pick_device(name)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "xpu"])
def test_devices_that_are_not_there_are_refused(name):
    with pytest.raises(DeviceError, match="is not there"):
        pick_device(name)


def test_xla_is_refused_without_torch_xla(monkeypatch):
    monkeypatch.setattr(device, "xla_hardware", lambda: None)
    with pytest.raises(DeviceError, match="needs torch_xla"):
        pick_device("xla")


def test_auto_never_takes_xla_on_a_cpu(monkeypatch):
    monkeypatch.setattr(device, "xla_hardware", lambda: "CPU")
    assert pick_device("auto").type != "xla"


def test_every_generator_is_seeded_saved_and_put_back():
    def draws():
        return [torch.randn(3).tolist(), np.random.randn(3).tolist(), random.random(), random.gauss(0, 1)]

    seed_everything(5, CPU)
    first = draws()
    seed_everything(5, CPU)
    assert draws() == first
    state = get_rng_state(CPU)
    assert all(not tensor.is_floating_point() for tensor in state.values())
    after = draws()
    draws()
    set_rng_state(state, CPU)
    assert draws() == after


def test_states_may_be_rows_of_a_larger_tensor():
    """Torch itself reads a view's state from the start of its storage, and may crash on it."""
    torch.manual_seed(1)
    state = get_rng_state(CPU)
    wanted = torch.rand(2)
    rows = {name: torch.stack([torch.zeros_like(value), value])[1] for name, value in state.items()}
    set_rng_state(rows, CPU)
    assert torch.equal(torch.rand(2), wanted)


def test_seeds_beyond_32_bits_are_taken():
    drawn = {}
    for seed in (2**40 + 1, 2**40 + 2, 2**40 + 1):
        seed_everything(seed, CPU)
        drawn.setdefault(seed, []).append((torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()))
    (first, again), (other,) = drawn.values()
    assert first == again and first[0] != other[0]


def test_other_precisions_are_refused():
    with pytest.raises(ValueError, match="float16"):
        autocast(CPU, "float16")


def who_am_i(folder):
    """Each replica writes its place and the sum of all ranks."""
    place = replicas(CPU)
    before = torch.tensor([float(place.rank)])
    total = all_sum(before)
    Path(folder, str(place.rank)).write_text(f"{place.world} {total.item()} {before.item()}")


def test_launch_runs_once_per_process(tmp_path):
    launch(who_am_i, tmp_path, device="cpu", processes=2)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["2 1.0 0.0", "2 1.0 1.0"]
    assert replicas(CPU) == Replicas(0, 1)


def test_launch_joins_what_torchrun_started(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom smlstm.learning.device import launch\nfrom test_device import who_am_i\n"
        "launch(who_am_i, sys.argv[1], device='cpu')\n"
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
    }
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path],
        env=environment,
        check=True,
        timeout=300,
    )
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["2 1.0 0.0", "2 1.0 1.0"]
