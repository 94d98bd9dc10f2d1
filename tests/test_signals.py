"""Market signals: against NumPy and pandas, bit for bit causal, in any pieces, never NaN, compiled in one graph."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smlstm.model.backends import use_backend
from smlstm.model.numerics import as_series
from smlstm.model.signals import (
    SignalState,
    as_strength,
    autocorrelation,
    centered,
    ema,
    ema_agreement,
    from_start,
    initial_signal_state,
    market_signals,
    normalized_volatility,
    rolling_volatility,
    trend_strength,
    window_autocorrelation,
)

F64 = torch.float64
CAUSAL = [
    rolling_volatility,
    normalized_volatility,
    trend_strength,
    ema_agreement,
    lambda x: ema(x, span=9),
    lambda x: market_signals(x)[0].volatility,
    lambda x: market_signals(x)[0].trend,
    lambda x: market_signals(x)[0].agreement,
    lambda x: market_signals(x)[0].autocorrelation,
]


@pytest.fixture(autouse=True, params=["kernel", "array"])
def form(request):
    "Everything here holds for both forms."
    with use_backend(request.param):
        yield request.param


def walk(B, T, seed=0, dtype=F64):
    return torch.randn(B, T, generator=torch.Generator().manual_seed(seed), dtype=dtype).cumsum(1)


def trend_of(w):
    d = w - w.mean()
    return (abs((d[:-1] * d[1:]).sum() / np.sqrt((d**2).sum() * (d[1:] ** 2).sum())) + 1) / 2


@settings(max_examples=40, deadline=None)
@given(T=st.integers(1, 60), window=st.integers(1, 30), seed=st.integers(0, 999))
def test_against_numpy_and_pandas(T, window, seed):
    x = walk(2, T, seed)
    frame = pd.DataFrame(x.numpy().T)
    sigma = frame.rolling(window + 1, min_periods=2).std().fillna(0).to_numpy().T
    np.testing.assert_allclose(rolling_volatility(x, window), sigma, atol=1e-9)
    usual = sigma.cumsum(1) / np.arange(1, T + 1)
    np.testing.assert_allclose(normalized_volatility(x, window), sigma / (usual + 1e-6), atol=1e-7)
    np.testing.assert_allclose(
        normalized_volatility(x, window, rule="published"), sigma / (sigma.mean(1, keepdims=True) + 1e-6), atol=1e-7
    )
    trend = trend_strength(x, window).numpy()
    for t in range(T):
        expected = trend_of(x[0, t - window : t + 1].numpy()) if t >= window >= 2 else 0.5
        assert trend[0, t] == pytest.approx(expected, abs=1e-9)
    if T > 2:
        np.testing.assert_allclose(trend_strength(x, window, "published")[1], trend_of(x[1].numpy()), atol=1e-9)
    for span in (1, 5.5, 26):
        np.testing.assert_allclose(
            ema(x, span=span), frame.ewm(span=span, adjust=False).mean().to_numpy().T, atol=1e-11
        )


def test_agreement_against_pandas():
    x = walk(1, 500)
    series = pd.Series(x[0].numpy())
    fast, slow = (np.sign(series.ewm(span=n, adjust=False).mean().diff().fillna(0)) for n in (12, 26))
    np.testing.assert_array_equal(ema_agreement(x)[0], fast * slow)
    assert ema_agreement(x)[0, 0] == 0


@pytest.mark.parametrize("signal", CAUSAL)
@pytest.mark.parametrize("today", [1, 20, 33, 96, 199])
def test_the_future_does_not_reach_back(signal, today):
    x = walk(2, 200, dtype=torch.float32)
    other = torch.cat([x[:, :today], 1e3 * torch.randn(2, 200 - today)], 1)
    assert torch.equal(signal(x)[:, :today], signal(other)[:, :today])


def test_the_published_forms_look_ahead():
    x = walk(1, 200)
    other = torch.cat([x[:, :150], 5 * x[:, 150:]], 1)
    for signal in (normalized_volatility, trend_strength):
        assert not torch.equal(signal(x, rule="published")[:, :150], signal(other, rule="published")[:, :150])


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 119), max_size=8, unique=True), window=st.integers(1, 25), seed=st.integers(0, 999))
def test_any_cut(cuts, window, seed):
    x = walk(2, 120, seed)
    whole, last = market_signals(x, window)
    state, pieces, edges = None, [], [0, *sorted(cuts), 120]
    for start, end in zip(edges, edges[1:]):
        signals, state = market_signals(x[:, start:end], window, state=state)
        pieces.append(signals)
    for joined, wanted in zip(zip(*pieces), whole):
        torch.testing.assert_close(torch.cat(joined, 1), wanted, atol=1e-12, rtol=0)
    for got, wanted in zip(state, last):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


def test_one_step_at_a_time_from_the_initial_state():
    x = walk(3, 70)
    state, steps = initial_signal_state(3, 20, F64), []
    for t in range(70):
        signals, state = market_signals(x[:, t : t + 1], state=state)
        steps.append(signals)
    whole, _ = market_signals(x)
    for joined, wanted in zip(zip(*steps), whole):
        torch.testing.assert_close(torch.cat(joined, 1), wanted, atol=1e-12, rtol=0)


@settings(max_examples=80, deadline=None)
@example(values=[0.0, 0.0, 2.0**-149], window=1)
@given(values=st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=40), window=st.integers(1, 12))
def test_finite_for_whatever_comes(values, window):
    x = torch.tensor([values], dtype=torch.float32, requires_grad=True)
    signals, state = market_signals(x, window)
    outputs = [
        *signals,
        trend_strength(x, window, "published"),
        normalized_volatility(x, window, rule="published"),
        ema(x, alpha=0.3),
    ]
    for y in outputs:
        assert y.shape == x.shape and y.isfinite().all()
    assert all(s.isfinite().all() for s in state)
    (gradient,) = torch.autograd.grad(sum(y.sum() for y in outputs), x)
    assert not gradient.isnan().any()
    assert (signals.autocorrelation.abs() <= 1 + 1e-6).all() and (signals.volatility >= 0).all()
    assert torch.equal(signals.trend, (signals.autocorrelation.abs() + 1) / 2)


@pytest.mark.parametrize("value", [0.0, 0.1, -2531.7, 1e7])
def test_flat_series_are_exactly_flat(value):
    x = torch.full((1, 300), value)
    signals, _ = market_signals(x)
    assert (
        (signals.volatility == 0).all()
        and (signals.trend == 0.5).all()
        and (signals.agreement == 0).all()
        and (signals.autocorrelation == 0).all()
    )


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-30, 2.0**30, 2.0**60, 2.0**100])
def test_trend_has_no_unit(scale):
    x = walk(2, 80, dtype=torch.float32)
    assert torch.equal(trend_strength(scale * x), trend_strength(x))
    assert torch.equal(autocorrelation(scale * x), autocorrelation(x)) and torch.equal(
        autocorrelation(-scale * x), autocorrelation(x)
    )
    assert torch.equal(trend_strength(scale * x, rule="published"), trend_strength(x, rule="published"))


def test_a_trend_is_told_from_noise():
    random = torch.Generator().manual_seed(1)
    noise, follow = torch.randn(50, 400, generator=random), [torch.zeros(50)]
    for e in noise.unbind(1):
        follow.append(0.9 * follow[-1] + e)
    assert trend_strength(torch.stack(follow, 1))[:, 100:].mean() > trend_strength(noise)[:, 100:].mean() + 0.15


def test_momentum_is_told_from_reversal_by_the_sign_alone():
    noise, market = torch.randn(50, 400, generator=torch.Generator().manual_seed(1)), {}
    for phi in (0.6, -0.6):
        steps = [torch.zeros(50)]
        for e in noise.unbind(1):
            steps.append(phi * steps[-1] + e)
        market[phi] = torch.stack(steps, 1)
    momentum, reversal = (autocorrelation(x)[:, 100:] for x in market.values())
    assert momentum.mean() > 0.3 and reversal.mean() < -0.3
    assert (trend_strength(market[0.6]) - trend_strength(market[-0.6]))[:, 100:].mean().abs() < 0.1


def test_gradients():
    x = torch.randn(1, 12, dtype=F64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    smooth = lambda x: (
        *market_signals(x, 4)[0][:2],
        autocorrelation(x, 4),
        ema(x, span=3),
        normalized_volatility(x, 4, rule="published"),
        trend_strength(x, 4, "published"),
    )
    assert torch.autograd.gradcheck(smooth, x)


@pytest.mark.parametrize("earlier", [0, 2, 9])
def test_gradients_of_the_state(earlier):
    "By finite differences: of what comes out for the next piece, by the piece and by the state it began from."
    x, before = walk(1, 7, seed=5), walk(1, earlier, seed=6)
    state = market_signals(before, 4)[1] if earlier else initial_signal_state(1, 4, F64)
    state = state._replace(volatility_sum=state.volatility_sum + 0.1)  # away from 0/0

    def smooth(x, window, total, fast, slow):
        signals, after = market_signals(x, 4, state=SignalState(window, state.count, total, fast, slow))
        return signals.volatility, signals.autocorrelation, after.window, *after[2:]

    parts = (x, *(part for i, part in enumerate(state) if i != 1))
    assert torch.autograd.gradcheck(smooth, [part.detach().clone().requires_grad_() for part in parts])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_no_step_before_it(value):
    x = walk(2, 90)
    broken = x.clone()
    broken[0, 45] = value
    for signal, wanted in zip(market_signals(broken)[0], market_signals(x)[0]):
        torch.testing.assert_close(signal[:, :45], wanted[:, :45], rtol=1e-12, atol=1e-12)


def test_float32_keeps_its_digits_on_prices():
    x = 2500 * torch.exp(0.01 * walk(2, 6000))
    low, high = market_signals(x.float())[0], market_signals(x.float().double())[0]
    assert ((low.volatility - high.volatility) / (high.volatility + 1e-3)).abs().max() < 1e-4
    assert (low.trend - high.trend).abs().max() < 1e-5


def test_half_precision_is_computed_in_float32():
    x = walk(2, 400).bfloat16()
    signals, state = market_signals(x)
    wanted, _ = market_signals(x.float())
    assert all(torch.equal(a, b) for a, b in zip(signals, wanted)) and state.count.tolist() == [400, 400]


class Streaming(torch.nn.Module):
    def forward(self, x, window, count, volatility_sum, fast, slow):
        signals, state = market_signals(x, 10, state=SignalState(window, count, volatility_sum, fast, slow))
        return (*signals, *state)


def streaming_inputs(B, T=30):
    _, state = market_signals(walk(B, 25, dtype=torch.float32), 10)
    return walk(B, T, 7, torch.float32), *state


def test_one_graph_with_a_dynamic_batch_and_no_float64():
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(Streaming(), streaming_inputs(3), dynamic_shapes=(batch,) * 6)
    for B in (1, 6):
        for got, wanted in zip(program.module()(*streaming_inputs(B)), Streaming()(*streaming_inputs(B))):
            torch.testing.assert_close(got, wanted)
    kinds = {node.meta["val"].dtype for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)}
    assert F64 not in kinds
    names = {str(node.target) for node in program.graph.nodes}
    assert not any(word in name for name in names for word in ("nonzero", "masked_select", "unfold", "aten.item"))


def test_compiles_whole():
    compiled = torch.compile(Streaming(), fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(*streaming_inputs(2)), Streaming()(*streaming_inputs(2))):
        torch.testing.assert_close(got, wanted)


def test_mistakes_are_named():
    x = torch.randn(2, 9)
    for bad in (x[0], x[:, :0], x.long()):
        for signal in CAUSAL:
            with pytest.raises(ValueError, match=r"need floats \[B, T\]"):
                signal(bad)
    for signal in (rolling_volatility, normalized_volatility, trend_strength, market_signals):
        with pytest.raises(ValueError, match="window=0"):
            signal(x, window=0)
    for signal in (normalized_volatility, trend_strength):
        with pytest.raises(ValueError, match="'whole' is unknown"):
            signal(x, rule="whole")
    with pytest.raises(ValueError, match="remembers 5 values"):
        market_signals(x, state=initial_signal_state(2, 5))
    for options in ({}, {"span": 3, "alpha": 0.5}):
        with pytest.raises(ValueError, match="exactly one"):
            ema(x, **options)
    for options in ({"span": 0.5}, {"alpha": 0.0}, {"alpha": 1.01}, {"span": float("nan")}):
        with pytest.raises(ValueError, match="must be"):
            ema(x, **options)


def test_sums_of_squares_lose_their_digits_and_windows_do_not():
    over = lambda y: F.pad(y, (1, 0)).cumsum(1)[:, 21:] - F.pad(y, (1, 0)).cumsum(1)[:, :-21]
    torch.manual_seed(0)
    level = 2500 + 0.1 * torch.randn(1, 500)
    assert ((over(level * level) - over(level) ** 2 / 21) / 20 < 0).any()
    relative = rolling_volatility(level) / rolling_volatility(level.double()) - 1
    assert relative[:, 1:].abs().max() < 1e-6


def test_a_flat_window_has_a_gradient_of_zero():
    flat = torch.full((1, 30), 0.1, dtype=F64, requires_grad=True)
    centered(from_start(flat, 20)).square().sum(1).sqrt().sum().backward()
    assert flat.grad.isnan().all()  # what a plain square root would give
    flat.grad = None
    rolling_volatility(flat).sum().backward()
    assert torch.equal(flat.grad, torch.zeros_like(flat))


def test_short_windows_of_noise_look_like_trends():
    torch.manual_seed(0)
    noise = torch.randn(20_000, 21, dtype=F64)
    for points in (3, 4, 6, 11, 21):
        strength = as_strength(window_autocorrelation(from_start(noise[:, :points], points - 1)))[:, -1].mean()
        assert bool(strength > 0.65) == (points < 11)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_gradients_of_the_trend_are_finite_at_any_scale(scale):
    x = (scale * torch.linspace(0, 1, 60)[None]).requires_grad_()
    trend_strength(x)[0, -1].backward()
    assert x.grad.isfinite().all()


def test_differences_of_averages_are_noise_and_averages_of_differences_are_not():
    quiet = torch.full((1, 400), 0.1)
    assert (torch.diff(ema(quiet, span=12)).sign() != 0).any()
    assert torch.equal(ema_agreement(quiet), torch.zeros(1, 400))


def test_the_averages_part_in_one_stretch_after_a_turn():
    toy = torch.cat([torch.linspace(0, 1, 60), torch.linspace(1, 0.4, 60)])[None].double()
    parted = (ema_agreement(toy)[0] < 0).nonzero().flatten()
    first, last = parted[0].item(), parted[-1].item()
    assert parted.tolist() == list(range(first, last + 1)) and 60 <= first < last < 90


def test_strength_is_that_of_the_autocorrelation_and_spans_are_alphas():
    x = walk(2, 300)
    assert torch.equal(as_strength(autocorrelation(x)), trend_strength(x))
    torch.testing.assert_close(ema(x, span=12), ema(x, alpha=2 / 13), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: as_series(torch.ones(5)), r"shape \(5,\)"),
        (lambda x: as_series(torch.ones(1, 5), window=0), "window=0"),
        (lambda x: trend_strength(x, rule="whole"), "'whole' is unknown"),
        (lambda x: ema(x), "give exactly one"),
        (lambda x: ema(x, alpha=1.5), "alpha=1.5"),
        (lambda x: ema(x, span=0), "span=0"),
        (lambda x: market_signals(x, window=10, state=market_signals(x)[1]), "remembers 20 values, but window=10"),
    ],
)
def test_misuse_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(walk(1, 60))


def test_half_precision_is_widened():
    assert torch.tensor(300.0, dtype=torch.bfloat16) == torch.tensor(301.0, dtype=torch.bfloat16)
    assert as_series(torch.ones(1, 5, dtype=torch.bfloat16)).dtype == torch.float32


def test_windows_are_relative_to_their_newest_point():
    windows = from_start(torch.tensor([[5.0, 6.0, 8.0, 8.0]]), window=2)
    assert windows.values[0].T.tolist() == [[0, 0, 0], [0, -1, 0], [-3, -2, 0], [-2, 0, 0]]
    assert windows.count.tolist() == [[1, 2, 3, 3]]


def test_trends_are_the_formula_in_numpy():
    x = walk(1, 1100)
    assert trend_strength(x)[0, 1000].item() == pytest.approx(trend_of(x[0, 980:1001].numpy()), abs=1e-12)
    published = trend_strength(x, rule="published")[0, 1000].item()
    assert published == pytest.approx(trend_of(x[0].numpy()), abs=1e-9)
    assert trend_strength(x)[0, :20].tolist() == [0.5] * 20
