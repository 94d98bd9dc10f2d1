"""Calendars: sessions, closes, and daily values beside intraday rows."""

import numpy as np
import pandas as pd
import pytest
from frame_kit import frames, plain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yahoo_server import calendar

from smlstm.data.calendars import exchange_calendar, merge_datasets
from smlstm.data.frames import COLUMNS
from smlstm.data.request import FetchError, InvalidRequest

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SESSIONS = calendar().sessions_in_range("2023-10-01", "2024-12-31")


@pytest.mark.parametrize("exchange", ["XTKS", "XHKG", "XNYS"])
def test_calendars_begin_when_they_are_known(exchange):
    assert len(exchange_calendar(exchange, 1960).sessions) > 4000
    with pytest.raises(InvalidRequest, match="ISO 10383"):
        exchange_calendar("NYSE-ish")


@settings(QUICK, max_examples=25)
@given(
    st.sets(st.sampled_from(list(SESSIONS)), min_size=1, max_size=20),
    st.sets(st.integers(0, 24 * 450), max_size=30),
    st.integers(0, 99),
)
def test_merge_shows_a_day_only_after_its_close(sessions, hours, seed):
    daily = plain(list(sessions), seed)
    times = pd.DatetimeIndex(
        [pd.Timestamp("2023-10-01", tz="UTC") + pd.Timedelta(hours=h) for h in sorted(hours)], tz="UTC"
    )
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
