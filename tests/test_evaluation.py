"""Tests of skill keep their size and find what is there; frames survive a file; bad frames are named."""

import io
import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from smlstm.evaluation import (SkillTest, _share_interval, add_baselines, comparison_table, conformal_intervals, contenders, deflated_sharpe, direction_test,
                               evaluate, evaluate_fold, holm, illustrate, interval_coverage, known_forecasts, loss_difference_test, skill_tests,
                               verdict, verdicts, walk_forward)
from smlstm.features import variance_proxy
from smlstm.sequences import Fold, time_folds


def make_prices(n=1_200, seed=0):
    rng = np.random.default_rng(seed)
    volatility = 0.01 * np.exp(np.cumsum(0.05 * rng.standard_normal(n)))
    close = 100 * np.exp(np.cumsum(np.clip(volatility, 0.003, 0.03) * rng.standard_normal(n)))
    wide = np.exp(np.abs(0.005 * rng.standard_normal((2, n))))
    open_ = np.r_[100, close[:-1]]
    return pd.DataFrame({"open": open_, "high": np.maximum(open_, close) * wide[0], "low": np.minimum(open_, close) / wide[1], "close": close, "volume": 1e6},
                        index=pd.bdate_range("2015-01-01", periods=n, name="date"))


def make_forecasts(prices, first=600, folds=2):
    proxy, close = variance_proxy(prices), prices.close
    f = pd.DataFrame({"date": prices.index, "close": close, "target_date": prices.index.to_series().shift(-1), "actual_close": close.shift(-1),
                      "forecast_close": close * 1.0001, "up_probability": 0.5 + 0.1 * np.sin(np.arange(len(close))), "actual_up": (close.shift(-1) > close).astype(float),
                      "forecast_variance": proxy.ewm(alpha=0.1).mean(), "actual_variance": proxy.shift(-1), "ewma_variance": proxy.ewm(alpha=0.06).mean(),
                      "regime_1": 0.7, "regime_2": 0.1, "regime_3": 0.1, "regime_4": 0.1}).iloc[first:-1].reset_index(drop=True)
    return f.assign(fold=np.arange(len(f)) * folds // len(f))


@pytest.fixture(scope="module")
def prices(): return make_prices()


@pytest.fixture(scope="module")
def forecasts(prices): return make_forecasts(prices)


def test_pesaran_timmermann_by_hand():
    rng = np.random.default_rng(0)
    up, called = (rng.random((2, 400)) < [[0.6], [0.7]]).astype(float)
    n, py, pz, hit = 400, up.mean(), called.mean(), np.mean(up == called)
    star = py * pz + (1 - py) * (1 - pz)
    variance = star * (1 - star) / n - ((2 * py - 1) ** 2 * pz * (1 - pz) + (2 * pz - 1) ** 2 * py * (1 - py)) / n
    test = direction_test(up, np.where(called, 0.8, 0.2))
    assert test.effect == pytest.approx(hit - star)
    assert test.statistic == pytest.approx((hit - star) / math.sqrt(variance))
    assert test.p_value == pytest.approx(2 * stats.norm.sf(abs(test.statistic)))


def test_diebold_mariano_by_hand():
    rng = np.random.default_rng(1)
    actual, model, baseline = np.exp(rng.normal(0, 0.1, (3, 300)))
    d = np.abs(1 - baseline / actual) - np.abs(1 - model / actual)
    lags, centred = math.ceil(300 ** (1 / 3)), d - d.mean()
    variance = centred @ centred / 300
    for lag in range(1, lags + 1):
        variance += 2 * (1 - lag / (lags + 1)) * (centred[lag:] @ centred[:-lag]) / 300
    statistic = d.mean() / math.sqrt(variance / 300) * math.sqrt((300 - 1) / 300)
    test = loss_difference_test("price", actual, model, baseline, "other")
    assert test.statistic == pytest.approx(statistic)
    assert test.p_value == pytest.approx(2 * stats.t.sf(abs(statistic), 299))
    assert test.effect == pytest.approx(d.mean() / np.abs(1 - baseline / actual).mean())
    flipped = loss_difference_test("price", actual, baseline, model, "other")
    assert flipped.statistic == pytest.approx(-statistic)


@pytest.mark.parametrize("horizon", [1, 5])
def test_size_of_the_direction_test(horizon):
    alarms = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        sums = np.convolve(rng.standard_normal(800 + horizon), np.ones(horizon), "valid")
        alarms += direction_test(sums[:800] > 0, rng.random(800), horizon).p_value < 0.05
    assert alarms <= 18                                            # 7.5 expected, standard deviation 2.7


def test_needed_rows_do_find_the_effect():
    rng = np.random.default_rng(0)
    needed = direction_test(rng.random(500) < 0.5, rng.random(500)).needed
    assert 2_900 < needed < 3_300
    found = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        right = rng.random(needed) < 0.525
        called = rng.random(needed) < 0.5
        found += direction_test(np.where(right, called, ~called), np.where(called, 0.6, 0.4)).p_value < 0.05
    assert 0.68 < found / 120 < 0.92                               # a power of 80%


def test_verdicts():
    base = SkillTest("direction", "a test", "base rate", 0.02, 3.0, 0.003, 5_000, 3_000)
    assert verdict(base).outcome == "skill shown"
    assert verdict(base._replace(statistic=-3.0)).outcome == "no skill shown: significantly worse than chance"
    worse = verdict(base._replace(head="price", baseline="persistence", statistic=-3.0, effect=-0.02, error=0.005))
    assert worse.outcome == "no skill shown: significantly worse than persistence" and "+2.00% against persistence (95%: +1.02 to +2.98)" in worse.reason
    assert verdict(base._replace(statistic=1.0, p_value=0.3)).outcome == "no skill shown"
    assert verdict(base._replace(statistic=1.0, p_value=0.3, rows=1_000)).outcome == "too few observations to tell (3,000 would be needed)"
    assert verdict(base._replace(note="undefined: constant forecast", statistic=math.nan, p_value=math.nan)).outcome == "no skill shown"
    assert verdict(base, p_value=0.06).outcome == "no skill shown"
    assert verdicts({"a": base._replace(p_value=0.03), "b": base._replace(p_value=0.04)})["a"].outcome == "no skill shown"     # Holm: 0.06


def test_worse_than_persistence_is_said_before_anything_else(forecasts):
    rng = np.random.default_rng(0)
    close = forecasts.close * np.exp(0.02 * rng.standard_normal(len(forecasts)))
    said = verdicts(skill_tests(forecasts.assign(forecast_close=close, drift_close=forecasts.close * 1.0001)))["price"]
    assert said.outcome == "no skill shown: significantly worse than persistence"


def test_interval_of_the_hit_rate_covers():
    missed = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        up = (rng.random(200) < 0.5).astype(float)
        right = rng.random(200) < 0.54
        low, high = _share_interval(pd.DataFrame({"actual_up": up, "up_probability": np.where(right, 0.1 + 0.8 * up, 0.9 - 0.8 * up)}))
        missed += not low <= 0.54 <= high
    assert missed / 300 < 0.09


def test_constant_and_perfect_forecasts(forecasts):
    for constant in (0.0, 0.5, 1.0):
        assert skill_tests(forecasts.assign(up_probability=constant))["direction"].note == "undefined: constant forecast"
    up_only = forecasts.assign(actual_up=1.0)
    assert "one way only" in skill_tests(up_only)["direction"].note
    same = forecasts.assign(forecast_close=forecasts.close, forecast_variance=forecasts.ewma_variance)
    tests = skill_tests(same)
    assert "same" in tests["price"].note and "same" in tests["volatility"].note
    run = evaluate(same.assign(up_probability=0.5))
    assert {v["outcome"] for v in run["overall"]["verdicts"].values()} == {"no skill shown"}
    assert run["overall"]["tests"]["price"]["p_value"] is None
    json.dumps(run, allow_nan=False)


def test_evaluate_survives_a_file(forecasts):
    text = io.StringIO()
    forecasts.to_csv(text, index=False)
    text.seek(0)
    assert _close(evaluate(pd.read_csv(text)), evaluate(forecasts))


def _close(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(_close(a[k], b[k]) for k in a)
    if isinstance(a, list): return len(a) == len(b) and all(map(_close, a, b))
    return a == pytest.approx(b, rel=1e-9) if isinstance(a, float) else a == b


def test_scores_of_folds(forecasts):
    run = evaluate(forecasts)
    assert [f["number"] for f in run["folds"]] == [0, 1] and run["overall"]["number"] == "all"
    rows = [f["rows"] for f in run["folds"]]
    joined = np.average([f["price"]["mape"] for f in run["folds"]], weights=rows)
    assert run["overall"]["price"]["mape"] == pytest.approx(joined)
    assert run["folds"][0]["test"] == {"first": str(forecasts.date[0].date()), "last": str(forecasts[forecasts.fold == 0].date.iloc[-1].date())}
    assert sum(run["overall"]["regime"]) == pytest.approx(1)
    hourly = forecasts.assign(date=pd.date_range("2024-01-01", periods=len(forecasts), freq="h", tz="UTC"))
    hourly["target_date"] = hourly.date + pd.Timedelta(hours=1)
    assert evaluate_fold(hourly).test["first"] == "2024-01-01" and "T" in evaluate_fold(hourly).test["last"]


def test_rows_that_wait_are_left_out(forecasts):
    waiting = forecasts.copy()
    waiting.loc[len(waiting) - 1, ["actual_close", "actual_up", "actual_variance"]] = np.nan
    assert len(known_forecasts(waiting)) == len(forecasts) - 1
    assert _close(evaluate(waiting), evaluate(forecasts.iloc[:-1]))
    assert conformal_intervals(waiting).upper_close.notna().iloc[-1]


@pytest.mark.parametrize("change, words", [
    (lambda f: f.drop(columns=["close", "fold"]), "lacks fold, close"),
    (lambda f: f.iloc[:0], "no row whose outcome is known"),
    (lambda f: f.iloc[::-1], "go backwards"),
    (lambda f: f.assign(up_probability=f.up_probability.where(f.index != 3)), "up_probability is missing at row 3"),
    (lambda f: f.assign(target_date=f.date), "not after date"),
    (lambda f: f.assign(forecast_variance=-1.0), "must be positive"),
    (lambda f: f.assign(up_probability=2.0), "[0, 1]"),
    (lambda f: f.assign(regime_1=0.0), "sum to 0.3"),
])
def test_bad_frames_are_named(forecasts, change, words):
    with pytest.raises(ValueError) as error:
        evaluate(change(forecasts))
    assert words in str(error.value)


def test_walk_forward_rolls_and_expands():
    seen = []
    note = lambda train, test: seen.append((train.start, train.stop, test.start, test.stop)) or pd.DataFrame({"x": np.arange(test.start, test.stop)})
    joined = walk_forward(note, time_folds(60, n_splits=2, gap=2, test_size=10), horizon=2, refit_every=4)
    assert seen == [(0, 38, 40, 44), (0, 42, 44, 48), (0, 46, 48, 50), (0, 48, 50, 54), (0, 52, 54, 58), (0, 56, 58, 60)]
    assert joined.x.tolist() == list(range(40, 60)) and joined.fold.tolist() == [0] * 10 + [1] * 10
    seen.clear()
    walk_forward(note, [Fold(0, slice(10, 30), slice(31, 41))], refit_every=5)
    assert seen == [(10, 30, 31, 36), (15, 35, 36, 41)]
    with pytest.raises(ValueError, match="2 forecasts came back for 10"):
        walk_forward(lambda train, test: pd.DataFrame({"x": [1, 2]}), [Fold(0, slice(0, 5), slice(6, 16))])


def test_baselines_on_a_frame(prices, forecasts):
    full = add_baselines(forecasts, prices)
    assert full[forecasts.columns].equals(forecasts) and full.notna().all().all()
    first = full[full.fold == 1].iloc[0]
    before = prices.close[prices.index < first.date]
    assert first.drift_close == pytest.approx(first.close * math.exp(np.log(before).diff().mean()), rel=1e-6)
    assert set(contenders(full, "volatility")) == {"model", "ewma", "constant", "har", "log_har", "garch", "gjr"}
    for head, best in (("price", "actual_close"), ("volatility", "actual_variance")):
        column = {"price": "oracle_close", "volatility": "oracle_variance"}[head]
        table = comparison_table(full.assign(**{column: full[best]}), head)
        assert table.iloc[:, 0].idxmin() == "oracle" and table.loc["oracle", "in 90% set"] and not table.loc["model", "in 90% set"]
    with pytest.raises(ValueError, match="not among the prices"):
        add_baselines(forecasts, prices.iloc[:700])


@pytest.mark.parametrize("seed", range(3))
def test_intervals_cover(seed):
    f = make_forecasts(make_prices(3_000, seed), first=300, folds=3)
    for level in (0.8, 0.9):
        coverage = interval_coverage(conformal_intervals(f, level=level))
        assert coverage[["close", "variance"]].sub(level).abs().to_numpy().max() < 0.03
    late = conformal_intervals(f).assign(lower_close=lambda c: c.lower_close.where(c.fold > 0))            # a fold without any interval
    assert interval_coverage(late).rows[0] == 0 and np.isnan(interval_coverage(late).close[0])
    assert evaluate(late)["folds"][0]["coverage"]["rows"] == 0
    jump = f.assign(actual_close=f.close * (f.actual_close / f.close) ** np.where(f.index > 1_500, 3, 1))     # errors treble
    adaptive, plain = (interval_coverage(conformal_intervals(jump, rate=rate)).close for rate in (0.01, 0.0))
    assert abs(adaptive.iloc[1] - 0.9) < abs(plain.iloc[1] - 0.9) and abs(adaptive["all"] - 0.9) < 0.01


def test_illustration_by_hand(forecasts):
    f = forecasts.iloc[:4].assign(close=100.0, actual_close=[110.0, 90.0, 100.0, 120.0], up_probability=[0.6, 0.6, 0.4, 0.7])
    out = illustrate(f, cost=0.01)
    assert out.frame.position.tolist() == [1, 1, 0, 1]
    assert out.frame["return"].tolist() == pytest.approx([0.1 - 0.01, -0.1, -0.01, 0.2 - 0.01])
    assert out.turnover == pytest.approx(3 / 4 * 252)
    wealth = np.cumprod(1 + out.frame["return"])
    assert out.max_drawdown == pytest.approx(1 - wealth.iloc[2] / wealth.iloc[0])
    assert illustrate(f, short=True).frame.position.tolist() == [1, 1, -1, 1]
    returns = np.random.default_rng(0).normal(0.001, 0.01, 500)
    deflated = [deflated_sharpe(returns, trials) for trials in (1, 10, 100)]
    assert deflated == sorted(deflated, reverse=True) and math.isnan(deflated_sharpe(np.zeros(5)))


def test_holm():
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]).tolist() == [1.0, 1.0]


@pytest.mark.slow
def test_no_skill_on_noise_for_the_whole_chain():
    "A linear model with every baseline on twenty random walks: skill is granted at most once."
    from smlstm.evaluation import ewma_variance, linear_forecast
    from smlstm.features import make_targets, prepare_data
    granted = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        inside = 0.01 / math.sqrt(20) * rng.standard_normal((2_500, 20))
        path = np.exp(np.cumsum(inside, axis=None).reshape(inside.shape))
        frame = pd.DataFrame({"open": np.r_[1, path[:-1, -1]], "high": path.max(1), "low": path.min(1), "close": path[:, -1], "volume": 1e6}, index=pd.bdate_range("2005-01-03", periods=2_500, name="date"))
        frame["high"], frame["low"] = frame[["open", "high"]].max(axis=1), frame[["open", "low"]].min(axis=1)
        features, targets = prepare_data(frame), make_targets(frame)
        targets, close = targets.loc[features.index], frame.close.loc[features.index]

        def fold(train, test):
            said, came = linear_forecast(features, targets, train, test), targets.iloc[test]
            now = close.iloc[test]
            return pd.DataFrame({"date": said.index, "close": now, "target_date": close.index[test.start + 1:test.stop + 1], "actual_close": now * np.exp(came.log_return),
                                 "forecast_close": now * np.exp(said.log_return), "up_probability": said.up_probability, "actual_up": came.up, "forecast_variance": said.variance,
                                 "actual_variance": np.exp(came.log_variance), "ewma_variance": ewma_variance(variance_proxy(frame))[said.index], "regime_1": 1.0})

        full = add_baselines(walk_forward(fold, time_folds(len(features) - 1, 3, 1)), frame)
        granted += any(v.outcome == "skill shown" for v in verdicts(skill_tests(full)).values())
    assert granted <= 1
