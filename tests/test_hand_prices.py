"""What a price is and when it is known, by hand: unfinished bars, closes of the exchange, adjustments, ranges."""

import threading

import numpy as np
import pandas as pd
import pytest
from tenacity import RetryCallState
from yahoo_kit import FAST, hourly

from smlstm.data import cache
from smlstm.data import yahoo as client
from smlstm.data.cache import split_range
from smlstm.data.calendars import expected_bars, merge_datasets
from smlstm.data.frames import clean_prices, frame_hash, standard_columns
from smlstm.data.request import BadPrices, TransientFailure
from smlstm.data.yahoo import safe_fetch


def at(text, zone="UTC"):
    return pd.Timestamp(text, tz=zone)


def test_an_hour_that_is_not_over_is_left_out(yahoo, monkeypatch):
    "The bar that began at 17:30 is complete at 18:30, not at 18:29."
    series = hourly(seed=2)
    yahoo.series[("SPY", "1h")] = series
    begun = [t for t in series.bars.index if t.hour == 17][-1]
    for minutes, known in ((59, False), (60, True)):
        now = begun + pd.Timedelta(minutes=minutes)
        monkeypatch.setattr(client, "utc_now", lambda now=now: now)
        frame = safe_fetch("SPY", begun - pd.Timedelta(days=20), None, interval="1h", **FAST)
        assert (frame.index[-1] == begun) == known and frame.index[-1] >= begun - pd.Timedelta(hours=1)


def test_a_day_is_over_when_its_session_is():
    "On the 3rd of July 2024 New York closed at 13:00; until then the last complete bar is that of the 2nd."
    meta = {"opens": at("2024-07-03 09:30", "America/New_York"), "closes": at("2024-07-03 13:00", "America/New_York")}
    last = lambda now: client._last_settled(meta, "1d", at(now))
    assert last("2024-07-03 16:59") == last("2024-07-03 13:00") == pd.Timestamp("2024-07-02")
    assert last("2024-07-03 17:00") >= pd.Timestamp("2024-07-03")
    assert client._last_settled({}, "15m", at("2024-07-03 15:07")) == at("2024-07-03 14:52")


def test_a_daily_value_is_known_when_its_session_has_closed():
    "13:00 in New York on the day before a holiday, in summer 17:00 UTC; on Monday in winter 16:00, or 21:00 UTC."
    days = pd.DatetimeIndex(["2024-07-02", "2024-07-03"], name="date")
    daily = pd.DataFrame({"close": [1.0, 2.0]}, index=days)
    times = pd.DatetimeIndex(
        [at("2024-07-02 19:59"), at("2024-07-02 20:00"), at("2024-07-03 16:59"), at("2024-07-03 17:00")]
    )
    merged = merge_datasets(daily, pd.DataFrame({"close": range(4)}, index=times))
    np.testing.assert_equal(merged.close_daily.to_numpy(), [np.nan, 1, 1, 2])
    winter = pd.DataFrame({"close": [3.0]}, index=pd.DatetimeIndex(["2024-01-08"], name="date"))
    times = pd.DatetimeIndex([at("2024-01-08 20:59"), at("2024-01-08 21:00")])
    merged = merge_datasets(winter, pd.DataFrame({"close": range(2)}, index=times))
    np.testing.assert_equal(merged.close_daily.to_numpy(), [np.nan, 3])
    merged = merge_datasets(
        winter, pd.DataFrame({"close": range(2)}, index=times + pd.Timedelta(hours=3)), exchange=None
    )
    np.testing.assert_equal(merged.close_daily.to_numpy(), [np.nan, 3])  # a market that never closes: at midnight


def test_sessions_that_should_be_there():
    "The first week of July 2024: the 4th is a holiday, the last traded day is not complete yet."
    meta = {"exchangeTimezoneName": "America/New_York", "instrumentType": "ETF"}
    meta |= {"born": at("1993-01-29", "America/New_York"), "traded": at("2024-07-09 15:00", "America/New_York")}
    days = expected_bars(meta, pd.Timestamp("2024-07-01"), pd.Timestamp("2024-07-20"), "1d")
    assert days.day.tolist() == [1, 2, 3, 5, 8]
    hours = expected_bars(meta, at("2024-07-02"), at("2024-07-06"), "1h").tz_convert("America/New_York")
    assert [f"{t:%d %H:%M}" for t in hours] == [
        *[f"03 {hour:02}:30" for hour in range(9, 13)],
        *[f"05 {hour:02}:30" for hour in range(9, 16)],
    ]
    quarters = expected_bars(meta, at("2024-07-01"), at("2024-07-04"), "15m").tz_convert("America/New_York")
    assert (len(quarters), f"{quarters[0]:%d %H:%M}", f"{quarters[-1]:%d %H:%M}") == (26 + 14, "02 09:30", "03 12:45")


def test_dividends_and_splits_are_taken_out_of_all_four_prices():
    raw = pd.DataFrame(
        {"Open": [10.0], "High": [12.0], "Low": [8.0], "Close": [10.0], "Adj Close": [5.0], "Volume": [7.0]},
        index=pd.DatetimeIndex(["2024-01-02"]),
    )
    assert standard_columns(raw, "here").iloc[0].tolist() == [5.0, 6.0, 4.0, 5.0, 7.0]


def test_rows_that_do_not_hold_together():
    "Of two rows of a day the last counts; a price of zero, a missing one and a high below the low are dropped."
    index = pd.DatetimeIndex([f"2024-01-{day:02}" for day in (*range(1, 21), 20)], name="date")
    frame = pd.DataFrame({name: 10.0 for name in ("open", "high", "low", "close")} | {"volume": 1.0}, index=index)
    frame.iloc[3, 3], frame.iloc[5, 0], frame.iloc[7, 1], frame.iloc[-1, 3] = 0.0, np.nan, 9.0, 10.5
    kept, report = clean_prices(frame)
    assert kept.index.day.tolist() == [d for d in range(1, 21) if d not in (4, 6, 8)] and kept.close.iloc[-1] == 10.5
    assert (report.nonpositive, report.null, report.crossed) == (("2024-01-04",), ("2024-01-06",), ("2024-01-08",))
    with pytest.raises(BadPrices, match="usable"):
        clean_prices(frame.assign(close=[0.0] * 5 + [10.0] * 16))


def test_jumps_of_the_size_of_a_split_are_listed():
    index = pd.bdate_range("2024-01-01", periods=6, name="date")
    close = [10.0, 10.1, 5.1, 5.0, 8.75, 8.7]  # halved; then up by three quarters, which is no split
    frame = pd.DataFrame({name: close for name in ("open", "high", "low", "close")} | {"volume": 1.0}, index=index)
    assert clean_prices(frame)[1].jumps == (str(index[2].date()),)


def test_chunks_by_hand():
    "Three workers and twenty years of days, at most ten years a request: thirds of 7,305 days."
    first, last = pd.Timestamp("2004-01-01"), pd.Timestamp("2024-01-01")
    chunks = split_range(first, last, "1d", 3)
    assert [(b - a).days for a, b in chunks] == [2435, 2435, 2435]
    assert chunks[0][0] == first and chunks[-1][1] == last and chunks[0][1] == chunks[1][0]


def test_a_stored_chunk_comes_the_same_again_on_the_same_day_only():
    "Prices of the past are adjusted anew by the next dividend; a chunk that reaches into the present ages in an hour."
    asked, past, now = at("2024-03-05 12:00"), pd.Timestamp("2024-02-01"), pd.Timestamp("2024-03-06")
    good = lambda moment, last: cache._still_good(asked, at(moment), last)
    assert good("2024-03-05 23:59", past) and not good("2024-03-06 00:01", past)
    assert good("2024-03-05 12:59", now) and not good("2024-03-05 13:00", now)


def test_what_is_asked_for_overlaps_what_is_stored():
    "A week on either side, and the last five rows at least: they may have been preliminary."
    index = pd.bdate_range("2024-01-02", "2024-03-01", name="date")
    stored = cache.Stored(pd.DataFrame({"close": 1.0}, index=index), {"from": "2024-01-01", "to": "2024-03-01"})
    day = lambda text: pd.Timestamp(text)
    ranges = cache._missing_ranges(
        stored, day("2023-06-01"), day("2024-03-20"), day("2024-03-20"), pd.Timedelta(hours=1)
    )
    assert ranges == [(day("2023-06-01"), day("2024-01-08")), (day("2024-02-23"), day("2024-03-20"))]
    assert cache._missing_ranges(stored, day("2024-01-02"), day("2024-03-01"), day("2024-03-20"), pd.Timedelta(0)) == []


def test_the_hash_of_a_frame_depends_on_its_dates():
    index = pd.bdate_range("2024-01-01", periods=3, name="date")
    frame = pd.DataFrame({name: 1.0 for name in ("open", "high", "low", "close", "volume")}, index=index)
    assert frame_hash(frame) != frame_hash(frame.set_axis(index + pd.Timedelta(days=7)))


def test_waits_between_tries_double():
    "With a delay of ten seconds: ten, twenty and forty, five minutes at most, and up to ten more by chance."
    retrying = client._retrying("SPY", 9, 10.0, threading.Event())
    for number, seconds in ((1, 10), (2, 20), (3, 40), (9, 300)):
        state = RetryCallState(retrying, None, (), {})
        state.attempt_number = number
        state.set_exception((TransientFailure, TransientFailure("busy"), None))
        assert all(seconds <= retrying.wait(state) <= seconds + 10 for _ in range(20))
