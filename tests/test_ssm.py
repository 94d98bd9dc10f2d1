"""The state space model: discretization to the last digit, chunks against the loop, any cut, half precision, export."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from smlstm.model.numerics import exprel
from smlstm.model.ssm import (
    FASTEST,
    MarketClock,
    SSMCoefficients,
    StructuredStateSpace,
    decay_between,
    discretize,
    initial_shares,
    ssm_chunkwise,
    ssm_recurrent,
)

F64 = torch.float64
METHODS = pytest.mark.parametrize("method", ["zoh", "bilinear"])


def case(B, T, D, N, seed, requires_grad=False):
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=random, dtype=F64)
    parts = [draw(B, T, D), draw(B, N, D), -2 * draw(B, T, N) ** 2, draw(B, T, N), draw(N), draw()]
    return [x.requires_grad_(requires_grad) for x in parts]


def run(form, u, state, *coefficients, **options):
    return form(u, SSMCoefficients(*coefficients), state, **options)


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 60),
    D=st.integers(1, 3),
    N=st.integers(1, 4),
    chunk=st.integers(1, 70),
    seed=st.integers(0, 999),
)
def test_chunks_are_the_loop(B, T, D, N, chunk, seed):
    parts = case(B, T, D, N, seed, requires_grad=True)
    slow, fast = run(ssm_recurrent, *parts), run(ssm_chunkwise, *parts, chunk_size=chunk)
    for a, b in zip(slow, fast):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    gradients = [torch.autograd.grad((y * torch.cos(y)).sum() + x.square().sum(), parts) for y, x in (slow, fast)]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 99), max_size=5, unique=True), method=st.sampled_from(["zoh", "bilinear"]))
def test_any_cut(cuts, method):
    torch.manual_seed(0)
    ssm = StructuredStateSpace(3, method).double()
    u, volatility, trend = (
        torch.randn(2, 100, 2, dtype=F64),
        4 * torch.rand(2, 100, dtype=F64),
        0.5 + torch.rand(2, 100, dtype=F64) / 2,
    )
    whole, last = ssm(u, volatility, trend)
    state, pieces, edges = None, [], [0, *sorted(cuts), 100]
    for start, end in zip(edges, edges[1:]):
        y, state = ssm(u[:, start:end], volatility[:, start:end], trend[:, start:end], state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(state, last, atol=1e-12, rtol=0)


def test_the_future_does_not_reach_back():
    torch.manual_seed(0)
    ssm = StructuredStateSpace()
    u, volatility, trend = torch.randn(1, 90, 2), torch.rand(1, 90) * 3, 0.5 + torch.rand(1, 90) / 2
    before = ssm(u, volatility, trend)[0][:, :50].clone()
    for x in (u, volatility, trend):
        x[:, 50:] = 0.7
    assert torch.equal(ssm(u, volatility, trend)[0][:, :50], before)


@settings(max_examples=60, deadline=None)
@given(exponent=st.floats(-14, 0.6), dt=st.sampled_from([0.01, 0.3, 1.0]))
def test_zoh_against_exact_rationals(exponent, dt):
    z = -(10.0**exponent) * dt
    exact = sum((Fraction(z) ** k / math.factorial(k + 1) for k in range(60)), Fraction(0)) * Fraction(dt)
    b = discretize(torch.tensor(-(10.0**exponent), dtype=F64), torch.tensor(dt, dtype=F64)).b.item()
    assert b == pytest.approx(float(exact), rel=1e-14, abs=0)


@METHODS
@pytest.mark.parametrize("lam", [0.0, -1e-12, -1e-3, -0.0999, -0.1, -0.1001, -5.0])
def test_gradients_of_one_step(method, lam):
    arguments = tuple(torch.tensor(x, dtype=F64, requires_grad=True) for x in (lam, 1.0))
    assert torch.autograd.gradcheck(lambda lam, dt: tuple(discretize(lam, dt, method)), arguments)


def test_bilinear_is_the_specifications():
    lam, dt = -3 * torch.rand(50, dtype=F64), torch.rand(50, dtype=F64)
    a, b = discretize(lam, dt, "bilinear")
    torch.testing.assert_close(a, (2 + dt * lam) / (2 - dt * lam), atol=1e-14, rtol=0)
    torch.testing.assert_close(b, dt * (1 + a) / 2, atol=1e-14, rtol=0)


@METHODS
def test_coefficients_are_the_discretization(method):
    ssm = StructuredStateSpace(5, method).double()
    volatility, trend = 4 * torch.rand(2, 30, dtype=F64), 0.5 + torch.rand(2, 30, dtype=F64) / 2
    a, b = discretize(ssm.lam, ssm.step_size(volatility, trend).unsqueeze(-1), method)
    coefficients = ssm.coefficients(volatility, trend)
    torch.testing.assert_close(coefficients.log_decay.exp(), a, atol=1e-13, rtol=0)
    torch.testing.assert_close(coefficients.B_bar, ssm.b * b, atol=1e-13, rtol=0)


def test_discretize_broadcasts():
    a, b = discretize(-torch.rand(4), torch.rand(2, 7, 1), "bilinear")
    assert a.shape == b.shape == (2, 7, 4)


@METHODS
@settings(max_examples=30, deadline=None)
@given(
    push=st.floats(-1e4, 1e4),
    volatility=st.floats(0, 1e8),
    trend=st.floats(0.5, 1),
    dt_max=st.sampled_from([0.02, 1.0, 50.0]),
)
def test_stable_whatever_is_learned(method, push, volatility, trend, dt_max):
    ssm = StructuredStateSpace(3, method, dt_min=0.01, dt_max=dt_max)
    for p in (ssm.rate, ssm.clock.weights):
        p.data.fill_(push)
    signals = torch.full((1, 4), volatility), torch.full((1, 4), trend)
    dt = ssm.step_size(*signals)
    assert (dt >= 0.01 * (1 - 1e-6)).all() and (dt <= dt_max * (1 + 1e-6)).all()
    assert (ssm.lam * dt.max() >= -FASTEST * (1 + 1e-6)).all()
    coefficients = ssm.coefficients(*signals)
    assert coefficients.log_decay.isfinite().all() and (coefficients.log_decay <= 0).all()
    y, state = ssm(torch.randn(1, 4, 2), *signals)
    y.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ssm.parameters())


@METHODS
@pytest.mark.parametrize("push", [-300.0, 300.0])
def test_stable_in_bfloat16(method, push):
    ssm = StructuredStateSpace(3, method).bfloat16()
    for p in (ssm.rate, ssm.clock.weights):
        p.data.fill_(push)
    coefficients = ssm.coefficients(*(torch.linspace(low, 3, 50, dtype=torch.bfloat16)[None] for low in (0, 0.5)))
    assert coefficients.log_decay.isfinite().all() and (coefficients.log_decay <= 0).all()


def test_the_start():
    ssm = StructuredStateSpace(6).double()
    one, half = torch.ones(1, 1, dtype=F64), torch.full((1, 1), 0.5, dtype=F64)
    dt = ssm.step_size(one, half).item()
    assert dt == pytest.approx(0.01**0.25, rel=1e-6)
    half_lives = (math.log(2) / (-ssm.lam * dt)).tolist()
    assert 1 < half_lives[0] < 1.5 and half_lives[-1] == pytest.approx(100, rel=1e-4)
    ratios = [b / a for a, b in zip(half_lives, half_lives[1:])]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-4)
    a, b = ssm.coefficients(one, half).log_decay.exp(), ssm.coefficients(one, half).B_bar
    torch.testing.assert_close(b, 1 - a, atol=1e-6, rtol=0)  # an exponential moving average
    u = torch.randn(1, 30, 2, dtype=F64)
    torch.testing.assert_close(ssm(u)[0], ssm(u, torch.ones(1, 30, dtype=F64), torch.full((1, 30), 0.5, dtype=F64))[0])
    assert (ssm(u)[0] - u).abs().max() < 0.2 * u.abs().max()
    assert (ssm.step_size(2 * one, half) > dt).all() and (ssm.step_size(one, 2 * half) < dt).all()


@METHODS
def test_bfloat16_is_computed_in_float32(method):
    torch.manual_seed(0)
    ssm = StructuredStateSpace(4, method)
    u, volatility, trend = torch.randn(2, 300, 3), 2 * torch.rand(2, 300), 0.5 + torch.rand(2, 300) / 2
    y, state = ssm(u.bfloat16(), volatility, trend)
    wanted, last = ssm(u.bfloat16().float(), volatility, trend)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(y, wanted.bfloat16())
    torch.testing.assert_close(state, last)
    low = StructuredStateSpace(4, method).bfloat16()
    y, _ = low(u.bfloat16(), volatility.bfloat16(), trend.bfloat16())
    assert y.isfinite().all()
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in low.parameters())


def test_float32_stays_close_over_4096_steps():
    torch.manual_seed(0)
    ssm = StructuredStateSpace()
    ssm.c.data.fill_(1.0)
    u, volatility, trend = torch.randn(1, 4096, 2), 4 * torch.rand(1, 4096), 0.5 + torch.rand(1, 4096) / 2
    y, _ = ssm(u, volatility, trend)
    wanted, _ = ssm.double()(u.double(), volatility.double(), trend.double())
    assert ((y - wanted).abs().max() / wanted.abs().max()) < 1e-5


@METHODS
def test_exports_with_a_dynamic_batch(method):
    ssm = StructuredStateSpace(method=method)
    arguments = lambda B: (torch.randn(B, 40, 3), torch.rand(B, 40), 0.5 + torch.rand(B, 40) / 2, torch.randn(B, 4, 3))
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(ssm, arguments(3), dynamic_shapes=(batch,) * 4)
    for B in (1, 5):
        inputs = arguments(B)
        for got, wanted in zip(program.module()(*inputs), ssm(*inputs)):
            torch.testing.assert_close(got, wanted)


def test_state_dict_goes_round():
    torch.manual_seed(0)
    ssm, other, u = StructuredStateSpace(), StructuredStateSpace(), torch.randn(1, 20, 2)
    for p in ssm.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    other.load_state_dict(ssm.state_dict())
    assert torch.equal(ssm(u)[0], other(u)[0])


def test_mistakes_are_named():
    u = torch.randn(2, 5, 3)
    ssm = StructuredStateSpace()
    with pytest.raises(ValueError, match="'euler' is unknown"):
        StructuredStateSpace(method="euler")
    with pytest.raises(ValueError, match="n_states=0"):
        StructuredStateSpace(0)
    with pytest.raises(ValueError, match="dt_min=1"):
        MarketClock(1.0, 1.0)
    with pytest.raises(ValueError, match="need \\[B, T, D\\]"):
        ssm(u[0], torch.ones(2, 5), torch.ones(2, 5))
    with pytest.raises(ValueError, match="T >= 1"):
        ssm(u[:, :0])
    with pytest.raises(ValueError, match=r"need \[B, N, D\] = \(2, 4, 3\)"):
        ssm(u, state=torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match="coefficients are for"):
        ssm(u, torch.ones(2, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="chunk_size=0"):
        ssm_chunkwise(u, ssm.coefficients(torch.ones(2, 5), torch.ones(2, 5)), chunk_size=0)


def test_the_order_of_accuracy():
    "Without input ZOH is exact, bilinear of second order; a held input limits both to the first, a mean does not."

    def error_at_ten(method, dt, inflow, lam=-0.8):
        a, b = discretize(torch.tensor(lam, dtype=F64), torch.tensor(dt, dtype=F64), method)
        t = torch.arange(1, round(10 / dt) + 1, dtype=F64) * dt
        u = {"none": 0 * t, "held": torch.sin(t), "mean": (torch.sin(t) + torch.sin(t - dt)) / 2}[inflow]
        x = a ** len(t) + (b * u * a ** torch.arange(len(t) - 1, -1, -1)).sum()  # starts from level 1
        wave = 0.0 if inflow == "none" else 1.0
        settled = lambda t: wave * (-lam * math.sin(t) - math.cos(t)) / (1 + lam**2)
        return abs(x.item() - (settled(10.0) + (1 - settled(0.0)) * math.exp(lam * 10)))

    for method in ("zoh", "bilinear"):
        for inflow in ("none", "held", "mean"):
            coarse, fine = (error_at_ten(method, dt, inflow) for dt in (0.5 * 2.0**-6, 0.5 * 2.0**-7))
            if (method, inflow) == ("zoh", "none"):
                assert max(coarse, fine) < 1e-15
            else:
                assert abs(math.log2(coarse / fine) - (1 if inflow == "held" else 2)) < 0.05


def test_the_bilinear_decay_is_positive_below_two():
    one = torch.tensor(1.0, dtype=F64)
    signs = [bool(discretize(torch.tensor(z, dtype=F64), one, "bilinear").a > 0) for z in (-1.99, -2.01)]
    assert signs == [True, False]
    steps = torch.arange(13)
    zoh = discretize(torch.tensor(-8.0, dtype=F64), one).a ** steps
    torch.testing.assert_close(zoh, torch.exp(-8.0 * steps.double()), rtol=0, atol=1e-12)


def test_decays_between_steps_and_their_gradients_are_finite():
    "A product of exponentials would be infinity times zero after 45 such steps."
    log_decay = torch.full((64,), -2.0)
    total = log_decay.cumsum(0)
    assert (total.exp()[:, None] * (-total).exp()).isnan().any()
    log_decay.requires_grad_()
    decays = decay_between(log_decay[:, None])[..., 0]
    decays.sum().backward()
    torch.testing.assert_close(decays.detach()[5, :6], torch.exp(-2.0 * torch.arange(5, -1, -1)), rtol=0, atol=1e-6)
    assert decays.isfinite().all() and log_decay.grad.isfinite().all()


def test_twice_the_length_is_twice_the_arithmetic():
    def multiplications(T, chunk_size):
        u, state, *coefficients = case(1, T, 4, 3, seed=T)
        with FlopCounterMode(display=False) as counter:
            ssm_chunkwise(u, SSMCoefficients(*coefficients), state, chunk_size)
        return counter.get_total_flops()

    assert multiplications(1024, 64) / multiplications(512, 64) == 2


def test_the_step_size_has_bounds_and_a_base():
    clock = MarketClock().double()
    base = clock(torch.tensor(1.0, dtype=F64), torch.tensor(0.5, dtype=F64))
    assert abs(base.item() - 0.01**0.25) < 1e-7
    extremes = clock(torch.tensor([0.0, 1e9], dtype=F64), torch.tensor([1.0, 0.5], dtype=F64))
    assert ((extremes > clock.dt_min) & (extremes < clock.dt_max)).all()
    half_lives = math.log(2) / (initial_shares(4, base.item(), 1.0).double() * FASTEST * base)
    assert abs(half_lives[-1].item() - 100) < 1e-3 and 1 < half_lives[0].item() < 1.5
    with pytest.raises(ValueError, match="0 < dt_min < dt_max"):
        MarketClock(1.0, 0.1)
    with pytest.raises(ValueError, match="'euler' is unknown"):
        discretize(base, base, "euler")


@METHODS
def test_decays_and_gradients_are_finite_at_extremes(method):
    torch.manual_seed(0)
    ssm = StructuredStateSpace(5, method).double()
    volatility, trend = torch.rand(2, 50, dtype=F64) * 4, 0.5 + torch.rand(2, 50, dtype=F64) / 2
    for extreme in (-1e4, 1e4):
        for p in (ssm.rate, ssm.clock.weights):
            p.data.fill_(extreme)
        coefficients = ssm.coefficients(volatility, trend)
        assert (coefficients.log_decay.isfinite() & (coefficients.log_decay <= 0)).all()
        gradients = torch.autograd.grad(
            coefficients.log_decay.sum() + coefficients.B_bar.sum(), (ssm.rate, ssm.b, ssm.clock.weights)
        )
        assert all(g.isfinite().all() for g in gradients)


def test_every_parameter_has_a_gradient():
    torch.manual_seed(0)
    ssm = StructuredStateSpace(method="bilinear")
    y, _ = ssm(torch.randn(2, 50, 3), torch.rand(2, 50) * 4, 0.5 + torch.rand(2, 50) / 2)
    y.square().sum().backward()
    assert all((p.grad != 0).all() for p in ssm.parameters())


@pytest.mark.parametrize("z", [-3.0, -0.11, -0.09, -1e-3, -1e-9, 0.0, 0.09, 0.5])
def test_exprel_and_its_slope_are_their_series(z):
    "sum of z^k / (k + 1)!, and its derivative, in fractions."
    exact = Fraction(z)
    value = sum(exact**k / math.factorial(k + 1) for k in range(40))
    slope = sum(k * exact ** (k - 1) / math.factorial(k + 1) for k in range(1, 40))
    x = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(exprel(x), x)
    assert exprel(x).item() == pytest.approx(float(value), rel=1e-14)
    assert gradient.item() == pytest.approx(float(slope), rel=1e-13)
