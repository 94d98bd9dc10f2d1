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
    "fred": (
        "observation_date,SP500\n2020-01-02,3257.85\n2020-01-03,.\n",
        r"no 'close' column; it has \['SP500'\]: name the column of closing prices close",
    ),
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

NY = "America/New_York"
MID = DAYS.tz_localize(NY)
CODES = table(DAILY).assign(Code="72030"), table(DAILY * 3).assign(Code="67580")
SMALL = bars(DAYS, 12.3, 2, 8).assign(volume=5000.0 + 137 * np.arange(60))
HALF = DAILY.assign(**{name: DAILY[name] / 2 for name in PRICES})
CLOSES = pd.DataFrame(np.nan, DAYS, [*PRICES, "volume"]).assign(close=DAILY.close)
SOME = lambda text: "Date,Close\n" + "".join(f"{day:%Y-%m-%d},{text(n)}\n" for n, day in enumerate(DAYS))


def small(separator, form, quote=""):
    "Prices near twelve, and volumes of some thousands, as text."
    rows = [[f"{day:%d.%m.%Y}", *map(form, row[:4], [2] * 4), form(row[4], 0)] for day, *row in SMALL.itertuples()]
    lines = [["Date", "Open", "High", "Low", "Close", "Volume"], *rows]
    return "\n".join(separator.join(quote + field + quote for field in line) for line in lines)


def comma(x, decimals):
    return f"{x:,.{decimals}f}".translate(str.maketrans(",.", ".,"))


def point(x, decimals):
    return f"{x:,.{decimals}f}"


FILES |= {
    "volumes with points, semicolons": (small(";", comma), SMALL),
    "volumes with points, tabs": (small("\t", comma), SMALL),
    "volumes with points, quoted": (small(",", comma, '"'), SMALL),
    "volumes with commas, semicolons": (small(";", point), SMALL),
    "volumes with commas, bars": (small("|", point), SMALL),
    "indian numbers": (
        marked(INDEX, lambda x: f"1,23,456.{x:.0f}").assign(Volume="50,00,000").to_csv(index=False),
        INDEX.assign(**{name: [float(f"123456.{x:.0f}") for x in INDEX[name]] for name in PRICES}),
    ),
    "bonds in 32nds": (SOME(lambda n: f"110'{n % 32:02d}{'0257'[n % 4]}"), 'not a number: "110\'000" in row 1'),
    "corn in eighths": (SOME(lambda n: f"375'{n % 8}"), 'not a number: "375\'0" in row 1'),
    "settlement of a future": (
        table(DAILY, close="Settle").assign(Last=1.0).to_csv(index=False),
        DAILY,
        dict(ticker="ES=F"),
    ),
    "a future that is rolled": (
        table(DAILY).assign(Symbol=np.where(np.arange(60) < 30, "ESH20", "ESM20")).to_csv(index=False),
        DAILY,
    ),
    "one symbol after another": (
        table(DAILY).assign(Symbol=np.where(np.arange(60) < 30, "AAA", "BBB")).to_csv(index=False),
        r"2 symbols in the column 'Symbol' \(AAA, BBB\), and SPY is not .* or leave the column out",
    ),
    "codes that are numbers": (
        pd.concat(CODES).to_csv(index=False),
        r"2 symbols in the column 'Code' \(72030, 67580\)",
        dict(ticker="7203.T"),
    ),
    "symbol without its ending": (
        pd.concat([table(DAILY).assign(SYMBOL="INFY"), table(DAILY * 2).assign(SYMBOL="TCS")]).to_csv(index=False),
        DAILY,
        dict(ticker="INFY.NS"),
    ),
    "j-quants": (
        table(DAILY).assign(AdjustmentFactor=1.0, AdjustmentClose=DAILY.close.to_numpy() / 2).to_csv(index=False),
        HALF,
    ),
    "sharadar": (table(DAILY).assign(closeunadj=7.0, closeadj=DAILY.close.to_numpy() / 2).to_csv(index=False), HALF),
    "adjusted closing price": (
        table(DAILY).assign(**{"Adjusted Close Price": DAILY.close.to_numpy() / 2}).to_csv(index=False),
        HALF,
    ),
    "adjusted closes alone": (table(DAILY)[["Date", "Close"]].set_axis(["Date", "Adj Close"], axis=1).to_csv(), CLOSES),
    "adjusted closes beside raw bars": (
        table(DAILY, close="Adj Close").to_csv(index=False),
        "no 'close' column; it has .*: name the column",
    ),
    "bloomberg fields": (
        table(
            DAILY, "%m/%d/%Y", **{n: f"PX_{n.upper()}" for n in ("open", "high", "low", "volume")}, close="PX_LAST"
        ).to_csv(index=False),
        DAILY,
    ),
    "refinitiv": (
        table(DAILY, "%Y-%m-%dT00:00:00Z", **{name: f"Price {name.title()}" for name in PRICES})
        .assign(Instrument="SPY.P")[
            ["Instrument", "Date", "Price Open", "Price High", "Price Low", "Price Close", "Volume"]
        ]
        .to_csv(index=False),
        DAILY,
    ),
    "polygon, flat file": (
        table(DAILY)
        .assign(Date=MID.as_unit("ns").asi8, ticker="SPY")
        .rename(columns={"Date": "window_start"})[["ticker", "Volume", "Open", "Close", "High", "Low", "window_start"]]
        .to_csv(index=False),
        DAILY,
    ),
    "tushare": (
        table(DAILY, "%Y%m%d", volume="vol")
        .rename(columns={"Date": "trade_date"})
        .assign(ts_code="600519.SH")[["ts_code", "trade_date", "Open", "High", "Low", "Close", "vol"]][::-1]
        .to_csv(index=False),
        DAILY,
        dict(ticker="600519.SS"),
    ),
    "cryptodatadownload, hours": (
        "https://www.CryptoDataDownload.com\n"
        + table(HOURLY, "%Y-%m-%d %H:%M:%S").assign(unix=UNIX(HOURLY, "s"), symbol="BTC/USD")[::-1].to_csv(index=False),
        HOURLY,
        dict(interval="1h", ticker="BTC-USD"),
    ),
    "coinmarketcap": (
        table(CRYPTO, "%Y-%m-%dT23:59:59.999Z").rename(columns={"Date": "timestamp"}).to_csv(index=False, sep=";"),
        CRYPTO,
        dict(ticker="BTC-USD"),
    ),
    "dukascopy": (
        table(HOURLY, "%d.%m.%Y %H:%M:%S.000").rename(columns={"Date": "Gmt time"}).to_csv(index=False),
        HOURLY,
        dict(interval="1h", ticker="EURUSD=X", date_format="%d.%m.%Y"),
    ),
    "dukascopy, local": (
        table(HOURLY, "%d.%m.%Y %H:%M:%S.000 GMT+0100").rename(columns={"Date": "Local time"}).to_csv(index=False),
        HOURLY.set_axis(HOURS - pd.Timedelta(hours=1)),
        dict(interval="1h", ticker="EURUSD=X", date_format="%d.%m.%Y"),
    ),
    "metatrader 5, hours without a zone": (
        table(HOURLY).assign(Date=HOURS.strftime("%Y.%m.%d"), Time=HOURS.strftime("%H:%M:%S")).to_csv(sep="\t"),
        "need a UTC offset",
        dict(interval="1h"),
    ),
    "times of three and four digits": (
        pd.DataFrame({"Date": 20240102, "Time": [930, 935, 940, 1000], "Close": 1.0}).to_csv(index=False),
        "need a UTC offset",
        dict(interval="5m"),
    ),
    "no time of day in the column of times": (
        "date;time;close\n20200102;;1\n20200103;;2\n",
        CLOSES[:2].assign(close=[1, 2]),
    ),
    "tradingview, a future": (
        table(DAILY)
        .assign(Date=(DAYS - pd.Timedelta(hours=7)).tz_localize("America/Chicago").as_unit("s").asi8)
        .to_csv(index=False),
        DAILY,
        dict(ticker="ES=F"),
    ),
    "histdata, no header": (
        table(HOURLY, "%Y%m%d %H%M%S").to_csv(index=False, header=False, sep=";"),
        "write a header",
        dict(interval="1h"),
    ),
    "asx, no header": (
        table(DAILY, "%Y%m%d")
        .assign(Code="BHP")[["Code", "Date", *map(str.title, DAILY)]]
        .to_csv(index=False, header=False),
        "write a header such as date,open,high,low,close,volume above .'BHP', '20200102'",
    ),
    "metatrader 4, times and no header": (
        table(DAILY, "%Y.%m.%d,00:00").to_csv(index=False, header=False).replace('"', ""),
        "write a header",
    ),
    "decimal commas between commas": (
        SOME(lambda n: f"{100 + n},25"),
        "cannot be read as csv: its first rows have more fields than its header",
    ),
    "empty rows of a spreadsheet": (LINES[0] + "\n" + "\n,,,,,\n".join(LINES[1:]) + "\n,,,,,\n", DAILY),
    "yf.download by ticker": (
        pd.concat({name: (DAILY * k).rename(columns=str.title) for k, name in ((1, "SPY"), (2, "QQQ"))}, axis=1)
        .rename_axis(columns=["Ticker", "Price"])
        .rename_axis("Date")
        .to_csv(),
        DAILY,
    ),
    "yahoo's page": (
        marked(INDEX, lambda x: f"{x:,.2f}", dates="%b %d, %Y", close="Close*")
        .assign(**{"Close*": [f"{x:,.2f}" for x in INDEX.close], "Adj Close**": [f"{x:,.2f}" for x in INDEX.close]})
        .drop(columns="Close")[::-1]
        .to_csv(index=False, sep="\t"),
        INDEX,
    ),
    "yahoo's page with a dividend": (
        marked(INDEX, lambda x: f"{x:,.2f}", dates="%b %d, %Y").to_csv(index=False, sep="\t")
        + "Feb 03, 2020\t1.57 Dividend\n",
        "'1.57 Dividend' in row 61 of 'open'",
    ),
    "every third day": (
        table(bars(pd.date_range("2020-01-01", periods=60, freq="3D"))).to_csv(index=False),
        "3 days apart, which is not 1d",
    ),
    "yahoo's weeks and today": (
        table(bars(WEEKS[:-1] - pd.Timedelta(days=4))).to_csv(index=False) + "2019-02-13,1,1,1,1,1\n",
        "the last bar, of 2019-02-13, comes 2 days after",
        dict(interval="1wk"),
    ),
    "quarters": (
        table(bars(pd.date_range("2000-01-01", periods=60, freq="QS"))).to_csv(index=False),
        "91 days apart, which is not 1mo",
        dict(interval="1mo"),
    ),
    "two styles of numbers": (
        SOME(lambda n: '"5.006,29"' if n % 2 else '"5,006.29"'),
        "not a number: '5,006.29' in row 1 of 'close'",
    ),
    "metastock": (
        table(DAILY)
        .assign(Date=DAYS.strftime("%Y%m%d"), Ticker="SPY", Time=0)
        .rename(columns={"Date": "<DTYYYYMMDD>", "Ticker": "<TICKER>", "Time": "<TIME>"})[
            ["<TICKER>", "<DTYYYYMMDD>", "<TIME>", *map(str.title, DAILY)]
        ]
        .to_csv(index=False),
        DAILY,
    ),
    "amibroker": (
        table(DAILY, "%m/%d/%Y")
        .rename(columns={"Date": "Date/Time"})
        .assign(Ticker="SPY")[["Ticker", "Date/Time", *map(str.title, DAILY)]]
        .to_csv(index=False),
        DAILY,
    ),
    "rows of R": ("\n".join([LINES[0].removeprefix("Date,"), *LINES[1:]]), DAILY),
    "japanese": ("日付,始値,終値\n2020/01/06,1,2\n".encode("shift_jis"), "no 'close' column"),
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
    np.testing.assert_allclose(got.volume, right.volume)


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


def test_numbers_of_thousands_or_of_three_decimals_are_named(tmp_path, caplog):
    "71,200 is a price in Seoul, and 1,105 a rate in Frankfurt; nothing in such a file tells, so the reading is said."
    got = ask(tmp_path / "a.csv", SOME(lambda n: f'"71,{200 + n}"'))
    assert got.frame.close.iloc[0] == 71_200 and "'71,200' in 'close' is read as 71200" in caplog.text
    caplog.clear()
    assert (
        ask(tmp_path / "a.csv", SOME(lambda n: f'"{0.998 + n / 1000:.3f}"'.replace(".", ","))).frame.close.iloc[0]
        == 0.998
    )
    assert caplog.text == ""


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
