"""The memory's C++: found, compiled once, shared between processes, and done without where it cannot be had."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from smlstm import memory, mixing
from smlstm.memory import chunkwise, library, random_inputs, read_chunks
from smlstm.mixing import Mixing, mixed_chunks, mixed_chunkwise, mixed_recurrent, random_mixing

needs_compiler = pytest.mark.skipif(not memory.compiler(), reason="no C++ compiler")

SAY = """
import warnings, torch
from smlstm.memory import MEMORY, chunkwise, library, random_inputs
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2): h, _ = chunkwise(*random_inputs(1, 1, 40, 4))
print(library(MEMORY, "double") is not None, [str(w.message)[:60] for w in said if "C++" in str(w.message) or "compiled" in str(w.message)], h.double().sum().item())
"""


def fresh(tmp_path, **env):
    "What a new process with an empty cache says."
    whole = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"} | env
    done = subprocess.run([sys.executable, "-c", SAY], capture_output=True, text=True, env=whole)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def uncached():
    library.cache_clear()
    yield
    library.cache_clear()


@needs_compiler
def test_the_kernel_is_used_where_there_is_a_compiler():
    assert library(memory.MEMORY, "double") and library(mixing.MIXING, "float")


@needs_compiler
def test_the_same_numbers_with_and_without_a_compiler(tmp_path):
    with_one, without = fresh(tmp_path), fresh(tmp_path, CXX="")
    assert with_one.startswith("True []") and without.startswith("False []")
    assert abs(float(with_one.split()[-1]) - float(without.split()[-1])) < 1e-10


def test_a_missing_compiler_is_said_once(tmp_path):
    assert fresh(tmp_path, CXX="no-such-compiler").startswith("False ['no C++ compiler found")


def test_a_compiler_that_fails_is_said_once_and_leaves_nothing(tmp_path):
    said = fresh(tmp_path, CXX="false")
    assert said.startswith("False") and said.count("could not be compiled") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@needs_compiler
def test_a_damaged_library_is_made_again(tmp_path, monkeypatch, uncached):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = memory.compiled(memory.MEMORY, "double", memory.compiler())
    path.write_bytes(b"torn")
    assert library(memory.MEMORY, "double") is not None


@needs_compiler
def test_many_processes_compile_at_once(tmp_path):
    with ThreadPoolExecutor(4) as pool: said = list(pool.map(lambda _: fresh(tmp_path), range(4)))
    assert len(set(said)) == 1 and said[0].startswith("True []")
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


@needs_compiler
@pytest.mark.parametrize("seed", range(12))
def test_random_sizes(seed):
    g = torch.Generator().manual_seed(seed)
    pick = lambda low, high: int(torch.randint(low, high, (1,), generator=g))
    B, H, T, d, R, N = pick(1, 4), pick(1, 4), pick(1, 150), pick(1, 40), pick(1, 20), pick(1, 20)
    left, right = (("diagonal", None), (None, None), ("full", "full"), ("diagonal", "full"))[seed % 4]
    inputs, mix = random_inputs(B, H, T, d, seed=seed), random_mixing(B, H, T, d, R, N, left=left, right=right, seed=seed)
    leaves = [x.requires_grad_() for x in (*inputs, *mix[:-1]) if x is not None]
    found = []
    for form in (None, mixed_chunks):
        h, state = mixed_chunkwise(*inputs, mix, form=form)
        found.append((h, *torch.autograd.grad(h.sin().sum() + sum(x.sin().sum() for x in (state.C, state.X, state.n, state.Cm)), leaves)))
    for a, b in zip(*found): torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * max(1.0, b.abs().max().item()))


@needs_compiler
def test_inputs_that_are_views_and_outputs_that_nobody_asks_for():
    q, k, v, log_i, log_f = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_inputs(2, 3, 45, 6))
    v.requires_grad_()
    h, state = chunkwise(q, k, v, log_i, log_f)
    (only_state,) = torch.autograd.grad(state.C.sum(), v, retain_graph=True)
    general = chunkwise(q, k, v, log_i, log_f, form=read_chunks)[1]
    torch.testing.assert_close(only_state, torch.autograd.grad(general.C.sum(), v)[0])
    with torch.no_grad(): torch.testing.assert_close(chunkwise(q, k, v, log_i, log_f)[0], h)


@needs_compiler
def test_tracers_get_operations():
    inputs = random_inputs(1, 1, 40, 4)
    traced = torch.jit.trace(lambda *x: chunkwise(*x)[0], inputs)
    other = random_inputs(1, 1, 40, 4, seed=1)
    torch.testing.assert_close(traced(*other), chunkwise(*other)[0])


@needs_compiler
def test_small_numbers_are_slow_for_nobody():
    "A forget gate that leaves next to nothing makes no denormal numbers, and the caller's own are left as they were."
    q, k, v, log_i, log_f = (x.float() for x in random_inputs(1, 1, 64, 8))
    chunkwise(q, k, v, log_i, log_f - 60)
    assert (torch.tensor(1e-40) * 1).item() > 0
