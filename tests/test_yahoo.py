"""One range of prices over a hostile wire: the real yfinance client against a server that speaks Yahoo's protocol."""

import random
import re
import time

import numpy as np
import pandas as pd
import pytest
import yfinance
from yahoo_kit import END, FAST, START, same, spy, spy_hours, truth
from yahoo_server import Series, calendar, daily, hourly, longer, walk

from smlstm.data.cache import get_stock_data
from smlstm.data.prices import load_prices
from smlstm.data.request import (
    InvalidRequest,
    NoPrices,
    RangeOutOfReach,
    RateLimited,
    TransientFailure,
    UnknownTicker,
    YahooUnreachable,
)
from smlstm.data.yahoo import safe_fetch

TRANSIENT = {
    "one rate limit": ["limit"],
    "rate limits": ["limit"] * 6,
    "server error": ["error"] * 2,
    "server error in JSON": ["error_json"] * 2,
    "bad gateway": ["gateway"] * 4,
    "stale crumb": ["crumb"] * 2,
    "time-out": ["slow"],
    "reset in mid-body": ["reset"] * 2,
    "short of its length": ["short"],
    "cut JSON": ["cut"] * 2,
    "a page instead of JSON": ["html"],
    "no body": ["blank"],
    "null": ["null"],
    "down for repair": ["back_soon"],
    "no description": ["no_meta"],
    "no quotes once": ["no_quotes"],
    "empty once": ["empty"],
    "half the rows once": ["half"],
    "holes once": ["holes"],
    "null closes once": ["nulls"],
    "without its first day": ["late"],
    "the same half twice": ["half"] * 2,
    "empty twice": ["empty"] * 2,
    "all of it in turn": ["limit", "limit", "error", "error", "cut", "html", "reset", "half", "null"],
}


@pytest.mark.parametrize("faults", TRANSIENT.values(), ids=TRANSIENT)
def test_transient_failures_end_in_the_right_frame(yahoo, faults):
    yahoo.faults = list(faults)
    frame = safe_fetch("SPY", START, END, **FAST)
    same(frame, truth(spy(), START, END))
    assert not yahoo.faults


@pytest.mark.parametrize("fault", ["limit_after", "limit_until"])
def test_retry_after_is_respected(yahoo, caplog, fault):
    yahoo.faults = [fault] * 2  # yfinance itself asks twice
    same(safe_fetch("SPY", START, END, **FAST), truth(spy(), START, END))
    assert re.search("next in [12] s", caplog.text)  # not the hundredth of a second of the first backoff


def test_patience_ends(yahoo, caplog):
    yahoo.faults = ["limit"] * 100
    with pytest.raises(RateLimited, match="SPY.*try again later"):
        safe_fetch("SPY", START, END, retries=4, **FAST)
    assert len(yahoo.log) == 8
    assert "try 1 of 4" in caplog.text


def test_different_halves_are_never_believed(yahoo):
    yahoo.fault = lambda asked: random.choice(["cut", "html"])
    with pytest.raises(TransientFailure):
        safe_fetch("SPY", START, END, retries=3, **FAST)


PERMANENT = {
    "unknown or delisted": ("unknown", UnknownTicker, "check the spelling"),
    "no such range": ("no_range", NoPrices, "other dates"),
    "out of reach": ("reach", RangeOutOfReach, "start later"),
    "no such interval": ("interval", InvalidRequest, "another interval"),
}


@pytest.mark.parametrize("fault, kind, says", PERMANENT.values(), ids=PERMANENT)
def test_permanent_failures_end_at_once(yahoo, fault, kind, says, tmp_path):
    yahoo.fault = lambda asked: fault
    with pytest.raises(kind, match=says):
        load_prices("SPY", "yahoo", START, END, cache_dir=tmp_path, delay=1000)
    assert len(yahoo.log) <= 2  # yfinance repeats a refusal once with other cookies
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_guard_on_the_way_is_no_way(yahoo, tmp_path):
    yahoo.fault = lambda asked: "forbidden"
    with pytest.raises(YahooUnreachable, match="HTTP 403"):
        load_prices("SPY", "yahoo", START, END, cache_dir=tmp_path, delay=1000)
    assert load_prices("SPY", cache_dir=tmp_path, delay=1000).provenance.substitute


def test_a_symbol_yahoo_never_had(yahoo, tmp_path):
    with pytest.raises(UnknownTicker, match="NOSUCH"):
        load_prices("NOSUCH", cache_dir=tmp_path, delay=1000)


@pytest.mark.parametrize("fault", ["null", "empty", "blank"])
def test_an_answer_about_nobody_is_never_believed(yahoo, tmp_path, fault):
    yahoo.faults = [fault] * 5
    same(load_prices("SPY", "yahoo", START, END, cache_dir=tmp_path, **FAST).frame, truth(spy(), START, END))


def test_no_rows_three_times_is_no_prices(yahoo):
    yahoo.fault = lambda asked: "no_quotes"
    with pytest.raises(NoPrices):
        safe_fetch("SPY", START, END, retries=4, **FAST)
    assert len(yahoo.log) == 3


@pytest.mark.parametrize(
    "bad, kind",
    [
        (dict(ticker="../../etc/passwd"), InvalidRequest),
        (dict(ticker="A/B"), InvalidRequest),
        (dict(interval="7q"), InvalidRequest),
        (dict(start="2016-01-01", end="2015-01-01"), InvalidRequest),
        (dict(start="2999-01-01"), InvalidRequest),
        (dict(start="soon"), InvalidRequest),
        (dict(source="nowhere"), InvalidRequest),
        (dict(source=None), InvalidRequest),
        (dict(ticker="US0378331005"), InvalidRequest),
        (dict(source="nowhere.csv"), InvalidRequest),
        (dict(interval="1h", start="2001-01-01"), RangeOutOfReach),
        (dict(start="0001-01-01"), InvalidRequest),
        (dict(start=np.int64(5)), InvalidRequest),
        (dict(retries=0), InvalidRequest),
        (dict(delay=-1), InvalidRequest),
        (dict(delay=float("nan")), InvalidRequest),
        (dict(source="sample", ticker="AAPL"), InvalidRequest),
        (dict(source="sample", start="2020-01-01"), NoPrices),
    ],
)
def test_wrong_requests_never_reach_the_wire(yahoo, tmp_path, bad, kind):
    with pytest.raises(kind):
        load_prices(**{"cache_dir": tmp_path, "delay": 1000, **bad})
    assert yahoo.log == [] and list(tmp_path.rglob("*.parquet")) == []


@pytest.mark.parametrize("workers", [0, -1, 1.5, True])
def test_a_pool_has_workers(yahoo, tmp_path, workers):
    with pytest.raises(InvalidRequest, match="max_workers"):
        get_stock_data("SPY", START, END, workers, cache_dir=tmp_path)


def test_null_closes_are_dropped_and_counted(yahoo, tmp_path):
    yahoo.fault = lambda asked: "nulls"
    got = load_prices("SPY", "yahoo", START, END, cache_dir=tmp_path, **FAST)
    whole = truth(spy(), START, END)
    assert 0 < len(whole) - len(got.frame) < 10
    assert any("without a price dropped" in note for note in got.provenance.notes)
    same(got.frame, whole.loc[got.frame.index])


def test_real_gaps_are_kept_and_listed(yahoo, tmp_path):
    yahoo.fault = lambda asked: "holes"
    got = load_prices("SPY", "yahoo", START, END, cache_dir=tmp_path, **FAST)
    assert any("bars missing" in note for note in got.provenance.notes)
    assert len(yahoo.log) == 3  # believed when it has said the same three times


@pytest.mark.parametrize(
    "mangle",
    [
        lambda r: pd.concat([r, r.iloc[10:20]]),
        lambda r: r.sample(frac=1, random_state=0),
        lambda r: pd.concat([r.iloc[::-1], r]),
    ],
    ids=["duplicated", "unordered", "both"],
)
def test_order_and_duplicates(yahoo, mangle):
    yahoo.mangle = mangle
    same(safe_fetch("SPY", START, END, **FAST), truth(spy(), START, END))


def test_rows_outside_the_range_are_cut(yahoo):
    yahoo.mangle = lambda rows: spy().bars.loc["2014-12":"2016-02"]
    same(safe_fetch("SPY", START, END, **FAST), truth(spy(), START, END))


def test_split_and_dividends_are_adjusted(yahoo):
    series = daily(seed=3)
    middle = series.bars.index[series.bars.index.searchsorted(pd.Timestamp("2015-06-15", tz="UTC"))]
    series.bars.loc[series.bars.index < middle, "factor"] = 0.97
    stamp = int(middle.timestamp())
    series.events = {
        "splits": {str(stamp): {"date": stamp, "numerator": 2, "denominator": 1, "splitRatio": "2:1"}},
        "dividends": {str(stamp): {"date": stamp, "amount": 3.0}},
    }
    yahoo.series[("SPLT", "1d")] = series
    frame = safe_fetch("SPLT", START, END, **FAST)
    same(frame, truth(series, START, END))
    assert list(frame.columns) == ["open", "high", "low", "close", "volume"]


def test_an_unadjusted_split_is_listed(yahoo, tmp_path):
    series = daily(seed=3)
    series.bars.loc[series.bars.index < "2015-06-15", ["open", "high", "low", "close"]] *= 2
    yahoo.series[("SPLT", "1d")] = series
    notes = load_prices("SPLT", "yahoo", START, END, cache_dir=tmp_path, **FAST).provenance.notes
    assert any("size of a split (2015-06-15)" in note for note in notes)


@pytest.mark.parametrize(
    "start, end", [("2015-03-02", "2015-03-20"), ("2015-10-26", "2015-11-13")], ids=["spring", "autumn"]
)
def test_daily_dates_across_clock_changes(yahoo, start, end):
    frame = safe_fetch("SPY", start, end, **FAST)
    assert list(frame.index) == list(calendar().sessions_in_range(start, pd.Timestamp(end) - pd.Timedelta(days=1)))


@pytest.mark.parametrize(
    "exchange, zone", [("XTKS", "Asia/Tokyo"), ("XASX", "Australia/Sydney"), ("XLON", "Europe/London")]
)
def test_sessions_east_of_greenwich_keep_their_dates(yahoo, exchange, zone):
    yahoo.series[("EAST", "1d")] = series = daily(exchange=exchange, zone=zone)
    frame = safe_fetch("EAST", START, END, **FAST)
    same(frame, truth(series, START, END))
    assert frame.index.isin(calendar(exchange).sessions).all() and frame.index.tz is None


def test_a_market_without_volume_or_calendar(yahoo):
    days = pd.date_range("2014-01-01", "2020-01-01", freq="D", tz="UTC")
    series = Series(walk(days).assign(volume=0.0), kind="CURRENCY", zone="Europe/London", name="EUR/USD")
    yahoo.series[("EURUSD=X", "1d")] = series
    frame = safe_fetch("EURUSD=X", START, END, **FAST)
    assert frame.volume.isna().all() and len(frame) > 360


def forming(series, hours_left):
    "A series whose last session is still under way."
    now = int(time.time())
    regular = {"timezone": "EST", "gmtoffset": -18000, "start": now - 3600, "end": now + int(hours_left * 3600)}
    bars = pd.concat([series.bars, series.bars.iloc[-1:].set_axis([pd.Timestamp(now - 3600, unit="s", tz="UTC")])])
    return Series(
        bars,
        extra_meta={
            "currentTradingPeriod": {"pre": dict(regular), "regular": dict(regular), "post": dict(regular)},
            "regularMarketTime": now,
        },
    )


def test_a_bar_that_is_still_forming_is_left_out(yahoo):
    yahoo.series[("LIVE", "1d")] = live = forming(spy(), hours_left=2)
    frame = safe_fetch("LIVE", START, None, **FAST)
    today = live.bars.index[-1].tz_convert("America/New_York").tz_localize(None).normalize()
    assert frame.index[-1] < today


def test_hourly_bars_with_early_closes_and_clock_changes(yahoo):
    yahoo.series[("SPY", "1h")] = series = hourly(seed=2)
    start = str((pd.Timestamp.now() - pd.Timedelta(days=600)).date())
    frame = get_stock_data("SPY", start, None, interval="1h", **FAST)
    same(frame, truth(series, start, "2999-01-01", "1h"))
    opens = frame.groupby(frame.index.date).head(1).index.tz_convert("America/New_York")
    assert set(opens.strftime("%H:%M")) == {"09:30"} and str(frame.index.tz) == "UTC"


def test_missing_hours_are_noticed(yahoo):
    yahoo.series[("SPY", "1h")] = spy_hours()
    yahoo.faults = ["holes", "half", "nulls"]
    start = (pd.Timestamp.now() - pd.Timedelta(days=90)).date()
    same(safe_fetch("SPY", start, None, interval="1h", **FAST), truth(spy_hours(), str(start), "2999-01-01", "1h"))
    assert not yahoo.faults


def test_the_users_setting_of_yfinance_is_back(yahoo):
    assert yfinance.config.debug.hide_exceptions
    safe_fetch("SPY", START, END, **FAST)
    assert yfinance.config.debug.hide_exceptions


@pytest.mark.parametrize("interval, rule", [("1wk", "W-MON"), ("1mo", "MS")])
def test_weeks_and_months_without_the_unfinished_one(yahoo, tmp_path, interval, rule):
    yahoo.series[("SPY", interval)] = series = longer(spy(), rule)
    got = load_prices("SPY", "yahoo", "2010-01-01", None, interval, cache_dir=tmp_path, **FAST)
    days = series.bars.index.tz_convert("America/New_York").tz_localize(None)
    span = pd.DateOffset(months=1) if interval == "1mo" else pd.DateOffset(days=7)
    complete = days[(days >= "2010-01-01") & (days + span <= pd.Timestamp.now("UTC").tz_localize(None).normalize())]
    assert list(got.frame.index) == list(complete) and len(complete) > 150
    expected = series.bars.close.set_axis(days)[complete]
    assert got.frame.close.tolist() == pytest.approx(expected.tolist())
    asked = len(yahoo.log)
    again = load_prices("SPY", "auto", "2010-01-01", None, interval, cache_dir=tmp_path, **FAST)
    assert len(yahoo.log) == asked and again.provenance.sha256 == got.provenance.sha256
