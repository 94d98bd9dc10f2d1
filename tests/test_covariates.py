"""Columns that are known ahead: the right bar, in tables, streams, panels and folders, and nothing else looks ahead."""

import joblib
import numpy as np
import pandas as pd
import pytest
from test_forecaster import SMALL, bars, long_frame, numbers

import smlstm.using.covariates as covariates
import smlstm.using.tables as tables
from smlstm.data.calendar_features import CALENDAR_FEATURES, calendar_features
from smlstm.data.prices import load_prices
from smlstm.evidence.inputs import announced_scores, gain_shares
from smlstm.judging.audit import audit_causality
from smlstm.learning.settings import TrainConfig
from smlstm.using.forecaster import Forecaster, fit_panel
from smlstm.using.panels import WindowConfig
from smlstm.using.run import DEFAULTS, make_tables, start_job
from smlstm.using.streams import table_of
from smlstm.using.sweep import sweep
from smlstm.using.tables import SeriesError, price_tables

# Decisions of the Federal Open Market Committee in 2018 and 2019, by federalreserve.gov
FOMC = "2018-01-31 2018-03-21 2018-05-02 2018-06-13 2018-08-01 2018-09-26 2018-11-08 2018-12-19 2019-01-30 2019-03-20"
DAYS = pd.to_datetime(FOMC.split())


def meetings(dates):
    "A function of dates: whether the committee decides."
    return pd.DataFrame({"fomc": dates.isin(DAYS).astype(float)}, dates)


def with_column(prices, after=0):
    "Prices with the column, and rows after the last close that have nothing else."
    later = pd.bdate_range(prices.index[-1] + pd.Timedelta(days=1), periods=after)
    return pd.concat([prices.assign(fomc=meetings(prices.index).fomc), meetings(later)])


@pytest.fixture(scope="module")
def prices():
    return bars("SPY")


@pytest.fixture(scope="module")
def fitted(prices):
    return Forecaster(future_exogenous="fomc", **SMALL).fit(with_column(prices[:1500], 30), progress=False)


def test_a_row_has_the_value_of_the_bar_that_it_forecasts(prices):
    ((_, table),) = price_tables(with_column(prices, 10), 1, None, 15.0, "fomc").items()
    features, index = table.features, table.features.index
    for day in DAYS[:8]:
        at = index.get_loc(day)
        assert list(features.fomc_ahead.iloc[at - 2 : at + 1]) == [0, 1, 0]
        assert list(features.fomc.iloc[at - 1 : at + 2]) == [0, 1, 0]
    assert features.fomc_ahead.sum() == 8 and features.isna().sum().sum() == 0


def test_a_row_has_the_share_of_the_bars_that_it_forecasts(prices):
    ((_, table),) = price_tables(with_column(prices, 10), 5, None, 15.0, "fomc").items()
    ahead, at = table.features.fomc_ahead, table.features.index.get_loc(pd.Timestamp("2018-03-21"))
    assert ahead.iloc[at - 6 : at + 1].tolist() == pytest.approx([0, 0.2, 0.2, 0.2, 0.2, 0.2, 0])


@pytest.mark.parametrize("horizon", [1, 5])
def test_columns_frames_and_functions_are_the_same(prices, horizon):
    dates = prices.index.append(pd.bdate_range("2019-01-02", periods=30))
    frame = meetings(dates)
    long = frame.rename_axis("ds").reset_index().assign(unique_id="series")
    given = {"column": (with_column(prices, 30), "fomc")} | {
        name: (prices, source) for name, source in {"function": meetings, "frame": frame, "long": long}.items()
    }
    made = {name: price_tables(p, horizon, None, 15.0, future)["series"] for name, (p, future) in given.items()}
    for table in made.values():
        pd.testing.assert_frame_equal(table.features, made["column"].features, check_freq=False, check_names=False)


def test_streams_go_on_as_a_table_does(prices, fitted):
    begun = Forecaster.predict(fitted)
    followed = [fitted.update(with_column(prices[a:b])) for a, b in [(1500, 1501), (1501, 1520)]]
    whole = fitted.predict(with_column(prices[:1520], 5))
    assert begun.date[0] == prices.index[1499] and followed[-1].date.iloc[-1] == whole.date[0]
    price = ["forecast_close", "up_probability", "forecast_variance"]
    np.testing.assert_allclose(followed[-1][price].tail(1), whole[price], rtol=1e-6)
    every = fitted.forecast(table_of(fitted.series["series"], with_column(prices, 5))).set_index("date")
    streamed = pd.concat(followed).set_index("date")[price]
    np.testing.assert_allclose(streamed, every.loc[streamed.index, price], rtol=1e-6)


def test_a_stream_says_what_it_must_know(prices):
    fitted = Forecaster(future_exogenous="fomc", **SMALL)
    with pytest.raises(SeriesError, match="fomc_ahead cannot be known at 2018-08-07.*add rows after the last close"):
        fitted.fit(with_column(prices[:1500]), progress=False)
    fitted.fit(with_column(prices[:1500], 2), progress=False)
    fitted.update(with_column(prices[1500:1501]))
    with pytest.raises(SeriesError, match="fomc must be known 1 bars after 2018-08-09"):
        fitted.update(with_column(prices[1501:1502]))
    fitted.update(with_column(prices[1501:1502], 1))  # a refusal keeps nothing
    with pytest.raises(SeriesError, match="lacks the columns"):
        fitted.update(prices[1502:1503])


def test_an_announcement_moves_the_forecast_before_it(prices, fitted):
    "A stream that is told of a meeting tomorrow forecasts another variance than one that is told of none."
    plain, told = with_column(prices[:1510], 1), with_column(prices[:1510], 1)
    told.iloc[-1, told.columns.get_loc("fomc")] = 1.0
    a, b = (fitted.predict(p).forecast_variance[0] for p in (plain, told))
    assert abs(a / b - 1) > 1e-4


def test_several_horizons_have_a_mean_each(tmp_path, prices):
    made = Forecaster(horizon=[1, 5], future_exogenous="fomc", calendar_features=True, **SMALL)
    made.fit(with_column(prices[:1500], 30), progress=False).save(tmp_path)
    loaded = Forecaster.load(tmp_path)
    assert {"fomc", "fomc_ahead_1", "fomc_ahead_5", "calendar_half_day_ahead_5"} <= set(
        loaded.series["series"].scaler.columns
    )
    followed, whole = loaded.update(with_column(prices[1500:1520])).tail(2), made.predict(with_column(prices[:1520], 5))
    assert followed.horizon.tolist() == whole.horizon.tolist() == [1, 5]
    np.testing.assert_allclose(followed.forecast_variance, whole.forecast_variance, rtol=1e-6)


def test_a_panel_streams_saves_and_loads(tmp_path):
    frames = {name: with_column(bars(name)[:1500], 20) for name in ("SPY", "QQQ")}
    frames["QQQ"]["fomc"] = 1 - frames["QQQ"].fomc  # each series has its own
    panel = Forecaster(future_exogenous=["fomc"], **SMALL).fit(long_frame(**frames), progress=False)
    assert panel.exogenous == ()
    panel.save(tmp_path)
    loaded = Forecaster.load(tmp_path)
    assert loaded.future_exogenous == ("fomc",) and loaded.series == panel.series
    pd.testing.assert_frame_equal(loaded.predict(), panel.predict())
    new = {name: with_column(bars(name)[1500:1510]) for name in frames}
    new["QQQ"]["fomc"] = 1 - new["QQQ"].fomc
    one, two = panel.update(new), loaded.update(new)
    pd.testing.assert_frame_equal(one, two)
    longer = {name: pd.concat([frames[name][:1500], new[name], frames[name][1510:]]) for name in frames}
    whole = panel.predict(longer).set_index("unique_id")
    last = one.groupby("unique_id").tail(1).set_index("unique_id").loc[whole.index]
    np.testing.assert_allclose(last.forecast_variance, whole.forecast_variance, rtol=1e-6)


def test_a_function_is_given_again_to_what_is_loaded(tmp_path, prices):
    made = Forecaster(future_exogenous=meetings, **SMALL).fit(prices[:1500], progress=False)
    made.save(tmp_path)
    with pytest.raises(
        ValueError, match=r"columns \['fomc'\] of a frame or a function.*load\(folder, future_exogenous"
    ):
        Forecaster.load(tmp_path)
    with pytest.raises(ValueError, match=r"columns \['fomc'\].*has \['other'\]"):
        Forecaster.load(tmp_path, future_exogenous=lambda dates: meetings(dates).set_axis(["other"], axis=1))
    loaded = Forecaster.load(tmp_path, future_exogenous=meetings)
    a, b = made.update(prices[1500:1505]), loaded.update(prices[1500:1505])
    pd.testing.assert_frame_equal(a, b)
    whole = loaded.predict(prices[:1505])
    np.testing.assert_allclose(a.forecast_variance.tail(1), whole.forecast_variance, rtol=1e-6)


def test_calendar_features_stream_and_come_back(tmp_path, prices):
    made = Forecaster(horizon=2, calendar_features=True, **SMALL).fit(prices[:1500], progress=False)
    made.save(tmp_path)
    loaded = Forecaster.load(tmp_path)
    assert loaded.calendar_features and loaded.series["series"].covariates.exchange == "XNYS"
    followed, whole = loaded.update(prices[1500:1530]).tail(1), made.predict(prices[:1530])
    price = ["forecast_close", "up_probability", "forecast_variance"]
    np.testing.assert_allclose(followed[price], whole[price], rtol=1e-6)
    assert set(CALENDAR_FEATURES) <= set(loaded.series["series"].scaler.columns)
    with pytest.raises(SeriesError, match="need daily bars"):
        Forecaster(calendar_features=True, **SMALL).fit(prices[::5], progress=False, max_gap=99)


def test_unknown_closures_are_not_foretold():
    "11 September 2001 and the storm of 2012 were known to nobody on the evening before."
    for evening, next_day in (("2001-09-10", 1), ("2012-10-26", 3)):
        row = calendar_features(pd.DatetimeIndex([evening]))
        assert np.exp(row.calendar_log_closure[0:1].item()) == pytest.approx(next_day)


@pytest.mark.parametrize("settings", [dict(future_exogenous="fomc"), dict(calendar_features="XNYS")])
def test_cross_validation_takes_them(prices, settings):
    given = with_column(prices) if "future_exogenous" in settings else prices
    tested = Forecaster(**settings, **SMALL).cross_validation(given, n_splits=2, progress=False)
    plain = Forecaster(**SMALL).cross_validation(prices, n_splits=2, progress=False)
    assert tested.date.equals(plain.date) and np.isfinite(numbers(tested)).all()
    assert not np.allclose(tested.forecast_variance, plain.forecast_variance)


PROBES = ("raise", "lower", "shuffle", "truncate", "rare rows")


def audit(forecaster, frame, ahead):
    def heads(p):
        known = forecaster.forecast(table_of(forecaster.series["series"], p)).set_index("date")
        return known[["forecast_close", "up_probability", "forecast_variance"]].dropna()

    return audit_causality(heads, frame, cuts=1, rows=5, tolerance=1e-5, ahead=ahead, probes=PROBES).causal


def audit_features(fitted, frame, ahead):
    features = lambda p: table_of(fitted, p).features.dropna()
    return audit_causality(features, frame, cuts=2, rows=9, ahead=ahead, probes=PROBES).causal


@pytest.mark.parametrize("horizon", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_only_declared_columns_look_ahead_and_only_as_far_as_declared(monkeypatch, horizon):
    frame = bars("SPY").tail(600)
    frame = frame.assign(fomc=(np.arange(600) % 9 == 0).astype(float))
    panel = price_tables(frame, horizon, None, 15.0, "fomc")
    made, _ = fit_panel(
        panel,
        {"series": slice(0, 250)},
        SMALL["architecture"],
        WindowConfig(32),
        TrainConfig(epochs=1),
        progress=False,
    )
    fitted = made.series["series"]
    assert audit(made, frame, {"fomc": horizon})
    assert audit_features(fitted, frame, {"fomc": horizon})
    assert not audit_features(fitted, frame, {"fomc": horizon - 1})  # the span's last bar is read, and not declared
    assert not audit_features(fitted, frame, None)
    means = covariates.means_ahead
    monkeypatch.setattr(covariates, "means_ahead", lambda values, rows, h: means(values, rows, h + 1))
    assert not audit_features(fitted, frame, {"fomc": horizon})  # one bar further


def test_calendar_features_pass_the_audit_undeclared():
    made = Forecaster(calendar_features=True, **SMALL).fit(bars("SPY").head(900), progress=False)
    assert audit(made, bars("SPY").tail(600), None)


@pytest.mark.parametrize(
    "future, message",
    [
        ("nothing", "no column 'nothing'"),
        (lambda dates: pd.DataFrame({"rsi_14": np.zeros(len(dates))}, dates), "'rsi_14'.*rename it"),
        (lambda dates: pd.DataFrame({"x": ["a"] * len(dates)}, dates), "x holds .*not numbers"),
        (lambda dates: pd.DataFrame({"x": np.cumsum(np.ones(len(dates)))}, dates), "depend on its own date"),
        (meetings(pd.bdate_range("2018-01-01", periods=99)), "fomc has no value at"),
        (lambda dates: np.zeros(3), "gave 3 rows for 16.. dates"),
    ],
)
def test_what_cannot_be_used_is_one_clear_error(prices, future, message):
    with pytest.raises(SeriesError, match=message):
        Forecaster(future_exogenous=future, **SMALL).fit(prices, progress=False)


def test_a_run_takes_calendar_features(tmp_path):
    parameters = dict(source="sample", start="2010-01-01", calendar_features=True, output_dir=str(tmp_path))
    assert DEFAULTS["calendar_features"] is False
    job = start_job(parameters)
    try:
        assert set(CALENDAR_FEATURES) <= set(make_tables(job)["SPY"].features)
    finally:
        job.lock.release(force=True)
    assert load_prices("SPY", source="sample").frame.index[-1] == pd.Timestamp("2018-12-31")


def test_a_sweep_takes_calendar_features(tmp_path, prices, monkeypatch):
    small = {"hidden_size": 8, "n_heads": 1, "n_layers": 1, "seq_length": 64, "epochs": 1}
    seen = []
    build = tables.build_table
    monkeypatch.setattr(tables, "build_table", lambda *a, **k: seen.append(build(*a, **k)) or seen[-1])
    with joblib.parallel_config("sequential"):
        for wanted in (False, "XNYS"):
            done = sweep({"SPY": prices}, {"small": small}, tmp_path, 2, calendar_features=wanted, progress=False)
            assert (done.status == "ok").all(), done.error.tolist()
    assert [set(CALENDAR_FEATURES) <= set(table.features) for table in seen] == [False, False, True, True]


@pytest.mark.slow
def test_a_planted_announcement_is_found():
    "Nine tenths of the best gain with the column and nothing without it, by the product as it comes."
    shares = gain_shares(announced_scores([11, 12]))
    assert (shares["with"] > 0.9).all() and (shares["without"] < 0.05).all()
