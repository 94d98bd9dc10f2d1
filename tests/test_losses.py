"""Losses over random inputs."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from smlstm.losses import (AsymmetricDirectionalLoss, CurriculumWeights, MultiObjectiveLoss, calibrated_probability, curriculum_weights,
                           directional_loss, huber, masked_mean, weighted_cross_entropy)


class Outputs(NamedTuple):
    price: torch.Tensor
    direction: torch.Tensor
    volatility: torch.Tensor


def letter(forecast, actual, up, down):
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
def test_the_directional_loss_is_the_letter(seed, up, down):
    generator = torch.Generator().manual_seed(seed)
    forecast, actual = (torch.randint(0, 3, (2, 9), generator=generator).double() for _ in range(2))       # many ties
    assert directional_loss(forecast, actual, up, down).item() == pytest.approx(letter(forecast, actual, up, down))
    assert AsymmetricDirectionalLoss(up, down, None)(forecast, actual).item() == pytest.approx(letter(forecast, actual, up, down))


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
    gradient, = torch.autograd.grad(huber(error, delta).sum(), error)
    assert torch.allclose(gradient, error.clamp(-delta, delta), atol=1e-9)


@pytest.mark.parametrize("p", [0.01, 0.4, 0.53, 0.99])
@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0, 7.0])
def test_calibration_undoes_the_weight(p, weight):
    """At the calibrated logit, the expected gradient of the weighted loss is zero."""
    logit = torch.tensor(p, dtype=torch.float64).logit() + torch.tensor(weight, dtype=torch.float64).log()
    logit.requires_grad_()
    expected = p * weighted_cross_entropy(logit, torch.tensor(1.0), weight) + (1 - p) * weighted_cross_entropy(logit, torch.tensor(0.0), weight)
    assert abs(torch.autograd.grad(expected, logit)[0].item()) < 1e-12
    assert calibrated_probability(logit, weight).item() == pytest.approx(p)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_extreme_outputs_give_finite_losses_and_gradients(size):
    outputs = Outputs(*(torch.tensor([[size, -size]]).requires_grad_() for _ in range(2)), torch.zeros(1, 2).requires_grad_())
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
        assert curriculum_weights(epoch) == CurriculumWeights(1.0, min(0.5 + epoch / 10, 2.0), min(0.2 + epoch / 20, 0.5))


@pytest.mark.parametrize("bad", [{"pos_weight": 0}, {"huber_delta": -1.0}, {"pos_weight": float("nan")}])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))): MultiObjectiveLoss(**bad)
