"""The CPU kernel: what it refuses and converts, tracers, sizes, causality, threads, forks, and its cache on disk."""

import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numba
import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from smlstm.model.backends import use_backend
from smlstm.model.comparisons import forward_and_gradients, largest_gap
from smlstm.model.memory import random_inputs
from smlstm.model.mixing import KINDS, TIMED, Mixing, mixed_chunkwise, mixed_recurrent, random_mixing
from smlstm.model.model import SMLSTM, SMLSTMConfig, empty_state, map_state
from smlstm.model.stabilization import MemoryState, chunkwise, recurrent


def single(mix):
    return Mixing(*(x if x is None else x.float() for x in mix[:-1]))


def python(code, folder, **environment):
    "What a new process prints that runs this code in `folder`."
    run = [sys.executable, "-c", textwrap.dedent(code)]
    root = str(Path(__file__).resolve().parent.parent)
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{folder}"} | environment
    done = subprocess.run(run, cwd=folder, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


# ---- what enters


def test_values_of_another_width():
    q, k, v, i, f = random_inputs(1, 2, 50, 8)
    for narrow in (v[..., :5].contiguous(), torch.cat([v, v], -1)):
        assert_close(chunkwise(q, k, narrow, i, f)[0], recurrent(q, k, narrow, i, f)[0])


def test_dtypes_are_those_of_the_query():
    q, k, v, i, f = random_inputs(1, 2, 50, 8)
    right, _ = recurrent(q, k, v, i, f)
    assert_close(chunkwise(q, k, v, i.float(), f.float())[0], right, rtol=1e-4, atol=1e-4)
    assert_close(chunkwise(q.float(), k, v, i, f)[0], right.float(), rtol=1e-4, atol=1e-4)
    mix = random_mixing(1, 2, 50, 8)
    right, _ = mixed_recurrent(q, k, v, i, f, mix)
    assert_close(mixed_chunkwise(q, k, v, i, f, single(mix))[0], right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_states_of_another_dtype(dtype):
    torch.manual_seed(0)
    config = SMLSTMConfig(n_features=4, hidden_size=16, n_heads=2, n_layers=1)
    model, x = SMLSTM(config).eval(), torch.randn(2, 40, 4)
    with torch.no_grad():
        state = model(x)[1]
        other, whole = map_state(lambda t: t.to(dtype), state), model(x, state)[0].price
        assert_close(model(x, other)[0].price, whole, rtol=0.1, atol=0.05)
        assert model.double()(x.double(), empty_state(config, 2))[0].price.dtype == torch.float64


def test_what_does_not_fit_is_named():
    q, k, v, i, f = random_inputs(1, 2, 20, 4)
    mix, (_, state) = random_mixing(1, 2, 20, 4), recurrent(q, k, v, i, f)
    wrong = [
        ("k is torch.int64", lambda: chunkwise(q, k.long(), v, i, f)),
        ("log_i, log_f must be", lambda: chunkwise(q, k, v, i[..., :3], f)),
        ("state.C is", lambda: chunkwise(q, k, v, i, f, state=state._replace(C=state.C[..., :3]))),
        (
            "state.n is torch.int32",
            lambda: chunkwise(q, k, v, i, f, state=MemoryState(state.C, state.n.int(), state.m)),
        ),
        ("mix.regime must be", lambda: mixed_chunkwise(q, k, v, i, f, mix._replace(regime=mix.regime[:, :3]))),
        ("mix.value_transform must be", lambda: mixed_chunkwise(q, k, v, i, f, random_mixing(1, 2, 20, 5))),
        ("on meta", lambda: chunkwise(q, k.to("meta"), v, i, f)),
        ("backend='cuda'", lambda: chunkwise(q, k, v, i, f, backend="cuda")),
    ]
    for text, call in wrong:
        with pytest.raises(ValueError, match=text):
            call()


# ---- sizes, against the recurrence and the independent reference


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 80), st.integers(1, 20), st.sampled_from(KINDS), st.booleans()
)
def test_random_sizes(B, H, T, d, kind, begun):
    inputs, mix = random_inputs(B, H, T, d, seed=T), random_mixing(B, H, T, d, **kind)
    state = None
    if begun:
        _, state = mixed_recurrent(*random_inputs(B, H, 3, d, seed=9), random_mixing(B, H, 3, d, seed=7, **kind))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        slow = forward_and_gradients(mixed_recurrent, inputs, mix, state)
        fast = forward_and_gradients(mixed_chunkwise, inputs, mix, state, backend="kernel")
    assert largest_gap(fast, slow) < 1e-8


@pytest.mark.parametrize("T, d", [(1, 1), (1, 130), (33, 130), (1000, 1), (1000, 7)])
def test_extreme_sizes(T, d):
    inputs, mix = random_inputs(1, 1, T, d), random_mixing(1, 1, T, d)
    assert_close(mixed_chunkwise(*inputs, mix, backend="kernel")[0], mixed_recurrent(*inputs, mix)[0])


def test_the_kernel_knows_the_plain_equations():
    inputs = random_inputs(1, 1, 70, 5)
    right = reference.plain_memory(*(x[0, 0].numpy() for x in inputs))[0]
    assert_close(chunkwise(*inputs, backend="kernel")[0][0, 0], torch.as_tensor(right))


# ---- causality


@pytest.mark.parametrize("backend", ["array", "kernel", "xla"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_nothing_before(backend, wrong):
    inputs, mix = [x.float() for x in random_inputs(1, 2, 70, 4)], single(random_mixing(1, 2, 70, 4))
    h, _ = mixed_chunkwise(*inputs, mix, backend=backend)
    for j in range(5):
        bad = [x.clone() for x in inputs]
        bad[j][0, 1, 45] = wrong
        got, _ = mixed_chunkwise(*bad, mix, backend=backend)
        assert_close(got[:, :, :45], h[:, :, :45])
        assert not got[0, 1, 45].isfinite().any()
    for name in TIMED:
        bad = getattr(mix, name).clone()
        bad[0, 45] = wrong
        got, _ = mixed_chunkwise(*inputs, mix._replace(**{name: bad}), backend=backend)
        assert_close(got[:, :, :45], h[:, :, :45])


# ---- tracers


def test_opcheck():
    from smlstm.model.kernels import memory_op

    q, k, v, i, f = (x.requires_grad_() for x in random_inputs(1, 1, 9, 3))
    one, none = torch.ones(1, 1, 9, 1).double(), torch.zeros(1, 1, 9, 0).double()
    rest = torch.zeros(1, 1, 9).double(), torch.zeros(1, 0).double(), torch.ones(1).double()
    state = torch.zeros(1, 1, 3, 1, 3), torch.zeros(1, 1, 3), torch.zeros(1, 1), torch.zeros(1, 1, 3, 3)
    sides = torch.ones(1, 1, 3).double(), torch.zeros(1, 0, 0).double()
    arguments = q, k, v, i, f, one, none, none, *rest, *sides, *(x.double() for x in state), 1.0, True
    torch.library.opcheck(memory_op, arguments)


def test_tracers_see_one_operation():
    inputs, mix = random_inputs(1, 2, 40, 4), random_mixing(1, 2, 40, 4)
    read = lambda *x: mixed_chunkwise(*x, mix)[0]
    graph = make_fx(read)(*inputs)
    other = random_inputs(1, 2, 40, 4, seed=1)
    assert_close(graph(*other), read(*other))
    with FakeTensorMode() as mode:
        fake = mixed_chunkwise(
            *(mode.from_tensor(x) for x in inputs), Mixing(*(x if x is None else mode.from_tensor(x) for x in mix))
        )
    assert fake[0].shape == (1, 2, 40, 4)

    class Read(torch.nn.Module):
        def forward(self, *x):
            return read(*x)

    assert_close(torch.export.export(Read(), tuple(inputs)).module()(*other), read(*other))


def test_a_trace_of_torch_jit_holds_array_operations():
    inputs = random_inputs(1, 2, 40, 4)
    traced = torch.jit.trace(lambda *x: chunkwise(*x)[0], inputs, check_trace=False)
    other = random_inputs(1, 2, 40, 4, seed=1)
    assert_close(traced(*other), chunkwise(*other)[0])


def test_second_derivatives():
    q, *rest = random_inputs(1, 1, 9, 3)
    q.requires_grad_()
    first = torch.autograd.grad(chunkwise(q, *rest)[0].sin().sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative: use backend='array'"):
        torch.autograd.grad(first.sum(), q)
    with use_backend("array"):
        assert torch.autograd.gradgradcheck(lambda x: chunkwise(x, *rest)[0], q)


# ---- processes and files


def test_a_fork_goes_on(tmp_path):
    code = """
        import os, torch
        from smlstm.model.memory import random_inputs
        from smlstm.model.stabilization import chunkwise
        torch.set_num_threads(2)
        inputs = random_inputs(4, 1, 40, 4)
        before = chunkwise(*inputs)[0]
        child = os.fork()
        if not child:
            os._exit(0 if torch.equal(chunkwise(*inputs)[0], before) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert python(code, tmp_path)[0] == "0"


SMALL = """
    import logging
    logging.basicConfig()
    import small
    print(small.twice(3))
"""


@pytest.fixture
def small(tmp_path):
    "A folder with a module of one compiled function."
    folder = tmp_path / "ein Ordner für später"
    folder.mkdir()
    (folder / "small.py").write_text(
        "from smlstm.model.kernel_masks import compiled\n\n\n@compiled\ndef twice(x):\n    return 2 * x\n"
    )
    return folder


def test_compiled_code_is_kept_in_a_folder_of_another_language(small):
    for _ in range(2):
        assert python(SMALL, small)[0] == "6"
    assert list((small / "__pycache__").glob("*.nbi"))


@pytest.mark.parametrize("home", ["/proc/none", ""])
def test_no_folder_to_write_costs_time_alone(small, home):
    printed, said = python(SMALL, small, NUMBA_CACHE_DIR="/proc/none", HOME=home)
    assert printed == "6"


def test_a_full_disk_costs_time_alone(small):
    code = """
        import errno, logging
        logging.basicConfig()
        from numba.core.caching import IndexDataCacheFile
        def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
        IndexDataCacheFile.save = full
        import small
        print(small.twice(3))
    """
    printed, said = python(code, small)
    assert printed == "6" and "No space left on device" in said


def test_a_file_of_an_older_version_is_made_anew(small):
    assert python(SMALL, small)[0] == "6"
    index = next((small / "__pycache__").glob("*.nbi"))
    index.write_bytes(index.read_bytes()[:-20])
    assert python(SMALL, small)[0] == "6"
    assert python(SMALL, small)[0] == "6"


def test_two_processes_compile_at_once(small):
    run = [sys.executable, "-c", textwrap.dedent(SMALL)]
    root = str(Path(__file__).resolve().parent.parent)
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{small}"}
    both = [subprocess.Popen(run, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [one.communicate(timeout=1800)[0].strip() for one in both] == ["6", "6"]


BOUNDS = """
    import torch
    from smlstm.model.memory import random_inputs
    from smlstm.model.mixing import mixed_chunkwise, mixed_recurrent, random_mixing
    for kind in (dict(value="diagonal"), dict(value="full", key="full")):
        inputs = [x.requires_grad_() for x in random_inputs(1, 1, 35, 2)]
        mix = random_mixing(1, 1, 35, 2, R=2, N=1, **kind)
        found = mixed_chunkwise(*inputs, mix)[0]
        right = mixed_recurrent(*inputs, mix)[0]
        for a, b in zip(*(torch.autograd.grad(x.sin().sum(), inputs) for x in (found, right))):
            torch.testing.assert_close(a, b)
    print("within")
"""


def test_no_index_is_out_of_bounds(tmp_path):
    "As Python, where NumPy checks every index."
    assert python(BOUNDS, tmp_path, NUMBA_DISABLE_JIT="1")[0] == "within"


COUNTED = """
    import numpy as np
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    import smlstm.model.kernels
    from smlstm.model.memory import random_inputs
    from smlstm.model.mixing import mixed_chunkwise, random_mixing
    product, ran = np.dot, []

    def counted(x, y, *out):
        ran.append(2 * x.shape[0] * x.shape[1] * y.shape[1])
        return product(x, y, *out)

    np.dot = counted
    for e, kind in ((3, dict(value=None)), (2, dict(value="diagonal")), (2, dict(value="full", key="full"))):
        q, k, v, *gates = (x.requires_grad_() for x in random_inputs(1, 2, 35, 2))
        v = torch.cat([v, v], -1)[..., :e]
        ran.clear()
        with FlopCounterMode(display=False) as counter:
            h, _ = mixed_chunkwise(q, k, v, *gates, random_mixing(1, 2, 35, 2, R=3, N=2, **kind), backend="kernel")
            forward = sum(ran)
            h.sum().backward()
        found = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
        right = {"smlstm.memory": forward, "smlstm.memory_backward": sum(ran) - forward}
        assert right.items() <= found.items(), (kind, found, right)
    print("counted")
"""


def test_counted_operations_are_the_products_that_run(tmp_path):
    "FlopCounterMode against the products of the kernel, run as Python and counted one by one."
    assert python(COUNTED, tmp_path, NUMBA_DISABLE_JIT="1")[0] == "counted"


@pytest.mark.slow
def test_no_index_is_out_of_bounds_when_compiled(tmp_path):
    assert python(BOUNDS, tmp_path, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path))[0] == "within"


@pytest.mark.slow
def test_the_process_that_compiles_computes_what_later_ones_do(tmp_path):
    code = """
        import hashlib
        import torch
        from smlstm import SMLSTM, SMLSTMConfig
        torch.manual_seed(0)
        model = SMLSTM(SMLSTMConfig(n_features=8))
        sum(part.square().mean() for part in model(torch.randn(2, 96, 8))[0]).backward()
        bits = b"".join(p.grad.numpy().tobytes() for p in model.parameters() if p.grad is not None)
        print(hashlib.sha256(bits).hexdigest())
    """
    runs = [python(code, tmp_path, NUMBA_CACHE_DIR=str(tmp_path), OMP_NUM_THREADS="1") for _ in range(2)]
    assert "compiled rows_backward" in runs[0][1] and not runs[1][1]
    assert runs[0][0] == runs[1][0]


@pytest.mark.slow
def test_memory_of_a_long_sequence(tmp_path):
    "65,536 steps, forward and backward: the states of 2,048 chunks, and little else."
    code = """
        import resource, torch
        from smlstm.model.memory import random_inputs
        from smlstm.model.mixing import Mixing, mixed_chunkwise, random_mixing
        def step(T):
            inputs = [x.float().requires_grad_() for x in random_inputs(1, 1, T, 16)]
            mix = Mixing(*(x if x is None else x.float() for x in random_mixing(1, 1, T, 16)[:-1]))
            mixed_chunkwise(*inputs, mix)[0].sum().backward()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(step(65_536) - step(64))
    """
    grown = python(code, tmp_path)[0]
    assert int(grown) < 1 << 20  # KiB


def test_a_change_of_what_it_calls_compiles_a_kernel_again(tmp_path):
    head = "from smlstm.model.kernel_masks import compiled\n"
    called = head + "\n\n@compiled\ndef factor(x):\n    return {} * x\n"
    (tmp_path / "kernel_b.py").write_text(
        head + "from kernel_a import factor\n\n\n@compiled\ndef once_more(x):\n    return factor(x) + 1\n"
    )
    code = "import kernel_b\nprint(kernel_b.once_more(3))"
    for number in (2, 2, 5):
        (tmp_path / "kernel_a.py").write_text(called.format(number))
        assert python(code, tmp_path)[0] == str(3 * number + 1)


def test_a_file_written_again_as_it_was_compiles_nothing(small):
    hits = SMALL + "    print(sum(small.twice.stats.cache_hits.values()))\n"
    assert python(hits, small)[0].split() == ["6", "0"]
    os.utime(small / "small.py", (1, 1))
    assert python(hits, small)[0].split() == ["6", "1"]
    (small / "small.py").write_text((small / "small.py").read_text().replace("2 * x", "3 * x"))
    assert python(hits, small)[0].split() == ["9", "0"]


def test_an_index_of_other_code_is_made_anew(small):
    assert python(SMALL, small)[0] == "6"
    (index,) = (small / "__pycache__").glob("*.nbi")
    whole = index.read_bytes()
    gone = (
        pickle.dumps(numba.__version__) + b"csmlstm.model.kernel_masks\nNoLongerThere\n."
    )  # a class of an older version
    index.write_bytes(gone)
    assert python(SMALL, small)[0] == "6"
    assert index.read_bytes() not in (gone, b"") and len(index.read_bytes()) >= len(whole) // 2
