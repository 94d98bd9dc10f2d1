"""Files as vendors and spreadsheets write them: the right prices, or one clear error; properties over all of them."""

import logging
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smlstm.data.prices import load_prices
from smlstm.data.request import BadPrices

PRICES = ["open", "high", "low", "close"]


def bars(days, start=100.0, decimals=4, seed=0):
    "Made-up bars on some dates."
    close = (start * np.exp(np.cumsum(np.random.default_rng(seed).normal(0, 0.01, len(days))))).round(decimals)
    open_ = np.append(start, close[:-1])
    high, low = (np.maximum(open_, close) * 1.01).round(decimals), (np.minimum(open_, close) * 0.99).round(decimals)
    return pd.DataFrame(dict(open=open_, high=high, low=low, close=close, volume=5e6), index=days)


DAYS = pd.bdate_range("2020-01-02", periods=60)
HOURS = pd.date_range("2024-01-02", periods=60, freq="h", tz="UTC")
NIGHTS = pd.date_range("2020-01-02", periods=60)  # with weekends
WEEKS, MONTHS = (
    pd.date_range("2018-01-05", periods=60, freq="W-FRI"),
    pd.date_range("2010-01-01", periods=60, freq="MS"),
)
DAILY, HOURLY, CRYPTO = bars(DAYS), bars(HOURS, 42_000.0, 2, 1), bars(NIGHTS, 7000.0, 2, 2)
YEN, EURO, INDEX = bars(DAYS, 151.0, 3, 3), bars(DAYS, 1.0, 3, 4), bars(DAYS, 5000.0, 2, 5)
PENNY = bars(DAYS, 1.2e-5, 9, 6)


def table(frame, dates=None, **columns):
    "A frame with its dates as text in front, and columns renamed (`old=new`) or left out (`old=None`)."
    text = frame.index.strftime(dates or "%Y-%m-%d")
    named = {columns.get(name, name.title()): frame[name].to_numpy() for name in frame}
    named.pop(None, None)
    return pd.DataFrame({"Date": text, **named})


def marked(frame, form, **more):
    "The same with prices as text."
    made = table(frame, **more)
    return made.assign(**{name.title(): [form(x) for x in frame[name]] for name in PRICES})


def german(x):
    return f"{x:,.2f}".translate(str.maketrans(",.", ".,"))


PLAIN = table(DAILY).to_csv(index=False)
LINES = PLAIN.splitlines()
UNIX = lambda frame, unit: frame.index.as_unit(unit).asi8
TWO = pd.concat([table(DAILY).assign(Symbol="AAA"), table(DAILY * 2).assign(Symbol="BBB")]).to_csv(index=False)
KLINES = ["open_time", "open", "high", "low", "close", "volume", "close_time", "quote_volume", "count"]
BINANCE = lambda unit: pd.DataFrame(
    {"open_time": UNIX(HOURLY, unit), **HOURLY.to_dict("list"), "close_time": 1, "count": 9}
)
OHLC = dict(open="o", high="h", low="l", close="c", volume="v")

# name: text or bytes, the prices that are right or what the error names, and what else is asked
FILES = {
    "stooq": (PLAIN, DAILY),
    "binance, milliseconds": (BINANCE("ms").to_csv(index=False), HOURLY, dict(interval="1h", ticker="BTC-USD")),
    "binance, microseconds": (BINANCE("us").to_csv(index=False), HOURLY, dict(interval="1h", ticker="BTC-USD")),
    "binance, no header": (
        BINANCE("ms").to_csv(index=False, header=False),
        "write a header such as date,open,high,low,close,volume",
        dict(interval="1h", ticker="BTC-USD"),
    ),
    "metatrader 4, no header": (table(DAILY, "%Y.%m.%d").to_csv(index=False, header=False), "write a header"),
    "metatrader 5": (
        table(DAILY, "%Y.%m.%d", volume="TICKVOL")
        .rename(columns=lambda c: f"<{c.upper()}>")
        .to_csv(sep="\t", index=False),
        DAILY.assign(volume=np.nan),
    ),
    "interactive brokers": (
        table(HOURLY).assign(Date=HOURS.tz_convert("America/New_York").strftime("%Y-%m-%d %H:%M:%S%z")).to_csv(),
        HOURLY,
        dict(interval="1h"),
    ),
    "interactive brokers, no offset": (
        table(HOURLY, "%Y%m%d %H:%M:%S US/Eastern").to_csv(index=False),
        "need a UTC offset",
        dict(interval="1h"),
    ),
    "nasdaq.com": (
        marked(INDEX, lambda x: f"${x:,.2f}", dates="%m/%d/%Y").rename(columns={"Close": "Close/Last"})[::-1].to_csv(),
        INDEX,
    ),
    "investing.com": (
        marked(INDEX, lambda x: f"{x:,.2f}", dates="%m/%d/%Y", volume=None)
        .rename(columns={"Close": "Price"})
        .assign(**{"Vol.": "5.00M", "Change %": "-0.12%"})[::-1]
        .to_csv(index=False, quoting=1),
        INDEX,
    ),
    "investing.de": ('"Datum","Zuletzt"\n"02.01.2020","5.006,29"\n', "no 'close' column"),
    "fred": ("observation_date,SP500\n2020-01-02,3257.85\n2020-01-03,.\n", r"no 'close' column; it has \['SP500'\]"),
    "ecb": ("Date,USD,JPY\n02 January 2020,1.1193,121.75\n", r"no 'close' column; it has \['USD', 'JPY'\]"),
    "quandl": (
        table(DAILY).assign(**{"Ex-Dividend": 0.0, "Adj. Close": DAILY.close.to_numpy() / 2})[::-1].to_csv(index=False),
        DAILY.assign(**{name: DAILY[name] / 2 for name in PRICES}),
    ),
    "alpha vantage, limit": ('{\n    "Information": "Thank you for using Alpha Vantage!"\n}\n', "close column"),
    "bloomberg": ("Security,SPY US Equity\n\n" + table(DAILY, "%m/%d/%Y", close="PX_LAST").to_csv(index=False), DAILY),
    "nse": (table(DAILY, "%d-%b-%Y", close="Close Price", open="Open Price").to_csv(index=False), DAILY),
    "tradingview": (table(DAILY).assign(Date=UNIX(DAILY, "s") + 52_200).to_csv(index=False), DAILY),
    "coinbase": (
        table(CRYPTO).assign(Date=UNIX(CRYPTO, "s"))[::-1].to_csv(index=False),
        CRYPTO,
        dict(ticker="BTC-USD"),
    ),
    "kraken, no header": (
        table(CRYPTO).assign(Date=UNIX(CRYPTO, "s")).to_csv(index=False, header=False),
        "write a header",
        dict(ticker="BTC-USD"),
    ),
    "polygon": (table(DAILY, **OHLC).to_csv(index=False), "no 'close' column"),
    "barchart": (
        PLAIN + '"Downloaded from Barchart.com"\n',
        "'Downloaded from Barchart.com' in row 61 is not written as",
    ),
    "utf-16": (PLAIN.encode("utf-16"), DAILY),
    "utf-16, tabs, no mark": (PLAIN.replace(",", "\t").encode("utf-16-le"), DAILY),
    "western european": (table(DAILY).assign(Währung="€").to_csv(index=False).encode("cp1252"), DAILY),
    "old mac": (PLAIN.replace("\n", "\r"), DAILY),
    "rows end in a comma": ("\n".join([LINES[0], *(line + "," for line in LINES[1:])]), DAILY),
    "all lines end in a comma": ("\n".join(line + "," for line in LINES), DAILY),
    "spaces around": (PLAIN.replace(",", "  , "), DAILY),
    "sep=": ("sep=;\n" + table(DAILY).to_csv(index=False, sep=";", decimal=","), DAILY),
    "yen of three decimals": (table(YEN, "%d.%m.%Y").to_csv(index=False, sep=";", decimal=","), YEN),
    "euro of three decimals": (table(EURO, "%d.%m.%Y").to_csv(index=False, sep=";", decimal=","), EURO),
    "euro of three decimals, quoted": (marked(EURO, lambda x: f"{x:.3f}".replace(".", ",")).to_csv(index=False), EURO),
    "german thousands": (marked(INDEX, german, dates="%d.%m.%Y").to_csv(index=False, sep=";"), INDEX),
    "swiss thousands": (marked(INDEX, lambda x: f"{x:,.2f}".replace(",", "'")).to_csv(index=False, sep=";"), INDEX),
    "tiny prices": (marked(PENNY, lambda x: f"{x:.9f}").to_csv(index=False), PENNY),
    "tiny prices, exponents": (marked(PENNY, lambda x: f"{x:.8E}").to_csv(index=False), PENNY),
    "header twice": ("\n".join([*LINES[:31], LINES[0], *LINES[31:]]), "'Open' in row 31 of"),
    "totals": (PLAIN + "Total,,,,,300000000\n", "'Total' in row 61 is not written as"),
    "average": (PLAIN + "Average,1,1,1,1,1\n", "'Average' in row 61 is not written as"),
    "dividend row": (PLAIN + "2020-03-26,,,,0.24 Dividend,\n", "'0.24 Dividend' in row 61 of 'close'"),
    "today is empty": (PLAIN + "2020-03-26,null,null,null,null,null\n", DAILY),
    "pence": (marked(DAILY, lambda x: f"{x}p").to_csv(index=False), "not a number"),
    "excel's numbers": (table(DAILY).assign(Date=(DAYS - pd.Timestamp("1899-12-30")).days).to_csv(), "are no dates"),
    "months": (table(bars(MONTHS), "%Y-%m").to_csv(index=False), "pass date_format", dict(interval="1mo")),
    "months by format": (
        table(bars(MONTHS), "%Y-%m").to_csv(index=False),
        bars(MONTHS),
        dict(interval="1mo", date_format="%Y-%m"),
    ),
    "weeks as days": (table(bars(WEEKS)).to_csv(index=False), "7 days apart, which is not 1d: pass interval='1wk'"),
    "two symbols": (TWO, DAILY, dict(ticker="AAA")),
    "two symbols, another": (TWO, r"2 symbols in the column 'Symbol' \(AAA, BBB\)", dict(ticker="CCC")),
    "closes side by side": (table(DAILY, close="close_A", open="close_B").to_csv(index=False), "no 'close' column"),
}


def ask(path, content, ticker="SPY", **more):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return load_prices(ticker, path, **more)


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_the_right_prices_or_one_clear_error(tmp_path, name):
    content, right, *more = FILES[name]
    path = tmp_path / "a.csv"
    if isinstance(right, str):
        with pytest.raises(ValueError, match=right) as caught:
            ask(path, content, *[], **(more[0] if more else {}))
        assert str(caught.value).startswith("a.csv") and len(str(caught.value)) < 400
        return
    got = ask(path, content, **(more[0] if more else {})).frame
    assert got.index.tolist() == right.index.tolist()
    np.testing.assert_allclose(got[PRICES], right[PRICES], rtol=1e-9)
    known = got.volume.notna()
    np.testing.assert_allclose(got.volume[known], right.volume[known])


@pytest.mark.parametrize(
    "change, note",
    [
        (lambda f: f.close.where(f.index != DAYS[30], -37.63), "1 rows with a price of zero or less dropped"),
        (lambda f: f.close.where(f.index < DAYS[30], f.close / 4), "size of a split (2020-02-13)"),
        (lambda f: f.close.where(f.index < DAYS[30], f.close / 1000), "size of a split (2020-02-13)"),
    ],
    ids=["oil below zero", "split", "thousands lost"],
)
def test_what_is_odd_is_named(tmp_path, change, note):
    close = change(DAILY)
    got = ask(tmp_path / "a.csv", pd.DataFrame({"Date": DAYS, "Close": close}).to_csv(index=False))
    assert any(note in one for one in got.provenance.notes)


def test_thousands_that_look_like_decimals_are_named(tmp_path):
    "999 and 1.012, a thousand and twelve in Germany, are read as 999 and 1.012: the jumps are named."
    text = "Date;Close\n" + "".join(f"{day:%d.%m.%Y};{999 + 13 * (i % 2):,}\n" for i, day in enumerate(DAYS))
    got = ask(tmp_path / "a.csv", text.replace(",", "."))
    assert any("59 jumps" in note for note in got.provenance.notes)


# ---------------------------------------------------------------- properties

FREQUENCIES = {"1d": "B", "1wk": "W-FRI", "1mo": "MS", "1h": "h", "15m": "15min", "5m": "5min"}
ZONES = ["UTC", "America/New_York", "Europe/Berlin", "Asia/Tokyo", "Asia/Kolkata", "Australia/Sydney"]
FORMATS = ["%Y-%m-%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y", "%Y%m%d", "%b %d, %Y", "%d-%b-%y", "%Y/%m/%d", "%d/%m/%y"]
MARKS = [(",", "."), (";", ","), (";", "."), ("\t", "."), ("\t", ","), ("|", ".")]


@st.composite
def written(draw):
    "Bars of some frequency, zone, format, separator, encoding and order, as a file; and the bars."
    interval = draw(st.sampled_from(list(FREQUENCIES)))
    first = pd.Timestamp("2015-01-01") + pd.Timedelta(days=draw(st.integers(0, 3000)))
    short = interval in ("1h", "15m", "5m")
    days = pd.date_range(
        first, periods=draw(st.integers(20, 80)), freq=FREQUENCIES[interval], tz="UTC" if short else None
    )
    frame = bars(days, draw(st.sampled_from([0.02, 1.0, 150.0, 42_000.0])), 6, draw(st.integers(0, 99)))
    separator, decimal = draw(st.sampled_from(MARKS))
    if short:
        zone = draw(st.sampled_from(ZONES))
        text, date_format = days.tz_convert(zone).strftime("%Y-%m-%d %H:%M:%S%z"), None
    else:
        date_format = draw(st.sampled_from(FORMATS))
        text = days.strftime(date_format)
        date_format = draw(st.sampled_from([None, date_format]))
    out = table(frame).assign(Date=text)
    if draw(st.booleans()):
        out = out[::-1]
    if draw(st.booleans()):
        out = out.rename(columns=draw(st.sampled_from([str.upper, str.lower, lambda c: f" {c} "])))
    content = out.to_csv(index=False, sep=separator, decimal=decimal, quoting=draw(st.sampled_from([0, 1])))
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"]))
    return content.encode(encoding), frame, interval, date_format


quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(written())
def test_any_format_zone_and_frequency(tmp_path, made):
    "The bars that were written, or an error about dates that can be read in two ways; with a format never."
    content, frame, interval, date_format = made
    logging.disable(logging.WARNING)
    try:
        got = ask(tmp_path / "a.csv", content, interval=interval, date_format=date_format).frame
    except ValueError as error:
        assert date_format is None and interval in ("1d", "1wk", "1mo"), error
        assert re.search("ambiguous.*date_format=", str(error)), error
    else:
        assert got.index.tolist() == frame.index.tolist()
        np.testing.assert_allclose(got[PRICES], frame[PRICES], rtol=1e-9)
    finally:
        logging.disable(logging.NOTSET)


damage = st.sampled_from("cut twice swap drop junk digits blank quote zeros nul".split())


def damaged(lines, kind, at):
    "A file's lines with one fault."
    at = at % len(lines)
    line = lines[at]
    changed = {
        "cut": [line[: len(line) // 2]],
        "twice": [line, line],
        "swap": [lines[-1]],
        "drop": [],
        "junk": ["?" * 9],
        "digits": [re.sub(r"\d", "x", line, count=3)],
        "blank": [""],
        "quote": ['"' + line],
        "zeros": [re.sub(r",.*", ",0,0,0,0,0", line)],
        "nul": [line + "\0"],
    }[kind]
    return [*lines[:at], *changed, *lines[at + 1 :]]


@quick
@given(written(), st.lists(st.tuples(damage, st.integers(0, 99)), min_size=1, max_size=3))
def test_any_damaged_file_is_prices_that_were_written_or_one_clear_error(tmp_path, made, faults):
    "No price of a damaged file is another than was written for its date, unless the damage is in that row."
    content, frame, interval, date_format = made
    lines = content.decode("utf-8-sig", errors="replace").splitlines()
    for kind, at in faults:
        lines = damaged(lines, kind, at) if lines else lines
    logging.disable(logging.WARNING)
    try:
        got = ask(tmp_path / "a.csv", "\n".join(lines), interval=interval, date_format=date_format).frame
    except ValueError as error:
        assert "\n" not in str(error)[:60] and str(error)
    else:
        assert got.index.is_monotonic_increasing and got.index.is_unique and (got.close > 0).all()
        same = got.index.intersection(frame.index)
        wrong = ~np.isclose(got.close[same], frame.close[same], rtol=1e-9)
        assert wrong.sum() <= len(faults)
    finally:
        logging.disable(logging.NOTSET)


def test_a_row_cut_inside_its_quotes_is_one_clear_error(tmp_path):
    head, row = '"Date","Open","High","Low","Close","Volume"', '"2015-01-{:02d}","2","2.2","1.8","2.1","5000"'
    rows = [row.format(day) for day in range(5, 25)]
    rows[0] = rows[0][: len(rows[0]) // 2]  # ends within a field, whose closing quote is then the next row's first
    with pytest.raises(BadPrices, match="more fields than its header"):
        ask(tmp_path / "a.csv", "\n".join([head, *rows]), interval="1d")
