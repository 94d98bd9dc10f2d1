"""Prices over a hostile wire: the real yfinance client against a local server that speaks Yahoo's protocol."""

import functools
import logging
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yfinance
import yfinance.base
import yfinance.scrapers.history

from smlstm import fetch
from smlstm.fetch import (BadPrices, FetchError, InvalidRequest, NoPrices, RangeOutOfReach, RateLimited, TransientFailure, UnknownTicker,
                          YahooUnreachable, fetch_chunk, frame_hash, get_stock_data, load_prices, merge_datasets, safe_fetch)
from yahoo_server import Series, YahooServer, calendar, closed_sessions, daily, hourly, walk

START, END = "2015-01-05", "2016-01-04"
FAST = dict(delay=0.01)


@functools.lru_cache(maxsize=None)
def spy():
    return daily(seed=1, name="SPDR S&P 500")


def point_at(url, monkeypatch):
    "Make the real client ask the server at `url`, without cookies, and forget what it knew."
    for module in (yfinance.base, yfinance.scrapers.history):
        monkeypatch.setattr(module, "_BASE_URL_", url)
    monkeypatch.setattr(yfinance.data.YfData, "_get_cookie_and_crumb", lambda self, timeout=30: (None, "basic"))
    monkeypatch.setattr(fetch, "_pace", fetch._Pace(0.0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def yahoo(monkeypatch):
    logging.getLogger("yfinance").setLevel(logging.CRITICAL)
    server = YahooServer()
    server.series[("SPY", "1d")] = spy()
    point_at(server.url, monkeypatch)
    monkeypatch.setattr(fetch, "_ask", functools.partial(fetch._ask, timeout=1.0))
    yield server
    server.stop()


def truth(series, start, end, interval="1d"):
    "The frame that a perfect client would build."
    bars = series.bars
    frame = bars[["open", "high", "low", "close"]].mul(bars.factor, axis=0).assign(volume=bars.volume).rename_axis("date")
    if interval == "1d":
        frame.index = frame.index.tz_convert(series.zone).tz_localize(None).normalize()
        return frame[(frame.index >= start) & (frame.index < end)]
    return frame[(frame.index >= pd.Timestamp(start, tz="UTC")) & (frame.index < pd.Timestamp(end, tz="UTC"))]


def same(frame, expected):
    pd.testing.assert_frame_equal(frame, expected, check_index_type=False, check_freq=False, rtol=1e-9)


# --- failures that pass -------------------------------------------------------------------------------------------

TRANSIENT = {
    "one rate limit": ["limit"], "rate limits": ["limit"] * 6, "server error": ["error"] * 2, "server error in JSON": ["error_json"] * 2,
    "bad gateway": ["gateway"] * 4, "stale crumb": ["crumb"] * 2, "time-out": ["slow"], "reset in mid-body": ["reset"] * 2,
    "short of its length": ["short"], "cut JSON": ["cut"] * 2, "a page instead of JSON": ["html"], "no body": ["blank"],
    "null": ["null"], "down for repair": ["back_soon"], "no description": ["no_meta"], "no quotes once": ["no_quotes"],
    "empty once": ["empty"], "half the rows once": ["half"], "holes once": ["holes"], "null closes once": ["nulls"],
    "without its first day": ["late"], "the same half twice": ["half"] * 2, "empty twice": ["empty"] * 2,
    "all of it in turn": ["limit", "limit", "error", "error", "cut", "html", "reset", "half", "null"],
}


@pytest.mark.parametrize("faults", TRANSIENT.values(), ids=TRANSIENT)
def test_transient_failures_end_in_the_right_frame(yahoo, faults):
    yahoo.faults = list(faults)
    frame = safe_fetch("SPY", START, END, **FAST)
    same(frame, truth(spy(), START, END))
    assert not yahoo.faults


@pytest.mark.parametrize("fault", ["limit_after", "limit_until"])
def test_retry_after_is_respected(yahoo, capsys, fault):
    yahoo.faults = [fault] * 2                              # yfinance itself asks twice
    same(safe_fetch("SPY", START, END, **FAST), truth(spy(), START, END))
    assert re.search("next in [12] s", capsys.readouterr().out)         # not the hundredth of a second of the first backoff


def test_patience_ends(yahoo, capsys):
    yahoo.faults = ["limit"] * 100
    with pytest.raises(RateLimited, match="SPY.*try again later"):
        safe_fetch("SPY", START, END, retries=4, **FAST)
    assert len(yahoo.log) == 8
    assert "try 1 of 4" in capsys.readouterr().out


def test_different_halves_are_never_believed(yahoo):
    yahoo.fault = lambda asked: random.choice(["cut", "html"])
    with pytest.raises(TransientFailure):
        safe_fetch("SPY", START, END, retries=3, **FAST)


# --- failures for good --------------------------------------------------------------------------------------------

PERMANENT = {
    "unknown or delisted": ("unknown", UnknownTicker, "check the spelling"), "no such range": ("no_range", NoPrices, "other dates"),
    "out of reach": ("reach", RangeOutOfReach, "start later"), "no such interval": ("interval", InvalidRequest, "another interval"),
}


@pytest.mark.parametrize("fault, kind, says", PERMANENT.values(), ids=PERMANENT)
def test_permanent_failures_end_at_once(yahoo, fault, kind, says, tmp_path):
    yahoo.fault = lambda asked: fault
    with pytest.raises(kind, match=says):
        load_prices("SPY", "yahoo", START, END, cache_dir=tmp_path, delay=1000)
    assert len(yahoo.log) <= 2                              # yfinance repeats a refusal once with other cookies
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


@pytest.mark.parametrize("bad, kind", [
    (dict(ticker="../../etc/passwd"), InvalidRequest), (dict(ticker="A/B"), InvalidRequest), (dict(interval="7q"), InvalidRequest),
    (dict(start="2016-01-01", end="2015-01-01"), InvalidRequest), (dict(start="2999-01-01"), InvalidRequest), (dict(start="soon"), InvalidRequest),
    (dict(source="nowhere"), InvalidRequest), (dict(source=None), InvalidRequest), (dict(ticker="US0378331005"), InvalidRequest), (dict(source="nowhere.csv"), InvalidRequest), (dict(interval="1h", start="2001-01-01"), RangeOutOfReach),
    (dict(start="0001-01-01"), InvalidRequest), (dict(start=np.int64(5)), InvalidRequest), (dict(retries=0), InvalidRequest), (dict(delay=-1), InvalidRequest),
    (dict(delay=float("nan")), InvalidRequest), (dict(source="sample", ticker="AAPL"), InvalidRequest), (dict(source="sample", start="2020-01-01"), NoPrices),
])
def test_wrong_requests_never_reach_the_wire(yahoo, tmp_path, bad, kind):
    with pytest.raises(kind):
        load_prices(**{"cache_dir": tmp_path, "delay": 1000, **bad})
    assert yahoo.log == [] and list(tmp_path.rglob("*.parquet")) == []


@pytest.mark.parametrize("workers", [0, -1, 1.5, True])
def test_a_pool_has_workers(yahoo, tmp_path, workers):
    with pytest.raises(InvalidRequest, match="max_workers"):
        get_stock_data("SPY", START, END, workers, cache_dir=tmp_path)


# --- what the rows may hold ---------------------------------------------------------------------------------------

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
    assert len(yahoo.log) == 3                              # believed when it has said the same three times


@pytest.mark.parametrize("mangle", [lambda r: pd.concat([r, r.iloc[10:20]]), lambda r: r.sample(frac=1, random_state=0),
                                    lambda r: pd.concat([r.iloc[::-1], r])], ids=["duplicated", "unordered", "both"])
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
    series.events = {"splits": {str(stamp): {"date": stamp, "numerator": 2, "denominator": 1, "splitRatio": "2:1"}},
                     "dividends": {str(stamp): {"date": stamp, "amount": 3.0}}}
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


@pytest.mark.parametrize("start, end", [("2015-03-02", "2015-03-20"), ("2015-10-26", "2015-11-13")], ids=["spring", "autumn"])
def test_daily_dates_across_clock_changes(yahoo, start, end):
    frame = safe_fetch("SPY", start, end, **FAST)
    assert list(frame.index) == list(calendar().sessions_in_range(start, pd.Timestamp(end) - pd.Timedelta(days=1)))


@pytest.mark.parametrize("exchange, zone", [("XTKS", "Asia/Tokyo"), ("XASX", "Australia/Sydney"), ("XLON", "Europe/London")])
def test_sessions_east_of_greenwich_keep_their_dates(yahoo, exchange, zone):
    yahoo.series[("EAST", "1d")] = series = daily(exchange=exchange, zone=zone)
    frame = safe_fetch("EAST", START, END, **FAST)
    same(frame, truth(series, START, END))
    assert frame.index.isin(calendar(exchange).sessions).all() and frame.index.tz is None


@pytest.mark.parametrize("exchange", ["XTKS", "XHKG", "XNYS"])
def test_calendars_begin_when_they_are_known(exchange):
    assert len(fetch.exchange_calendar(exchange, 1960).sessions) > 4000
    with pytest.raises(InvalidRequest, match="ISO 10383"):
        fetch.exchange_calendar("NYSE-ish")


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
    return Series(bars, extra_meta={"currentTradingPeriod": {"pre": dict(regular), "regular": dict(regular), "post": dict(regular)}, "regularMarketTime": now})


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


# --- chunks -------------------------------------------------------------------------------------------------------

def test_twenty_years_arrive_in_chunks_without_gaps_or_duplicates(yahoo, tmp_path):
    frame = get_stock_data("SPY", None, None, cache_dir=tmp_path, **FAST)
    same(frame, truth(spy(), frame.index[0], "2999-01-01"))
    assert len(yahoo.log) == 3 and len(frame) > 5000
    assert frame.index[0] - (pd.Timestamp.now() - pd.DateOffset(years=20)) < pd.Timedelta(days=7)


def test_never_more_than_max_workers_at_once(yahoo, tmp_path, monkeypatch):
    now, most, lock, ask = [0], [0], threading.Lock(), fetch._ask

    def counted(*args):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        try:
            time.sleep(0.05)
            return ask(*args)
        finally:
            with lock:
                now[0] -= 1
    monkeypatch.setattr(fetch, "_ask", counted)
    get_stock_data("SPY", None, None, max_workers=2, cache_dir=tmp_path, **FAST)
    assert most[0] == 2


def test_a_chunk_before_the_first_trade_is_empty(yahoo, tmp_path):
    yahoo.series[("NEW", "1d")] = series = daily(years=3)
    assert fetch_chunk("NEW", "2010-01-01", "2011-01-01", **FAST).empty
    frame = get_stock_data("NEW", None, None, cache_dir=tmp_path, **FAST)
    same(frame, truth(series, "2000-01-01", "2999-01-01"))


def test_a_chunk_fails_while_its_siblings_succeed(yahoo, tmp_path):
    middle = pd.Timestamp.now().timestamp() - 10 * 365 * 86400
    yahoo.fault = lambda asked: "unknown" if asked[2] < middle < asked[3] else None
    with pytest.raises(UnknownTicker):
        get_stock_data("SPY", None, None, cache_dir=tmp_path, **FAST)
    done = len([a for a in yahoo.log if not a[2] < middle < a[3]])
    yahoo.fault, yahoo.log = None, []
    frame = get_stock_data("SPY", None, None, cache_dir=tmp_path, **FAST)
    assert done == 2 and len(yahoo.log) == 1
    same(frame, truth(spy(), frame.index[0], "2999-01-01"))


def test_a_failure_ends_the_waiting_of_its_siblings(yahoo, tmp_path):
    middle = pd.Timestamp.now().timestamp() - 10 * 365 * 86400
    yahoo.fault = lambda asked: "unknown" if asked[2] < middle < asked[3] else "limit"
    with pytest.raises((UnknownTicker, RateLimited)):
        get_stock_data("SPY", None, None, cache_dir=tmp_path, delay=500)


def test_interrupted_between_chunks_and_resumed(yahoo, tmp_path, monkeypatch):
    write, written = fetch._write, []

    def interrupted(path, stored):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, stored)
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_prices("SPY", "yahoo", cache_dir=tmp_path, **FAST)
    yahoo.log.clear()
    got = load_prices("SPY", "yahoo", cache_dir=tmp_path, **FAST)
    same(got.frame, truth(spy(), got.frame.index[0], "2999-01-01"))
    assert len(yahoo.log) == 2


KILLED = """
    import sys, time
    import yfinance, yfinance.base, yfinance.scrapers.history
    from smlstm import fetch
    for module in (yfinance.base, yfinance.scrapers.history): module._BASE_URL_ = sys.argv[1]
    yfinance.data.YfData._get_cookie_and_crumb = lambda self, timeout=30: (None, "basic")
    write = fetch._write
    def slowly(path, stored):
        write(path, stored); print("written", flush=True); time.sleep(30)
    fetch._write = slowly
    fetch.load_prices("SPY", "yahoo", cache_dir=sys.argv[2], delay=0.01)
"""


def test_killed_between_chunks_and_resumed(yahoo, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), yahoo.url, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout.readline() == b"written\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "SPY_1d_adjusted.parquet").exists()
    kept = len(list(tmp_path.glob("*.parts/*.parquet")))
    yahoo.log.clear()
    got = load_prices("SPY", "yahoo", cache_dir=tmp_path, **FAST)
    same(got.frame, truth(spy(), got.frame.index[0], "2999-01-01"))
    assert kept >= 1 and len(yahoo.log) == 3 - kept
    assert not list(tmp_path.rglob("*.tmp"))


CROWD = """
    import sys
    import yfinance, yfinance.base, yfinance.scrapers.history
    from smlstm import fetch
    for module in (yfinance.base, yfinance.scrapers.history): module._BASE_URL_ = sys.argv[1]
    yfinance.data.YfData._get_cookie_and_crumb = lambda self, timeout=30: (None, "basic")
    print("ready", flush=True)
    sys.stdin.readline()
    got = fetch.load_prices("SPY", "yahoo", start=sys.argv[3], cache_dir=sys.argv[2], delay=0.01)
    print(got.provenance.sha256, flush=True)
"""


def crowd(yahoo, folder, starts):
    "Processes that are ready to load the same symbol into the same folder."
    command = [sys.executable, "-c", textwrap.dedent(CROWD), yahoo.url, str(folder)]
    children = [subprocess.Popen([*command, start], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for start in starts]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    return children


@pytest.mark.parametrize("rounds", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_share_a_cache_while_one_of_them_is_killed(yahoo, tmp_path, rounds):
    starts, chance = ["2007-01-03", "2012-01-03", "2007-01-03", "2016-01-04"], random.Random(0)
    for number in range(rounds):
        yahoo.fault, folder = lambda asked: chance.choice(["reset", "null", "error", None, None, None]), tmp_path / str(number)
        children = crowd(yahoo, folder, starts)
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        time.sleep(chance.uniform(0.05, 1.5))
        children[0].kill()
        said = [child.communicate(timeout=300)[0].strip().splitlines() or [""] for child in children]
        for start, sha in list(zip(starts, said))[1:]:
            assert sha[-1] == frame_hash(truth(spy(), start, "2999-01-01")), start
        assert {p.name for p in folder.iterdir()} <= {"SPY_1d_adjusted.parquet", "SPY_1d_adjusted.lock"}


def test_chunks_of_another_day_are_not_trusted(yahoo, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fetch.shutil, "rmtree", lambda *a, **k: None)
        get_stock_data("SPY", "2010-01-04", END, cache_dir=tmp_path, **FAST)
    for path in tmp_path.rglob("*.parts/*.parquet"):
        stored = fetch._read(path)
        fetch._write(path, fetch.Stored(stored.frame * 2, stored.note | {"at": "2001-01-01T12:00:00+00:00"}))
    same(get_stock_data("SPY", "2010-01-04", END, cache_dir=tmp_path, **FAST), truth(spy(), "2010-01-04", END))


def test_a_chunk_that_reaches_into_the_present_ages(yahoo, tmp_path, monkeypatch):
    whole, morning = spy(), fetch._now().normalize()
    with monkeypatch.context() as patch:                                # stopped in the morning, before the last bar was there
        patch.setattr(fetch.shutil, "rmtree", lambda *a, **k: None)
        patch.setattr(fetch, "_now", lambda: morning)
        yahoo.series[("SPY", "1d")] = Series(whole.bars.iloc[:-1])
        get_stock_data("SPY", "2010-01-04", None, cache_dir=tmp_path, **FAST)
    yahoo.series[("SPY", "1d")], yahoo.log = whole, []
    monkeypatch.setattr(fetch, "_now", lambda: morning + pd.Timedelta(hours=23))
    same(get_stock_data("SPY", "2010-01-04", None, cache_dir=tmp_path, **FAST), truth(whole, "2010-01-04", "2999-01-01"))
    assert len(yahoo.log) == 1                                          # the older chunks were whole and still are


# --- the cache ----------------------------------------------------------------------------------------------------

def test_a_second_load_asks_for_nothing(yahoo, tmp_path):
    first = load_prices("SPY", cache_dir=tmp_path, **FAST)
    yahoo.log.clear()
    second = load_prices("SPY", cache_dir=tmp_path, **FAST)
    assert yahoo.log == [] and (first.provenance.source, second.provenance.source) == ("yahoo", "cache")
    assert first.provenance.sha256 == second.provenance.sha256 == frame_hash(second.frame)
    inside = load_prices("SPY", start="2012-01-01", end="2013-01-01", cache_dir=tmp_path)
    assert yahoo.log == []
    same(inside.frame, truth(spy(), "2012-01-01", "2013-01-01"))


def test_only_missing_ranges_are_asked_for(yahoo, tmp_path):
    load_prices("SPY", start="2012-01-03", end="2013-01-01", cache_dir=tmp_path, **FAST)
    for start, end, old in (("2012-01-03", "2014-01-01", "2012-12-01"), ("2011-01-03", "2014-01-01", None)):
        yahoo.log.clear()
        got = load_prices("SPY", start=start, end=end, cache_dir=tmp_path, **FAST)
        same(got.frame, truth(spy(), start, end))
        (asked,) = yahoo.log
        span = pd.Timedelta(seconds=asked[3] - asked[2])
        assert span < pd.Timedelta(days=385), span
        assert old is None or pd.Timestamp(asked[2], unit="s") > pd.Timestamp(old)


def test_years_before_the_first_trade_take_nothing_away(yahoo, tmp_path):
    yahoo.series[("NEW", "1d")] = series = daily(years=3)
    for start in ("2020-01-02", "2012-01-03"):
        same(load_prices("NEW", start=start, cache_dir=tmp_path, **FAST).frame, truth(series, "2000-01-01", "2999-01-01"))
    with pytest.raises(NoPrices):
        load_prices("NEW", start="2012-01-03", end="2013-01-02", cache_dir=tmp_path, **FAST)


def test_a_null_never_replaces_a_price(yahoo, tmp_path):
    load_prices("SPY", start="2012-01-03", end="2013-01-01", cache_dir=tmp_path, **FAST)
    yahoo.mangle = lambda rows: rows.assign(close=rows.close.where(rows.index > "2012-12-29"))
    same(load_prices("SPY", start="2012-01-03", end="2014-01-01", cache_dir=tmp_path, **FAST).frame, truth(spy(), "2012-01-03", "2014-01-01"))


def test_a_new_history_full_of_holes_is_no_reason_to_give_up_the_old(yahoo, tmp_path):
    yahoo.series[("DIV", "1d")] = series = daily(seed=1)
    load_prices("DIV", start="2010-01-04", end="2014-01-01", cache_dir=tmp_path, **FAST)
    path, two_years = tmp_path / "DIV_1d_adjusted.parquet", 2 * 365 * 86400
    before = path.read_bytes()
    series.bars.loc[series.bars.index < "2014-03-01", "factor"] = 0.995
    yahoo.fault = lambda asked: "half" if asked[3] - asked[2] > two_years else None
    with pytest.raises(TransientFailure, match="the old one stays"):
        load_prices("DIV", start="2010-01-04", end="2015-01-01", cache_dir=tmp_path, **FAST)
    assert path.read_bytes() == before
    yahoo.fault = None
    same(load_prices("DIV", start="2010-01-04", end="2015-01-01", cache_dir=tmp_path, **FAST).frame, truth(series, "2010-01-04", "2015-01-01"))


def test_recent_bars_are_refreshed(yahoo, tmp_path):
    load_prices("SPY", start="2015-01-02", cache_dir=tmp_path, **FAST)
    path = tmp_path / "SPY_1d_adjusted.parquet"
    stored = fetch._read(path)
    earlier = stored.frame.iloc[:-3].copy()
    earlier.iloc[-1, 4] *= 2                                            # a volume that was not final
    fetch._write(path, fetch.Stored(earlier, stored.note | {"to": str(pd.Timestamp(stored.note["to"]) - pd.Timedelta(days=4))}))
    yahoo.log.clear()
    same(load_prices("SPY", start="2015-01-02", cache_dir=tmp_path, **FAST).frame, truth(spy(), "2015-01-02", "2999-01-01"))
    assert pd.Timedelta(seconds=yahoo.log[0][3] - yahoo.log[0][2]) < pd.Timedelta(days=30)


def test_rewritten_history_is_fetched_whole_and_told(yahoo, tmp_path, capsys):
    series = daily(seed=1)
    yahoo.series[("DIV", "1d")] = series
    load_prices("DIV", start="2010-01-04", end="2014-01-01", cache_dir=tmp_path, **FAST)
    series.bars.loc[series.bars.index < "2014-03-01", "factor"] = 0.995
    got = load_prices("DIV", start="2010-01-04", end="2015-01-01", cache_dir=tmp_path, **FAST)
    same(got.frame, truth(series, "2010-01-04", "2015-01-01"))
    assert "rewritten" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b[:1000] + b"x" + b[1001:], lambda b: b"PAR1" * 9],
                         ids=["cut", "empty", "one byte", "nonsense"])
def test_a_corrupt_file_is_set_aside(yahoo, tmp_path, damage, capsys):
    load_prices("SPY", start=START, end=END, cache_dir=tmp_path, **FAST)
    path = tmp_path / "SPY_1d_adjusted.parquet"
    path.write_bytes(damage(path.read_bytes()))
    same(load_prices("SPY", start=START, end=END, cache_dir=tmp_path, **FAST).frame, truth(spy(), START, END))
    assert (tmp_path / "SPY_1d_adjusted.parquet.corrupt").exists() and "set aside" in capsys.readouterr().out


@pytest.mark.parametrize("fault, kind", [("unknown", UnknownTicker), ("limit", RateLimited), ("cut", TransientFailure), ("reset", TransientFailure)])
def test_a_failed_update_leaves_the_cache_as_it_was(yahoo, tmp_path, fault, kind):
    load_prices("SPY", start=START, end=END, cache_dir=tmp_path, **FAST)
    path = tmp_path / "SPY_1d_adjusted.parquet"
    before = path.read_bytes()
    yahoo.fault = lambda asked: fault
    with pytest.raises(kind):
        load_prices("SPY", start=START, end="2018-01-01", cache_dir=tmp_path, retries=2, **FAST)
    assert path.read_bytes() == before
    yahoo.fault = None
    same(load_prices("SPY", start=START, end="2018-01-01", cache_dir=tmp_path, **FAST).frame, truth(spy(), START, "2018-01-01"))


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    path = tmp_path / "A.parquet"
    fetch._write(path, fetch.Stored(truth(spy(), "2015-01-05", "2015-02-05"), {"from": "2015-01-05 00:00:00", "to": "2015-02-05 00:00:00"}))
    whole, good = path.read_bytes(), fetch._read(path)
    at_note = whole.index(b"2015-02-05")
    for i in (*range(at_note, at_note + 10), *range(0, len(whole), 29)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1:])
        got = fetch._read(path)
        assert got is None or got.note == good.note and got.frame.equals(good.frame), i


def test_what_a_killed_writer_left_is_cleared_away(yahoo, tmp_path):
    (tmp_path / "SPY_1d_adjusted.parquet.1-2.tmp").write_bytes(b"PAR1")
    load_prices("SPY", start=START, end=END, cache_dir=tmp_path, **FAST)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_write_that_fails_halfway_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "A.parquet"
    fetch._write(path, fetch.Stored(truth(spy(), START, END), {}))
    before = path.read_bytes()

    def torn(table, where):
        Path(where).write_bytes(b"PAR1 and then the power went")
        raise OSError("no space left")
    monkeypatch.setattr(fetch.pq, "write_table", torn)
    with pytest.raises(FetchError, match="no space left"):
        fetch._write(path, fetch.Stored(truth(spy(), START, END) * 2, {}))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_reader_never_meets_a_half_written_file(tmp_path):
    path, frame = tmp_path / "A.parquet", spy().bars.drop(columns="factor").rename_axis("date")
    fetch._write(path, fetch.Stored(frame, {}))
    writer = threading.Thread(target=lambda: [fetch._write(path, fetch.Stored(frame * k, {})) for k in range(1, 25)])
    writer.start()
    while writer.is_alive():
        assert fetch._read(path) is not None
    writer.join()


def test_missing_hours_are_noticed(yahoo):
    yahoo.series[("SPY", "1h")] = spy_hours()
    yahoo.faults = ["holes", "half", "nulls"]
    start = (pd.Timestamp.now() - pd.Timedelta(days=90)).date()
    same(safe_fetch("SPY", start, None, interval="1h", **FAST), truth(spy_hours(), str(start), "2999-01-01", "1h"))
    assert not yahoo.faults


def test_two_at_once_fetch_once(yahoo, tmp_path):
    frames = []
    threads = [threading.Thread(target=lambda: frames.append(load_prices("SPY", start=START, end=END, cache_dir=tmp_path, **FAST).frame)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(frames) == 4 and len(yahoo.log) == 1
    for frame in frames:
        same(frame, truth(spy(), START, END))


def test_a_cache_that_cannot_be_written_says_so(yahoo, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match="cache_dir"):
        load_prices("SPY", start=START, end=END, cache_dir=tmp_path / "file" / "below", **FAST)


def test_the_users_setting_of_yfinance_is_back(yahoo):
    assert yfinance.config.debug.hide_exceptions
    safe_fetch("SPY", START, END, **FAST)
    assert yfinance.config.debug.hide_exceptions


# --- no way to Yahoo ----------------------------------------------------------------------------------------------

@pytest.fixture
def nowhere(monkeypatch):
    server = YahooServer()
    server.stop()                                                       # a port where nobody listens
    point_at(server.url, monkeypatch)


@pytest.mark.parametrize("ticker, symbol", [("SPY", "^GSPC"), ("VOO", "^GSPC"), ("IVV", "^GSPC"), ("^GSPC", "^GSPC"), ("QQQ", "^IXIC"), ("^IXIC", "^IXIC")])
def test_the_twin_stands_in_aloud(nowhere, tmp_path, capsys, ticker, symbol):
    p = load_prices(ticker, cache_dir=tmp_path, delay=1000).provenance
    assert (p.symbol, p.source, p.substitute) == (symbol, "sample", ticker != symbol)
    assert p.banner in capsys.readouterr().out and "stands in" in p.banner
    assert ticker == symbol or p.banner.startswith(f"NOT {ticker}")


@pytest.mark.parametrize("request_", [dict(ticker="AAPL"), dict(source="yahoo"), dict(interval="1h"), dict(start="2020-01-01")], ids=str)
def test_nothing_else_stands_in(nowhere, tmp_path, request_):
    with pytest.raises(YahooUnreachable, match="cannot be reached"):
        load_prices(**{"cache_dir": tmp_path, "delay": 1000, **request_})


def test_a_cache_serves_without_a_network_and_says_so(yahoo, tmp_path, monkeypatch, capsys):
    load_prices("SPY", start=START, end=END, cache_dir=tmp_path, **FAST)
    server = YahooServer()
    server.stop()
    point_at(server.url, monkeypatch)
    within = load_prices("SPY", start=START, end=END, cache_dir=tmp_path).provenance
    assert (within.source, within.symbol, "could not be reached" in within.banner) == ("cache", "SPY", False)
    beyond = load_prices("SPY", start=START, end="2018-01-01", cache_dir=tmp_path).provenance
    assert beyond.source == "cache" and "could not be reached" in beyond.banner and beyond.last < END
    with pytest.raises(YahooUnreachable):
        load_prices("SPY", "yahoo", start=START, end="2018-01-01", cache_dir=tmp_path)


def test_the_network_goes_away_in_mid_flight(yahoo, tmp_path, monkeypatch):
    way = iter([True])
    monkeypatch.setattr(fetch, "yahoo_reachable", lambda timeout=4.0: next(way, False))
    yahoo.fault = lambda asked: "reset"
    with pytest.raises(YahooUnreachable):
        load_prices("SPY", "yahoo", START, END, cache_dir=tmp_path, delay=1000)


# --- files --------------------------------------------------------------------------------------------------------

def test_files_round_trip(tmp_path):
    frame = load_prices(source="sample", start="2010-01-01", end="2012-01-01").frame
    frame.to_csv(tmp_path / "a.csv")
    frame.to_parquet(tmp_path / "a.parquet")
    frame.iloc[::-1].rename(columns=str.title).rename_axis("Date").reset_index().to_csv(tmp_path / "b.csv", index=False)
    for name in ("a.csv", "a.parquet", "b.csv"):
        got = load_prices("ABC", str(tmp_path / name))
        same(got.frame, frame)
        assert got.provenance.source == "file" and got.provenance.symbol == "ABC"


@pytest.mark.parametrize("text, says", [
    ("", "cannot be read"), ("Date,Open\n2020-01-01,1\n", "no 'close' column"), ("Date,Close\nyesterday,1\n", "dates cannot be read"),
    ("Date,Close\n2020-01-01,one\n", "not a number"), ("Date,Close\n", "usable"), ("Date,Close\n2020-01-01,-3\n", "usable"), ("Close\n1\n", "date column"),
    ("Date,Close,close\n2020-01-01,1,2\n", "more than one column 'close'"), ("Date,Close\n2020-01-01,1\n,1\n", "row 2 has none"),
])
def test_bad_files_end_in_one_clear_error(tmp_path, text, says):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(BadPrices, match=says):
        load_prices("ABC", str(path))


@pytest.mark.parametrize("name", ["Adj Close", "adj_close", "AdjClose", "Adjusted Close", "adjusted_close"])
def test_an_adjusted_close_adjusts(tmp_path, name):
    (tmp_path / "a.csv").write_text(f"Date,Open,Close,{name}\n2020-01-02,4,4,2\n2020-01-03,5,5,2.5\n")
    frame = load_prices("ABC", str(tmp_path / "a.csv")).frame
    assert list(frame.close) == [2, 2.5] and list(frame.open) == [2, 2.5]


def test_an_impossible_volume_is_unknown(tmp_path):
    (tmp_path / "a.csv").write_text("Date,Close,Volume\n2020-01-02,4,-7\n2020-01-03,5,inf\n2020-01-06,5,9\n")
    got = load_prices("ABC", str(tmp_path / "a.csv"))
    assert list(got.frame.volume.isna()) == [True, True, False] and any("2 volumes" in note for note in got.provenance.notes)


def test_intraday_files_need_a_zone(tmp_path):
    path = tmp_path / "h.csv"
    path.write_text("Date,Close\n2024-01-02 09:30:00,1\n2024-01-02 10:30:00,2\n")
    with pytest.raises(BadPrices, match="UTC offset"):
        load_prices("ABC", str(path), interval="1h")
    path.write_text("Date,Close\n2024-03-08 09:30:00-05:00,1\n2024-03-11 09:30:00-04:00,2\n")
    assert list(load_prices("ABC", str(path), interval="1h").frame.index.hour) == [14, 13]


# --- fifty of fifty -----------------------------------------------------------------------------------------------

KINDS = ["limit", "error", "error_json", "reset", "short", "cut", "html", "blank", "null", "no_meta", "no_quotes", "empty", "half", "holes", "nulls"]


def load_through_faults(yahoo, folder, seed):
    "Twenty years of days and 730 days of hours while 5% of answers fail; then again, asking for nothing."
    chance = random.Random(seed)
    yahoo.fault = lambda asked: chance.choice(KINDS) if chance.random() < 0.05 else None
    for interval in ("1d", "1h"):
        series = yahoo.series[("SPY", interval)]
        got = load_prices("SPY", "auto", interval=interval, cache_dir=folder, **FAST)
        assert got.provenance.source == "yahoo"
        same(got.frame, truth(series, str(got.frame.index[0].date()), "2999-01-01", interval))
        asked = len(yahoo.log)
        again = load_prices("SPY", "auto", interval=interval, cache_dir=folder, **FAST)
        assert len(yahoo.log) == asked and again.provenance.sha256 == got.provenance.sha256


@functools.lru_cache(maxsize=None)
def spy_hours():
    return hourly(seed=2)


@pytest.mark.parametrize("runs", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_complete_and_in_order_every_time(yahoo, tmp_path, runs):
    yahoo.series[("SPY", "1h")] = spy_hours()
    for seed in range(runs):
        load_through_faults(yahoo, tmp_path / str(seed), seed)
