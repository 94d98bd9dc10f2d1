"""The plain memory: its stabilizer at the edges, and its forms against the recurrence with gradients."""

import pytest
import torch
import torch.nn.functional as F

from smlstm.model.memory import random_inputs
from smlstm.model.stabilization import (
    MemoryState,
    chunk_scales,
    chunkwise,
    cumulative,
    gate_decays,
    initial_memory,
    recurrent,
    running_stabilizer,
    soft_cap,
    stabilize_gates,
)

F64 = torch.float64
ARRAY = dict(backend="array")


def close(found, expected, eps):
    torch.testing.assert_close(found, expected, rtol=0, atol=eps)


def series(T, seed=0):
    g = torch.Generator().manual_seed(seed)
    log_i, log_f, v = torch.randn(3, T, generator=g, dtype=F64)
    return 2 * log_i, F.logsigmoid(2 + log_f), v


def test_an_empty_memory_stays_empty_and_takes_the_first_write_whole():
    nothing = torch.tensor([-torch.inf, -torch.inf, -200.0])
    gates = stabilize_gates(nothing, torch.zeros(3), m0=torch.tensor(-torch.inf))
    assert gates.i.tolist() == [0, 0, 1] and gates.f.tolist() == [0, 0, 0]
    assert torch.equal(gates.m, nothing)


def test_a_series_may_be_cut_anywhere():
    log_i, log_f, _ = series(4000)
    whole = stabilize_gates(log_i, log_f)
    first = stabilize_gates(log_i[:1234], log_f[:1234])
    second = stabilize_gates(log_i[1234:], log_f[1234:], m0=first.m[-1])
    for joined, part_1, part_2 in zip(whole, first, second):
        close(joined, torch.cat([part_1, part_2]), eps=1e-12)


@pytest.mark.parametrize("ignored", [[1, 4], [0, 1, 2, 3, 4, 5]], ids=str)
def test_padding_leaves_no_trace(ignored):
    torch.manual_seed(0)
    a, b = torch.randn(6, dtype=F64), F.logsigmoid(torch.randn(6, dtype=F64))
    a[ignored], b[ignored] = -torch.inf, 0.0
    a.requires_grad_(), b.requires_grad_()
    gates = stabilize_gates(a, b)
    (gates.i.sum() + gates.f.sum()).backward()
    assert gates.i.detach()[ignored].tolist() == [0] * len(ignored)
    assert torch.cat([gates.f, a.grad, b.grad]).isfinite().all()


def test_no_gradient_passes_through_the_stabilizer():
    "A memory trained through a stabilizer that is part of the graph, and through one that is a constant."

    def max_loop(log_i, log_f):
        m = [torch.zeros((), dtype=F64)]
        for i, f in zip(log_i, log_f):
            m.append(torch.maximum(f + m[-1], i))
        return torch.stack(m[1:])

    def gradients(stabilizer):
        a, b, v = (x.clone().requires_grad_() for x in series(200))
        m = stabilizer(a, b)
        before = torch.cat([torch.zeros_like(m[:1]), m[:-1]])
        i, f = torch.exp(a - m), torch.exp(b + before - m)
        c, n, h = 0, 0, []
        for t in range(200):
            c, n = f[t] * c + i[t] * v[t], f[t] * n + i[t]
            h.append(c / torch.maximum(n.abs(), torch.exp(-m[t])))
        return torch.autograd.grad(torch.stack(h).square().sum(), (a, b, v))

    for one, other in zip(gradients(max_loop), gradients(lambda a, b: stabilize_gates(a, b).m)):
        close(one, other, eps=1e-12)


def test_the_soft_cap():
    assert soft_cap(torch.linspace(-200, 200, 401), 15).abs().max() <= 15
    close(soft_cap(torch.tensor([-0.5, 0.0, 0.5]), 15), torch.tensor([-0.5, 0.0, 0.5]), eps=1e-3)
    with pytest.raises(ValueError, match="cap=0 must be positive"):
        soft_cap(torch.zeros(2), 0)


def test_an_unknown_rule_is_refused():
    log_i, log_f, _ = series(4)
    with pytest.raises(ValueError, match="'mox' is unknown"):
        stabilize_gates(log_i, log_f, rule="mox")


def forward_and_gradients(form, inputs, state=None, **kwargs):
    leaves = [x.clone().requires_grad_() for x in (*inputs, *(state or initial_memory(*inputs[1:3]))[:2])]
    h, after = form(*leaves[:5], state=state and MemoryState(*leaves[5:], state.m), **kwargs)
    g = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in (h, after.C, after.n))
    return (
        h.detach(),
        torch.autograd.grad(total, leaves, materialize_grads=True),
        [x.detach() for x in after],
    )


SIZES = [(2, 2, 37, 8, 8), (1, 1, 1, 4, 16), (1, 3, 64, 8, 16), (3, 1, 50, 6, 64), (1, 1, 300, 4, 4)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_all_forms_are_the_recurrence(size):
    "Forward and gradients: sizes that do not fit the chunk, values of another width than keys, a state carried in."
    B, H, T, d, L = size
    inputs = random_inputs(B, H, T, d, seed=T)
    inputs = (*inputs[:2], inputs[2][..., : d - 1], *inputs[3:])
    q, k, v, *gates = random_inputs(B, H, 5, d, seed=99)
    _, state = recurrent(q, k, v[..., : d - 1], *gates)
    h, grads, last = forward_and_gradients(recurrent, inputs, state)
    for form, kwargs in [(chunkwise, dict(chunk_size=L, **ARRAY)), (cumulative, {})]:
        h_fast, grads_fast, last_fast = forward_and_gradients(form, inputs, state, **kwargs)
        close(h_fast, h, eps=1e-10)
        for fast, slow in zip(grads_fast, grads):
            close(fast, slow, eps=1e-8)
        for fast, slow in zip(last_fast, last):
            close(fast, slow, eps=1e-10)


def test_streams_from_a_chunkwise_past_and_bad_values_reach_no_earlier_step():
    inputs = random_inputs(2, 2, 30, 8)
    first, second = ([x[:, :, part] for x in inputs] for part in (slice(0, 20), slice(20, 30)))
    h, _ = recurrent(*inputs)
    h1, state = chunkwise(*first, chunk_size=8, **ARRAY)
    h2, _ = recurrent(*second, state=state)
    close(torch.cat([h1, h2], 2), h, eps=1e-10)
    bad = [x.clone() for x in inputs]
    bad[2][0, 1, 20, 3] = torch.nan
    for form, kwargs in [(recurrent, {}), (chunkwise, ARRAY)]:
        found = form(*bad, **kwargs)[0]
        close(found[:, :, :20], h[:, :, :20], eps=1e-10)
        assert found[0, 1, 20:, 3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_gates_stay_finite(dtype):
    g = torch.Generator().manual_seed(0)
    q, k, v, log_i, log_f = (x.to(dtype) for x in random_inputs(2, 1, 130, 8))
    log_i = (400 * torch.rand(log_i.shape, generator=g) - 200).to(dtype)
    log_f = F.logsigmoid(400 * torch.rand(log_f.shape, generator=g) - 200).to(dtype)
    h, grads, _ = forward_and_gradients(chunkwise, (q, k, v, log_i, log_f), **ARRAY)
    assert all(x.isfinite().all() for x in (h, *grads))


def test_gates_that_are_shut():
    "Nothing written at one step, everything forgotten at another."
    shut = [x.clone() for x in random_inputs(1, 1, 12, 4)]
    shut[3][..., 4] = -torch.inf
    shut[4][..., 7] = -torch.inf
    h, _, _ = forward_and_gradients(recurrent, shut)
    for form, kwargs in [(chunkwise, ARRAY), (cumulative, {})]:
        h_fast, grads_fast, _ = forward_and_gradients(form, shut, **kwargs)
        close(h_fast, h, eps=1e-10)
        assert all(x.isfinite().all() for x in grads_fast)


def test_the_recurrence_is_the_equations_in_bare_exponentials():
    q, k, v, log_i, log_f = inputs = random_inputs(2, 3, 50, 8)
    C, n, outputs = 0, 0, []
    for t in range(50):
        f, i = log_f[:, :, t, None].exp(), log_i[:, :, t, None].exp()
        C = f[..., None] * C + i[..., None] * v[:, :, t, :, None] * k[:, :, t, None, :]
        n = f * n + i * k[:, :, t]
        n_q = (n * q[:, :, t]).sum(-1, keepdim=True)
        outputs.append((C @ q[:, :, t, :, None]).squeeze(-1) / n_q.abs().clamp(min=1.0))
    close(recurrent(*inputs)[0], torch.stack(outputs, 2), eps=1e-10)


def test_masks_are_at_most_one_on_the_scale_of_the_stabilizer():
    *_, log_i, log_f = (x.unsqueeze(2) for x in random_inputs(2, 3, 50, 8))
    scales = chunk_scales(log_i, log_f, torch.zeros(2, 3, dtype=F64))
    decays = gate_decays(log_i, log_f, scales)
    close(scales.step, stabilize_gates(log_i, log_f).m, eps=1e-10)
    assert max(decays.written.max(), decays.carried.max()) < 1 + 1e-12


def test_float32_stays_close_over_4096_steps():
    inputs = random_inputs(1, 2, 4096, 16, seed=3)
    exact, _ = chunkwise(*inputs, **ARRAY)
    single, _ = chunkwise(*(x.float() for x in inputs), **ARRAY)
    assert (single - exact).norm() / exact.norm() < 1e-4


def test_a_running_sum_loses_the_digits_that_the_scan_keeps():
    g = torch.Generator().manual_seed(0)
    log_i, log_f = 2 * torch.randn(65_536, generator=g, dtype=F64), -5 - torch.rand(65_536, generator=g, dtype=F64)
    exact = running_stabilizer(log_i, log_f, torch.tensor(0.0, dtype=F64))
    total = log_f.float().cumsum(-1)
    by_sums = total + torch.cummax(log_i.float() - total, -1).values.clamp(min=0)
    assert (by_sums - exact).abs().max() > 1e-2
    assert (running_stabilizer(log_i.float(), log_f.float(), torch.tensor(0.0)) - exact).abs().max() < 1e-5
