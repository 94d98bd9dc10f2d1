"""Dates of tables: one format for the whole column, the session of a bar stamped in UTC, the distance of the bars."""

from datetime import date

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yahoo_server import calendar

from smlstm.data.dates import bar_instants, check_spacing, read_stamps, session_dates
from smlstm.data.prices import load_prices
from smlstm.data.request import BadPrices

QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FORMATS = [
    *("%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%Y%m%d", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y", "%d.%m.%Y"),
    *("%d/%m/%y", "%m/%d/%y", "%d-%m-%y", "%d.%m.%y", "%y/%m/%d", "%b %d, %Y", "%B %d, %Y", "%d %b %Y", "%d-%b-%Y"),
    *("%d-%b-%y", "%a, %d %b %Y", "%A, %B %d, %Y", "%b-%d-%Y", "%Y-%b-%d", "%d %B %Y", "%Y-%m-%dT%H:%M:%S"),
    *("%Y-%m-%d %H:%M:%S", "%d/%m/%Y %H:%M", "%m/%d/%Y %I:%M:%S %p", "%m/%d/%Y %H:%M:%S", "%Y-%m-%d %H:%M:%S.%f"),
    *("%Y%m%d %H:%M:%S", "%b %d, %Y %H:%M"),
]


def days_of(text, **options):
    return session_dates(read_stamps(pd.Series(text), "a.csv", **options), "a.csv")


@pytest.mark.parametrize("plain", [False, True], ids=["padded", "not padded"])
@pytest.mark.parametrize("form", FORMATS)
def test_any_format_of_a_year(form, plain):
    truth = pd.bdate_range("2018-12-20", "2020-03-10")
    text = (truth + pd.Timedelta(hours=16)).strftime(form)
    if plain and "%Y%m" not in form:
        text = text.str.replace(r"(?<![\d:.])0(?=\d)", "", regex=True)
    for order in (text, text[::-1]):
        assert list(days_of(order)) == list(truth if order is text else truth[::-1])


@QUICK
@given(st.sampled_from(FORMATS), st.dates(date(1975, 1, 1), date(2024, 1, 1)), st.integers(1, 60))
def test_any_format_is_read_rightly_or_refused(form, first, rows):
    truth = pd.bdate_range(first, periods=rows)
    text = (truth + pd.Timedelta(hours=16)).strftime(form)
    try:
        found = days_of(text)
    except BadPrices as error:
        assert "ambiguous" in str(error) and "date_format=" in str(error)
        assert truth.day.max() <= 12 or "%y" in form
    else:
        assert list(found) == list(truth)
    assert list(days_of(text, date_format=form)) == list(truth)


def test_a_file_of_the_field_keeps_all_its_rows(tmp_path):
    truth = pd.bdate_range("2013-01-02", "2018-12-31")
    close = np.linspace(100, 150, len(truth))
    pd.DataFrame({"Date": truth.strftime("%b %d, %Y"), "Close": close}).to_csv(tmp_path / "a.csv", index=False)
    got = load_prices("ABC", tmp_path / "a.csv")
    assert list(got.frame.index) == list(truth) and got.provenance.notes == ()
    assert got.frame.close.tolist() == pytest.approx(close)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("4/1/2015 16:00:00", "2015-04-01"),  # google finance; day 13 below decides
        ("29-Feb-2020", "2020-02-29"),
        ("1577923200", "2020-01-02"),
        ("1577923200000", "2020-01-02"),
        ("2020-01-02T00:00:00Z", "2020-01-02"),
        ("2020-01-02 00:00:00-05:00", "2020-01-02"),
        ("Thursday, 2 January 2020", "2020-01-02"),
        ("2nd Jan 2020", "2020-01-02"),
        ("20200102", "2020-01-02"),
        ("202001021630", "2020-01-02"),  # as milliseconds it would be a day of 1976
        ("20200102163000", "2020-01-02"),
    ],
)
def test_single_spellings(text, expected):
    text = ["4/13/2015 16:00:00", text] if text.startswith("4/1") else [text]
    assert days_of(text)[-1] == pd.Timestamp(expected)


@pytest.mark.parametrize(
    "column, says",
    [
        (["03/04/2020", "04/04/2020"], r"2020-04-03 \(day first: date_format='%d/%m/%Y'\) or 2020-03-04 \(month first"),
        (["3.4.20", "4.5.20"], "date_format='%d.%m.%y'"),
        (["2020-01-02", "03/01/2020"], "'03/01/2020' in row 2 is not written as '2020-01-02' in row 1"),
        (["13/13/2020"], "no order of day, month and year"),
        (["2020-02-30"], "no order"),
        (["yesterday"], "'yesterday' in row 1"),
        (["2020-01-02 25:00"], "time of day"),
        ([0, 1, 2], "numbers from 0 to 2 are no dates"),
        ([43831, 43832], "are no dates"),
        (["Foo 02, 2019"], "no order"),
        ([True, False], "is no date"),
        (["2020-01-02", None], "row 2 has none"),
        (["01 marraskuu 2020"], "no order"),  # November in Finnish, whose first letters are March's
        (["113/01/02"], "no order"),  # years of Taiwan
        (["2567-01-02"], "Out of bounds"),  # of Thailand
        (["2020-W05"], "is no date"),
        (["2020-01-06 - 2020-01-10"], "time of day"),
        ([2020010209], "pass date_format"),  # an hour; as seconds it would be in 2034
        ([2001020930], "pass date_format"),
    ],
)
def test_what_stays_unclear_is_refused(column, says):
    with pytest.raises(BadPrices, match=says):
        days_of(column)


def test_a_format_chooses(tmp_path):
    column = ["03/04/2020", "06/04/2020", "07/04/2020"]
    assert days_of(column, date_format="%d/%m/%Y")[0] == pd.Timestamp("2020-04-03")
    assert days_of(column, date_format="%m/%d/%Y")[0] == pd.Timestamp("2020-03-04")
    assert days_of([c + " 16:00:00" for c in column], date_format="%d/%m/%Y")[0] == pd.Timestamp("2020-04-03")
    with pytest.raises(BadPrices, match="do not follow date_format='%Y-%m-%d': .*'?03/04/2020[^\n]{0,60}$"):
        days_of(column, date_format="%Y-%m-%d")
    path = tmp_path / "a.csv"
    path.write_text("Date,Close\n" + "".join(f"{c},{n}\n" for n, c in enumerate(column, 1)))
    with pytest.raises(BadPrices, match="ambiguous"):
        load_prices("ABC", path)
    assert load_prices("ABC", path, date_format="%d/%m/%Y").frame.index[0] == pd.Timestamp("2020-04-03")


# --- daily bars stamped in UTC ------------------------------------------------------------------------------------

EXCHANGES = {
    "XLON": "Europe/London",
    "XETR": "Europe/Berlin",
    "XHKG": "Asia/Hong_Kong",
    "XASX": "Australia/Sydney",
    "XTKS": "Asia/Tokyo",
    "XNYS": "America/New_York",
    "XBOM": "Asia/Kolkata",
    "BVMF": "America/Sao_Paulo",
    "XNZE": "Pacific/Auckland",
    "XSAU": "Asia/Riyadh",
}


@pytest.mark.parametrize("marked", [True, False], ids=["with Z", "without"])
@pytest.mark.parametrize("hour", [0, 9, 16], ids=["midnight", "open", "close"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_local_day_written_in_utc_is_that_day(exchange, hour, marked):
    truth = calendar(exchange).sessions_in_range("2022-01-03", "2024-06-28") if exchange != "XSAU" else saudi()
    local = (truth + pd.Timedelta(hours=hour)).tz_localize(EXCHANGES[exchange])
    utc = local.tz_convert("UTC")
    column = utc.strftime("%Y-%m-%dT%H:%M:%SZ") if marked else utc.tz_localize(None).strftime("%Y-%m-%d %H:%M:%S")
    try:
        assert list(days_of(column)) == list(truth)
    except BadPrices as error:  # nine or sixteen o'clock in Riyadh is on its day, but so Sundays are in New Zealand's
        assert exchange == "XSAU" and hour and "no date of a daily bar" in str(error)


def saudi():
    from smlstm.data.calendars import exchange_calendar

    sessions = exchange_calendar("XSAU", 2022).sessions
    return sessions[(sessions >= "2022-01-03") & (sessions <= "2024-06-28")]


EVENINGS = {"futures": "America/Chicago", "currencies": "America/New_York"}


@pytest.mark.parametrize("rows", [15, 60, 500])
@pytest.mark.parametrize("form", ["offset", "Z", "naive", "seconds", "local"])
@pytest.mark.parametrize("market", EVENINGS)
def test_a_session_that_opens_in_the_evening_is_the_next_day_s(market, form, rows):
    "Monday's bar of a future or a currency is stamped on Sunday, at 17:00 in Chicago or New York."
    truth = pd.bdate_range("2022-01-10", periods=rows)
    local = (truth - pd.Timedelta(hours=7)).tz_localize(EVENINGS[market])
    utc = local.tz_convert("UTC")
    column = {
        "offset": [t.isoformat() for t in local],
        "Z": utc.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "naive": utc.strftime("%Y-%m-%d %H:%M"),
        "seconds": utc.as_unit("s").asi8,
        "local": local.strftime("%Y-%m-%d %H:%M:%S"),
    }[form]
    assert list(days_of(column)) == list(truth)


@pytest.mark.parametrize(
    "zone, hour", [("Asia/Jerusalem", "17:25"), ("Asia/Riyadh", "23:59:59"), ("Africa/Cairo", "14:30")]
)
def test_a_week_from_sunday_to_thursday_keeps_its_days(zone, hour):
    truth = pd.bdate_range("2022-01-02", periods=300, freq="C", weekmask="Sun Mon Tue Wed Thu")
    local = (truth + pd.Timedelta(hour if len(hour) > 5 else hour + ":00")).tz_localize(zone)
    assert list(days_of([t.isoformat() for t in local])) == list(truth)


def test_months_that_open_on_an_evening_are_refused():
    "17:00 in New York on the last of January is where February's bar begins, or where January's ends."
    months = pd.date_range("2018-01-31 17:00", periods=40, freq="ME", tz="America/New_York").tz_convert("UTC")
    with pytest.raises(BadPrices, match="no date of a daily bar: it may be .*the next session"):
        days_of(months.strftime("%Y-%m-%dT%H:%M:%SZ"))


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "America/Los_Angeles", "Asia/Tokyo"])
def test_days_around_the_clock_are_those_of_utc(zone):
    truth = pd.date_range("2022-01-02", periods=300)
    begin = truth.tz_localize("UTC").tz_convert(zone)
    assert list(days_of([t.isoformat() for t in begin])) == list(truth)
    ends = truth + pd.Timedelta(hours=24) - pd.Timedelta(milliseconds=1)
    assert list(days_of(ends.strftime("%Y-%m-%dT%H:%M:%S.%fZ"))) == list(truth)


def test_numbers_of_seconds_are_stamps_too():
    truth = calendar("XHKG").sessions_in_range("2022-01-03", "2024-06-28")
    seconds = truth.tz_localize("Asia/Hong_Kong").as_unit("s").asi8
    assert list(days_of(seconds)) == list(days_of(seconds * 1000)) == list(truth)


def test_too_few_bars_to_tell_are_refused():
    with pytest.raises(BadPrices, match="no date of a daily bar: it may be .* or "):
        days_of(["2024-01-02T16:00:00Z", "2024-01-03T16:00:00Z"])  # midnight in Hong Kong, or London's afternoon


def test_closes_with_half_days_keep_their_dates():
    schedule = calendar().closes.loc["2022-01-03":"2024-06-28"]
    assert list(days_of(schedule.dt.strftime("%Y-%m-%dT%H:%M:%SZ"))) == list(schedule.index)


def test_intraday_bars_are_instants():
    stamps = read_stamps(pd.Series(["2024-03-08 09:30:00-05:00", "2024-03-11 09:30:00-04:00"]), "a.csv")
    assert list(bar_instants(stamps, "a.csv").hour) == [14, 13]
    assert bar_instants(read_stamps(pd.Series([1710162000]), "a.csv"), "a.csv")[0] == pd.Timestamp(
        "2024-03-11 13:00", tz="UTC"
    )
    with pytest.raises(BadPrices, match="UTC offset"):
        bar_instants(read_stamps(pd.Series(["2024-03-08 09:30:00"]), "a.csv"), "a.csv")


# --- the distance of the bars -------------------------------------------------------------------------------------


def hours(step="1h"):
    days = calendar().schedule.loc["2024-01-02":"2024-03-28"]
    starts = [pd.date_range(a, b, freq=step, inclusive="left") for a, b in zip(days.open, days.close)]
    return pd.DatetimeIndex(np.concatenate([s.asi8 for s in starts])).tz_localize("UTC")


BARS = {
    "1d": pd.bdate_range("2022-01-03", periods=300),
    "1h": hours(),
    "15m": hours("15min"),
    "5m": hours("5min"),
    "1wk": pd.date_range("2020-01-06", periods=100, freq="W-MON"),
    "1mo": pd.date_range("2010-01-01", periods=100, freq="MS"),
}


@pytest.mark.parametrize("interval", BARS)
@pytest.mark.parametrize("held", BARS)
def test_a_table_has_the_bars_that_are_asked_for(tmp_path, held, interval):
    frame = pd.DataFrame({"close": np.linspace(1, 2, len(BARS[held]))}, index=BARS[held].rename("date"))
    frame.to_csv(tmp_path / "a.csv")
    frame.to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        if held == interval:
            assert len(load_prices("ABC", tmp_path / name, interval=interval).frame) == len(frame)
            continue
        with pytest.raises(BadPrices, match=rf"apart, which is not {interval}: pass interval='{held}'|UTC offset"):
            load_prices("ABC", tmp_path / name, interval=interval)


def test_four_hours_are_no_interval():
    with pytest.raises(BadPrices, match="4 hours apart, which is not 1h: there are 1d, 1h"):
        check_spacing(pd.date_range("2024-01-01", periods=50, freq="4h", tz="UTC"), "1h", "a.csv")
    check_spacing(pd.DatetimeIndex(["2024-01-01", "2024-03-01"]), "1d", "a.csv")  # two rows show nothing


pieces = st.text("0123456789-/.: TZ+aefnbJF,pm", max_size=22)


@QUICK
@given(
    st.lists(pieces, min_size=1, max_size=4) | st.lists(st.integers() | st.floats(), min_size=1, max_size=4),
    st.booleans(),
)
def test_anything_is_dates_or_one_clear_error(column, intraday):
    try:
        found = read_stamps(pd.Series(column), "a.csv")
        index = bar_instants(found, "a.csv") if intraday else session_dates(found, "a.csv")
    except BadPrices as error:
        assert str(error).startswith("a.csv: ")
        return
    assert len(index) == len(column) and not index.isna().any()


@pytest.mark.parametrize("step", [2, 3])
def test_every_second_or_third_day_is_no_daily_bar(step):
    with pytest.raises(BadPrices, match=f"{step} days apart, which is not 1d: there are 1d"):
        check_spacing(pd.date_range("2024-01-01", periods=60, freq=f"{step}D"), "1d", "a.csv")
    sparse = pd.bdate_range("2024-01-01", periods=400).delete(np.arange(0, 390, 3))  # a stock that does not trade daily
    check_spacing(sparse, "1d", "a.csv")


def test_days_with_several_bars_are_named_by_their_distance():
    days = pd.bdate_range("2020-01-02", periods=60)
    hours = [day + pd.Timedelta(hours=9 + n) for day in days[-5:] for n in range(7)]
    with pytest.raises(BadPrices, match="1 hour apart, which is not 1d: pass interval='1h'"):
        check_spacing(days[:-5].append(pd.DatetimeIndex(hours)), "1d", "a.csv")


@pytest.mark.parametrize(
    "interval, whole, today",
    [
        ("1wk", pd.date_range("2018-01-01", periods=101, freq="W-MON"), "2019-12-04"),
        ("1mo", pd.date_range("2000-01-01", periods=101, freq="MS"), "2008-05-09"),
        ("1mo", pd.date_range("2000-01-01", periods=100, freq="MS"), "2008-05-09"),
        ("1mo", pd.date_range("2000-01-05", periods=100, freq="28D"), "2007-08-16"),
    ],
)
def test_a_week_or_month_that_is_not_over_is_refused(interval, whole, today):
    "Yahoo's files end in a row of today."
    with pytest.raises(BadPrices, match=f"the last bar, of {today}, comes .* leave it out"):
        check_spacing(whole.append(pd.DatetimeIndex([today])), interval, "a.csv")
    check_spacing(whole, interval, "a.csv")


@pytest.mark.parametrize("exchange", ["XNYS", "XSHG", "XIST", "XTKS", "XIDX", "XETR", "XSAU"])
@pytest.mark.parametrize("edge", ["min", "max"])
@pytest.mark.parametrize("interval, period", [("1wk", "W-SUN"), ("1wk", "W-SAT"), ("1mo", "M")])
def test_weeks_and_months_of_sessions_are_whole(exchange, edge, interval, period):
    "Labels that are the first or last session of a week, some of them one day after a holiday, wherever the file ends."
    sessions = (
        saudi() if exchange == "XSAU" else calendar(exchange).sessions_in_range("2018-01-01", "2024-06-28")
    ).to_series()
    labels = pd.DatetimeIndex(getattr(sessions.groupby(sessions.dt.to_period(period)), edge)())
    for rows in range(20, len(labels), 3):
        check_spacing(labels[:rows], interval, "a.csv")
