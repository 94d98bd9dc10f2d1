"""Scores, tests and intervals by hand, by statsmodels, scipy and arch, and a published example."""

import math
import warnings

import arch.data.sp500
import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from arch import arch_model
from scipy import stats
from statsmodels.stats.contingency_tables import StratifiedTable
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from smlstm.data.variance import variance_proxy
from smlstm.judging.baselines import autoregressive_return, ewma_variance, garch_variance, har_variance
from smlstm.judging.evaluation import deflated_sharpe, illustrate
from smlstm.judging.intervals import conformal_intervals, conformal_quantile
from smlstm.judging.metrics import (
    base_log_odds,
    base_rate,
    brier,
    direction_slope,
    directional_accuracy,
    expected_calibration_error,
    hit_rate,
    level_slope,
    mape,
    qlike,
    qlike_scale,
    reliability_curve,
    shrinkage,
)
from smlstm.judging.scores import share_interval
from smlstm.judging.skill import clark_west_test, direction_test, holm, loss_difference_test, skill_tests, verdicts
from smlstm.judging.voltarget import target_numbers, target_rules, volatility_target


@pytest.fixture(scope="module")
def prices():
    return arch.data.sp500.load().rename(columns=str.lower)[["open", "high", "low", "close", "volume"]].iloc[:900]


def test_metrics_by_hand():
    assert mape([100, 200], [110, 190]) == pytest.approx(7.5)
    assert directional_accuracy([1, 2, 1, 2], [1, 2, 3, 4]) == pytest.approx(200 / 3)
    up, probability = [1, 0, 1, 1], [0.9, 0.6, 0.5, 0.7]
    assert hit_rate(up, probability) == 0.5  # one half is no forecast of a rise
    assert base_rate(up) == base_rate([0, 1, 0, 0]) == 0.75
    assert brier(up, probability) == pytest.approx((0.01 + 0.36 + 0.25 + 0.09) / 4)
    assert qlike([2.0, 1.0], [1.0, 2.0]) == pytest.approx((2 - math.log(2) - 1 + 0.5 + math.log(2) - 1) / 2)
    assert qlike_scale([2.0, 3.0], [1.0, 2.0]) == pytest.approx(1.75)


def test_calibration_error_by_hand():
    "Two bins of two, one too low and one too high: 0.15 and 0.9 were forecast, and half rose in each."
    up, probability = [0, 1, 1, 0], [0.1, 0.2, 0.9, 0.9]
    curve = reliability_curve(up, probability, 2)
    assert curve.probability.tolist() == pytest.approx([0.15, 0.9]) and curve.frequency.tolist() == [0.5, 0.5]
    assert expected_calibration_error(up, probability, 2) == pytest.approx((0.35 + 0.4) / 2)


def test_slopes_against_statsmodels():
    "Errors that are larger where the forecast is, so that robust standard errors are twice the plain ones."
    rng = np.random.default_rng(0)
    forecast, weight = rng.standard_normal(300), rng.uniform(0.2, 3, 300)
    y = 0.4 * forecast + rng.standard_normal(300) * (0.3 + forecast**2)
    for given in (None, weight):
        ols = sm.WLS(y, forecast, 1 if given is None else given).fit(cov_type="HC3")
        assert level_slope(forecast, y, given) == pytest.approx((ols.params[0], ols.bse[0]))
    assert level_slope(forecast, y)[1] > 1.5 * sm.OLS(y, forecast).fit().bse[0]
    up = (rng.random(300) < 1 / (1 + np.exp(-0.3 - 0.5 * forecast))).astype(float)
    for base in (0.3, 0.3 + 0.1 * weight):
        offset = np.broadcast_to(base, 300)
        glm = sm.GLM(up, forecast, family=sm.families.Binomial(), offset=offset).fit(cov_type="HC0")
        assert direction_slope(base + forecast, base, up) == pytest.approx((glm.params[0], glm.bse[0]), rel=1e-5)


def test_shrinkage_by_hand():
    "The slope less its standard error, or several, from nothing to all of it."
    assert [shrinkage(*pair) for pair in ((0.5, 0.2), (0.1, 0.2), (1.5, 0.2), (0.9, 0.0))] == pytest.approx(
        [0.3, 0.0, 1.0, 0.9]
    )
    assert shrinkage(0.5, 0.2, 2) == pytest.approx(0.1)


def test_base_log_odds_by_hand():
    """46 of 100 rises cannot be told from one half; 460 of 1,000 can, by a little; overlapping rows count for less.
    A share of rises above one half stays as it is."""
    up = np.repeat([1.0, 0.0], [46, 54])
    assert base_log_odds(up) == 0 and base_log_odds(1 - up) == pytest.approx(math.log(0.54 / 0.46))
    odds = math.log(0.46 / 0.54)
    drawn = odds * (1 - 1 / (1000 * 0.46 * 0.54) / odds**2)
    assert base_log_odds(np.tile(up, 10)) == pytest.approx(drawn) and -0.15 < drawn < -0.12
    assert base_log_odds(np.tile(up, 10), horizon=9) == 0
    assert base_log_odds(np.ones(50)) == pytest.approx(math.log(101))


def test_forecasts_that_differ_by_rounding_are_the_same():
    "The share of rises as log odds and back is off by 1e-16, which is no difference to be tested."
    up, share = np.tile([1.0, 0.0, 1.0], 200), np.full(600, 0.53)
    back = 1 / (1 + np.exp(-np.log(share / (1 - share)) * (1 + 1e-15)))
    assert (back != share).any()
    assert "both forecasts are the same" in loss_difference_test("direction", up, back, share, "share").note
    assert not loss_difference_test("direction", up, back + 1e-4 * up, share, "share").note


def test_conformal_quantile_of_ten_errors():
    "Of ten the ceil(11 (1 - miss))-th smallest; where eleven would be needed, the largest."
    errors = np.array([3.0, 10, 1, 7, 5, 9, 2, 8, 6, 4])
    quantiles = [conformal_quantile(errors, miss) for miss in (0.5, 0.2, 0.1, 0.05, 0.95)]
    assert quantiles == [6.0, 9.0, 10.0, 10.0, 1.0]


def ten_rows():
    "Errors of 1 to 12 percent, each forecast with a deviation of two percent."
    percent = np.array([3.0, 10, 1, 7, 5, 9, 2, 8, 6, 4, 12, 11]) / 100
    sign = np.where(np.arange(12) % 2, -1, 1)
    return percent, pd.DataFrame(
        {
            "forecast_close": 100.0,
            "actual_close": 100 * np.exp(sign * percent),
            "forecast_variance": 0.02**2,
            "actual_variance": 0.02**2 * np.exp(np.arange(12.0) - 3),
        }
    )


@pytest.mark.parametrize("horizon", [1, 3])
def test_conformal_intervals_by_hand(horizon):
    "Each row's width is a quantile of the last five errors whose outcome was known at its close."
    percent, frame = ten_rows()
    out = conformal_intervals(frame, 0.6, window=5, minimum=3, rate=0.0, horizon=horizon)
    for row in range(12):
        past = slice(max(row - horizon - 4, 0), max(row - horizon + 1, 0))
        known = np.sort(percent[past])
        if len(known) < 3:
            assert math.isnan(out.lower_close[row])
            continue
        width = known[math.ceil((len(known) + 1) * 0.6 - 1e-9) - 1]
        assert out.upper_close[row] == pytest.approx(100 * math.exp(width))
        assert out.lower_close[row] == pytest.approx(100 * math.exp(-width))
        ratio = np.arange(12.0)[past] - 3  # of four fifths on each side
        rank = min(math.ceil((len(ratio) + 1) * 0.8 - 1e-9), len(ratio))
        assert out.upper_variance[row] == pytest.approx(0.02**2 * math.exp(np.sort(ratio)[rank - 1]))
        assert out.lower_variance[row] == pytest.approx(0.02**2 * math.exp(-np.sort(-ratio)[rank - 1]))


def test_adaptive_width_by_hand():
    "Gibbs and Candes (2021): after a miss the share that may miss shrinks by rate times the level, else it grows."
    _, frame = ten_rows()
    frame.actual_close = 100 * np.exp(np.where(np.arange(12) < 6, np.arange(12) + 1.0, 50.0) / 100)
    out = conformal_intervals(frame, 0.5, window=100, minimum=4, rate=0.2, horizon=1)
    width = np.log(out.upper_close / 100) * 100
    # four errors: the third; then 5 percent misses, 0.5 becomes 0.4: of five the ceil(6 * 0.6)-th
    # then 6 percent misses, 0.3: of six the ceil(7 * 0.7)-th; 50 percent misses, 0.2: of seven the ceil(8 * 0.8)-th
    assert width[4:8].tolist() == pytest.approx([3, 4, 5, 50])


def test_wilson_interval():
    assert share_interval(57, 100) == pytest.approx(proportion_confint(57, 100, method="wilson"), rel=1e-6)


def test_holm_is_that_of_statsmodels():
    p = np.random.default_rng(3).random(9) ** 3
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_rows_needed_for_a_power_of_four_fifths():
    "(1.96 + 0.84)^2 standard errors squared over the smallest effect worth having: 2.5 points of right directions."
    rng = np.random.default_rng(0)
    up = rng.random(500) < 0.5
    test = direction_test(up, np.where(rng.random(500) < 0.5, 0.9, 0.1))
    z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    assert test.needed == math.ceil(500 * (z * test.error / 0.025) ** 2)
    assert test.error == pytest.approx(0.5 / math.sqrt(500), rel=0.02)


def test_direction_test_of_overlapping_outcomes():
    "Over several bars: the slope of one on the other with Newey and West's errors, over n^(1/3) lags at least."
    rng = np.random.default_rng(4)
    up, called = (rng.random((2, 300)) < 0.55).astype(float)
    test = direction_test(up, np.where(called, 0.7, 0.2), horizon=5)
    fit = sm.OLS(up, sm.add_constant(called)).fit(cov_type="HAC", cov_kwds={"maxlags": 7})
    assert (test.statistic, test.p_value) == pytest.approx((fit.tvalues[1], fit.pvalues[1]))


def test_direction_within_folds():
    "Calls that know the fold alone: up in the rising one, down in the falling one. Over both folds they seem informed."
    rng = np.random.default_rng(6)
    fold, draw = np.repeat([1, 2, 3], [700, 500, 300]), rng.random((2, 1500))
    share = np.select([fold == 1, fold == 2], [0.6, 0.4], 0.5)
    up, called = draw[0] < share, (draw[1] < np.select([fold == 1, fold == 2], [0.9, 0.1], 1.0)).astype(float)
    together, within = direction_test(up, called), direction_test(up, called, folds=fold)
    assert together.p_value < 0.001 and within.p_value > 0.05 and within.rows == 1500
    tables = [pd.crosstab(up[fold == n], called[fold == n]).to_numpy() for n in (1, 2)]  # the third is constant
    mantel = StratifiedTable([table.astype(float) for table in tables]).test_null_odds()
    assert within.statistic**2 == pytest.approx(mantel.statistic, rel=0.05)
    alone = [direction_test(up[fold == n], called[fold == n]) for n in (1, 2)]
    hits = sum(test.effect * test.rows for test in alone)
    variance = sum((test.effect * test.rows / test.statistic) ** 2 for test in alone)
    assert within.effect == pytest.approx(hits / 1500)
    assert within.statistic == pytest.approx(hits / math.sqrt(variance))
    informed = direction_test(up, np.where(rng.random(1500) < 0.2, up, called), folds=fold)
    assert informed.statistic > 3
    assert direction_test(up, fold == 1, folds=fold).note == "undefined: constant forecast"


def test_direction_within_folds_of_overlapping_outcomes():
    "A constant for each fold beside the calls, with Newey and West's errors."
    rng = np.random.default_rng(7)
    fold = np.repeat([1, 2], [160, 140])
    up, called = (rng.random((2, 300)) < 0.55).astype(float)
    test = direction_test(up, called, horizon=5, folds=fold)
    design = np.column_stack([fold == 1, fold == 2, called]).astype(float)
    fit = sm.OLS(up, design).fit(cov_type="HAC", cov_kwds={"maxlags": 7})
    assert (test.statistic, test.p_value) == pytest.approx((fit.tvalues[2], fit.pvalues[2]))


def moves(seed, signal=0.1, noise=0.0, n=1000):
    "Closes after which the price moves by a known signal, and forecasts of it with noise."
    x, e, wrong = np.random.default_rng(seed).standard_normal((3, n))
    frame = pd.DataFrame({"close": 50.0, "actual_close": 50 * np.exp(0.01 * (signal * x + e))})
    return frame.assign(forecast_close=50 * np.exp(0.01 * (signal * x + noise * wrong)))


def test_clark_west_by_hand():
    "The mean of r^2 - ((r - f)^2 - f^2) over its standard error, of Newey and West over n^(1/3) lags."
    frame = moves(8)
    plain = loss_difference_test("price", frame.actual_close, frame.forecast_close, frame.close, "persistence")
    test = clark_west_test(frame, plain)
    r, f = (np.log(frame[c] / frame.close).to_numpy() for c in ("actual_close", "forecast_close"))
    adjusted = r**2 - ((r - f) ** 2 - f**2)
    fit = sm.OLS(adjusted, np.ones(1000)).fit(cov_type="HAC", cov_kwds={"maxlags": 10})
    assert test.test == "Clark-West" and test.effect == plain.effect > 0
    assert test.statistic == pytest.approx(fit.tvalues[0] * math.sqrt(999 / 1000))  # Harvey's correction
    assert test.p_value == pytest.approx(2 * stats.t.sf(test.statistic, 999))


def test_clark_west_grants_nothing_to_a_larger_error():
    "A forecast of noise is worse than persistence in the sample: the plain test stays."
    frame = moves(9, signal=0.0, noise=0.3)
    plain = loss_difference_test("price", frame.actual_close, frame.forecast_close, frame.close, "persistence")
    assert plain.effect < 0 and clark_west_test(frame, plain) == plain


def test_brier_verdict_by_hand():
    "Probabilities that hit more often than chance, but exaggerate: worse than the share of rises."
    rng, n = np.random.default_rng(10), 4000
    up = (rng.random(n) < 0.5).astype(float)
    right = rng.random(n) < 0.56
    dates = pd.date_range("2000-01-03", periods=n + 1)
    frame = pd.DataFrame({"date": dates[:-1], "target_date": dates[1:], "fold": 1, "close": 1.0, "actual_up": up})
    frame = frame.assign(actual_close=np.exp(0.01 * (2 * up - 1)), forecast_close=1.0, regime_1=1.0)
    frame = frame.assign(actual_variance=1.0, forecast_variance=1.0, ewma_variance=1.0, share_probability=0.5)
    for sure, outcome in {0.95: "significantly worse than the share of rises", 0.56: "skill shown"}.items():
        called = np.where(right == (up == 1), sure, 1 - sure)
        tests = skill_tests(frame.assign(up_probability=called))
        saved = 1 - ((called - up) ** 2).mean() / 0.25
        verdict = verdicts(tests)["direction"]
        assert outcome in verdict.outcome
        if sure == 0.95:
            assert tests["direction"].effect == pytest.approx(saved) and saved < -0.5
            assert "Brier score" in verdict.reason
        plain = direction_test(up, called)
        assert plain.statistic > 5


def test_qlike_difference_by_hand():
    "The share of the baseline's loss that the model saves."
    rng = np.random.default_rng(5)
    actual, model, baseline = np.exp(0.3 * rng.standard_normal((3, 200)))
    test = loss_difference_test("volatility", actual, model, baseline, "other")
    loss = lambda f: (actual / f - np.log(actual / f) - 1).mean()
    assert test.effect == pytest.approx(1 - loss(model) / loss(baseline))


def test_moving_variance_by_hand():
    weights = np.array([0.94**2, 0.94, 1.0])
    assert ewma_variance(pd.Series([4.0, 1.0, 2.0])).iloc[-1] == pytest.approx(weights @ [4, 1, 2] / weights.sum())


@pytest.mark.parametrize("log", [False, True])
def test_har_by_least_squares(prices, log):
    "Corsi (2009): a day, a week and a month of variance, on the training rows; scaled to the best QLIKE there."
    proxy, train, horizon = variance_proxy(prices), slice(30, 600), 2
    ahead = (proxy.shift(-1) + proxy.shift(-2)) / 2
    x = np.stack([np.ones(len(proxy)), *(proxy.rolling(n).mean() for n in (1, 5, 22))], 1)
    y = ahead.to_numpy()
    if log:
        x[:, 1:], y = np.log(x[:, 1:]), np.log(y)
    beta = np.linalg.lstsq(x[train], y[train], rcond=None)[0]
    fitted = np.exp(x @ beta) if log else (x @ beta).clip(min=ahead[train].min())
    fitted *= (ahead.to_numpy()[train] / fitted[train]).mean()
    got = har_variance(proxy, train, horizon, log=log)
    np.testing.assert_allclose(got[22:], fitted[22:], rtol=1e-6)


def test_garch_is_that_of_arch(prices):
    "Estimated on the training rows alone, forecast from each bar on; the mean variance of two bars, scaled there."
    proxy, train = variance_proxy(prices), slice(0, 600)
    r = 100 * np.log(prices.close).diff().dropna()
    known = arch_model(r[:599], mean="Constant", vol="GARCH", p=1, q=1, dist="t").fit(disp="off")
    fixed = arch_model(r, mean="Constant", vol="GARCH", p=1, q=1, dist="t").fix(known.params)
    path = fixed.forecast(horizon=2, start=0).variance.mean(axis=1) / 1e4
    ahead = (proxy.shift(-1) + proxy.shift(-2)) / 2
    both = path.index.intersection(prices.index[train])
    expected = path * (ahead[both] / path[both]).mean()
    got = garch_variance(prices.close, proxy, train, 2)
    np.testing.assert_allclose(got[700:], expected[699:], rtol=0.02)


def test_garch_of_hours_is_that_of_days_but_for_the_scale():
    "Returns a thirtieth as large, as in an hour or of currencies, have variances a nine-hundredth as large."
    rng, variance, moves = np.random.default_rng(0), 1e-4, []
    for shock in rng.standard_t(6, 3000) * math.sqrt(4 / 6):
        moves.append(math.sqrt(variance) * shock)
        variance = 2e-6 + 0.08 * moves[-1] ** 2 + 0.9 * variance
    index = pd.date_range("2020-01-01", periods=3000, freq="h")
    found = {}
    for size in (1, 30):
        close = pd.Series(100 * np.exp(np.cumsum(moves) / size), index)
        proxy = (np.log(close).diff() ** 2).clip(lower=1e-12)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found[size] = garch_variance(close, proxy, slice(0, 2000))
    ratio = (found[1] / found[30]).iloc[2000:]
    assert 0.9 * 900 < ratio.min() and ratio.max() < 1.1 * 900


def test_autoregression_by_least_squares(prices):
    r = np.log(prices.close).diff().to_numpy()
    x = np.stack([np.ones(len(r)), *(np.roll(r, k) for k in range(5))], 1)
    y = np.r_[r[1:] + np.roll(r, -1)[1:], np.nan]  # the next two
    train = slice(10, 500)
    beta = np.linalg.lstsq(x[train], y[train], rcond=None)[0]
    got = autoregressive_return(prices.close, train, horizon=2)
    np.testing.assert_allclose(got[10:], (x @ beta)[10:], rtol=1e-6, atol=1e-12)


def traded(returns, probability):
    "A forecast frame whose prices move by `returns`."
    n = len(returns)
    dates = pd.bdate_range("2024-01-01", periods=n + 1)
    return pd.DataFrame(
        {
            "date": dates[:-1],
            "fold": 0,
            "close": 50.0,
            "target_date": dates[1:],
            "actual_close": 50 * (1 + np.asarray(returns)),
            "forecast_close": 50.0,
            "up_probability": probability,
            "actual_up": (np.asarray(returns) > 0).astype(float),
            "forecast_variance": 1e-4,
            "actual_variance": 1e-4,
            "ewma_variance": 1e-4,
            "regime_1": 1.0,
        }
    )


def test_a_year_of_trading_by_hand():
    "Long, flat, short, long: positions of one, each change costs a tenth of a percent of what is traded."
    out = illustrate(
        traded([0.02, 0.01, -0.03, -0.01], [0.7, 0.5, 0.3, 0.55]), cost=0.001, short=True, bars_per_year=100
    )
    earned = np.array([0.02 - 0.001, -0.001, 0.03 - 0.001, -0.01 - 0.002])
    assert out.frame["return"].tolist() == pytest.approx(earned)
    assert out.annual_return == pytest.approx(100 * earned.mean())
    assert out.annual_volatility == pytest.approx(10 * earned.std(ddof=1))
    assert out.sharpe == pytest.approx(10 * earned.mean() / earned.std(ddof=1))
    assert out.turnover == pytest.approx(100 * (1 + 1 + 1 + 2) / 4)
    assert out.max_drawdown == pytest.approx(0.012)
    assert illustrate(traded([-0.1, 0.5], [0.9, 0.9]), cost=0).max_drawdown == pytest.approx(0.1)  # from the start


def test_a_volatility_target_by_hand():
    "Target 20%, forecasts 20, 10, 40 and 20%: positions 1, 1.5 (the cap), 0.5 and 1. One percent of trades is lost."
    frame = traded([0.10, -0.10, 0.0, 0.20], 0.5).assign(forecast_volatility=[0.2, 0.1, 0.4, 0.2])
    out = volatility_target(frame, target=0.2, cap=1.5, cost=0.01, bars_per_year=1)
    assert out.frame.position.tolist() == pytest.approx([1, 1.5, 0.5, 1])
    bought = np.array([1, 0.5, 1.35 / 0.85 - 0.5, 0.5])  # 1.5 in what fell by a tenth is 1.35 of 0.85
    earned = np.array([0.1, -0.15, 0, 0.2]) - 0.01 * bought
    assert out.frame["return"].tolist() == pytest.approx(earned)
    assert out.turnover == pytest.approx(bought.mean()) and out.annual_return == pytest.approx(earned.mean())
    quarterly = volatility_target(frame, target=0.4, cap=1.5, cost=0.01, bars_per_year=4)  # 40% a year, 20% a quarter
    assert quarterly.frame.position.tolist() == pytest.approx(out.frame.position.tolist())
    assert quarterly.turnover == pytest.approx(4 * out.turnover)


def test_a_volatility_target_as_an_account():
    "Shares and cash of an account that is set to its weights at each close, without costs."
    rng = np.random.default_rng(0)
    moves, volatility = rng.normal(0, 0.02, 200), rng.uniform(0.05, 0.4, 200)
    out = volatility_target(
        traded(moves, 0.5).assign(forecast_volatility=volatility), target=0.2, cap=2, cost=0, bars_per_year=1
    )
    price, shares, cash, wealth, turned = 50.0, 0.0, 1000.0, [], 0.0
    for move, deviation in zip(moves, volatility):
        own = shares * price + cash
        wanted = min(2, 0.2 / deviation) * own / price
        turned += abs(wanted - shares) * price / own
        cash, shares, price = cash - (wanted - shares) * price, wanted, price * (1 + move)
        wealth.append((shares * price + cash) / 1000)
    assert out.frame.wealth.tolist() == pytest.approx(wealth)
    assert out.turnover == pytest.approx(turned / 200)


def test_a_volatility_target_stands_beside_the_same_rule_and_holding():
    "EWMA four times the model's variance has half its position; always in is the plain rule; losing all is the end."
    frame = traded([0.01, -0.02, 0.01], 0.5).assign(forecast_volatility=0.2, ewma_variance=4e-4)
    rules = target_rules(frame, bars_per_year=1, target=0.1)
    positions = {name: rule.frame.position.iloc[0] for name, rule in rules.items()}
    assert positions == pytest.approx({"target, by the model": 0.5, "target, by EWMA": 0.25, "always in": 1.0})
    numbers = target_numbers(frame)
    assert list(numbers) == list(rules) and target_numbers(frame, horizon=2) == {}
    assert numbers["always in"]["mean_position"] == 1 and numbers["target, by the model"]["mean_position"] < 1
    lost = traded([-0.9, 0.5], 0.5).assign(forecast_volatility=0.01)
    assert volatility_target(lost, cap=1.5, bars_per_year=1).frame.wealth.tolist() == [0, 0]


def test_deflated_sharpe_by_hand():
    """Bailey and Lopez de Prado (2014). The best of 100 worthless rules is expected at 2.53 standard deviations: their
    example has 0.1132 for a variance of 0.5 a year and 250 bars. Skewed returns with fat tails, by scipy's moments."""
    rng = np.random.default_rng(0)
    r = 0.0012 + 0.01 * (np.where(rng.random(1250) < 0.02, -4.0, 0.0) + rng.standard_normal(1250))
    ratio, n = r.mean() / r.std(ddof=1), len(r)
    skew, kurtosis = stats.skew(r), stats.kurtosis(r, fisher=False)
    assert skew < -0.5 and kurtosis > 4
    spread = math.sqrt(1 - skew * ratio + (kurtosis - 1) / 4 * ratio**2)
    luck = 0.1132 / math.sqrt(0.5 / 250) / math.sqrt(n - 1)  # worthless rules differ by the error of a Sharpe ratio
    assert deflated_sharpe(r) == pytest.approx(stats.norm.cdf(ratio * math.sqrt(n - 1) / spread))
    assert deflated_sharpe(r, 100) == pytest.approx(
        stats.norm.cdf((ratio - luck) * math.sqrt(n - 1) / spread), abs=1e-3
    )


def test_kurtosis_counts_in_the_deflated_sharpe():
    "Two values with equal odds have a kurtosis of one, so that its term is zero."
    r = np.tile([0.03, -0.01], 50)
    ratio = 0.01 / r.std(ddof=1)
    assert deflated_sharpe(r) == pytest.approx(stats.norm.cdf(ratio * math.sqrt(99)))
    tails = np.r_[np.tile([0.01], 98), 0.3, -0.28]  # none but two bars move: kurtosis near 50
    ratio = tails.mean() / tails.std(ddof=1)
    skew, kurtosis = stats.skew(tails), stats.kurtosis(tails, fisher=False)
    spread = math.sqrt(1 - skew * ratio + (kurtosis - 1) / 4 * ratio**2)
    assert kurtosis > 40 and deflated_sharpe(tails) == pytest.approx(stats.norm.cdf(ratio * math.sqrt(99) / spread))
