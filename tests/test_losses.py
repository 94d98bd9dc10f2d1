"""Losses over random inputs."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from smlstm.model.losses import (
    AsymmetricDirectionalLoss,
    CurriculumWeights,
    MultiObjectiveLoss,
    calibrated_probability,
    curriculum_weights,
    directional_loss,
    huber,
    masked_mean,
    weighted_cross_entropy,
)


class Outputs(NamedTuple):
    price: torch.Tensor
    direction: torch.Tensor
    volatility: torch.Tensor


def published(forecast, actual, up, down):
    """The directional loss, step by step."""
    total = 0.0
    for f, a in zip(forecast.tolist(), actual.tolist()):
        for t in range(len(f) - 1):
            moved, true = f[t + 1] - f[t], a[t + 1] - a[t]
            wrong = (moved > 0) - (moved < 0) != (true > 0) - (true < 0)
            total += wrong * (up if true > 0 else down if true < 0 else 0.0)
    return total / (forecast.shape[0] * (forecast.shape[1] - 1))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 5), st.floats(0.1, 5))
def test_the_directional_loss_is_the_published_one(seed, up, down):
    generator = torch.Generator().manual_seed(seed)
    forecast, actual = (torch.randint(0, 3, (2, 9), generator=generator).double() for _ in range(2))  # many ties
    assert directional_loss(forecast, actual, up, down).item() == pytest.approx(published(forecast, actual, up, down))
    assert AsymmetricDirectionalLoss(up, down, None)(forecast, actual).item() == pytest.approx(
        published(forecast, actual, up, down)
    )


def test_the_surrogate_has_the_right_gradient():
    torch.manual_seed(0)
    forecast, actual = torch.randn(2, 7).double().requires_grad_(), torch.randn(2, 7).double()
    assert torch.autograd.gradcheck(lambda f: AsymmetricDirectionalLoss(temperature=0.7)(f, actual), forecast)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=1, max_size=9), st.floats(0.01, 10))
def test_huber_is_torchs(errors, delta):
    error = torch.tensor(errors, dtype=torch.float64).requires_grad_()
    wanted = F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)
    assert torch.allclose(huber(error, delta), wanted, rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(huber(error, delta).sum(), error)
    assert torch.allclose(gradient, error.clamp(-delta, delta), atol=1e-9)


@pytest.mark.parametrize("p", [0.01, 0.4, 0.53, 0.99])
@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0, 7.0])
def test_calibration_undoes_the_weight(p, weight):
    """At the calibrated logit, the expected gradient of the weighted loss is zero."""
    logit = torch.tensor(p, dtype=torch.float64).logit() + torch.tensor(weight, dtype=torch.float64).log()
    logit.requires_grad_()
    expected = p * weighted_cross_entropy(logit, torch.tensor(1.0), weight) + (1 - p) * weighted_cross_entropy(
        logit, torch.tensor(0.0), weight
    )
    assert abs(torch.autograd.grad(expected, logit)[0].item()) < 1e-12
    assert calibrated_probability(logit, weight).item() == pytest.approx(p)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_extreme_outputs_give_finite_losses_and_gradients(size):
    outputs = Outputs(
        *(torch.tensor([[size, -size]]).requires_grad_() for _ in range(2)), torch.zeros(1, 2).requires_grad_()
    )
    found = MultiObjectiveLoss()(outputs, torch.tensor([[[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]))
    assert found.total.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.total, outputs))


def test_halves_add_up_to_the_whole():
    torch.manual_seed(0)
    y, outputs = torch.rand(6, 5, 3), Outputs(*torch.randn(3, 6, 5))
    loss = MultiObjectiveLoss()
    parts = [loss(Outputs(*(o[s] for o in outputs)), y[s]).total for s in (slice(0, 2), slice(2, 6))]
    assert loss(outputs, y).total.item() == pytest.approx((2 * parts[0] + 4 * parts[1]).item() / 6, rel=1e-5)


def test_masked_rows_do_not_count():
    assert masked_mean(torch.tensor([[1.0, 1.0], [float("inf")] * 2]), torch.tensor([1.0, 0.0])).item() == 1.0


def test_the_curriculum_is_the_specifications():
    for epoch in range(40):
        assert curriculum_weights(epoch) == CurriculumWeights(
            1.0, min(0.5 + epoch / 10, 2.0), min(0.2 + epoch / 20, 0.5)
        )


@pytest.mark.parametrize("bad", [{"pos_weight": 0}, {"huber_delta": -1.0}, {"pos_weight": float("nan")}])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        MultiObjectiveLoss(**bad)


def test_the_surrogate_needs_a_positive_temperature():
    with pytest.raises(ValueError, match="temperature must be positive"):
        AsymmetricDirectionalLoss(temperature=0.0)


def test_the_surrogate_has_a_gradient_at_every_step():
    forecast = torch.tensor([[100.0, 99.0, 100.0, 101.0, 100.0]], requires_grad=True)
    AsymmetricDirectionalLoss(temperature=0.5)(forecast, torch.tensor([[100.0, 101.0, 102.0, 101.0, 100.0]])).backward()
    assert (forecast.grad != 0).all()


def test_a_true_path_that_does_not_move_costs_nothing():
    actual = torch.tensor([[100.0, 101.0, 102.0, 101.0, 100.0]])
    assert directional_loss(actual, torch.full_like(actual, 100.0)).item() == 0


@pytest.mark.parametrize("delta", [0.5, 1.0, 3.0])
def test_huber_on_a_grid(delta):
    error = torch.linspace(-4, 4, 81)
    torch.testing.assert_close(huber(error, delta), F.huber_loss(error, 0 * error, reduction="none", delta=delta))


def test_the_cross_entropy_is_torchs():
    logit, up = torch.tensor([-200.0, -1.0, 0.0, 2.0, 200.0]), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    torch.testing.assert_close(
        weighted_cross_entropy(logit, up, 2.0),
        F.binary_cross_entropy_with_logits(logit, up, reduction="none", pos_weight=torch.tensor(2.0)),
    )
    assert calibrated_probability(torch.tensor([0.0]), pos_weight=1.0).item() == 0.5


@pytest.fixture
def batch():
    torch.manual_seed(0)
    y = torch.stack([torch.randn(4, 6), torch.randint(0, 2, (4, 6)).float(), torch.randn(4, 6)], dim=-1)
    return Outputs(*(torch.randn(4, 6, requires_grad=True) for _ in range(3))), y


FILLED = torch.tensor([1.0, 1.0, 1.0, 0.0])


def test_gradients_behind_a_mask_are_those_of_the_real_rows(batch):
    outputs, y = batch
    objective, epoch0 = MultiObjectiveLoss(), curriculum_weights(0)
    three = objective(Outputs(*(o[:3] for o in outputs)), y[:3], epoch0)
    wanted = torch.autograd.grad(three.total, outputs)
    y[3] = float("nan")
    masked = objective(outputs, y, epoch0, mask=FILLED)
    torch.testing.assert_close(masked.total, three.total)
    for one, other in zip(torch.autograd.grad(masked.total, outputs), wanted):
        torch.testing.assert_close(one[:3], other[:3])


@pytest.mark.parametrize("fill", [float("nan"), 0.0])
def test_a_filler_row_is_to_be_finite(batch, fill):
    "`torch.where` keeps a NaN out of the sum, not out of the filler row's own gradient."
    outputs, y = batch
    y[3] = fill
    total = MultiObjectiveLoss()(outputs, y, curriculum_weights(0), mask=FILLED).total
    sent_back = torch.autograd.grad(total, outputs[0])[0][3]
    assert sent_back.isnan().all() if fill != fill else (sent_back == 0).all()


def test_steps_that_count_twice_and_not_at_all(batch):
    "Weights of zero and two, half of each, are the mean over the steps of weight two."
    outputs, y = batch
    weight, objective = 2.0 * (torch.arange(6) % 2).expand(4, 6), MultiObjectiveLoss()
    half = objective(outputs, torch.cat([y, weight[..., None]], -1))
    odd = objective(Outputs(*(o[:, 1::2] for o in outputs)), y[:, 1::2])
    for one, other in zip(half, odd):
        torch.testing.assert_close(one, other)


def test_the_surrogate_of_a_low_temperature_is_the_published_form():
    g = torch.Generator().manual_seed(0)
    path, guess = (torch.randn(8, 200, generator=g).cumsum(1) for _ in range(2))
    exact = AsymmetricDirectionalLoss(temperature=None)(guess, path)
    gaps = [abs(AsymmetricDirectionalLoss(temperature=t)(guess, path) - exact).item() for t in (1.0, 0.1, 0.01, 1e-5)]
    assert gaps[-1] < 1e-6 and gaps[0] > 1e-3


def test_several_horizons_count_alike():
    "Targets [B, T, 6] of two horizons and heads [B, T, 2]: the mean of the losses of each alone."
    g, objective = torch.Generator().manual_seed(1), MultiObjectiveLoss()
    targets, heads = torch.randn(2, 4, 6, 3, generator=g), torch.randn(2, 3, 4, 6, generator=g)
    targets[..., 1] = (targets[..., 1] > 0).float()
    alone = [objective(Outputs(*own), y) for own, y in zip(heads, targets)]
    joint = objective(Outputs(*heads.permute(1, 2, 3, 0)), torch.cat([*targets], -1))
    for name in joint._fields:
        expected = sum(getattr(one, name) for one in alone) / 2
        torch.testing.assert_close(getattr(joint, name), expected)
