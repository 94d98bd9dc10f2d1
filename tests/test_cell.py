"""The cell: settings that are refused, any split, the future, gates at extremes, and its parts one by one."""

import pytest
import torch
from torch import nn

from smlstm.model.cell import (
    CellConfig,
    ParallelSMLSTMCell,
    persistence_weights,
    project,
    regime_weights,
    spread_forget_biases,
    state_space_coefficients,
)
from smlstm.model.signals import Signals, market_signals

KINDS = [
    {},
    dict(value_transform="full", key_transform="full"),
    dict(value_transform=None),
    dict(d_state=0, trend=False),
    dict(input_gate="sigmoid"),
    dict(ssm_method="bilinear"),
    dict(regime_transform="mlp"),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def close(found, expected, eps):
    torch.testing.assert_close(found, expected, rtol=0, atol=eps)


def small(**kwargs):
    torch.manual_seed(0)
    return ParallelSMLSTMCell(CellConfig(hidden_size=16, n_heads=2, **kwargs))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(hidden_size=30, n_heads=4), "must be a multiple of n_heads=4"),
        (dict(value_transform="diag"), "did you mean 'diagonal'?"),
        (dict(ssm_method="euler"), "ssm_method='euler': must be one of 'zoh', 'bilinear'"),
        (dict(n_heads=2.0), "n_heads=2.0: must be a whole number"),
        (dict(gate_cap=50), "at most 30"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError) as error:
        CellConfig(**wrong)
    assert message in str(error.value)


def test_projections_have_the_shapes_of_heads():
    linear = nn.Linear(16, 4 * 16 + 2 * 2)
    spread_forget_biases(linear, 2)
    assert project(linear, torch.randn(3, 5, 16), CellConfig(hidden_size=16, n_heads=2)).k.shape == (3, 2, 5, 8)


def test_momentum_and_reversal_differ_in_the_autocorrelation_alone():
    "Weights of a regime that depends on one signal, on an autoregression of 0.6 and one of -0.6."
    torch.manual_seed(0)
    noise, market = torch.randn(1, 2_000), {}
    for phi in (0.6, -0.6):
        market[phi] = noise.clone()
        for t in range(1, 2_000):
            market[phi][:, t] += phi * market[phi][:, t - 1]
    gate, nothing = nn.Linear(16 + len(Signals._fields), 2), torch.zeros(1, 2_000, 16)

    def first_regime(name):
        with torch.no_grad():
            gate.weight.zero_()
            gate.weight[0, 16 + Signals._fields.index(name)] = 5.0
            return [regime_weights(gate, nothing, market_signals(x)[0])[..., 0].mean().item() for x in market.values()]

    for name in ("volatility", "trend", "agreement"):
        momentum, reversal = first_regime(name)
        assert abs(momentum - reversal) < 0.15
    momentum, reversal = first_regime("autocorrelation")
    assert momentum > 0.8 > 0.2 > reversal


def test_signals_do_not_depend_on_the_level_of_the_series():
    torch.manual_seed(0)
    series = torch.randn(1, 50)
    for here, shifted in zip(market_signals(series)[0], market_signals(series + 3)[0]):
        close(shifted, here, eps=1e-4)


def test_persistence_and_the_state_space_that_is_left_out():
    signals = market_signals(torch.randn(1, 50))[0]
    assert persistence_weights(None, signals.trend).abs().max() == 0
    close(persistence_weights(torch.tensor(0.0), signals.trend), signals.trend / 2, eps=1e-6)
    assert [tuple(x.shape) for x in state_space_coefficients(None, signals)] == [(1, 50, 1), (1, 50, 1), (1,), ()]


def test_outputs_have_the_shapes_of_the_input():
    cell = ParallelSMLSTMCell()
    out = cell(torch.randn(3, 40, 32))
    assert (out.h.shape, out.regimes.shape) == ((3, 40, 32), (3, 40, 4))
    close(out.regimes.sum(-1), torch.ones(3, 40), eps=1e-5)
    with pytest.raises(ValueError, match=r"x must be \[B, T, 32\]"):
        cell(torch.randn(1, 5, 8))


@every_kind
def test_any_split_gives_the_same_outputs(kind):
    cell, x = small(chunk_size=8, **kind).double(), torch.randn(2, 50, 16, dtype=torch.float64)
    whole = cell.parallel_forward(x)
    for split in ([20, 30], [1] * 50, [7, 1, 42]):
        state, pieces = None, []
        for piece in x.split(split, 1):
            h, _, state = cell.parallel_forward(piece, state)
            pieces.append(h)
        close(torch.cat(pieces, 1), whole.h, eps=1e-10)
        close(state.memory.C, whole.state.memory.C, eps=1e-10)


@every_kind
def test_the_future_does_not_reach_back(kind):
    cell, x = small(chunk_size=8, **kind).double(), torch.randn(2, 50, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, 30:] = torch.randn(2, 20, 16, dtype=torch.float64)
    before, after = cell(x).h, cell(changed).h
    assert torch.equal(after[:, :24], before[:, :24])  # chunks before the change: bitwise
    close(after[:, :30], before[:, :30], eps=1e-12)
    assert (after[:, 30:] - before[:, 30:]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_kind
def test_extreme_gates_leave_outputs_and_gradients_finite(kind, dtype):
    cell = small(chunk_size=16, **kind)
    with torch.no_grad():
        cell.project.weight[-4:] *= 200  # the gates' rows
    cell, x = cell.to(dtype), torch.randn(2, 70, 16).to(dtype)
    assert cell.project(cell.norm(x))[..., -4:].abs().max() > 200
    h = cell(x).h
    h.square().sum().backward()
    grads = [p.grad for p in cell.parameters() if p.grad is not None]
    assert h.isfinite().all() and all(g.isfinite().all() for g in grads)


def test_the_state_has_one_size():
    size = lambda state: sum(x.numel() for part in state for x in part)
    cell = ParallelSMLSTMCell()
    short, long = (size(cell(torch.randn(1, T, 32)).state) for T in (5, 500))
    assert short == long


def test_engines_agree():
    x = torch.randn(2, 70, 16)
    close(small(backend="auto")(x).h, small(backend="array")(x).h, eps=1e-4)
