"""Any frame in: a valid frame, or one clear error."""

from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from frame_kit import frames, plain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smlstm.data.frames import COLUMNS, as_price_frame, clean_prices, frame_hash
from smlstm.data.request import BadPrices

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


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
    for date, row in clean.iterrows():  # nothing is invented
        assert ((originals["date"] == date) & (originals["close"] == row.close)).any()


def test_the_hash_is_of_the_numbers():
    frame = plain(pd.date_range("2020-01-01", periods=9), 0)
    known = frame_hash(frame)
    assert frame_hash(frame.set_axis(frame.index.as_unit("s"))) == known == frame_hash(frame.copy(deep=True))
    assert frame_hash(frame * (1 + 1e-15)) != known
    assert frame_hash(frame.assign(volume=np.nan)) == frame_hash(frame.assign(volume=-np.float64(np.nan)))


# --- frames of users ----------------------------------------------------------------------------------------------

DAYS = pd.bdate_range("2024-01-02", periods=5, name="date")
TRUTH = pd.DataFrame({"open": [1.0, 2, 3, 4, 5], "close": [1234.5, 1235, 1236, 1237, 1238]}, index=DAYS)


def same(got, expected=TRUTH):
    pd.testing.assert_frame_equal(got, expected, check_freq=False, check_names=False, check_index_type=False)


class Polars:
    "What is used of a polars frame: it turns into a pandas frame without an index."

    def __init__(self, frame):
        self.frame = frame

    def to_pandas(self):
        return self.frame.reset_index()


def of_yfinance(symbols):
    wide = {name: TRUTH.rename(columns=str.title) for name in symbols}
    return pd.concat(wide, axis=1).swaplevel(axis=1)


KINDS = {
    "in shape": TRUTH,
    "integers": TRUTH.assign(open=[1, 2, 3, 4, 5]),
    "objects": TRUTH.astype(object),
    "text": TRUTH.astype(str),
    "text with commas": TRUTH.assign(close=[f"{x:,.1f}" for x in TRUTH.close]),
    "decimals": TRUTH.map(Decimal),
    "of yfinance": TRUTH.rename(columns=str.title),
    "two levels": of_yfinance(["SPY"]),
    "two levels, fields last": of_yfinance(["SPY"]).swaplevel(axis=1),
    "two symbols": of_yfinance(["QQQ", "SPY"]),
    "date column": TRUTH.reset_index(),
    "text dates": TRUTH.set_axis(DAYS.strftime("%b %d, %Y")),
    "ds": TRUTH.rename_axis("ds").reset_index(),
    "seconds": TRUTH.reset_index().assign(date=DAYS.as_unit("s").asi8),
    "polars": Polars(TRUTH),
    "symbols in the index": pd.concat({"SPY": TRUTH}, names=["symbol", "date"]),
    "two symbols in the index": pd.concat({"QQQ": TRUTH * 2, "SPY": TRUTH}).swaplevel().sort_index(),
    "adjusted": (TRUTH * 2).assign(**{"Adj Close": TRUTH.close}),
    "adjusted, all in lower case": (TRUTH * 2).assign(adj_close=TRUTH.close),
    "time of day beside the date": TRUTH.assign(Date=DAYS.strftime("%Y.%m.%d"), Time="00:00").reset_index(drop=True),
    "nullable": TRUTH.convert_dtypes(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_users_are_brought_in_shape(kind):
    same(as_price_frame(KINDS[kind], "my series", "SPY"))


def test_a_frame_in_shape_is_not_copied():
    assert as_price_frame(TRUTH) is TRUTH


def test_other_columns_stay():
    got = as_price_frame(TRUTH.rename(columns=str.title).assign(vix=[13, 14, 15, 16, 17], Note="x"))
    assert list(got.columns) == ["open", "close", "vix", "Note"] and got.vix.dtype.kind == "i"


def test_a_column_named_vol_beside_others_in_shape_stays():
    "Volatility, say: only where prices have to be brought in shape is it a volume."
    given = TRUTH.assign(vol=0.2)
    assert as_price_frame(given) is given


def test_hours_of_two_columns_are_hours():
    hours = pd.date_range("2024-01-02 09:00", periods=5, freq="h")
    given = TRUTH.assign(Date=hours.strftime("%Y%m%d").astype(int), Time=hours.strftime("%H%M").astype(int))
    assert list(as_price_frame(given.reset_index(drop=True)).index) == list(hours)
    given = given.assign(Time=hours.strftime("%H%M%S").astype(int))
    assert list(as_price_frame(given.reset_index(drop=True)).index) == list(hours)


def test_a_series_is_a_close():
    same(as_price_frame(TRUTH.close.rename("SPY")), TRUTH[["close"]])


def test_an_unreadable_volume_is_unknown():
    assert as_price_frame(TRUTH.assign(volume=["1.5K", "-", "7", "?", "8"])).volume.tolist()[:1] == [1500]


@pytest.mark.parametrize(
    "data, says",
    [
        (np.ones((5, 2)), "my series is a ndarray"),
        ([1, 2], "my series is a list"),
        (TRUTH.reset_index(drop=True), "my series has no dates"),
        (TRUTH.rename(columns={"close": "shut"}), "my series has no 'close' column"),
        (
            TRUTH.assign(close=["1", "2", "x", "4", "5"]),
            "my series has a price that is not a number: 'x' in row 3 of 'close'",
        ),
        (of_yfinance(["QQQ", "DIA"]), r"columns of 2 symbols \(QQQ, DIA\)"),
        (pd.concat({"QQQ": TRUTH, "DIA": TRUTH}), r"rows of 2 symbols \(QQQ, DIA\): give \{name: frame\} of each"),
        (TRUTH.set_axis([0, 1, 2, 3, 4]), "has no dates"),
        (TRUTH.reset_index().assign(date=range(5)), "numbers from 0 to 4 are no dates"),
    ],
)
def test_frames_that_cannot_be_used_are_named(data, says):
    with pytest.raises(BadPrices, match=says):
        as_price_frame(data, "my series")


cells = st.sampled_from(
    ["1", "2.5", "1,000", "1,000.5", "x", "", "-", "nan", None, 3, 4.5, Decimal("2.5"), True, "1.2M"]
)


@QUICK
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=8), st.booleans())
def test_any_cells_give_floats_or_one_clear_error(rows, by_column):
    index = pd.bdate_range("2024-01-02", periods=len(rows), name="date")
    frame = pd.DataFrame(rows, columns=["close", "volume"], index=index)
    try:
        got = as_price_frame(frame.reset_index() if by_column else frame)
    except BadPrices as error:
        assert "close" in str(error) and "not a number" in str(error)
        return
    assert (got.dtypes == np.float64).all() and got.index.equals(index)
    for cell, value in zip(frame.close, got.close):
        if isinstance(cell, (int, float, Decimal)) and not pd.isna(cell):
            assert value == float(cell)
