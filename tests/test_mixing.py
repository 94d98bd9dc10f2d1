"""The mixed memory: transforms, sums over pairs, the fused form at many sizes, and what it does at extremes."""

import pytest
import torch
import torch.nn.functional as F

from smlstm.model.comparisons import forward_and_gradients, largest_gap
from smlstm.model.memory import random_inputs
from smlstm.model.mixing import (
    KINDS,
    TIMED,
    Mixing,
    RowNetwork,
    apply_network,
    mix_regimes,
    mixed_chunkwise,
    mixed_recurrent,
    random_mixing,
    read_pairs,
    sum_of_pairs,
)

SIZES = [(2, 2, 37, 6, 8), (1, 1, 1, 4, 16), (1, 3, 32, 20, 16), (1, 1, 70, 3, 2)]


def close(found, expected, eps=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=eps)


def single(mix):
    return Mixing(*(x if x is None else x.float() for x in mix[:-1]))


def test_regimes_without_transforms_add_up():
    C, w = torch.randn(1, 1, 5, 5), torch.rand(1, 4)
    close(mix_regimes(C, w, Mixing(w, None, None, *[None] * 5)), w.sum() * C)


def test_networks_are_homogeneous_and_act_on_rows():
    torch.manual_seed(0)
    network = RowNetwork(torch.randn(2, 4, 6, 5), torch.randn(2, 4, 5, 6))
    rows = torch.randn(3, 2, 7, 5)
    close(apply_network(network, 1e3 * rows), 1e3 * apply_network(network, rows), eps=1)
    expected = rows[1, 1, 2] + network.outer[1, 3] @ F.relu(network.inner[1, 3] @ rows[1, 1, 2])
    close(apply_network(network, rows)[1, 1, 3, 2], expected, eps=1e-4)


def test_sums_over_pairs():
    torch.manual_seed(0)
    weights, values, keys = torch.rand(3, 4, 6), torch.rand(6, 4, 5), torch.rand(6, 4, 2)
    expected = sum(weights[1, r, u] * torch.outer(values[u, r], keys[u, r]) for r in range(4) for u in range(6))
    close(sum_of_pairs(weights, values, keys)[1], expected)
    shared = keys[:, :1]
    close(sum_of_pairs(weights, values, shared), sum_of_pairs(weights, values, shared.expand(6, 4, 2)))
    close(read_pairs(keys[:3, 0], weights, values, keys)[1], expected @ keys[1, 0])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_fused_form_is_the_recurrence(kind, size):
    "Forward and gradients, at sizes that do not fit the chunk, over more than one segment, from a random state."
    B, H, T, d, L = size
    inputs, mix = random_inputs(B, H, T, d, seed=T), random_mixing(B, H, T, d, **kind)
    _, state = mixed_recurrent(*random_inputs(B, H, 5, d, seed=9), random_mixing(B, H, 5, d, seed=7, **kind))
    slow = forward_and_gradients(mixed_recurrent, inputs, mix, state)
    fast = forward_and_gradients(mixed_chunkwise, inputs, mix, state, chunk_size=L, backend="array")
    assert largest_gap(fast, slow) < 1e-9


def test_streams_from_a_chunkwise_past():
    inputs, mix = random_inputs(1, 2, 30, 4), random_mixing(1, 2, 30, 4)
    part = lambda a, b: (
        [x[:, :, a:b] for x in inputs],
        mix._replace(**{name: getattr(mix, name)[:, a:b] for name in TIMED}),
    )
    (early, early_mix), (late, late_mix) = part(0, 21), part(21, 30)
    h1, state = mixed_chunkwise(*early, early_mix, chunk_size=8, backend="array")
    h2, _ = mixed_recurrent(*late, late_mix, state=state)
    close(torch.cat([h1, h2], 2), mixed_recurrent(*inputs, mix)[0], eps=1e-10)


def test_late_gates_and_bad_values_leave_earlier_steps_alone():
    "With one scale for a whole chunk the steps before a gate of exp(60) would underflow."
    inputs, mix = [x.float() for x in random_inputs(1, 1, 20, 4)], single(random_mixing(1, 1, 20, 4))
    late, bad = inputs[3].clone(), mix.regime.clone()
    late[..., 15:], bad[:, 15, 2] = 60, torch.nan
    read = lambda log_i, mix: mixed_chunkwise(*inputs[:3], log_i, inputs[4], mix, backend="array")[0][:, :, :15]
    close(read(late, mix), read(inputs[3], mix), eps=1e-4)
    close(read(inputs[3], mix._replace(regime=bad)), read(inputs[3], mix), eps=1e-6)


def test_outputs_and_gradients_stay_finite_and_misfits_are_refused():
    g = torch.Generator().manual_seed(0)
    wild = lambda *shape: 400 * torch.rand(shape, generator=g) - 200
    q, k, v, *_ = (x.float() for x in random_inputs(2, 1, 130, 8))
    mix = single(random_mixing(2, 1, 130, 8))
    inputs = (q, k, v, 15 * torch.tanh(wild(2, 1, 130) / 15), F.logsigmoid(wild(2, 1, 130)))
    h, grads, _ = forward_and_gradients(mixed_chunkwise, inputs, mix, backend="array")
    assert all(x.isfinite().all() for x in (h, *grads))
    with pytest.raises(ValueError, match=r"mix.B_bar must be \[2, 130, 4\]"):
        mixed_chunkwise(*inputs, mix._replace(B_bar=mix.B_bar[:, :9]))


def test_the_recurrence_is_the_three_equations_in_bare_exponentials():
    q, k, v, log_i, log_f = inputs = random_inputs(2, 3, 20, 6)
    mix = random_mixing(2, 3, 20, 6, value="full", key="diagonal")
    C = n = X = Cm = 0
    outputs = []
    for t in range(20):
        f, i = log_f[:, :, t, None].exp(), log_i[:, :, t, None].exp()
        C = f[..., None] * C + i[..., None] * v[:, :, t, :, None] * k[:, :, t, None, :]
        n = f * n + i * k[:, :, t]
        Cr = mix_regimes(C, mix.regime[:, t], mix)
        X = mix.log_decay[:, None, t, :, None, None].exp() * X + mix.B_bar[:, None, t, :, None, None] * Cr.unsqueeze(2)
        now = (mix.C[:, None, None] * X).sum(2) + mix.D * Cr
        s = mix.persistence[:, t, None, None, None]
        Cf, Cm = (1 - s) * now + s * Cm, now
        n_q = (n * q[:, :, t]).sum(-1, keepdim=True)
        outputs.append((Cf @ q[:, :, t, :, None]).squeeze(-1) / n_q.abs().clamp(min=1.0))
    close(mixed_recurrent(*inputs, mix)[0], torch.stack(outputs, 2), eps=1e-10)


def test_float32_stays_close_over_4096_steps():
    inputs, mix = random_inputs(1, 2, 4096, 16, seed=3), random_mixing(1, 2, 4096, 16)
    exact, _ = mixed_chunkwise(*inputs, mix, backend="array")
    found, _ = mixed_chunkwise(*(x.float() for x in inputs), single(mix), backend="array")
    assert (found - exact).norm() / exact.norm() < 1e-4
