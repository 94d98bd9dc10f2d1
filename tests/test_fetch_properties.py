"""Any frame in: a valid frame, or one clear error."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smlstm.fetch import (COLUMNS, INTERVALS, Answer, BadPrices, FetchError, InvalidRequest, Stored, _joined, check_ticker, clean_prices,
                          frame_hash, merge_datasets, split_range)
from yahoo_server import calendar

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

prices = st.one_of(st.floats(0.01, 1e6), st.sampled_from([np.nan, 0.0, -1.0, np.inf, 100.0, 100.0, 100.0]))
days = st.integers(0, 400).map(lambda n: pd.Timestamp("2020-01-01") + pd.Timedelta(days=n))


@st.composite
def frames(draw):
    dates = draw(st.lists(days, max_size=25))
    rows = draw(st.lists(st.tuples(*[prices] * 5), min_size=len(dates), max_size=len(dates)))
    return pd.DataFrame(rows, columns=COLUMNS, index=pd.DatetimeIndex(dates, name="date"), dtype=float)


@QUICK
@given(frames())
def test_clean_prices_gives_a_price_frame_or_an_error(frame):
    try:
        clean, report = clean_prices(frame)
    except BadPrices as error:
        assert "usable" in str(error)
        return
    assert clean.index.is_monotonic_increasing and clean.index.is_unique and list(clean.columns) == COLUMNS
    assert np.isfinite(clean.close).all() and (clean.close > 0).all() and not (clean.high < clean.low).any()
    dropped = sum(len(getattr(report, name)) for name in ("null", "nonpositive", "crossed", "duplicates"))
    assert len(clean) + dropped == len(frame) and report.rows == len(clean)
    originals = frame.reset_index()
    for date, row in clean.iterrows():                                  # nothing is invented
        assert ((originals["date"] == date) & (originals["close"] == row.close)).any()


@QUICK
@given(st.text(max_size=25) | st.none() | st.integers())
def test_a_ticker_is_plain_or_refused(text):
    try:
        symbol = check_ticker(text)
    except InvalidRequest:
        return
    assert symbol == symbol.upper() and symbol.isascii() and not set(symbol) & set("/\\:\0\n ") and ".." not in symbol


@QUICK
@given(st.integers(1, 9000), st.integers(0, 4000), st.sampled_from(list(INTERVALS)), st.integers(1, 8))
def test_chunks_touch_and_cover(length, offset, interval, workers):
    first = pd.Timestamp("2000-01-01") + pd.Timedelta(days=offset)
    last = first + pd.Timedelta(days=length)
    chunks = split_range(first, last, interval, workers)
    assert chunks[0][0] == first and chunks[-1][1] == last
    assert all(a[1] == b[0] for a, b in zip(chunks, chunks[1:])) and all(a < b for a, b in chunks)
    assert max((b - a).days for a, b in chunks) <= INTERVALS[interval].request


def plain(dates, seed):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(rng.uniform(1, 9, (len(dates), 5)), index=pd.DatetimeIndex(sorted(set(dates)), name="date")[:len(dates)], columns=COLUMNS)


@QUICK
@given(st.sets(days, min_size=1), st.lists(st.sets(days, min_size=1), min_size=1, max_size=4))
def test_joins_keep_every_date_and_the_newest_value(old, pieces):
    stored = Stored(plain(old, 0), {})
    answers = [Answer(plain(piece, i + 1), {}) for i, piece in enumerate(pieces)]
    joined = _joined(stored, answers)
    assert set(joined.index) == set(old).union(*pieces) and joined.index.is_monotonic_increasing and joined.index.is_unique
    for date, row in joined.iterrows():
        newest = [f for f in (stored.frame, *(a.frame for a in answers)) if date in f.index][-1]
        assert (row == newest.loc[date]).all()


SESSIONS = calendar().sessions_in_range("2023-10-01", "2024-12-31")


@settings(QUICK, max_examples=25)
@given(st.sets(st.sampled_from(list(SESSIONS)), min_size=1, max_size=20), st.sets(st.integers(0, 24 * 450), max_size=30), st.integers(0, 99))
def test_merge_shows_a_day_only_after_its_close(sessions, hours, seed):
    daily = plain(list(sessions), seed)
    times = pd.DatetimeIndex([pd.Timestamp("2023-10-01", tz="UTC") + pd.Timedelta(hours=h) for h in sorted(hours)], tz="UTC")
    hourly = pd.DataFrame({"close": np.arange(len(times), dtype=float)}, index=times)
    merged = merge_datasets(daily, hourly)
    assert merged.index.equals(hourly.index) and list(merged.columns) == ["close", *(f"{c}_daily" for c in COLUMNS)]
    closes = calendar().closes[daily.index].to_dict()
    for time, row in merged.iterrows():
        known = [d for d in daily.index if closes[d] <= time]
        assert np.isnan(row.close_daily) if not known else row.close_daily == daily.close[known[-1]]


@QUICK
@given(frames(), st.sampled_from(["last", "linear_lookahead", "spline"]), st.booleans())
def test_merge_of_anything_is_a_frame_or_a_clear_error(daily, how, zoned):
    hours = pd.date_range("2020-01-02", periods=40, freq="7h", tz="UTC" if zoned else None)
    try:
        merged = merge_datasets(daily, pd.DataFrame({"close": 1.0}, index=hours), how)
    except FetchError as error:
        assert len(str(error)) > 20
        return
    assert len(merged) == 40 and zoned and how != "spline"


@pytest.mark.parametrize("how, leaks", [("last", False), ("linear_lookahead", True)])
def test_changing_the_future_moves_nothing_before(how, leaks):
    rng = np.random.default_rng(0)
    daily = pd.DataFrame({"close": rng.uniform(1, 2, len(SESSIONS))}, index=SESSIONS)
    closes = calendar().closes
    starts = [t for d in SESSIONS for t in pd.date_range(calendar().opens[d], closes[d], freq="h", inclusive="left")]
    hourly = pd.DataFrame({"close": 1.0}, index=pd.DatetimeIndex(starts))
    whole, found = merge_datasets(daily, hourly, how), False
    for k in range(5, len(SESSIONS), 17):
        changed = daily.copy()
        changed.iloc[k:] = 77.0
        before = hourly.index < closes[SESSIONS[k]]
        found |= not whole[before].equals(merge_datasets(changed, hourly, how)[before])
    assert found == leaks


def test_the_hash_is_of_the_numbers():
    frame = plain(pd.date_range("2020-01-01", periods=9), 0)
    known = frame_hash(frame)
    assert frame_hash(frame.set_axis(frame.index.as_unit("s"))) == known == frame_hash(frame.copy(deep=True))
    assert frame_hash(frame * (1 + 1e-15)) != known
    assert frame_hash(frame.assign(volume=np.nan)) == frame_hash(frame.assign(volume=-np.float64(np.nan)))
