"""Metrics against their definitions written out, and against scikit-learn where it has them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, mean_absolute_percentage_error

from smlstm.judging.metrics import (
    base_rate,
    brier,
    directional_accuracy,
    expected_calibration_error,
    hit_rate,
    mape,
    qlike,
    qlike_loss,
    qlike_scale,
    regime_distribution,
    reliability_curve,
)

seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(2, 60))
@settings(max_examples=50, deadline=None)
def test_against_definitions(seed, n):
    rng = np.random.default_rng(seed)
    actual, forecast = rng.uniform(1, 2, (2, n))
    up, probability = (rng.random(n) < 0.6).astype(float), rng.random(n)
    assert mape(actual, forecast) == pytest.approx(100 * mean_absolute_percentage_error(actual, forecast))
    right = sum(np.sign(actual[t + 1] - actual[t]) == np.sign(forecast[t + 1] - forecast[t]) for t in range(n - 1))
    assert directional_accuracy(actual, forecast) == pytest.approx(100 * right / (n - 1))
    assert hit_rate(up, probability) == pytest.approx(sum((p > 0.5) == bool(u) for p, u in zip(probability, up)) / n)
    assert brier(up, probability) == pytest.approx(
        brier_score_loss(up, probability) if len(set(up)) > 1 else np.mean((up - probability) ** 2)
    )
    assert 0.5 <= base_rate(up) <= 1
    assert qlike(actual, forecast) == pytest.approx(np.mean(actual / forecast - np.log(actual / forecast) - 1))


@given(seeds, st.integers(1, 300), st.integers(1, 20), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_reliability_counts_every_row_once(seed, n, bins, levels):
    rng = np.random.default_rng(seed)
    probability = rng.integers(0, levels + 1, n) / levels  # many ties
    up = (rng.random(n) < probability).astype(float)
    curve = reliability_curve(up, probability, bins)
    assert curve.rows.sum() == n and len(curve.rows) <= max(bins, 1)
    assert np.average(curve.frequency, weights=curve.rows) == pytest.approx(up.mean())
    assert np.average(curve.probability, weights=curve.rows) == pytest.approx(probability.mean())
    for value in np.unique(probability):  # equal probabilities share a bin
        assert len({int(np.argmin(np.abs(curve.probability - p))) for p in probability[probability == value]}) == 1
    assert 0 <= expected_calibration_error(up, probability, bins) <= 1


def test_bins_of_unequal_size_by_hand():
    "Three equal forecasts share the lower of two bins, and count three times in the calibration error."
    up, probability = [1, 1, 1, 1], [0.1, 0.1, 0.1, 0.9]
    curve = reliability_curve(up, probability, bins=2)
    assert curve.rows.tolist() == [3, 1] and curve.probability.tolist() == pytest.approx([0.1, 0.9])
    assert expected_calibration_error(up, probability, bins=2) == pytest.approx((3 * 0.9 + 1 * 0.1) / 4)
    assert expected_calibration_error([1, 0, 1, 1], probability, bins=2) == pytest.approx(
        (3 * abs(2 / 3 - 0.1) + 0.1) / 4
    )


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_scale_is_the_best_scale(seed):
    rng = np.random.default_rng(seed)
    proxy, forecast = np.exp(rng.normal(size=(2, 50)))
    scale = qlike_scale(proxy, forecast)
    at = lambda c: qlike(proxy, c * forecast)
    assert at(scale) <= min(at(0.99 * scale), at(1.01 * scale))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: mape([], []), "empty"),
        (lambda: mape([1, 2, 3], [1, 2]), "forecast has 2 values, actual has 3"),
        (lambda: mape([1, 0], [1, 1]), "actual is 0 at row 1"),
        (lambda: directional_accuracy([1], [1]), "at least 2 rows"),
        (lambda: hit_rate([1, 0], [0.1, np.inf]), "probability is inf at row 1"),
        (lambda: hit_rate([1, 0.5], [0.1, 0.2]), "up holds 0.5"),
        (lambda: brier([1, 0], [-0.1, 0.2]), "[0, 1]"),
        (lambda: qlike_loss([1, -1], [1, 1]), "proxy is -1 at row 1"),
        (lambda: qlike_loss([1, 1], [1, 0]), "forecast is 0 at row 1"),
        (lambda: regime_distribution(np.zeros((0, 4))), "shape (0, 4)"),
        (lambda: regime_distribution([[0.5, 0.4]]), "sum to 0.9"),
        (lambda: regime_distribution([[1.5, -0.5]]), "non-negative"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)
