"""Several horizons in one fit: targets by hand, gaps that hold, streams, files, panels, and lags of tests."""

import copy
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from smlstm.data.prices import load_prices
from smlstm.judging.audit import audit_causality
from smlstm.judging.evaluation import evaluate
from smlstm.judging.risk import risk_table
from smlstm.learning.settings import TrainConfig
from smlstm.model.losses import CurriculumWeights, MultiObjectiveLoss
from smlstm.model.model import SMLSTM, Forecast, SMLSTMConfig
from smlstm.using.commands import parse_parameters
from smlstm.using.estimator import ForecasterRegressor
from smlstm.using.forecaster import Forecaster, fit_panel
from smlstm.using.horizons import split_horizons, to_long
from smlstm.using.panels import WindowConfig, split_panel
from smlstm.using.parameters import ParameterError, check_parameters
from smlstm.using.run import run
from smlstm.using.tables import SeriesError, build_table
from smlstm.using.walkforward import panel_folds, walk_forward

HORIZONS = (1, 5, 21)
SMALL = dict(
    architecture=dict(hidden_size=8, n_heads=1, n_layers=1),
    windows=WindowConfig(seq_length=64, stride=64),
    training=TrainConfig(epochs=1, learning_rate=0.003),
)
QUICK = dict(model=SMALL["architecture"], windows=SMALL["windows"], training=SMALL["training"], progress=False)


def bars(ticker="SPY", rows=1600):
    return load_prices(ticker, source="sample").frame.tail(rows)


@pytest.fixture(scope="module")
def joint():
    return Forecaster(HORIZONS, **SMALL).fit(bars().iloc[:-60], progress=False)


@pytest.fixture(scope="module")
def folds():
    return Forecaster(HORIZONS, **SMALL).cross_validation(bars(), n_splits=2, progress=False)


def numbers(frame):
    return frame.select_dtypes("number").drop(columns="horizon", errors="ignore").to_numpy(float)


# targets, by hand


def measured_variance(frame, row):
    "Squared gap from the close before, and Garman and Klass within the bar, of one row."
    one, before = frame.iloc[row], frame.iloc[row - 1].close
    gap = math.log(one.open) - math.log(before)
    inside = 0.5 * math.log(one.high / one.low) ** 2 - (2 * math.log(2) - 1) * math.log(one.close / one.open) ** 2
    return max(gap**2 + max(inside, 0.0), 1e-10)


@pytest.mark.parametrize("horizon", HORIZONS)
def test_targets_are_those_computed_by_hand(horizon):
    frame = bars(rows=700)
    table = build_table(frame, HORIZONS)
    targets, first = table.at(horizon).targets, table.warmup
    for row in (0, 7, 133, table.known - 1, len(targets) - 1 - horizon):
        now, then = frame.close.iloc[first + row], frame.close.iloc[first + row + horizon]
        variance = [measured_variance(frame, first + row + ahead) for ahead in range(1, horizon + 1)]
        expected = [math.log(then / now), float(then > now), math.log(sum(variance) / horizon)]
        np.testing.assert_allclose(targets.iloc[row], expected, rtol=1e-9, atol=1e-12)
    assert targets.isna().all(axis=1).sum() == horizon


def test_a_table_of_the_past_knows_what_was_known_then():
    frame = bars(rows=900)
    past, whole = build_table(frame.iloc[:700], HORIZONS), build_table(frame, HORIZONS)
    then = whole.until(past.known)
    pd.testing.assert_frame_equal(then.targets, past.targets)
    assert then.horizons == HORIZONS and then.horizon == 21


# the loss


def test_the_loss_is_the_mean_of_the_horizons_losses_by_hand():
    price, logit, volatility = np.array([0.5, -3.0]), np.array([0.2, -1.0]), np.array([0.0, 1.5])
    y = np.array([[0.1, 1.0, 0.3], [0.5, 0.0, 1.0]])  # of two horizons
    huber = lambda e: e**2 / 2 if abs(e) <= 1 else abs(e) - 0.5
    entropy = lambda z, up: 2 * up * math.log1p(math.exp(-z)) + (1 - up) * math.log1p(math.exp(z))
    parts = [(huber(p - t[0]), entropy(z, t[1]), (v - t[2]) ** 2) for p, z, v, t in zip(price, logit, volatility, y)]
    expected = np.mean([a + 2 * b + 0.5 * c for a, b, c in parts])
    heads = Forecast(*(torch.tensor(part)[None, None] for part in (price, logit, volatility)), None)
    losses = MultiObjectiveLoss()(heads, torch.from_numpy(y.reshape(1, 1, 6)), CurriculumWeights())
    assert losses.total.item() == pytest.approx(expected, rel=1e-9)
    weighted = torch.cat([torch.from_numpy(y.reshape(1, 1, 6)), torch.full((1, 1, 1), 3.0)], -1)
    assert MultiObjectiveLoss()(heads, weighted, CurriculumWeights()).total.item() == pytest.approx(3 * expected)


def test_each_horizon_has_heads_of_its_own():
    torch.manual_seed(0)
    model = SMLSTM(SMLSTMConfig(n_features=4, hidden_size=8, n_heads=1, n_layers=1, n_horizons=3))
    x, y = torch.randn(2, 16, 4), torch.rand(2, 16, 9)
    loss = MultiObjectiveLoss()
    forecast, _ = model(x)
    loss(
        forecast._replace(**{n: getattr(forecast, n)[..., 1] for n in forecast._fields[:3]}), y[..., 3:6]
    ).total.backward()
    reached = model.heads.weight.grad.abs().sum(1) > 0
    assert reached.tolist() == [False] * 3 + [True] * 3 + [False] * 3


# one horizon


def test_one_horizon_in_a_list_is_that_horizon():
    one, other = (Forecaster(h, **SMALL).fit(bars().iloc[:-5], progress=False) for h in (5, [5]))
    assert other.horizon == 5
    for a, b in zip(one.model.parameters(), other.model.parameters()):
        assert torch.equal(a, b)
    pd.testing.assert_frame_equal(one.predict(), other.predict())
    assert "horizon" not in one.predict()


# gaps


@pytest.mark.parametrize("tickers", [("SPY",), ("SPY", "QQQ")])
def test_the_longest_horizon_lies_between_training_validation_and_test(tickers):
    tables = {name: build_table(bars(name), HORIZONS) for name in tickers}
    for fold in panel_folds(tables, 3):
        splits = split_panel(tables, {name: rows.train for name, rows in fold.items()}, SMALL["windows"])
        for name, rows in fold.items():
            dates, bars_of = tables[name].features.index, tables[name].prices.index
            reached = bars_of[bars_of.get_loc(dates[rows.train.stop - 1]) + 21]  # the last bar of a training target
            assert reached <= dates[rows.test.start]
            learned = bars_of[bars_of.get_loc(dates[splits[name].learn.stop - 1]) + 21]
            assert learned <= dates[splits[name].valid.start]


def test_a_fold_with_the_gap_of_a_shorter_horizon_is_refused():
    joint, short = ({"SPY": build_table(bars(), h)} for h in (HORIZONS, 5))
    with pytest.raises(ValueError, match="leaves a gap of 5 rows, but targets reach 21 ahead"):
        next(walk_forward(joint, fit=fit_panel, folds=panel_folds(short, 2), progress=False))


def test_the_fit_ends_where_its_longest_target_does():
    frame, train = bars(), slice(0, 900)
    fit = lambda prices: fit_panel({"SPY": build_table(prices, HORIZONS)}, {"SPY": train}, **QUICK)[0]
    last = build_table(frame, HORIZONS).warmup + train.stop - 1 + 21  # the last bar that a training target reaches
    after, within = frame.copy(), frame.copy()
    after.iloc[last + 1 :, :4] *= 1.5
    within.iloc[last:, :4] *= 1.5
    same, other, moved = fit(frame), fit(after), fit(within)
    assert all(torch.equal(a, b) for a, b in zip(same.model.parameters(), other.model.parameters()))
    assert same.series == other.series
    assert not all(torch.equal(a, b) for a, b in zip(same.model.parameters(), moved.model.parameters()))


# frames


def test_forecasts_are_a_row_for_each_series_cutoff_and_horizon(joint):
    frame = joint.predict()
    assert frame.horizon.tolist() == [1, 5, 21] and frame.horizon.dtype.kind == "i"
    sessions = bars().index
    assert (frame.target_date == [sessions[-61 + h] for h in HORIZONS]).all()
    assert frame.columns.get_loc("horizon") == frame.columns.get_loc("date") + 1
    spread = np.log(frame["forecast_close-hi-90"] / frame["forecast_close-lo-90"])
    assert spread.is_monotonic_increasing
    long = to_long(frame)
    assert list(long)[:4] == ["unique_id", "ds", "cutoff", "horizon"] and "SMLSTM-lo-90" in long


def test_some_of_the_horizons_can_be_chosen(joint):
    whole = joint.predict()
    one = joint.predict(horizon=5)
    assert "horizon" not in one and len(one) == 1
    np.testing.assert_array_equal(numbers(one), numbers(whole[whole.horizon == 5]))
    pd.testing.assert_frame_equal(joint.predict(horizon=[21, 1]), whole[whole.horizon != 5].reset_index(drop=True))
    with pytest.raises(ValueError, match=r"horizon=2: this forecaster was fitted to look 1, 5, 21 bars ahead"):
        joint.predict(horizon=2)


def test_a_table_of_one_fitted_horizon_gives_its_frame(joint):
    whole = joint.forecast(build_table(bars(), HORIZONS))
    one = joint.forecast(build_table(bars(), 5))
    pd.testing.assert_frame_equal(one, split_horizons(whole)[5])
    with pytest.raises(SeriesError, match="fit one with horizon=3"):
        joint.forecast(build_table(bars(), 3))


def test_what_came_true_is_that_of_the_horizon(folds):
    close = bars().close
    for horizon, frame in split_horizons(folds).items():
        places = close.index.get_indexer(frame.date)
        np.testing.assert_array_equal(frame.target_date, close.index[places + horizon])
        np.testing.assert_allclose(frame.actual_close, close.to_numpy()[places + horizon], rtol=1e-12)
        np.testing.assert_array_equal(frame.actual_up, close.to_numpy()[places + horizon] > close.to_numpy()[places])


def test_intervals_of_each_horizon_come_from_its_own_known_errors(folds):
    for horizon, frame in split_horizons(folds[folds.fold == 1]).items():
        error = np.abs(np.log(frame.actual_close / frame.forecast_close)) / np.sqrt(frame.forecast_variance)
        row = len(frame) - 1
        known = error[: row - horizon + 1].to_numpy()[-250:]
        assert len(known) == 250
        rank = math.ceil(251 * 0.9)
        width = np.sort(known)[rank - 1] * math.sqrt(frame.forecast_variance[row])
        assert frame["forecast_close-hi-90"][row] == pytest.approx(
            frame.forecast_close[row] * math.exp(width), rel=1e-9
        )


def test_a_head_moves_the_forecasts_of_its_horizon_alone(joint):
    moved, table = copy.deepcopy(joint), build_table(bars(rows=700), HORIZONS)
    whole = lambda one: one._replace(calibration=one.calibration._replace(volatility_share=1.0))
    counted = [whole(one) for one in joint.series["series"].each]
    moved.series["series"] = counted[0]._replace(further=tuple(counted[1:]))
    before = moved.forecast(table)
    with torch.no_grad():
        moved.model.heads.bias[3 * 1 + 2] += 0.5  # volatility of the second horizon, in deviations of its target
    after = moved.forecast(table)
    ratio = (after.forecast_variance / before.forecast_variance).groupby(after.horizon).agg(["min", "max"])
    scale = dict(zip(counted[1].target_scaler.columns, counted[1].target_scaler.scale))["log_variance_ratio"]
    np.testing.assert_allclose(ratio.loc[5], math.exp(0.5 * scale), rtol=1e-5)
    np.testing.assert_allclose(ratio.loc[[1, 21]], 1, rtol=1e-12)


# streams, files, panels


def test_a_stream_ends_where_one_reading_ends(joint):
    frame, stream = bars(), dict(joint.streams)
    try:
        for a, b in ((-60, -59), (-59, -30), (-30, -1)):
            streamed = joint.update(frame.iloc[a:b])
        assert len(streamed) == 3 * 29 and streamed.horizon.tolist() == [1, 5, 21] * 29
        whole = joint.predict(frame.iloc[:-1])
        np.testing.assert_allclose(numbers(streamed.tail(3)), numbers(whole), rtol=1e-5)
        assert (streamed.tail(3).target_date.to_numpy() == whole.target_date.to_numpy()).all()
    finally:
        joint.streams = stream


def test_a_loaded_one_goes_on_where_the_saved_one_was(joint, tmp_path):
    joint.save(tmp_path)
    loaded = Forecaster.load(tmp_path)
    assert loaded.horizon == HORIZONS and loaded.series == joint.series
    pd.testing.assert_frame_equal(loaded.predict(), joint.predict())
    stream, new = dict(joint.streams), bars().iloc[-60:-30]
    try:
        pd.testing.assert_frame_equal(loaded.update(new), joint.update(new))
    finally:
        joint.streams = stream
    for one, other in zip(loaded.streams["series"].each, stream["series"].each):
        assert len(one.waiting) == len(other.waiting)


def test_a_panel_has_each_horizon_of_each_series(tmp_path):
    pair = {name: bars(name, 2200).iloc[:-10] for name in ("SPY", "QQQ")}
    panel = Forecaster(HORIZONS, **SMALL).fit(pair, progress=False)
    frame = panel.predict()
    assert list(zip(frame.unique_id, frame.horizon)) == [(n, h) for n in pair for h in HORIZONS]
    panel.save(tmp_path)
    loaded = Forecaster.load(tmp_path)
    new = {"QQQ": bars("QQQ", 2200).iloc[-10:-7]}
    made = panel.update(new)
    pd.testing.assert_frame_equal(loaded.update(new), made)
    assert made.unique_id.unique().tolist() == ["QQQ"] and len(made) == 9
    whole = panel.predict({"QQQ": bars("QQQ", 2200).iloc[:-7]})
    np.testing.assert_allclose(numbers(made.tail(3)), numbers(whole), rtol=1e-5)


def test_the_audit_finds_no_lookahead_in_any_horizon(joint):
    def forecasts(prices):
        frame = joint.forecast(build_table(prices.ffill(), HORIZONS)).set_index("date")
        wide = frame.pivot(columns="horizon", values=["forecast_close", "up_probability", "forecast_variance"])
        return wide.set_axis([f"{name}_{horizon}" for name, horizon in wide.columns], axis=1)

    report = audit_causality(forecasts, bars(rows=700), cuts=2, tolerance=1e-5)
    assert report.causal, str(report)


# tests of skill


def long_run_variance(x, lags):
    "Newey and West's (1987) estimate: autocovariances up to `lags`, with weights that fall to zero behind them."
    x = x - x.mean()
    return (x @ x + 2 * sum((1 - lag / (lags + 1)) * (x[lag:] @ x[:-lag]) for lag in range(1, lags + 1))) / len(x)


@pytest.mark.parametrize("horizon", HORIZONS)
def test_tests_of_skill_count_the_overlap_of_their_horizon(folds, horizon):
    from statsmodels.api import OLS

    frame = split_horizons(folds)[horizon]
    tests = evaluate(frame, horizon)["overall"]["tests"]
    ratio, base = (frame.actual_variance / v for v in (frame.forecast_variance, frame.ewma_variance))
    saved = ((base - np.log(base)) - (ratio - np.log(ratio))).to_numpy()
    rows, lags = len(saved), max(horizon - 1, math.ceil(len(saved) ** (1 / 3)))
    error = math.sqrt(long_run_variance(saved, lags) / rows)
    harvey = math.sqrt((rows + 1 - 2 * horizon + horizon * (horizon - 1) / rows) / rows)
    found = tests["volatility"]
    assert found["statistic"] == pytest.approx(harvey * saved.mean() / error, rel=1e-6)
    called, up = (frame.up_probability > 0.5).astype(float), frame.actual_up
    if tests["direction"]["note"] or horizon == 1:
        return
    moving = [f for f in (0, 1) if called[frame.fold == f].nunique() > 1]
    known = frame.fold.isin(moving)
    design = np.column_stack([*((frame.fold == f)[known].astype(float) for f in moving), called[known]])
    lags = max(horizon - 1, math.ceil(known.sum() ** (1 / 3)))
    fit = OLS(up[known].to_numpy(), design).fit(cov_type="HAC", cov_kwds={"maxlags": lags})
    assert tests["direction"]["statistic"] == pytest.approx(float(fit.tvalues[-1]), rel=1e-9)


def test_tests_of_tails_see_outcomes_that_do_not_overlap():
    "Of sums of five normal numbers, forecast right, tests at 5% reject about 5%; with overlap they reject far more."
    rng, horizon, rejected = np.random.default_rng(0), 5, {1: [], 5: []}
    point, tail = -1.6448536 * horizon**0.5, -2.0627128 * horizon**0.5  # 5% quantile and shortfall of the sum
    for _ in range(200):
        sums = np.convolve(rng.standard_normal(1500), np.ones(horizon), "valid")
        known = {"q0.01": 2.0 * point, "es0.01": 2.0 * tail, "q0.05": point, "es0.05": tail}
        frame = pd.DataFrame({"log_return": sums}).assign(**known)
        for apart, found in rejected.items():
            found.append(risk_table(frame, apart).loc[0.05, ["kupiec", "independence"]] < 0.05)
    shares = {apart: pd.DataFrame(found).mean() for apart, found in rejected.items()}
    assert shares[5].between(0.01, 0.11).all() and shares[1].kupiec > 0.15 and shares[1].independence > 0.9, shares


# runs


@pytest.mark.parametrize("given", ["1,5,21", "[1, 5, 21]", [21, 5, 1], (1, 5, 21)])
def test_a_parameter_is_several_horizons(given):
    assert check_parameters(horizon=given)["horizon"] == HORIZONS


@pytest.mark.parametrize("given", ["1,a", "1,300", "1,1", [], {}, True, "0,5"])
def test_a_parameter_that_is_no_horizon_is_refused(given):
    with pytest.raises(ParameterError, match=r"horizon must be a whole number from 1 to 250, or several"):
        check_parameters(horizon=given)


def test_an_ensemble_of_several_horizons_is_refused():
    with pytest.raises(ParameterError, match="False with several horizons"):
        check_parameters(horizon="1,5", ensemble=True)


def test_the_command_line_takes_several_horizons():
    asked = parse_parameters(["horizon=1,5,21"])["horizon"]
    from papermill.translators import PythonTranslator

    given = eval(PythonTranslator.translate(asked))  # what the notebook gets
    assert check_parameters(horizon=given)["horizon"] == HORIZONS


@pytest.mark.slow
def test_a_run_writes_each_horizon(tmp_path):
    small = dict(source="sample", start="2013-01-01", epochs=1, n_splits=2, hidden_size=8, n_heads=1, n_layers=1)
    result = run(small, horizon="1,5", seq_length=64, stride=128, output_dir=str(tmp_path))
    metrics = json.loads((result.folder / "metrics.json").read_text(encoding="utf-8"))
    assert list(metrics["horizons"]) == ["1", "5"] and metrics["data"]["ticker"] == "SPY"
    rows = pd.read_csv(result.folder / "forecasts.csv", parse_dates=["date", "target_date"])
    close = load_prices("SPY", source="sample", start="2013-01-01").frame.close
    for horizon, frame in split_horizons(rows).items():
        known = frame[frame.actual_close.notna()]
        places = close.index.get_indexer(known.date)
        np.testing.assert_allclose(known.actual_close, close.to_numpy()[places + horizon], rtol=1e-9)
        losses = known.actual_variance / known.forecast_variance
        found = metrics["horizons"][str(horizon)]["overall"]
        assert found["volatility"]["qlike"] == pytest.approx((losses - np.log(losses) - 1).mean(), rel=1e-6)
        assert found["audit"]["causal"] and len(frame) == len(known) + 1
        contenders = {row["contender"] for row in metrics["horizons"][str(horizon)]["comparison"]["volatility"]}
        assert {"model", "lstm", "har", "ewma"} <= contenders
        test, lagged = found["tests"]["volatility"], evaluate(result.forecasts["SPY", horizon], horizon)
        assert test["p_value"] == pytest.approx(lagged["overall"]["tests"]["volatility"]["p_value"], rel=1e-6)
        tomorrow = frame.iloc[-1]
        assert tomorrow.usual_move == pytest.approx(tomorrow.forecast_volatility * horizon**0.5)
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in ("Scores by horizon", "Fan over the horizons", "5 bars ahead"))
    assert Forecaster.load(result.folder).horizon == (1, 5)
    assert set(result.metrics) == {("SPY", 1), ("SPY", 5)}


# refusals


def test_what_cannot_be_is_refused_by_name():
    for wrong, text in (
        ([], "must be a whole number of bars, or several"),
        ("1,5", "must be a whole number of bars, or several"),
        ([5, 5], "give each horizon once"),
        ([0, 5], "must be at least 1"),
    ):
        with pytest.raises(ValueError, match=text):
            Forecaster(wrong)
    with pytest.raises(ValueError, match="an ensemble forecasts one horizon"):
        Forecaster([1, 5], architecture={"scales": [1, 5]})
    with pytest.raises(ValueError, match=r"horizon=\[1, 5\]: a regressor forecasts one horizon"):
        ForecasterRegressor(Forecaster([1, 5])).fit(bars())
    with pytest.raises(SeriesError, match=r"look 5 and \(1, 5\) bars ahead"):
        fit_panel({"A": build_table(bars(), (1, 5)), "B": build_table(bars(), 5)}, **QUICK)
