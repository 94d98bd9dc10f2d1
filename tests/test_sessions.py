"""The date of the next bar and the bars of a year, against calendars, pandas' frequencies and dates by hand."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smlstm.data.calendars import exchange_calendar, find_calendar
from smlstm.data.request import InvalidRequest
from smlstm.data.sessions import BarPattern, bar_pattern, bars_per_year, next_bar, next_session

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def sessions(exchange, last, first="2022-06-01"):
    index = exchange_calendar(exchange, 2022).sessions
    return index[(index >= first) & (index <= last)]


@pytest.mark.parametrize(
    "symbol, exchange, last, expected",
    [
        ("0700.HK", "XHKG", "2024-07-03", "2024-07-04"),  # New York's holiday is not Hong Kong's
        ("7203.T", "XTKS", "2024-05-02", "2024-05-07"),  # Golden Week
        ("SAP.DE", "XETR", "2024-03-28", "2024-04-02"),  # Good Friday and Easter Monday
        ("BHP.AX", "XASX", "2024-04-24", "2024-04-26"),  # Anzac Day
        ("2222.SR", "XSAU", "2024-01-04", "2024-01-07"),  # Thursday to Sunday
        ("600519.SS", "XSHG", "2024-09-30", "2024-10-08"),  # a week of holidays
        ("RELIANCE.NS", "XBOM", "2024-08-14", "2024-08-16"),  # Independence Day
        ("SHOP.TO", "XTSE", "2024-06-28", "2024-07-02"),  # Canada Day
        ("HSBA.L", "XLON", "2024-05-03", "2024-05-07"),  # Early May bank holiday
        ("SPY", "XNYS", "2024-07-03", "2024-07-05"),
        ("^GSPC", "XNYS", "2012-10-26", "2012-10-31"),  # the hurricane
        ("ES=F", "CMES", "2024-03-28", "2024-04-01"),
    ],
)
def test_the_next_session_of_an_exchange(symbol, exchange, last, expected):
    year = int(last[:4]) - 1
    index = exchange_calendar(exchange, year).sessions
    index = index[(index >= f"{year}-01-01") & (index <= last)]
    assert next_session(index, find_calendar(symbol)) == pd.Timestamp(expected)
    assert next_session(index[-3:], find_calendar(symbol)) == pd.Timestamp(expected)


@pytest.mark.parametrize(
    "index, expected",
    [
        (pd.date_range("2023-01-06", "2024-06-07", freq="W-FRI"), "2024-06-14"),
        (pd.date_range("2023-01-02", "2024-06-03", freq="W-MON"), "2024-06-10"),
        (pd.date_range("2020-01-01", "2024-06-01", freq="MS"), "2024-07-01"),
        (pd.date_range("2020-01-31", "2024-01-31", freq="ME"), "2024-02-29"),
        (pd.date_range("2020-01-31", "2024-05-31", freq="BME"), "2024-06-28"),
        (pd.date_range("2010-01-01", "2024-04-01", freq="QS"), "2024-07-01"),
        (pd.date_range("2010-03-31", "2024-03-31", freq="QE"), "2024-06-30"),
        (pd.date_range("1990-12-31", "2023-12-31", freq="YE"), "2024-12-31"),
        (pd.date_range("2024-01-01", "2024-06-08"), "2024-06-09"),  # around the clock
        (pd.DatetimeIndex(["2024-06-01", "2024-06-02"]), "2024-06-03"),
        (pd.DatetimeIndex(["2018-12-28", "2018-12-31"]), "2019-01-02"),
        (pd.bdate_range("2023-01-01", "2024-06-06", freq="C", weekmask="Sun Mon Tue Wed Thu"), "2024-06-09"),
        (pd.bdate_range("2023-01-01", "2024-06-07", freq="C", weekmask="Sun Mon Tue Wed Thu Fri"), "2024-06-09"),
        (pd.bdate_range("2023-01-02", "2024-07-03"), "2024-07-04"),  # traded on every holiday: no stock exchange
    ],
)
def test_the_next_bar_by_the_pattern_of_the_index(index, expected):
    assert next_session(index) == pd.Timestamp(expected)


def test_weeks_labelled_by_their_last_session():
    days = sessions("XNYS", "2024-03-22").to_series()
    index = pd.DatetimeIndex(days.groupby(days.index.to_period("W-SUN")).max())
    assert next_session(index) == pd.Timestamp("2024-03-28")  # Thursday, since Good Friday is closed
    assert next_session(index, n=2) == pd.Timestamp("2024-04-05")


def test_a_horizon_beyond_the_calendar_is_no_error():
    index = sessions("XSHG", "2024-12-30")
    ahead = next_session(index, "XSHG", 600)
    assert pd.Timestamp("2027-04-01") < ahead < pd.Timestamp("2027-09-01") and ahead.day_of_week < 5
    later = exchange_calendar("XNYS", 2024).sessions  # known to a year from now
    assert next_session(sessions("XNYS", "2024-12-31"), n=300) == later[later > "2024-12-31"][299]
    assert pd.Timestamp("2027-04-01") < next_session(sessions("XNYS", "2024-12-31"), n=600) < pd.Timestamp("2027-09-01")


EXCHANGES = ["XNYS", "XHKG", "XTKS", "XETR", "XLON", "XSAU", "XBOM", "XSHG", "XSWX", "BVMF", "XASX"]


@QUICK
@given(st.sampled_from(EXCHANGES), st.integers(300, 800), st.integers(1, 30), st.integers(2, 300))
def test_any_exchange_any_day(exchange, row, n, rows):
    days = exchange_calendar(exchange, 2021).sessions
    index = days[max(row - rows, 0) : row]
    assert next_session(index, exchange, n) == days[row - 1 + n]


FREQUENCIES = [
    "D",
    "B",
    "MS",
    "ME",
    "BME",
    "QS",
    "QE",
    "YS",
    "YE",
    *(f"W-{d}" for d in "MON TUE WED THU FRI SAT SUN".split()),
]


@QUICK
@given(st.sampled_from(FREQUENCIES), st.integers(0, 3000), st.integers(64, 200), st.integers(1, 24))
def test_any_frequency_of_pandas(frequency, offset, rows, n):
    index = pd.date_range(pd.Timestamp("1990-01-01") + pd.Timedelta(days=offset), periods=rows + n, freq=frequency)
    assert next_session(index[:rows], None, n) == index[rows + n - 1]


def hours(exchange, first, last, step="1h"):
    schedule = exchange_calendar(exchange, 2022).schedule.loc[first:last]
    starts = [pd.date_range(a, b, freq=step, inclusive="left") for a, b in zip(schedule.open, schedule.close)]
    return pd.DatetimeIndex(np.concatenate([s.asi8 for s in starts])).tz_localize("UTC")


@QUICK
@given(st.integers(300, 820), st.integers(1, 40), st.sampled_from(["1h", "30min", "15min"]))
def test_hours_of_new_york_across_clock_changes_and_early_closes(row, n, step):
    index = hours("XNYS", "2024-10-15", "2025-04-15", step)
    assert next_session(index[:row], None, n) == index[row + n - 1]


def test_hours_around_the_clock_and_of_currencies():
    index = pd.date_range("2024-03-01", "2024-03-20 07:00", freq="h", tz="UTC")
    assert next_session(index) == pd.Timestamp("2024-03-20 08:00", tz="UTC")
    local = index.tz_convert("America/New_York")
    week = local.day_of_week * 24 + local.hour
    open_ = index[(week < 4 * 24 + 17) | (week >= 6 * 24 + 17)]
    friday = open_[open_ <= pd.Timestamp("2024-03-15 20:00", tz="UTC")]  # 16:00 in New York, summer time since the 10th
    assert next_session(friday) == pd.Timestamp("2024-03-17 21:00", tz="UTC")


def test_a_pattern_survives_json():
    import json

    for index in (sessions("XNYS", "2024-07-03"), pd.date_range("2020-01-01", periods=30, freq="MS")):
        pattern = bar_pattern(index)
        assert BarPattern(*json.loads(json.dumps(pattern))) == pattern
        assert next_bar(index[-1], pattern) == next_session(index)


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "3"])
def test_bars_ahead_are_a_number(n):
    with pytest.raises(InvalidRequest, match="at least 1"):
        next_session(sessions("XNYS", "2024-07-03"), None, n)


@pytest.mark.parametrize(
    "interval, calendar, bars",
    [
        ("1d", None, 252),
        ("1d", "24/7", 365),
        ("1h", "24/7", 8760),  # 24 x 365
        ("1h", "XNYS", 1764),  # seven bars in six and a half hours
        ("15m", "XNYS", 252 * 26),
        ("5m", "XNYS", 252 * 78),
        ("1wk", "XNYS", 52),
        ("1mo", None, 12),
        ("3mo", None, 4),
        ("1d", "XTKS", 244),
        ("1d", "24/5", 261),
        ("1h", "24/5", 261 * 24),
    ],
)
def test_bars_a_year(interval, calendar, bars):
    assert bars_per_year(interval, calendar) == pytest.approx(bars, abs=2 if calendar == "XTKS" else 0)


def test_bars_a_year_of_a_pattern():
    assert bars_per_year(bar_pattern(hours("XNYS", "2024-01-02", "2024-05-01"))) == 1764
    assert bars_per_year(bar_pattern(pd.date_range("2020-01-05", periods=99, freq="W"))) == 52
    assert bars_per_year(bar_pattern(sessions("XNYS", "2024-07-03"))) == 252
    assert bars_per_year(bar_pattern(pd.bdate_range("2020-01-01", periods=600))) == 261
    for bad in ("1x", "", "0d", "2d", None, "d"):
        with pytest.raises(InvalidRequest, match="not a bar length"):
            bars_per_year(bad)


@pytest.mark.parametrize(
    "symbol, exchange",
    [
        ("0700.HK", "XHKG"),
        ("^N225", "XTKS"),
        ("^TASI.SR", "XSAU"),
        ("^SET.BK", "XBKK"),
        ("^STOXX50E", "XPAR"),
        ("^TNX", None),
        ("btc-usd", "24/7"),
        ("BRK-B", None),
        ("RDS-A", None),
        ("EURUSD=X", None),
        ("GC=F", "CMES"),
        ("SPY", None),
        (".HK", None),
        ("NIFTY_FIN_SERVICE.NS", "XBOM"),
        ("x", None),
        (7, None),
    ],
)
def test_the_calendar_of_a_symbol(symbol, exchange):
    assert find_calendar(symbol) == exchange


def test_bars_a_year_are_counted_where_no_calendar_is_known():
    tokyo = exchange_calendar("XTKS", 2020).sessions
    tokyo = tokyo[(tokyo >= "2021-01-04") & (tokyo <= "2024-12-30")]
    assert bars_per_year(bar_pattern(tokyo)) == pytest.approx(245, abs=1)  # a series without a symbol
    schedule = exchange_calendar("XETR", 2022).schedule.loc["2023-01-02":"2024-12-30"]
    starts = [pd.date_range(a, b, freq="h", inclusive="left") for a, b in zip(schedule.open, schedule.close)]
    frankfurt = pd.DatetimeIndex(np.concatenate([s.asi8 for s in starts])).tz_localize("UTC")
    assert bars_per_year(bar_pattern(frankfurt, "XETR")) == pytest.approx(254 * 9, rel=0.01)
    assert bars_per_year(bar_pattern(frankfurt)) == pytest.approx(254 * 9, rel=0.01)
    assert next_session(frankfurt) is pd.NaT and next_session(frankfurt, "XETR") == pd.Timestamp(
        "2025-01-02 08:00", tz="UTC"
    )


def test_a_daily_index_with_a_zone_keeps_its_midnight():
    index = sessions("XNYS", "2024-03-08").tz_localize("America/New_York")
    assert next_session(index) == pd.Timestamp("2024-03-11", tz="America/New_York")  # clocks change on the tenth


@pytest.mark.parametrize(
    "symbol, last, expected",
    [
        ("005930.KS", "2024-09-13", "2024-09-19"),  # Chuseok
        ("2330.TW", "2024-02-05", "2024-02-15"),  # New Year
        ("THYAO.IS", "2024-04-09", "2024-04-15"),  # Ramadan feast
        ("PETR4.SA", "2024-02-09", "2024-02-14"),  # Carnival
        ("WALMEX.MX", "2024-03-27", "2024-04-01"),  # Holy Thursday
        ("VOLV-B.ST", "2024-06-20", "2024-06-24"),  # Midsummer
        ("PTT.BK", "2024-04-11", "2024-04-17"),  # Songkran
        ("EQNR.OL", "2024-05-16", "2024-05-21"),  # Constitution Day and Whit Monday
        ("AIR.NZ", "2024-04-24", "2024-04-26"),  # Anzac Day
    ],
)
def test_holidays_of_the_world(symbol, last, expected):
    index = exchange_calendar(find_calendar(symbol), 2023).sessions
    assert next_session(index[(index >= "2023-06-01") & (index <= last)], find_calendar(symbol)) == pd.Timestamp(
        expected
    )


def test_a_calendar_that_cannot_be_built_leaves_the_weekdays(monkeypatch, caplog):
    "Also for a pattern that was found where the calendar could be built; the note comes once for each exchange."
    import exchange_calendars

    from smlstm.data import calendars

    get = exchange_calendars.get_calendar

    def broken(name, *arguments, **options):
        if name in ("XTAE", "ASEX", "XBSE"):
            raise ValueError("Special dates are not sessions")
        return get(name, *arguments, **options)

    monkeypatch.setattr(exchange_calendars, "get_calendar", broken)
    for cached in (calendars.exchange_calendar, calendars._far_sessions, calendars.note_without_calendar):
        cached.cache_clear()
    index = pd.bdate_range("2023-01-01", "2024-10-01", freq="C", weekmask="Sun Mon Tue Wed Thu")
    assert next_session(index, find_calendar("TEVA.TA"), 3) == pd.Timestamp("2024-10-06")
    assert next_bar(index[-1], BarPattern("session", 1, "01236", "XTAE"), 3) == pd.Timestamp("2024-10-06")
    assert bars_per_year("1d", "XTAE") == round(365.25 * 5 / 7) == 261
    friday = pd.Timestamp("2024-10-04")
    for exchange in ("ASEX", "XBSE"):
        assert next_bar(friday, BarPattern("session", 1, "01234", exchange)) == pd.Timestamp("2024-10-07")
        assert next_bar(friday, BarPattern("week", 1, "last", exchange), 2) == pd.Timestamp("2024-10-18")
        assert next_bar(friday.tz_localize("UTC"), BarPattern("second", 3600, "0", exchange)) is pd.NaT
    said = [record.getMessage() for record in caplog.records if "cannot build the calendar of" in record.getMessage()]
    assert len(said) == 3 and all("weekdays decide" in one for one in said)
    with pytest.raises(InvalidRequest, match="cannot build the calendar of XTAE"):
        bars_per_year("1h", "XTAE")
    with pytest.raises(InvalidRequest, match="no calendar for the exchange 'NOSUCH'"):
        next_session(index, "NOSUCH")


@pytest.mark.parametrize("step", ["1h", "30min", "15min"])
@pytest.mark.parametrize("exchange", ["XSAU", "XNZE", "XETR", "XLON", "XASX", "XBOM", "XKRX", "XSTU", "BVMF", "XNYS"])
def test_bars_of_minutes_are_an_exchange_s_by_name_and_never_around_the_clock(exchange, step):
    "Riyadh trades on Sundays and Wellington while it is Sunday in New York; a quarter of an hour has few gaps."
    index = hours(exchange, "2023-01-02", "2024-12-30", step)
    pattern, alone = bar_pattern(index[:-40], exchange), bar_pattern(index[:-40])
    assert pattern.exchange == exchange and alone.exchange == (exchange if exchange == "XNYS" else None)
    assert [next_bar(index[-41], pattern, n) for n in (1, 39)] == [index[-40], index[-2]]
    assert exchange == "XNYS" or next_bar(index[-41], alone) is pd.NaT
    for one in (pattern, alone):
        assert bars_per_year(one) == pytest.approx(len(index) / 2, rel=0.02)


def week_of_currencies(step, first="2024-01-07", last="2024-06-26", pause=0):
    "Bars from Sunday to Friday, 17:00 in New York, with a pause of so many minutes every day from then on."
    index = pd.date_range(first, last, freq=step, tz="UTC")
    local = index.tz_convert("America/New_York")
    minutes = local.day_of_week * 1440 + local.hour * 60 + local.minute
    paused = (minutes % 1440 >= 17 * 60) & (minutes % 1440 < 17 * 60 + pause)
    return index[((minutes < 4 * 1440 + 17 * 60) | (minutes >= 6 * 1440 + 17 * 60)) & ~paused]


@pytest.mark.parametrize("step", ["1h", "15min", "5min"])
def test_currencies_around_the_clock_and_futures_with_a_pause(step):
    "On a Wednesday, when two days of bars have no gap; some bars of currencies are missing, where nobody traded."
    a_year = pd.Timedelta(days=365.25) / pd.Timedelta(step)
    currencies = week_of_currencies(step)
    lost = np.random.default_rng(0).random(len(currencies)) < 0.01
    for index in (currencies, currencies[~lost].union(currencies[-1:])):
        assert bar_pattern(index).exchange == "24/5"
        assert bars_per_year(bar_pattern(index)) == pytest.approx(a_year * 5 / 7, rel=0.01)
    around = pd.date_range("2024-01-07", "2024-06-26", freq=step, tz="UTC")
    assert bar_pattern(around).exchange == "24/7" and bars_per_year(bar_pattern(around)) == pytest.approx(
        a_year, rel=0.01
    )
    future = week_of_currencies(step, pause=60)
    for exchange in (None, "CMES"):
        assert bars_per_year(bar_pattern(future, exchange)) == pytest.approx(a_year * 5 / 7 * 23 / 24, rel=0.02)
    paused = future[future.tz_convert("America/Chicago") < pd.Timestamp("2024-06-25 16:00", tz="America/Chicago")]
    assert paused[-1] + pd.Timedelta(step) == pd.Timestamp("2024-06-25 16:00", tz="America/Chicago")
    assert next_session(paused, "CMES") == pd.Timestamp("2024-06-25 17:00", tz="America/Chicago")
