"""Quantiles, CRPS, value at risk and regressions: by hand, by integrals, scipy, statsmodels, a published table."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import integrate, stats

from smlstm.judging.distribution import (
    QUANTILES,
    pinball_loss,
    predictive_distribution,
    sample_crps,
    sample_pit,
    tail_mean,
)
from smlstm.judging.risk import acerbi_szekely_test, christoffersen_test, independence_test, kupiec_test
from smlstm.judging.score_details import (
    encompassing_test,
    encompassing_tests,
    evaluate_details,
    mincer_zarnowitz,
    scores_by_year,
)


@pytest.fixture(scope="module")
def forecasts():
    "Returns of changing, known scale with t-distributed errors, and their true scale as the forecast."
    rng, n = np.random.default_rng(0), 3000
    dates = pd.bdate_range("2000-01-03", periods=n + 1)
    variance = 1e-4 * np.exp(2 * np.sin(np.arange(n) / 40))
    close = 100 * np.exp(np.cumsum(np.r_[0, np.sqrt(variance) * rng.standard_t(5, n) / np.sqrt(5 / 3)]))
    frame = pd.DataFrame({"date": dates[:-1], "target_date": dates[1:], "close": close[:-1], "actual_close": close[1:]})
    frame = frame.assign(fold=1 + np.arange(n) * 3 // n, forecast_close=frame.close, forecast_variance=variance)
    frame = frame.assign(actual_variance=variance * rng.chisquare(5, n) / 5, ewma_variance=1e-4, regime_1=1.0)
    return frame.assign(up_probability=0.5, actual_up=(close[1:] > close[:-1]).astype(float))


def test_crps_is_the_integral_of_squared_differences():
    "Of the two distribution functions: that of the sample, and the step at the outcome."
    sample = np.sort(np.random.default_rng(1).standard_normal(30))
    for outcome in (-3.0, 0.2, 1.5):
        step = lambda z, y: (np.mean(sample <= z) - (z >= y)) ** 2
        expected = integrate.quad(step, -6, 6, (outcome,), points=[*sample, outcome], limit=500)[0]
        assert sample_crps(sample, outcome) == pytest.approx(expected, rel=1e-6)


def test_quantiles_by_hand():
    "Of 99 past errors those at 1, 5, 25, 50, 75, 95 and 99% are the 1st, 5th, 25th, 50th, 75th, 95th and 99th."
    n = 100
    rank = np.random.default_rng(2).permutation(99) + 1.0
    dates = pd.date_range("2000-01-03", periods=n + 1)
    frame = pd.DataFrame(
        {"date": dates[:-1], "target_date": dates[1:], "fold": 1, "close": 1.0, "forecast_close": 1.01}
    )
    frame = frame.assign(forecast_variance=4e-4, actual_close=1.01 * np.exp(0.02 * (np.r_[rank, 7.5] - 50) / 20))
    frame = frame.assign(up_probability=0.5, actual_up=1.0, actual_variance=1.0, ewma_variance=1.0, regime_1=1.0)
    made = predictive_distribution(frame, minimum=99)
    assert len(made) == 1
    row = made.iloc[0]
    in_units = lambda k: np.log(1.01) + 0.02 * (k - 50) / 20
    for p in QUANTILES:
        assert row[f"q{p:g}"] == pytest.approx(in_units(100 * p), abs=1e-12)
    assert row["es0.05"] == pytest.approx(in_units(3)) and row["es0.01"] == pytest.approx(in_units(1))
    assert row.pit == pytest.approx(7.5 / 100) and row.log_return == pytest.approx(in_units(7.5))


def test_only_errors_known_by_then_count(forecasts):
    "Over three bars: the error of a row is known three rows later, and moves the quantiles from there on alone."
    first = predictive_distribution(forecasts, horizon=3)
    changed = forecasts.copy()
    changed.loc[1000, "actual_close"] *= 1.5
    second = predictive_distribution(changed, horizon=3)
    moved = (first.filter(regex="^q|^es") != second.filter(regex="^q|^es")).any(axis=1)
    assert first.index[0] == 252 and moved.idxmax() == 1003 and moved.loc[1003:1500].mean() > 0.9


def test_the_true_scale_gives_a_flat_transform(forecasts):
    "And shares below each quantile near their nominal ones; a constant scale gives neither."
    made = predictive_distribution(forecasts)
    assert stats.kstest(made.pit, "uniform").pvalue > 0.05
    details = evaluate_details(forecasts)
    assert all(abs(row["below"] - row["quantile"]) < 0.015 for row in details["quantiles"])
    assert all(row["pinball"] < row["pinball_ewma"] for row in details["quantiles"] if row["quantile"] != 0.5)
    assert set(details["mincer_zarnowitz"]) == {"model"}  # the other forecast is constant
    assert details["crps"]["model"] < details["crps"]["ewma"] and details["crps"]["p_value"] < 0.001
    assert min(row[name] for row in details["risk"] for name in ("kupiec", "christoffersen", "acerbi_szekely_p")) > 0.01
    constant = predictive_distribution(forecasts.assign(forecast_variance=1e-4), window=3000)
    assert independence_test(constant.log_return < constant["q0.05"]).p_value < 0.05


@pytest.mark.parametrize(
    "n, p, least, most",
    [(255, 0.01, 1, 6), (510, 0.01, 2, 10), (1000, 0.01, 5, 16)]
    + [(255, 0.05, 7, 20), (510, 0.05, 17, 35), (1000, 0.05, 38, 64)],
)
def test_the_published_table_of_kupiec(n, p, least, most):
    "Numbers of exceedances that are not rejected at 5% (Kupiec, 1995; Jorion, 2007, table 6-2)."
    kept = [x for x in range(1, n // 5) if kupiec_test(np.arange(n) < x, p).p_value > 0.05]
    assert (kept[0], kept[-1]) == (least, most)


def test_kupiec_without_an_exceedance():
    "Twice n times the log of 1 / (1 - p)."
    assert kupiec_test(np.zeros(250), 0.01).statistic == pytest.approx(-2 * 250 * np.log(0.99))


def test_christoffersen_is_a_likelihood_ratio_of_a_table():
    rng = np.random.default_rng(3)
    exceeded = rng.random(800) < np.repeat(rng.choice([0.02, 0.25], 40), 20)
    table = pd.crosstab(exceeded[:-1], exceeded[1:]).to_numpy()
    g = stats.chi2_contingency(table, correction=False, lambda_="log-likelihood")
    assert independence_test(exceeded) == pytest.approx((g.statistic, g.pvalue))
    both = christoffersen_test(exceeded, 0.05)
    assert both.statistic == pytest.approx(g.statistic + kupiec_test(exceeded, 0.05).statistic)
    assert both.p_value == pytest.approx(stats.chi2.sf(both.statistic, 2), rel=1e-9, abs=0)


def test_acerbi_szekely_by_hand():
    "Four days at 50%: two below, of -3 and -1, where -2 was forecast on average: as bad as it should be."
    test = acerbi_szekely_test(np.array([-3.0, 1.0, -1.0, 2.0]), np.full(4, -0.5), np.full(4, -2.0), 0.5)
    assert test.statistic == pytest.approx(0)
    worse = acerbi_szekely_test(np.array([-3.0, 1.0, -3.0, 2.0]), np.full(4, -0.5), np.full(4, -2.0), 0.5)
    assert worse.statistic == pytest.approx(1 - 6 / (4 * 0.5 * 2))


def test_pieces_by_hand():
    assert pinball_loss([2.0, -1.0], [1.0, 1.0], 0.1) == pytest.approx([0.1, 1.8])
    assert sample_pit(np.array([1.0, 2.0, 4.0]), 3.0) == pytest.approx(2.5 / 4)
    assert tail_mean(np.array([-4.0, -2.0, 1.0]), -2.0) == -3 and tail_mean(np.array([1.0, 2.0]), 0.0) == 1


def test_mincer_zarnowitz_against_statsmodels():
    rng = np.random.default_rng(4)
    forecast = np.exp(rng.normal(-9, 0.5, 1000))
    measured = 2e-5 + 0.8 * forecast * rng.chisquare(4, 1000) / 4
    fit = mincer_zarnowitz(measured, forecast)
    wls = sm.WLS(measured, sm.add_constant(forecast), 1 / forecast**2).fit(cov_type="HAC", cov_kwds={"maxlags": 10})
    assert tuple(fit[:4]) == pytest.approx((*wls.params, *wls.bse), rel=1e-6)
    wald = wls.wald_test((np.eye(2), np.array([0.0, 1.0])), use_f=False, scalar=True)
    assert fit.p_value == pytest.approx(float(wald.pvalue), rel=1e-4, abs=1e-12)
    assert mincer_zarnowitz(forecast * rng.chisquare(4, 1000) / 4, forecast).p_value > 0.05
    with pytest.raises(ValueError, match="0.0001 in all rows"):
        mincer_zarnowitz(measured, np.full(1000, 1e-4))


@pytest.mark.parametrize("horizon, lags", [(1, 10), (30, 29)])
def test_encompassing_against_statsmodels(horizon, lags):
    "The regression of the errors on the distance, and the weights of the best combination by least squares."
    rng = np.random.default_rng(6)
    y, (f, g) = rng.standard_normal(1000), rng.standard_normal((2, 1000))
    f, g = y + f + 0.3, y + 2 * g
    found = encompassing_test(y, f, g, horizon)
    ols = sm.OLS(y - f, sm.add_constant(g - f)).fit(cov_type="HAC", cov_kwds={"maxlags": lags})
    assert tuple(found) == pytest.approx((ols.params[1], ols.bse[1], ols.pvalues[1]), rel=1e-8)
    back = encompassing_test(y, g, f, horizon)
    assert (back.weight, back.error) == pytest.approx((1 - found.weight, found.error))
    losses = [np.var(y - (1 - w) * f - w * g) for w in (found.weight - 0.01, found.weight, found.weight + 0.01)]
    assert losses[1] == min(losses) and found.weight == pytest.approx(0.2, abs=0.1)  # by their variances, 1 and 4
    with pytest.raises(ValueError, match="differ by a constant"):
        encompassing_test(y, f, f + 0.1)


def test_encompassing_takes_the_contender_of_earlier_folds(forecasts):
    "Heads on their scales: logs of the variance and of the price over the close, and probabilities as they are."
    rng = np.random.default_rng(7)
    truth, noise = np.log(forecasts.forecast_variance), 0.5 * rng.standard_normal((2, 3000))
    mixed = forecasts.assign(
        forecast_variance=np.exp(truth + noise[0]),
        a_variance=np.exp(truth + noise[1]),
        a_probability=np.where(rng.random(3000) < 0.2, forecasts.actual_up, 0.5),
    )
    found = encompassing_tests(mixed)
    assert set(found) == {"direction", "volatility"}  # the price is persistence in both
    assert found["volatility"]["contender"] == "ewma, a" and found["direction"]["contender"] == "always up, a"
    other = np.where(mixed.fold == 1, np.log(1e-4), truth + noise[1])
    own, y = np.log(mixed.forecast_variance), np.log(mixed.actual_variance)
    ols = sm.OLS(y - own, sm.add_constant(other - own)).fit(cov_type="HAC", cov_kwds={"maxlags": 15})
    assert found["volatility"]["contender_adds"]["weight"] == pytest.approx(ols.params.iloc[1])
    assert found["volatility"]["contender_adds"]["error"] == pytest.approx(ols.bse.iloc[1])
    other = np.where(mixed.fold == 1, 1.0, mixed.a_probability)
    ols = sm.OLS(mixed.actual_up - 0.5, sm.add_constant(other - 0.5)).fit(cov_type="HAC", cov_kwds={"maxlags": 15})
    assert found["direction"]["contender_adds"]["weight"] == pytest.approx(ols.params.iloc[1])
    assert found["direction"]["contender_adds"]["p_value"] < 1e-6
    moved = mixed.assign(forecast_close=mixed.close * np.exp(0.001 * noise[0]))
    price = encompassing_tests(moved)["price"]
    y = np.log(mixed.actual_close / mixed.close)
    ols = sm.OLS(y, sm.add_constant(0.001 * noise[0])).fit(cov_type="HAC", cov_kwds={"maxlags": 15})
    assert price["contender"] == "persistence"
    assert price["model_adds"]["p_value"] == pytest.approx(ols.pvalues.iloc[1])


def test_scores_by_year(forecasts):
    "A year's rows by its target dates; the mean of all years is that of all rows."
    table = scores_by_year(forecasts)
    years = pd.DatetimeIndex(forecasts.target_date).year
    assert table.index.tolist() == sorted(set(years)) and table.rows.tolist() == list(np.bincount(years)[2000:])
    error = 100 * (forecasts.actual_close / forecasts.close - 1).abs() / (forecasts.actual_close / forecasts.close)
    assert table.mape[2003] == pytest.approx(error[years == 2003].mean())
    assert np.average(table.brier, weights=table.rows) == pytest.approx(0.25)
