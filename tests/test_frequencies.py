"""Weekly, monthly and hourly series: windows, warm-up, lags and decay by hand, and the whole main flow on each."""

import json
import math

import arch.data.nasdaq
import arch.data.sp500
import numpy as np
import pandas as pd
import pytest
from statsmodels.api import OLS, add_constant
from yahoo_server import hourly

import smlstm
from smlstm.data.calendars import exchange_calendar, find_calendar
from smlstm.data.features import FEATURES, SETTLED, feature_table, latest_features, prepare_data
from smlstm.data.frames import standard_columns
from smlstm.data.frequencies import FREQUENCIES, frequency_of
from smlstm.data.variance import variance_proxy
from smlstm.judging.baselines import ewma_variance, har_variance, leverage_har_variance
from smlstm.using.panels import WindowConfig, train_panel
from smlstm.using.tables import build_table

SMALL = dict(epochs=1, hidden_size=8, n_heads=1, n_layers=1, n_splits=2)
PERIODS = {"1wk": "W-FRI", "1mo": "ME"}


def resampled(module, interval):
    "A bundled index in bars of a week or a month."
    rules = {"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum"}
    return standard_columns(module.load(), "index").resample(PERIODS[interval]).agg(rules).dropna()


def series_of(interval):
    "A series of each frequency."
    if interval in PERIODS:
        return resampled(arch.data.nasdaq, interval)
    if interval == "1d":
        return standard_columns(arch.data.nasdaq.load(), "index").iloc[:1500]
    rng, names = np.random.default_rng(5), {"1h": "h", "15m": "15min", "5m": "5min"}
    index = pd.date_range("2024-01-02", periods=1500, freq=names[interval], tz="UTC")
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.002, 1500)))
    open_ = np.append(100.0, close[:-1])
    high, low = np.maximum(open_, close) * 1.001, np.minimum(open_, close) * 0.999
    volume = rng.integers(100, 900, 1500).astype(float)
    return pd.DataFrame(dict(open=open_, high=high, low=low, close=close, volume=volume), index)


# ---------------------------------------------------------------- windows by hand


def test_weeks_and_months_have_windows_of_the_calendar():
    "A month, a quarter and a year in the windows of each; 40 weeks and 10 months are the 200 days of the long average."
    for interval, month, long, year in (("1wk", 4, 40, 52), ("1mo", 3, 10, 12)):
        frame = resampled(arch.data.sp500, interval)
        features, close = prepare_data(frame), np.log(frame.close)
        known = features.index
        at = lambda column, rows=known: column.loc[rows]
        pd.testing.assert_series_equal(features[f"return_{month}"], at(close.diff(month)), check_names=False)
        average = frame.close.rolling(long).mean() / frame.close - 1
        pd.testing.assert_series_equal(features[f"sma_{long}"], at(average), check_names=False)
        high = np.log(frame.close / frame.close.rolling(year).max())
        pd.testing.assert_series_equal(features.drawdown, at(high), check_names=False, atol=1e-12)
        assert not {"return_22", "sma_200", "log_variance_66"} & set(features)


@pytest.mark.parametrize("interval, rows, first", [("1wk", 1044 - 104, "2001-01-05"), ("1mo", 240 - 60, "2004-01-31")])
def test_twenty_years_are_long_enough(interval, rows, first):
    "Two years of weeks and five of months warm up; with 250 bars for all, twenty years of months had no row at all."
    features = prepare_data(resampled(arch.data.sp500, interval))
    assert len(features) == rows and features.index[0] == pd.Timestamp(first)


def test_days_are_as_they_were():
    names = {"return_5", "return_22", "ema_12", "ema_50", "sma_200", "log_variance_66", "downside_22", "obv_22"}
    assert names < set(FEATURES) and FREQUENCIES["1d"].warmup == 250
    assert FREQUENCIES["1d"].decay == FREQUENCIES["1h"].decay == 0.94


@pytest.mark.parametrize("interval", FREQUENCIES)
def test_columns_are_those_of_the_table_and_of_the_last_bar(interval):
    "Every column in its range, and the last row from the last bars alone."
    frame = series_of(interval)
    frequency, features = frequency_of(frame.index), prepare_data(frame)
    assert frequency.interval == interval
    table = feature_table(frequency)
    assert set(features) == {n for n in table if interval in ("1h", "15m", "5m") or not n.startswith("day_")}
    for name, column in features.items():
        low, high = table[name].low, table[name].high
        assert (low is None or column.min() >= low) and (high is None or column.max() <= high), name
    for stop in (frequency.warmup + 1, frequency.warmup + 40, len(frame)):
        bars = {name: frame[name].to_numpy()[max(0, stop - SETTLED) : stop] for name in frame}
        new = pd.Series(latest_features(bars, *frame.index[stop - 2 : stop], frequency=frequency))
        row = features.iloc[stop - 1 - frequency.warmup]
        pd.testing.assert_series_equal(new[row.index], row, check_names=False, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("interval", FREQUENCIES)
def test_no_window_is_longer_than_its_lag(interval):
    "Changing one bar moves a column within its lag, and only from that bar on."
    frame, frequency = series_of(interval), FREQUENCIES[interval]
    table, at = feature_table(frequency), frequency.warmup + 20
    shaken = frame.copy()
    shaken.iloc[at] *= [1.03, 1.05, 1.01, 1.04, 1.5]
    moved = (prepare_data(shaken) - prepare_data(frame)).abs()
    for name, column in moved.items():
        rows = np.flatnonzero(column.to_numpy() > 1e-9) + frequency.warmup - at
        assert rows.min(initial=0) >= 0, name
        assert table[name].lag is None or rows.max(initial=0) <= table[name].lag, name


# ---------------------------------------------------------------- baselines by hand


@pytest.mark.parametrize("interval, lags", [("1wk", (1, 4, 13)), ("1mo", (1, 3, 12))])
def test_har_of_weeks_and_months(interval, lags):
    "The regression of statsmodels on the means of those spans, up to the one factor that both are scaled by."
    frame = resampled(arch.data.sp500, interval)
    proxy, stop, first = variance_proxy(frame), len(frame) - 60, max(lags)
    x = add_constant(pd.DataFrame({n: np.log(proxy.rolling(n).mean()) for n in lags}))
    by_ols = np.exp(OLS(np.log(proxy).shift(-1)[first:stop], x[first:stop]).fit().predict(x[first:]))
    ours = har_variance(proxy, slice(0, stop), log=True)[first:]
    np.testing.assert_allclose(ours / ours.iloc[0], by_ols / by_ols.iloc[0], rtol=1e-7)
    assert leverage_har_variance(frame.close, proxy, slice(0, stop))[first + 1 :].notna().all()


@pytest.mark.parametrize("interval, decay", [("1d", 0.94), ("1wk", 0.85), ("1mo", 0.80), ("1h", 0.94)])
def test_decays(interval, decay):
    proxy = variance_proxy(series_of(interval))
    weights = decay ** np.arange(len(proxy) - 2, -1, -1)
    expected = weights @ proxy.to_numpy()[1:] / weights.sum()
    assert ewma_variance(proxy).iloc[-1] == pytest.approx(expected, rel=1e-9)
    assert build_table(series_of(interval)).bars.ewma_variance.iloc[-1] == pytest.approx(expected, rel=1e-9)


# ---------------------------------------------------------------- the main flow


def flow(tmp_path, frame, interval, **more):
    "A run on a file of bars; its result, and the same forecast after the series was read bar by bar."
    frame.rename_axis("date").to_csv(tmp_path / "bars.csv")
    asked = dict(ticker="ABC", source=str(tmp_path / "bars.csv"), interval=interval, output_dir=str(tmp_path / "runs"))
    result = smlstm.run(asked | SMALL | more)
    history = smlstm.load_prices("ABC", asked["source"], interval=interval, date_format=more.get("date_format")).frame
    streaming = smlstm.Forecaster.load(result.folder).start(history.iloc[:-3])
    last = streaming.update(history.iloc[-3:]).iloc[-1]
    numbers = ["forecast_close", "up_probability", "forecast_variance", "forecast_volatility", "ewma_variance"]
    for name in numbers:
        assert last[name] == pytest.approx(result.tomorrow["ABC"][name], rel=1e-5), name
    return result


def check_yearly(result, per_year):
    "The report's annual numbers, from the CSV, by hand."
    rows = pd.read_csv(result.folder / "forecasts.csv").dropna(subset=["actual_close"])
    earned = rows.actual_close / rows.close - 1
    earned.iloc[0] -= 0.0005
    always = json.loads((result.folder / "metrics.json").read_text())["illustration"]["always in"]
    assert always["annual_return"] == pytest.approx(earned.mean() * per_year, rel=1e-6)
    assert always["annual_volatility"] == pytest.approx(earned.std() * math.sqrt(per_year), rel=1e-6)


@pytest.mark.parametrize(
    "interval, per_year, target, length",
    [("1wk", 52, "2019-01-11", 52), pytest.param("1mo", 12, "2019-01-31", 12, marks=pytest.mark.slow)],
)
def test_weekly_and_monthly_bars_go_all_the_way(tmp_path, interval, per_year, target, length):
    result = flow(tmp_path, resampled(arch.data.sp500, interval), interval)
    assert result.tomorrow["ABC"].target_date == pd.Timestamp(target)
    assert math.isfinite(result.tomorrow["ABC"]["forecast_close-lo-90"])
    facts = json.loads((result.folder / "manifest.json").read_text())["parameters"]
    assert facts["seq_length"] == length and facts["stride"] == length // 4
    check_yearly(result, per_year)


@pytest.mark.parametrize(
    "interval, length, stride, share, folds",
    [("1wk", 52, 13, 0.15, 5), ("1mo", 12, 3, 0.2, 3)],
)
def test_a_forecaster_is_cut_by_the_frequency(monkeypatch, interval, length, stride, share, folds):
    "With no settings at all: windows of a year of weeks or months, and as many folds as such a history holds."
    seen = []

    def fit(tables, train, architecture, windows, *others, **options):
        seen.append(windows.filled(frequency_of(next(iter(tables.values())).features.index)))
        return train_panel(tables, train, {"hidden_size": 4, "n_heads": 1, "n_layers": 1}, windows, *others, **options)

    monkeypatch.setattr("smlstm.using.forecaster.train_panel", fit)
    frame = series_of(interval)
    made = smlstm.Forecaster(training={"epochs": 1, "warmup_epochs": 1}).cross_validation(frame, progress=False)
    assert made.fold.nunique() == folds and len(seen) == folds
    assert {(one.seq_length, one.stride, one.valid_share) for one in seen} == {(length, stride, share)}


def test_what_a_user_chooses_of_the_windows_stays():
    chosen = WindowConfig(seq_length=24, stride=None, valid_share=0.3)
    assert chosen.filled(FREQUENCIES["1mo"]) == chosen
    assert WindowConfig(seq_length=64).filled(FREQUENCIES["1wk"]).stride == 32
    assert WindowConfig().filled() == WindowConfig(seq_length=128, stride=32, valid_share=0.15)
    assert WindowConfig(stride=5).filled(FREQUENCIES["1wk"]).stride == 5


@pytest.mark.slow
def test_hourly_bars_go_all_the_way(tmp_path):
    bars = hourly(seed=2, days=260).bars[["open", "high", "low", "close", "volume"]]
    result = flow(tmp_path, bars, "1h", seq_length=64)
    assert {"return_7", "return_35", "log_variance_140", "day_sin"} < set(
        result.forecaster.series["ABC"].scaler.columns
    )
    check_yearly(result, 7 * 252)


def of_new_york(minutes, rows, seed=3):
    "Bars of so many minutes in the sessions of New York, in which the variance of a session's first hour is fourfold."
    schedule = exchange_calendar("XNYS", 2023).schedule.loc["2023-02-01":"2023-12-29"]
    starts = [
        pd.date_range(a, b, freq=f"{minutes}min", inclusive="left") for a, b in zip(schedule.open, schedule.close)
    ]
    index = pd.DatetimeIndex(np.concatenate([one.asi8 for one in starts])).tz_localize("UTC")[:rows]
    rng, early = (
        np.random.default_rng(seed),
        np.concatenate([np.arange(len(one)) * minutes < 60 for one in starts])[:rows],
    )
    close = 100 * np.exp(np.cumsum(rng.normal(0, np.where(early, 0.002, 0.001))))
    open_ = np.append(100.0, close[:-1])
    high, low = np.maximum(open_, close) * 1.0005, np.minimum(open_, close) * 0.9995
    return pd.DataFrame(dict(open=open_, high=high, low=low, close=close, volume=rng.integers(99, 999, rows)), index)


@pytest.mark.parametrize("minutes, after", [pytest.param(5, 1, marks=pytest.mark.slow), (15, 26 * 2 + 7)])
def test_minutes_go_all_the_way(tmp_path, minutes, after):
    "Ends in mid-session and at a session's end; the date forecast is the calendar's, and a year has its bars."
    frame = of_new_york(minutes, 1600 + after)
    bars = of_new_york(minutes, len(frame) + 1)
    result = flow(tmp_path, frame, f"{minutes}m", seq_length=64)
    tomorrow = result.tomorrow["ABC"]
    assert pd.Timestamp(tomorrow.target_date) == bars.index[-1]
    assert math.isfinite(tomorrow["forecast_close-lo-90"])
    check_yearly(result, 252 * 390 / minutes)


def test_what_a_user_chooses_stays(tmp_path):
    from smlstm.using.parameters import fill_in
    from smlstm.using.run import DEFAULTS

    chosen = dict(interval="1mo", seq_length=24, stride=8, n_splits=4)
    assert {name: fill_in(DEFAULTS | chosen)[name] for name in chosen} == chosen
    assert [fill_in(DEFAULTS)[name] for name in ("seq_length", "stride", "n_splits")] == [128, 32, 5]


# ---------------------------------------------------------------- what a run reads


def written(tmp_path, frame, dates="%Y-%m-%d"):
    frame.set_axis(frame.index.strftime(dates).rename("Date")).to_csv(tmp_path / "bars.csv")
    return dict(ticker="ABC", source=str(tmp_path / "bars.csv"), output_dir=str(tmp_path / "runs"), n_splits=2)


def test_a_run_reads_dates_by_its_format(tmp_path):
    "Starts of months are ambiguous: 1 to 12 January, or months."
    from smlstm.using.run import start_job

    frame = resampled(arch.data.sp500, "1mo")
    frame = frame.set_axis(frame.index.to_period("M").to_timestamp())
    asked = written(tmp_path, frame, "%d/%m/%Y") | dict(interval="1mo")
    with pytest.raises(ValueError, match="ambiguous.*date_format='%d/%m/%Y'"):
        start_job(asked)
    job = start_job(asked | dict(date_format="%d/%m/%Y"))
    job.lock.release(force=True)
    assert job.prices["ABC"].frame.index.tolist() == frame.index.tolist()
    for wrong in ("day/month", "%Q", "%d", 3, ""):
        with pytest.raises(smlstm.using.parameters.ParameterError, match="date_format=.* must be a format of dates"):
            start_job(asked | dict(date_format=wrong))


def test_a_gap_is_refused_and_max_gap_allows_it(tmp_path):
    "Thirty days are no holiday. Twelve, the lunar new year of Shanghai in 2020, are."
    from smlstm.using.run import make_tables, start_job
    from smlstm.using.tables import SeriesError

    frame = standard_columns(arch.data.sp500.load(), "index").iloc[:1200]
    gone = (frame.index > "2001-06-01") & (frame.index < "2001-07-01")
    job = start_job(written(tmp_path, frame[~gone]))
    with pytest.raises(SeriesError, match="series 'ABC': there is a gap of 31 days after 2001-06-01.*max_gap=15"):
        make_tables(job)
    job.lock.release(force=True)
    job = start_job(written(tmp_path, frame[~gone]) | dict(max_gap=32.0))
    assert len(make_tables(job)["ABC"].features) == len(frame) - gone.sum() - 250
    assert job.settings["max_gap"] == 32.0
    job.lock.release(force=True)
    holiday = (frame.index > "2001-06-01") & (frame.index < "2001-06-13")
    job = start_job(written(tmp_path, frame[~holiday]))
    assert len(make_tables(job)["ABC"].features)
    job.lock.release(force=True)


HOLIDAYS = {  # the last session before the longest closing of those years, and the first after it
    "600519.SS": ("2023-09-28", "2023-10-09"),
    "7203.T": ("2019-04-26", "2019-05-07"),
    "2330.TW": ("2020-01-20", "2020-01-30"),
    "BBCA.JK": ("2018-06-08", "2018-06-20"),
    "THYAO.IS": ("2003-11-20", "2003-12-01"),
    "005930.KS": ("2017-09-29", "2017-10-10"),
}


def of_exchange(symbol, last):
    "Made-up bars on an exchange's sessions of ten years, up to a day."
    sessions = exchange_calendar(find_calendar(symbol), 1995).sessions
    days = sessions[(sessions >= pd.Timestamp(last) - pd.DateOffset(years=10)) & (sessions <= last)]
    close = 100 * np.exp(np.cumsum(np.random.default_rng(1).normal(0, 0.01, len(days))))
    return pd.DataFrame(dict(open=close, high=close * 1.01, low=close * 0.99, close=close, volume=1e6), days)


@pytest.mark.parametrize("symbol", HOLIDAYS)
def test_long_holidays_are_no_gaps_in_a_run(tmp_path, symbol):
    "Weeks without a session pass in a file and in the main flow, with the parameters that nobody set."
    from smlstm.using.run import make_tables, start_job

    frame = of_exchange(symbol, pd.Timestamp(HOLIDAYS[symbol][1]) + pd.Timedelta(days=30))
    assert pd.Timestamp(HOLIDAYS[symbol][0]) == frame.index[frame.index < HOLIDAYS[symbol][1]][-1]
    job = start_job(written(tmp_path, frame) | dict(ticker=symbol))
    assert job.parameters["max_gap"] == 15 and len(make_tables(job)[symbol].features) == len(frame) - 250
    job.lock.release(force=True)


@pytest.mark.slow
@pytest.mark.parametrize("symbol", ["600519.SS"])
def test_a_run_before_a_long_holiday_names_the_day_after_it(tmp_path, symbol):
    "And the bar of that day follows in the stream."
    last, first = HOLIDAYS[symbol]
    frame = of_exchange(symbol, first)
    result = smlstm.run(written(tmp_path, frame.iloc[:-1]) | dict(ticker=symbol) | SMALL)
    assert frame.index[-2] == pd.Timestamp(last) and result.tomorrow[symbol].target_date == pd.Timestamp(first)
    assert smlstm.Forecaster.load(result.folder).update(frame.iloc[-1:]).date[0] == pd.Timestamp(first)


def test_fetched_prices_are_kept_where_cache_dir_names(yahoo, tmp_path):
    from smlstm.using.run import start_job

    asked = dict(ticker="SPY", start="2015-01-01", cache_dir=str(tmp_path / "kept"), output_dir=str(tmp_path / "runs"))
    job = start_job(asked | dict(n_splits=2))
    job.lock.release(force=True)
    assert job.prices["SPY"].provenance.source == "yahoo"
    assert any(path.is_file() for path in (tmp_path / "kept").rglob("*"))
    elsewhere = job.parameters | dict(cache_dir=str(tmp_path / "other"))
    assert smlstm.using.runfolder.training_folder(elsewhere, job.origins) == job.checkpoints
