"""Files of prices: the right frame, or one clear error."""

import numpy as np
import pandas as pd
import pytest
from yahoo_kit import same

from smlstm.data.prices import load_prices
from smlstm.data.request import BadPrices


def test_files_round_trip(tmp_path):
    frame = load_prices(source="sample", start="2010-01-01", end="2012-01-01").frame
    frame.to_csv(tmp_path / "a.csv")
    frame.to_parquet(tmp_path / "a.parquet")
    frame.iloc[::-1].rename(columns=str.title).rename_axis("Date").reset_index().to_csv(tmp_path / "b.csv", index=False)
    for name in ("a.csv", "a.parquet", "b.csv"):
        got = load_prices("ABC", str(tmp_path / name))
        same(got.frame, frame)
        assert got.provenance.source == "file" and got.provenance.symbol == "ABC"


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "cannot be read"),
        ("Date,Open\n2020-01-01,1\n", "no 'close' column"),
        ("Date,Close\nyesterday,1\n", "dates cannot be read"),
        ("Date,Close\n2020-01-01,one\n", "not a number"),
        ("Date,Close\n", "usable"),
        ("Date,Close\n2020-01-01,-3\n", "usable"),
        ("Close\n1\n", "date column"),
        ("Date,Close,close\n2020-01-01,1,2\n", "more than one column 'close'"),
        ("Date,Close\n2020-01-01,1\n,1\n", "row 2 has none"),
    ],
)
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
    assert list(got.frame.volume.isna()) == [True, True, False] and any(
        "2 volumes" in note for note in got.provenance.notes
    )


def test_intraday_files_need_a_zone(tmp_path):
    path = tmp_path / "h.csv"
    path.write_text("Date,Close\n2024-01-02 09:30:00,1\n2024-01-02 10:30:00,2\n")
    with pytest.raises(BadPrices, match="UTC offset"):
        load_prices("ABC", str(path), interval="1h")
    path.write_text("Date,Close\n2024-03-08 09:30:00-05:00,1\n2024-03-11 09:30:00-04:00,2\n")
    assert list(load_prices("ABC", str(path), interval="1h").frame.index.hour) == [14, 13]


# --- several symbols, other vendors -------------------------------------------------------------------------------

DAYS = pd.bdate_range("2020-01-02", periods=60, name="date")


def bars(seed=0, start=100.0):
    rng = np.random.default_rng(seed)
    close = start * np.exp(np.cumsum(rng.normal(0, 0.01, len(DAYS)))).round(4)
    frame = {
        "open": close,
        "high": close * 1.01,
        "low": close * 0.99,
        "close": close,
        "volume": np.full(len(DAYS), 5e6),
    }
    return pd.DataFrame(frame, index=DAYS).round(4)


def several(column="Name"):
    parts = {"AAA": bars(1), "BBB": bars(2, 30.0), "CCC": bars(3, 7.0)}
    return pd.concat([frame.assign(**{column: name}) for name, frame in parts.items()]), parts


@pytest.mark.parametrize("column", ["Name", "symbol", "Ticker", "unique_id", "<TICKER>", "Company"])
def test_the_ticker_chooses_among_symbols(tmp_path, column):
    table, parts = several(column)
    table.sort_index(kind="stable").to_csv(tmp_path / "a.csv")
    for name, frame in parts.items():
        same(load_prices(name.lower(), tmp_path / "a.csv").frame, frame)
    with pytest.raises(BadPrices, match=rf"3 symbols in the column '{column}' \(AAA, BBB, CCC\), and SPY is not one"):
        load_prices("SPY", tmp_path / "a.csv")


def test_one_symbol_under_another_name_is_taken(tmp_path):
    table, parts = several()
    table[table.Name == "AAA"].to_csv(tmp_path / "a.csv")
    same(load_prices("SPY", tmp_path / "a.csv").frame, parts["AAA"])


def test_symbols_without_a_column_are_no_history(tmp_path):
    table, _ = several()
    table.drop(columns="Name").to_csv(tmp_path / "a.csv")
    with pytest.raises(BadPrices, match="only 60 of 180 rows are usable .repeated dates: 2020-01-02"):
        load_prices("SPY", tmp_path / "a.csv")


def test_rows_written_twice_are_harmless(tmp_path):
    pd.concat([bars(), bars()]).to_csv(tmp_path / "a.csv")
    got = load_prices("SPY", tmp_path / "a.csv")
    same(got.frame, bars())
    assert any("60 repeated dates" in note for note in got.provenance.notes)


def vendors():
    "The same prices as a dozen vendors write them."
    frame, out = bars(), {}
    named = frame.rename(columns=str.title).rename_axis("Date")
    out["yahoo"] = named.assign(**{"Adj Close": named.Close}).to_csv()
    stooq = frame.set_axis(DAYS.strftime("%Y%m%d").rename("<DATE>")).rename(columns=lambda c: f"<{c.upper()}>")
    out["stooq"] = (
        stooq.assign(**{"<TIME>": "000000", "<TICKER>": "SPY.US"}).rename(columns={"<VOLUME>": "<VOL>"}).to_csv()
    )
    nasdaq = pd.DataFrame({"Date": DAYS.strftime("%m/%d/%Y"), "Close/Last": [f"${x:,.4f}" for x in frame.close]})
    nasdaq["Volume"] = [f"{x:,.0f}" for x in frame.volume]
    for name in ("open", "high", "low"):
        nasdaq[name.title()] = [f"${x:,.4f}" for x in frame[name]]
    out["nasdaq"] = nasdaq[::-1].to_csv(index=False)
    investing = pd.DataFrame({"Date": DAYS.strftime("%b %d, %Y"), "Price": [f"{x:,.4f}" for x in frame.close]})
    for name in ("open", "high", "low"):
        investing[name.title()] = [f"{x:,.4f}" for x in frame[name]]
    out["investing"] = investing.assign(**{"Vol.": "5.00M", "Change %": "0.10%"})[::-1].to_csv(index=False)
    out["german"] = named.set_axis(DAYS.strftime("%d.%m.%Y").rename("Date")).to_csv(sep=";", decimal=",")
    whole = DAYS.strftime("%Y-%m-%d").rename("Date")
    marked = {name.title(): [f"{x:,.4f}" for x in frame[name]] for name in list(frame)[:4]}
    marked["Volume"] = [f"{x:,.0f}" for x in frame.volume]
    out["commas between thousands, semicolons between fields"] = pd.DataFrame(marked, whole).to_csv(sep=";")
    other = {name: [x.translate(str.maketrans(",.", ".,")) for x in column] for name, column in marked.items()}
    out["points between thousands"] = pd.DataFrame(other, whole).to_csv(sep=";")
    out["alpha vantage"] = (
        frame.rename_axis("timestamp").rename(columns=lambda c: f"{list(frame).index(c) + 1}. {c}").to_csv()
    )
    out["excel"] = named.set_axis(DAYS.strftime("%-d-%b-%y").rename("Date")).to_csv(sep="\t")
    out["metatrader"] = (
        named.set_axis(DAYS.strftime("%Y.%m.%d").rename("<DATE>"))
        .rename(columns=lambda c: f"<{c.upper()}>")
        .to_csv(sep="\t")
    )
    download = pd.concat({name.title(): frame[[name]].set_axis(["SPY"], axis=1) for name in frame}, axis=1)
    download.columns.names = ["Price", "Ticker"]
    out["yf.download"] = download.rename_axis("Date").to_csv()
    out["utf-8 with a mark"] = "\ufeff" + named.to_csv()
    out["unix"] = named.set_axis(pd.Index(DAYS.as_unit("s").asi8, name="time")).to_csv()
    out["crypto"] = (
        named.assign(Symbol="SPY", Unix=1).set_axis(DAYS.strftime("%Y-%m-%d 00:00:00").rename("date")).to_csv()
    )
    return out


def test_round_thousands_beside_others(tmp_path):
    "The opens alone would be decimals, as in 151,234 yen; the closes say that they are not."
    rows = ["Date;Open;Close", "2024-01-02;4,745;4,742.83", "2024-01-03;4,725;4,704.81", "2024-01-04;4,697;4,688.68"]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    assert list(load_prices("X", tmp_path / "a.csv").frame.open) == [4745, 4725, 4697]


@pytest.mark.parametrize("vendor", vendors())
def test_files_of_the_field(tmp_path, vendor):
    (tmp_path / "a.csv").write_text(vendors()[vendor], encoding="utf-8")
    got = load_prices("SPY", tmp_path / "a.csv")
    same(got.frame, bars())


@pytest.mark.parametrize(
    "column, values",
    [
        (["1,234.5", "1,250.0", "999.0"], [1234.5, 1250, 999]),
        (["1.234,5", "1.250,0", "999,0"], [1234.5, 1250, 999]),
        (["12,5", "12,75", "13,0"], [12.5, 12.75, 13]),
        (["38,000", "38,250", "39,100"], [38000, 38250, 39100]),
        (["$12.5", "$12.75", "$13"], [12.5, 12.75, 13]),
        (["1 234.5", "1 250.0", "999.0"], [1234.5, 1250, 999]),
        (["12.5", "", "13"], [12.5, 13]),
        (["12.5", "-", "13"], [12.5, 13]),
    ],
)
def test_numbers_as_text(tmp_path, column, values):
    days = pd.bdate_range("2020-01-02", periods=9)
    column = column * 3 if len(values) == 3 else [*column, *["12.5"] * 6]
    pd.DataFrame({"Date": days, "Close": column}).to_csv(tmp_path / "a.csv", index=False)
    assert load_prices("ABC", tmp_path / "a.csv").frame.close.tolist()[: len(values)] == values


def test_a_volume_that_cannot_be_read_does_not_stop_the_prices(tmp_path):
    volume = ["1.2M", "1,118,280", "950K", "-", "3B", "?", "7", "", "0.5m"]
    days = pd.bdate_range("2020-01-02", periods=9)
    pd.DataFrame({"Date": days, "Close": np.arange(1.0, 10), "Volume": volume}).to_csv(tmp_path / "a.csv", index=False)
    got = load_prices("ABC", tmp_path / "a.csv")
    known = got.frame.volume.dropna().tolist()
    assert known == [1.2e6, 1118280, 950e3, 3e9, 7, 0.5e6] and len(got.frame) == 9
    assert any("unreadable" in note for note in got.provenance.notes)


@pytest.mark.parametrize(
    "kind", ["index of New York", "two levels of rows", "rows from the middle", "dates of Python", "two levels"]
)
def test_parquet_of_the_field(tmp_path, kind):
    frame = bars()
    table = {
        "index of New York": frame.tz_localize("America/New_York"),
        "two levels of rows": pd.concat({"SPY": frame, "QQQ": frame * 2}).swaplevel().sort_index(),
        "rows from the middle": pd.concat([frame.iloc[:3], frame]).reset_index()[3:],
        "dates of Python": frame.set_axis(DAYS.date),
        "two levels": pd.concat({name: frame[[name]].set_axis(["SPY"], axis=1) for name in frame}, axis=1),
    }[kind]
    if kind == "two levels of rows":
        table.index.names = ["date", "ticker"]
    table.to_parquet(tmp_path / "a.parquet")
    same(load_prices("SPY", tmp_path / "a.parquet").frame, frame)


@pytest.mark.parametrize(
    "above", ["https://www.vendor.com\n", "# daily close, adjusted\n\n", "Title\n\nDisclaimer: no close, of course\n"]
)
def test_lines_above_the_header_are_left_out(tmp_path, above):
    (tmp_path / "a.csv").write_text(above + bars().to_csv())
    same(load_prices("SPY", tmp_path / "a.csv").frame, bars())


@pytest.mark.parametrize(
    "text",
    [
        "Date,AAPL,MSFT\n2020-01-02,1,2\n",
        "2020-01-02,1,2,3\n2020-01-03,1,2,3\n",
        '{"close": 1}',
        "<!doctype html><title>close</title>",
        "Date,Close\n2020-01-02,1\nTotal,1\n",
        "Date,Close\n2020-01-02,1\nDate,Close\n2020-01-03,1\n",
        "Date,Close\n9999-01-01,1\n",
        "Date,Close\n2020-01-02,5%\n",
        "Date,Open,Close\n2020-01-02,0.24 Dividend,\n",
    ],
)
def test_what_is_no_price_file_is_one_clear_error(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(BadPrices) as error:
        load_prices("SPY", tmp_path / "a.csv")
    assert "a.csv" in str(error.value)
