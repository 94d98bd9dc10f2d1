"""Gates in log space: the scan against the loop, at every length, with closed gates and extreme values."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smlstm.model.stabilization import running_stabilizer, soft_cap, stabilize_gates

INF = float("inf")


def loop(log_i, log_f, m0, rule="max"):
    "The recurrence as it is written, in NumPy float64, one step after another."
    m, out = np.asarray(m0, dtype=float), []
    for t in range(log_f.shape[-1]):
        m = np.maximum(log_f[..., t] + m, (log_i if rule == "max" else log_f)[..., t])
        out.append(m)
    return np.stack(out, -1)


def gates_with_holes(shape, seed, dtype=torch.float64):
    "Random gates, some inputs ignored and some memories wiped."
    random = np.random.default_rng(seed)
    log_i, log_f = 8 * random.standard_normal(shape), -4 * random.random(shape) ** 3
    log_i[random.random(shape) < 0.2], log_f[random.random(shape) < 0.1] = -INF, -INF
    return torch.tensor(log_i, dtype=dtype), torch.tensor(log_f, dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(1, 70), seed=st.integers(0, 10**6), m0=st.floats(-50, 50), rule=st.sampled_from(["max", "published"])
)
def test_scan_is_the_loop(T, seed, m0, rule):
    log_i, log_f = gates_with_holes((2, 3, T), seed)
    m = stabilize_gates(log_i, log_f, torch.full((2, 3), m0, dtype=torch.float64), rule).m
    expected = loop(log_i.numpy(), log_f.numpy(), np.full((2, 3), m0), rule)
    np.testing.assert_allclose(m, expected, atol=1e-12, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(T=st.integers(1, 70), seed=st.integers(0, 10**6), empty=st.booleans())
def test_gates_are_bounded_and_gradients_finite(T, seed, empty):
    log_i, log_f = (x.requires_grad_() for x in gates_with_holes((2, T), seed, torch.float32))
    m0 = torch.full((2,), -INF) if empty else None
    gates = stabilize_gates(log_i, log_f, m0)
    (gates.i * torch.randn(2, T)).sum().add(gates.f.square().sum()).backward()
    for x in (gates.i, gates.f, log_i.grad, log_f.grad):
        assert x.isfinite().all()
    assert gates.i.max() <= 1 + 1e-5 and gates.f.max() <= 1 + 1e-5
    assert (gates.i[log_i == -INF] == 0).all() and (gates.f[log_f == -INF] == 0).all()
    assert not gates.m.requires_grad


@settings(max_examples=30, deadline=None)
@given(T=st.integers(2, 60), cut=st.integers(1, 59), seed=st.integers(0, 10**6))
def test_any_cut(T, cut, seed):
    cut, (log_i, log_f) = min(cut, T - 1), gates_with_holes((3, T), seed)
    whole = stabilize_gates(log_i, log_f)
    first = stabilize_gates(log_i[:, :cut], log_f[:, :cut])
    second = stabilize_gates(log_i[:, cut:], log_f[:, cut:], first.m[:, -1])
    for joined, part_1, part_2 in zip(whole, first, second):
        np.testing.assert_allclose(torch.cat([part_1, part_2], -1), joined, atol=1e-12)


def read(i, f, m, v):
    "A scalar memory on the stabilized scale."
    c = n = torch.zeros_like(v[:, 0])
    out = []
    for t in range(v.shape[1]):
        c, n = f[:, t] * c + i[:, t] * v[:, t], f[:, t] * n + i[:, t]
        out.append(c / torch.maximum(n.abs(), torch.exp(-m[:, t])))
    return torch.stack(out, 1)


def test_read_does_not_depend_on_the_rule_or_on_m0():
    log_i, log_f = gates_with_holes((3, 200), 5)
    v = torch.randn(3, 200, dtype=torch.float64)
    plain = read(log_i.exp(), log_f.exp(), torch.zeros(3, 200, dtype=torch.float64), v)
    for m0 in (None, torch.tensor([-3.0, 0.5, 4.0], dtype=torch.float64)):
        np.testing.assert_allclose(read(*stabilize_gates(log_i, log_f, m0), v), plain, atol=1e-12)


def test_gradient_of_the_starting_scale():
    "m0 says how large the carried memory is: its gradient is the true one, though m carries none."
    log_i, log_f = (x.nan_to_num(neginf=-3.0) for x in gates_with_holes((2, 9), 1))
    start = torch.tensor([[0.4, 0.9], [-0.3, 0.7]], dtype=torch.float64)  # c and n on the scale exp(m0)

    def last_read(m0):
        i, f, m = stabilize_gates(log_i, log_f, m0)
        c, n = start
        for t in range(9):
            c, n = f[:, t] * c + i[:, t], f[:, t] * n + 2 * i[:, t]
        return c / n

    assert torch.autograd.gradcheck(last_read, torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_preactivations(dtype):
    log_i = torch.linspace(-200, 200, 401, dtype=dtype)[None].requires_grad_()
    log_f = torch.nn.functional.logsigmoid(torch.linspace(200, -200, 401, dtype=dtype))[None].requires_grad_()
    gates = stabilize_gates(log_i, log_f)
    (gates.i.float().sum() + gates.f.float().sum()).backward()
    assert all(x.isfinite().all() for x in (*gates, log_i.grad, log_f.grad))


def test_long_series_keep_their_digits():
    log_i, log_f = torch.randn(2, 30_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_f = -6 - log_f.abs()
    zero = torch.zeros((), dtype=torch.float64)
    error = running_stabilizer(log_i.float(), log_f.float(), zero.float()) - running_stabilizer(log_i, log_f, zero)
    assert error.abs().max() < 5e-6


def test_mistakes_are_named():
    x = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="'Max' is unknown"):
        stabilize_gates(x, x, rule="Max")
    for cap in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be positive"):
            soft_cap(x, cap)


def test_exports_with_a_dynamic_batch():
    class Gates(torch.nn.Module):
        def forward(self, log_i, log_f):
            return tuple(stabilize_gates(log_i, log_f))

    example = (torch.randn(3, 2, 20), -torch.rand(3, 2, 20))
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(Gates(), example, dynamic_shapes=(batch, batch))
    for B in (1, 7):
        log_i, log_f = torch.randn(B, 2, 20), -torch.rand(B, 2, 20)
        for got, wanted in zip(program.module()(log_i, log_f), stabilize_gates(log_i, log_f)):
            torch.testing.assert_close(got, wanted)
