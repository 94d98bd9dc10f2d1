"""Tests of skill keep their size and find what is there; frames survive a file; bad frames are named."""

import io
import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from smlstm.data.features import make_targets, prepare_data
from smlstm.data.variance import variance_proxy
from smlstm.data.windows import Fold, refit_folds, time_folds
from smlstm.judging.baselines import add_baselines, ewma_variance, linear_forecast
from smlstm.judging.evaluation import comparison_table, deflated_sharpe, evaluate, illustrate
from smlstm.judging.intervals import conformal_intervals
from smlstm.judging.score_details import encompassing_test
from smlstm.judging.scores import evaluate_fold, head_forecasts, interval_coverage, known_forecasts, share_interval
from smlstm.judging.skill import (
    SkillTest,
    best_so_far,
    direction_test,
    holm,
    loss_difference_test,
    skill_tests,
    verdict,
    verdicts,
)


def make_prices(n=1_200, seed=0):
    rng = np.random.default_rng(seed)
    volatility = 0.01 * np.exp(np.cumsum(0.05 * rng.standard_normal(n)))
    close = 100 * np.exp(np.cumsum(np.clip(volatility, 0.003, 0.03) * rng.standard_normal(n)))
    wide = np.exp(np.abs(0.005 * rng.standard_normal((2, n))))
    open_ = np.r_[100, close[:-1]]
    return pd.DataFrame(
        {
            "open": open_,
            "high": np.maximum(open_, close) * wide[0],
            "low": np.minimum(open_, close) / wide[1],
            "close": close,
            "volume": 1e6,
        },
        index=pd.bdate_range("2015-01-01", periods=n, name="date"),
    )


def make_forecasts(prices, first=600, folds=2):
    proxy, close = variance_proxy(prices), prices.close
    f = (
        pd.DataFrame(
            {
                "date": prices.index,
                "close": close,
                "target_date": prices.index.to_series().shift(-1),
                "actual_close": close.shift(-1),
                "forecast_close": close * 1.0001,
                "up_probability": 0.5 + 0.1 * np.sin(np.arange(len(close))),
                "actual_up": (close.shift(-1) > close).astype(float),
                "forecast_variance": proxy.ewm(alpha=0.1).mean(),
                "actual_variance": proxy.shift(-1),
                "ewma_variance": proxy.ewm(alpha=0.06).mean(),
                "regime_1": 0.7,
                "regime_2": 0.1,
                "regime_3": 0.1,
                "regime_4": 0.1,
            }
        )
        .iloc[first:-1]
        .reset_index(drop=True)
    )
    return f.assign(fold=np.arange(len(f)) * folds // len(f))


@pytest.fixture(scope="module")
def prices():
    return make_prices()


@pytest.fixture(scope="module")
def forecasts(prices):
    return make_forecasts(prices)


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
    assert alarms <= 18  # 7.5 expected, standard deviation 2.7


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
    assert 0.68 < found / 120 < 0.92  # a power of 80%


def test_verdicts():
    base = SkillTest("direction", "a test", "base rate", 0.02, 3.0, 0.003, 5_000, 3_000)
    assert verdict(base).outcome == "skill shown"
    assert verdict(base._replace(statistic=-3.0)).outcome == "no skill shown: significantly worse than chance"
    worse = verdict(base._replace(head="price", baseline="persistence", statistic=-3.0, effect=-0.02, error=0.005))
    assert (
        worse.outcome == "no skill shown: significantly worse than persistence"
        and "+2.00% against persistence (95%: +1.02 to +2.98)" in worse.reason
    )
    assert verdict(base._replace(statistic=1.0, p_value=0.3)).outcome == "no skill shown"
    assert (
        verdict(base._replace(statistic=1.0, p_value=0.3, rows=1_000)).outcome
        == "too few observations to tell (3,000 would be needed)"
    )
    assert (
        verdict(base._replace(note="undefined: constant forecast", statistic=math.nan, p_value=math.nan)).outcome
        == "no skill shown"
    )
    assert verdict(base, p_value=0.06).outcome == "no skill shown"
    assert (
        verdicts({"a": base._replace(p_value=0.03), "b": base._replace(p_value=0.04)})["a"].outcome == "no skill shown"
    )  # Holm: 0.06


def test_worse_than_persistence_is_said_before_anything_else(forecasts):
    rng = np.random.default_rng(0)
    close = forecasts.close * np.exp(0.02 * rng.standard_normal(len(forecasts)))
    noisy = forecasts.assign(forecast_close=close, drift_close=forecasts.close * 1.0001)
    assert verdicts(skill_tests(noisy))["price"].outcome == "no skill shown: significantly worse than persistence"


def test_interval_of_the_hit_rate_covers():
    missed = 0
    for seed in range(300):
        right = np.random.default_rng(seed).random(200) < 0.54
        low, high = share_interval(int(right.sum()), 200)
        missed += not low <= 0.54 <= high
    assert missed / 300 < 0.09


def test_constant_and_perfect_forecasts(forecasts):
    for constant in (0.0, 0.5, 1.0):
        assert (
            skill_tests(forecasts.assign(up_probability=constant))["direction"].note == "undefined: constant forecast"
        )
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
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_close, a, b))
    return a == pytest.approx(b, rel=1e-9) if isinstance(a, float) else a == b


def test_scores_of_folds(forecasts):
    run = evaluate(forecasts)
    assert [f["number"] for f in run["folds"]] == [0, 1] and run["overall"]["number"] == "all"
    rows = [f["rows"] for f in run["folds"]]
    joined = np.average([f["price"]["mape"] for f in run["folds"]], weights=rows)
    assert run["overall"]["price"]["mape"] == pytest.approx(joined)
    assert run["folds"][0]["test"] == {
        "first": str(forecasts.date[0].date()),
        "last": str(forecasts[forecasts.fold == 0].date.iloc[-1].date()),
    }
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


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: f.drop(columns=["close", "fold"]), "lacks fold, close"),
        (lambda f: f.iloc[:0], "no row whose outcome is known"),
        (lambda f: f.iloc[::-1], "go backwards"),
        (lambda f: f.assign(up_probability=f.up_probability.where(f.index != 3)), "up_probability is missing at row 3"),
        (lambda f: f.assign(target_date=f.date), "not after date"),
        (lambda f: f.assign(forecast_variance=-1.0), "must be positive"),
        (lambda f: f.assign(up_probability=2.0), "[0, 1]"),
        (lambda f: f.assign(regime_1=0.0), "sum to 0.3"),
    ],
)
def test_bad_frames_are_named(forecasts, change, words):
    with pytest.raises(ValueError) as error:
        evaluate(change(forecasts))
    assert words in str(error.value)


def test_refits_roll_and_expand():
    blocks = refit_folds(time_folds(60, n_splits=2, gap=2, test_size=10), every=4)
    assert [(f.number, f.train.start, f.train.stop, f.test.start, f.test.stop) for f in blocks] == [
        (0, 0, 38, 40, 44),
        (0, 0, 42, 44, 48),
        (0, 0, 46, 48, 50),
        (1, 0, 48, 50, 54),
        (1, 0, 52, 54, 58),
        (1, 0, 56, 58, 60),
    ]
    rolled = refit_folds([Fold(0, slice(10, 30), slice(31, 41))], every=5)
    assert rolled == [Fold(0, slice(10, 30), slice(31, 36)), Fold(0, slice(15, 35), slice(36, 41))]


def test_baselines_on_a_frame(prices, forecasts):
    full = add_baselines(forecasts, prices)
    assert full[forecasts.columns].equals(forecasts) and full.notna().all().all()
    first = full[full.fold == 1].iloc[0]
    before = prices.close[prices.index < first.date]
    assert first.drift_close == pytest.approx(first.close * math.exp(np.log(before).diff().mean()), rel=1e-6)
    assert set(head_forecasts(full, "volatility")) == set(
        "model ewma tuned_ewma constant har log_har leverage_har garch gjr range_garch".split()
    )
    for head, best in (("price", "actual_close"), ("volatility", "actual_variance")):
        column = {"price": "oracle_close", "volatility": "oracle_variance"}[head]
        table = comparison_table(full.assign(**{column: full[best]}), head)
        assert (
            table.iloc[:, 0].idxmin() == "oracle"
            and table.loc["oracle", "in 90% set"]
            and not table.loc["model", "in 90% set"]
        )
    with pytest.raises(ValueError, match="not among the prices"):
        add_baselines(forecasts, prices.iloc[:700])


def test_refits_use_what_was_known_at_each(prices, forecasts):
    "Blocks of 200 rows: each contender is fitted on what was known before its block, as in a fold of its own."
    refitted = add_baselines(forecasts, prices, refit_every=200)
    alone = add_baselines(forecasts.iloc[200:300].assign(fold=7), prices)
    columns = [column for column in alone if column not in forecasts]
    pd.testing.assert_frame_equal(refitted.iloc[200:300][columns], alone[columns])
    assert len(refitted) == len(forecasts) and not refitted.drift_close.equals(
        add_baselines(forecasts, prices).drift_close
    )


def test_skill_is_against_the_best_contender_so_far(forecasts):
    rng = np.random.default_rng(0)
    near = forecasts.actual_variance * np.exp(rng.normal(0, 0.1, len(forecasts)))
    forecasts = forecasts.assign(forecast_variance=forecasts.ewma_variance * np.exp(rng.normal(0, 1, len(forecasts))))
    known = forecasts.assign(forecast_variance=near)
    assert skill_tests(known)["volatility"].statistic > 0  # better than EWMA and itself the only contender
    strong = known.assign(oracle_variance=forecasts.actual_variance)
    test = skill_tests(strong)["volatility"]
    assert (
        test.baseline == "the best simple contender so far (ewma, oracle)"
        and test.statistic < skill_tests(known)["volatility"].statistic
    )
    assert evaluate(strong)["overall"]["best_simple"]["volatility"] == {"0": "ewma", "1": "oracle"}
    chosen = best_so_far(strong.assign(lstm_variance=forecasts.actual_variance * 1.001), "volatility")[1]
    assert set(chosen.values()) == {"ewma", "oracle"}  # a network is no simple contender


def test_best_so_far_by_hand(forecasts):
    "Losses of earlier folds alone decide: `a` is best on the first, `b` on the rest and, by then, over both."
    nine = forecasts.iloc[:9].assign(fold=np.repeat([1, 2, 3], 3), actual_variance=1.0, ewma_variance=9.0)
    nine = nine.assign(a_variance=[2.0] * 3 + [9.0] * 6, b_variance=[3.0] * 3 + [1.0] * 6)
    series, chosen = best_so_far(nine, "volatility")
    assert chosen == {1: "ewma", 2: "a", 3: "b"} and series.tolist() == [9.0] * 6 + [1.0] * 3


@pytest.mark.parametrize("seed", range(3))
def test_intervals_cover(seed):
    f = make_forecasts(make_prices(3_000, seed), first=300, folds=3)
    for level in (0.8, 0.9):
        coverage = interval_coverage(conformal_intervals(f, level=level))
        assert coverage[["close", "variance"]].sub(level).abs().to_numpy().max() < 0.03
    late = conformal_intervals(f).assign(
        lower_close=lambda c: c.lower_close.where(c.fold > 0)
    )  # a fold without any interval
    assert interval_coverage(late).rows[0] == 0 and np.isnan(interval_coverage(late).close[0])
    assert evaluate(late)["folds"][0]["coverage"]["rows"] == 0
    jump = f.assign(
        actual_close=f.close * (f.actual_close / f.close) ** np.where(f.index > 1_500, 3, 1)
    )  # errors treble
    adaptive, plain = (interval_coverage(conformal_intervals(jump, rate=rate)).close for rate in (0.01, 0.0))
    assert abs(adaptive.iloc[1] - 0.9) < abs(plain.iloc[1] - 0.9) and abs(adaptive["all"] - 0.9) < 0.01


def test_illustration_by_hand(forecasts):
    f = forecasts.iloc[:4].assign(
        close=100.0, actual_close=[110.0, 90.0, 100.0, 120.0], up_probability=[0.6, 0.6, 0.4, 0.7]
    )
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


@pytest.mark.parametrize(
    "dates, bars",
    [
        (pd.date_range("2024-01-01", periods=601), 365),
        (pd.date_range("2010-01-01", periods=601, freq="W-FRI"), 52),
        (pd.date_range("1970-01-31", periods=601, freq="ME"), 12),
        (pd.date_range("2024-01-01", periods=601, freq="h", tz="UTC"), 365 * 24),
    ],
)
def test_annual_figures_follow_the_dates(forecasts, dates, bars):
    f = forecasts.iloc[:500].assign(date=dates[:500], target_date=dates[1:501])
    by_dates, by_hand = illustrate(f, cost=0.0), illustrate(f, cost=0.0, bars_per_year=bars)
    earned = (f.up_probability > 0.5) * (f.actual_close / f.close - 1)
    assert by_dates[:6] == by_hand[:6]
    assert by_dates.annual_return == pytest.approx(bars * earned.mean())
    assert by_dates.annual_volatility == pytest.approx(math.sqrt(bars) * earned.std())
    assert by_dates.sharpe == pytest.approx(math.sqrt(bars) * earned.mean() / earned.std())


def test_holm():
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]).tolist() == [1.0, 1.0]


@pytest.mark.slow
def test_no_skill_on_noise_for_the_whole_chain():
    "A linear model with every baseline on twenty random walks: skill is granted at most once."
    granted = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        inside = 0.01 / math.sqrt(20) * rng.standard_normal((2_500, 20))
        path = np.exp(np.cumsum(inside, axis=None).reshape(inside.shape))
        frame = pd.DataFrame(
            {
                "open": np.r_[1, path[:-1, -1]],
                "high": path.max(1),
                "low": path.min(1),
                "close": path[:, -1],
                "volume": 1e6,
            },
            index=pd.bdate_range("2005-01-03", periods=2_500, name="date"),
        )
        frame["high"], frame["low"] = frame[["open", "high"]].max(axis=1), frame[["open", "low"]].min(axis=1)
        features, targets = prepare_data(frame), make_targets(frame)
        targets, close = targets.loc[features.index], frame.close.loc[features.index]

        def fold(number, train, test, frame=frame, features=features, targets=targets, close=close):
            forecast, actual = linear_forecast(features, targets, train, test), targets.iloc[test]
            now = close.iloc[test]
            return pd.DataFrame(
                {
                    "date": forecast.index,
                    "fold": number,
                    "close": now,
                    "target_date": close.index[test.start + 1 : test.stop + 1],
                    "actual_close": now * np.exp(actual.log_return),
                    "forecast_close": now * np.exp(forecast.log_return),
                    "up_probability": forecast.up_probability,
                    "actual_up": actual.up,
                    "forecast_variance": forecast.variance,
                    "actual_variance": np.exp(actual.log_variance),
                    "ewma_variance": ewma_variance(variance_proxy(frame))[forecast.index],
                    "regime_1": 1.0,
                }
            )

        parts = [fold(*f) for f in time_folds(len(features) - 1, 3, 1)]
        full = add_baselines(pd.concat(parts, ignore_index=True), frame)
        granted += any(v.outcome == "skill shown" for v in verdicts(skill_tests(full)).values())
    assert granted <= 1


def test_what_leaves_no_error_has_no_weight():
    "A perfect forecast, constant outcomes, two rows, NaN and other lengths: refused, and left out of a frame's tests."
    r = np.random.default_rng(0)
    y, f, g = r.normal(size=(3, 200))
    for bad in ((y, y, g), (np.ones(200), np.full(200, 0.5), g), (y[:2], f[:2], g[:2])):
        with pytest.raises(ValueError, match="no error"):
            encompassing_test(*bad)
    for bad in ((y, f, g[:1]), (y, np.where(y > 2, np.nan, f), g), (y[:, None], f[:, None], g[:, None])):
        with pytest.raises(ValueError, match="finite and"):
            encompassing_test(*bad)
