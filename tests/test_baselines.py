"""Contenders against numbers from outside: statsmodels, brute force, and series whose answer is known."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from statsmodels.api import OLS, add_constant

from smlstm.data.variance import variance_proxy
from smlstm.judging.baselines import (
    add_baselines,
    boosted_forecast,
    garch_variance,
    leverage_har_variance,
    linear_forecast,
    range_garch_variance,
    tuned_ewma_variance,
)


@pytest.fixture(scope="module")
def prices():
    "Calm and wild days by turns, with falls that are larger than rises."
    rng, n = np.random.default_rng(3), 900
    move = 0.01 * np.exp(np.sin(np.arange(n) / 40)) * (rng.standard_normal(n) - 0.3 * (rng.random(n) < 0.1))
    close = 100 * np.exp(move.cumsum())
    wide = 1 + np.abs(0.5 * move) + 0.001
    frame = pd.DataFrame({"open": np.r_[100, close[:-1]], "close": close}, pd.bdate_range("2018-01-01", periods=n))
    both = frame[["open", "close"]]
    return frame.assign(high=both.max(axis=1) * wide, low=both.min(axis=1) / wide, volume=1e6).rename_axis("date")


@pytest.fixture(scope="module")
def table():
    "Features, and a variance that is the reference times exp(0.3): nothing is left for the features."
    rng, index = np.random.default_rng(0), pd.bdate_range("2015-01-01", periods=700)
    features = pd.DataFrame(rng.normal(size=(700, 4)), index)
    reference = pd.Series(np.exp(rng.normal(-9, 1, 700)), index)
    targets = pd.DataFrame({"log_return": rng.normal(0, 0.01, 700)}, index)
    targets["up"] = (targets.log_return > 0).astype(float)
    return features, targets.assign(log_variance=np.log(reference) + 0.3), reference


@pytest.mark.parametrize("forecaster", [linear_forecast, boosted_forecast])
def test_variance_is_measured_against_the_reference(table, forecaster):
    if forecaster is boosted_forecast:
        pytest.importorskip("lightgbm")
    features, targets, reference = table
    train, test = slice(0, 500), slice(501, 700)
    known = forecaster(features, targets, train, test, reference=reference).variance
    np.testing.assert_allclose(known, reference.iloc[test] * np.exp(0.3), rtol=1e-6)
    without = forecaster(features, targets, train, test).variance
    assert np.log(without).std() < 0.5 < np.log(known).std()  # the features know nothing of the reference
    same = forecaster(features, targets, train, test, reference=0 * reference + 4.0).variance
    np.testing.assert_allclose(same, without, rtol=1e-6)  # a constant reference changes nothing


@pytest.mark.parametrize("horizon", [1, 3])
def test_tuned_decay_by_brute_force(prices, horizon):
    proxy, train, decays = variance_proxy(prices), slice(0, 600), (0.8, 0.9, 0.97)
    ahead = sum(proxy.shift(-k) for k in range(1, horizon + 1)) / horizon
    found = {}
    for decay in decays:
        weights = decay ** np.arange(900)
        mean = [np.average(proxy[1 : t + 1], weights=weights[:t][::-1]) if t else np.nan for t in range(900)]
        ratio = (ahead / pd.Series(mean, proxy.index)).iloc[1:600].dropna()
        scale = ratio.mean()
        loss = np.mean(ratio / scale - np.log(ratio / scale) - 1)
        found[loss] = scale * pd.Series(mean, proxy.index)
    best = tuned_ewma_variance(proxy, train, horizon, decays)
    np.testing.assert_allclose(best[1:], found[min(found)][1:], rtol=1e-9)
    assert len({round(loss, 4) for loss in found}) == 3  # the decays do differ


def test_leverage_is_the_regression_of_statsmodels(prices):
    proxy, move = variance_proxy(prices), np.log(prices.close).diff()
    deviation = np.sqrt(proxy.ewm(alpha=0.06).mean())
    columns = {}
    for n in (1, 5, 22):
        mean = move.rolling(n).sum() / deviation / np.sqrt(n)
        columns |= {f"v{n}": np.log(proxy.rolling(n).mean()), f"down{n}": mean.where(mean < 0, 0.0)}
        columns |= {f"up{n}": mean.where(mean > 0, 0.0)}
    x = add_constant(pd.DataFrame(columns)[22:])
    fit = OLS(np.log(proxy).shift(-1)[22:600], x[: 600 - 22]).fit()
    raw = np.exp(fit.predict(x))
    expected = raw * (proxy.shift(-1)[22:600] / raw[: 600 - 22]).mean()
    np.testing.assert_allclose(leverage_har_variance(prices.close, proxy, slice(0, 600))[22:], expected, rtol=1e-7)
    assert fit.params["down1"] < 0 and abs(fit.params["down1"] + fit.params["up1"]) > 0.01  # both signs count


@pytest.mark.parametrize("horizon", [1, 3])
def test_range_garch_by_its_quasi_likelihood(horizon):
    "Parameters by a search in numpy, the recursion and the mean of the bars ahead by hand; arch has no part in it."
    rng, h, v = np.random.default_rng(5), 1.0, []
    down = rng.random(3_000) < 0.5
    for fell, draw in zip(down, rng.chisquare(6, 3_000) / 6):
        v.append(h * draw)
        h = 0.06 + (0.08 + 0.16 * fell) * v[-1] + 0.78 * h
    v = np.array(v)

    def path(parameters):
        "Conditional variance of each row, and that of the one after the last."
        omega, alpha, gamma, beta = parameters
        h = [v[:1_500].mean()]
        for value, fell in zip(v, down):
            h.append(omega + (alpha + gamma * fell) * value + beta * h[-1])
        return np.array(h)

    def quasi(parameters):
        h = path(parameters)[:1_500]
        return np.mean(np.log(h) + v[:1_500] / h) if (h > 0).all() else 1e9

    omega, alpha, gamma, beta = found = minimize(quasi, [0.1, 0.1, 0.1, 0.7], method="Nelder-Mead", tol=1e-9).x
    next_one, steps = path(found)[1:], []
    for _ in range(horizon):
        steps.append(next_one)
        next_one = omega + (alpha + gamma / 2 + beta) * next_one
    expected = np.mean(steps, 0)
    ahead = np.convolve(v, np.ones(horizon) / horizon, "valid")[1:]
    expected *= np.mean(ahead[:1_500] / expected[:1_500])
    close = pd.Series(100 * np.exp(np.cumsum(np.where(down, -0.01, 0.01))))
    got = range_garch_variance(close, pd.Series(1e-4 * v), slice(0, 1_500), horizon).to_numpy() * 1e4
    assert gamma > 0.08
    np.testing.assert_allclose(
        got[50:], expected[50:], rtol=2e-3
    )  # the first rows depend on where the recursion starts


def test_contenders_are_fitted_before_their_fold(prices):
    "Drift, constant variance and share of rises are means over the bars whose outcome was known at the fold's start."
    frame = pd.DataFrame({"date": prices.index[500:700], "close": prices.close.iloc[500:700], "fold": 4})
    for horizon in (1, 5):
        columns = add_baselines(frame.reset_index(drop=True), prices, horizon=horizon).iloc[0]
        outcome = np.log(prices.close.shift(-horizon) / prices.close)[: 500 - horizon]
        assert columns.drift_close / columns.close == pytest.approx(np.exp(outcome.mean()), rel=1e-12)
        assert columns.share_probability == pytest.approx((outcome > 0).mean())


def test_gaps_after_the_training_rows_change_no_fit():
    r, dates = np.random.default_rng(0), pd.bdate_range("2015-01-01", periods=600)
    close = pd.Series(100 * np.exp(np.cumsum(0.01 * r.normal(size=600))), dates)
    proxy = pd.Series(1e-4 * r.chisquare(3, 600) / 3, dates)
    holes, missing = proxy.copy(), close.copy()
    holes.iloc[450:550] = missing.iloc[450:550] = np.nan
    whole, broken = (range_garch_variance(close, p, slice(100, 400)) for p in (proxy, holes))
    pd.testing.assert_series_equal(whole[:450], broken[:450])
    whole, broken = (garch_variance(c, proxy, slice(100, 400)) for c in (close, missing))
    pd.testing.assert_series_equal(whole[:450], broken[:450])


@pytest.mark.parametrize("forecast", [garch_variance, range_garch_variance])
@pytest.mark.parametrize("train, held", [(slice(300, 300), 0), (slice(300, 319), 19), (slice(0, 0), 0)])
def test_garch_refuses_rows_that_it_cannot_be_fitted_to(prices, forecast, train, held):
    with pytest.raises(ValueError, match=f"{held} values: GARCH needs 20"):
        forecast(prices.close, variance_proxy(prices), train)
