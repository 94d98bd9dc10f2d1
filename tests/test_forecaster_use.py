"""The forecaster as a user has it: settings, frames, dates of forecasts, levels, volatility, and what `fit` leaves."""

import random
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import torch
from exchange_calendars import get_calendar
from sklearn.base import clone

from smlstm.data.features import WARMUP
from smlstm.data.frames import Prices
from smlstm.data.prices import load_prices
from smlstm.data.windows import Fold
from smlstm.learning.settings import TrainConfig
from smlstm.using.forecaster import Forecaster, fit_panel
from smlstm.using.panels import WindowConfig
from smlstm.using.tables import SeriesError, build_table, price_tables
from smlstm.using.walkforward import join_folds, panel_folds, walk_forward

SMALL = dict(
    architecture=dict(hidden_size=4, n_heads=1, n_layers=1, n_regimes=2, d_state=1),
    windows=WindowConfig(seq_length=32, stride=64),
    training=TrainConfig(epochs=1),
    device="cpu",
)


def bars(n=700, ticker="SPY"):
    return load_prices(ticker, source="sample").frame.tail(n)


def walk(index, seed=0):
    "A price frame of a random walk on these dates."
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, len(index))))
    open_ = np.r_[100, close[:-1]]
    high, low = np.maximum(open_, close) * 1.002, np.minimum(open_, close) * 0.998
    return pd.DataFrame({"open": open_, "high": high, "low": low, "close": close, "volume": 1e6}, index)


@pytest.fixture(scope="module")
def single():
    return Forecaster(**SMALL).fit(bars(), progress=False)


@pytest.fixture(scope="module")
def panel():
    return Forecaster(**SMALL).fit({"SPY": bars(), "QQQ": bars(ticker="QQQ")}, progress=False)


# ---------------------------------------------------------------- settings


WRONG = {
    "no horizon": (dict(horizon=0), "horizon=0: must be at least 1"),
    "text": (dict(horizon="5"), "horizon='5': must be a whole number"),
    "half a bar": (dict(horizon=1.5), "horizon=1.5: must be a whole number"),
    "a bool": (dict(horizon=True), "horizon=True: must be a whole number"),
    "misspelled": (dict(architecture={"hidden": 8}), "architecture has no 'hidden': did you mean 'hidden_size'?"),
    "no sizes": (dict(architecture=["hidden_size"]), "architecture=['hidden_size']: must be a Mapping"),
    "features": (dict(architecture={"n_features": 3}), "architecture has no 'n_features'"),
    "scales": (dict(architecture={"scales": "1,5"}), "scales='1,5': must be bars of each member"),
    "window": (dict(windows={"seqlength": 64}), "windows has no 'seqlength': did you mean 'seq_length'?"),
    "no windows": (dict(windows=64), "windows=64: must be a WindowConfig"),
    "no training": (dict(training="long"), "training='long': must be a TrainConfig"),
    "gap": (dict(max_gap=0), "max_gap=0: must be positive days"),
    "exogenous": (dict(exogenous=5), "exogenous=5: must be a tuple"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_setting_is_refused_by_name(case):
    settings, message = WRONG[case]
    with pytest.raises(ValueError) as error:
        Forecaster(**settings)
    assert message in str(error.value)
    with pytest.raises(ValueError) as error:
        Forecaster().set_params(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize("field, value", [("seq_length", 1.5), ("stride", "8"), ("batch_size", 0), ("augment", "no")])
def test_a_wrong_window_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}: must be"):
        WindowConfig(**{field: value})


def test_settings_in_other_forms_are_right():
    made = Forecaster(horizon=np.int64(2), windows={"seq_length": 32}, training={"epochs": 3}, exogenous="vix")
    assert (made.windows, made.training, made.exogenous) == (WindowConfig(32), TrainConfig(epochs=3), ("vix",))
    assert Forecaster(exogenous=["a", "b"]).exogenous == ("a", "b")


def test_a_refused_parameter_changes_nothing():
    made = Forecaster(horizon=2)
    with pytest.raises(ValueError, match="Forecaster has no 'horizn': did you mean 'horizon'"):
        made.set_params(horizn=3)
    with pytest.raises(ValueError, match="horizon=0"):
        made.set_params(max_gap=3.0, horizon=0)
    assert (made.horizon, made.max_gap) == (2, Forecaster().max_gap)


def test_clones_are_unfitted_with_the_same_settings(single):
    other = clone(single)
    assert other.get_params() == single.get_params() and other.architecture is not single.architecture
    assert other.model is None and not other.series and other.history is None
    assert clone(Forecaster()).get_params() == Forecaster().get_params()
    assert single.set_params(horizon=1) is single


@pytest.mark.parametrize("level", [0.9, "90", 100, 0, -5, None, [80, 0.95], True, np.nan])
def test_levels_are_percent(single, level):
    frame = bars()
    for call in (
        lambda: single.predict(frame, level=level),
        lambda: single.predict(level=level),
        lambda: single.update(frame.iloc[:0], level=level),
        lambda: Forecaster(**SMALL).cross_validation(frame, 2, level=level, progress=False),
    ):
        with pytest.raises(ValueError, match="give percent") as error:
            call()
    if level == 0.9:
        assert "did you mean 90?" in str(error.value)


def test_a_level_or_several(single):
    assert "forecast_close-lo-97.5" in single.predict(level=97.5)
    assert {"forecast_close-lo-80", "forecast_close-hi-95"} <= set(single.predict(level=np.array([80, 95])))
    assert not list(single.predict(level=()).filter(like="-lo-"))


# ---------------------------------------------------------------- one type, one set of names


def test_every_answer_is_a_frame_of_the_same_columns(single, panel):
    frame = bars()
    longer = frame.rename(columns={"close": "y"}).rename_axis("ds").reset_index().assign(unique_id="SPY")
    answers = [
        single.predict(),
        single.predict(frame),
        panel.predict(),
        panel.predict({"SPY": frame}),
        panel.predict(longer),
        panel.update({"SPY": frame.iloc[:0]}),
    ]
    assert len({tuple(answer.columns) for answer in answers}) == 1
    assert len({tuple(answer.dtypes.astype(str)) for answer in answers}) == 1
    assert [list(answer.unique_id) for answer in answers[2:5]] == [["SPY", "QQQ"], ["SPY"], ["SPY"]]
    tested = Forecaster(**SMALL).cross_validation(frame, 2, progress=False)
    assert set(tested.unique_id) == {"series"} and set(answers[0]) <= set(tested)


# ---------------------------------------------------------------- what a fit leaves


def test_a_fit_leaves_the_global_generators_alone(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    made = Forecaster(**SMALL).fit(bars(), progress=False)
    made.save(tmp_path)
    Forecaster.load(tmp_path)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_a_loaded_forecaster_has_its_history_and_a_device(tmp_path, single):
    single.save(tmp_path)
    loaded = Forecaster.load(tmp_path)
    assert loaded.history == single.history and len(loaded.history.epochs) == 1
    assert loaded.get_params() == single.get_params()
    moved = Forecaster.load(tmp_path, device="cpu")
    assert moved.device == "cpu"
    pd.testing.assert_frame_equal(moved.predict(), single.predict())
    with pytest.raises(ValueError, match="gpu"):
        Forecaster.load(tmp_path, device="gpu")


# ---------------------------------------------------------------- frames


FORMS = {
    "text": lambda f: f.assign(close=f.close.map("{:,.6f}".format)),
    "objects": lambda f: f.astype(object),
    "decimals": lambda f: f.assign(close=f.close.map(lambda value: Decimal(repr(value)))),
    "yfinance": lambda f: f.rename(columns=str.title),
    "two levels": lambda f: f.rename(columns=str.title).pipe(
        lambda g: g.set_axis(pd.MultiIndex.from_product([g.columns, ["SPY"]]), axis=1)
    ),
    "dates in a column": lambda f: f.rename_axis("date").reset_index(),
    "whole volumes": lambda f: f.assign(volume=f.volume.astype("int64")),
    "prices": lambda f: load_prices("SPY", source="sample")._replace(frame=f),
}


@pytest.mark.parametrize("form", FORMS)
def test_frames_of_other_kinds_are_right(single, form):
    expected, given = single.predict(bars()), FORMS[form](bars())
    for prices in (given, {"series": given}):
        if isinstance(prices, Prices):
            prices = prices._replace(provenance=prices.provenance._replace(ticker="series"))
        found = single.predict(prices)
        np.testing.assert_allclose(
            found.select_dtypes("number").to_numpy(), expected.select_dtypes("number").to_numpy(), rtol=1e-5
        )


def test_a_series_of_closes():
    closes = bars().close
    made = Forecaster(**SMALL).fit(closes, progress=False)
    pd.testing.assert_frame_equal(made.predict(closes), made.predict(closes.to_frame()))


def test_a_frame_of_polars_is_converted(single):
    class Polars:
        "What the library needs of a polars frame."

        def to_pandas(self):
            return bars().rename_axis("date").reset_index()

    assert single.predict(Polars()).forecast_close[0] == pytest.approx(single.predict(bars()).forecast_close[0])


NOT_PRICES = {
    "an array": (lambda f: f.to_numpy(), "ndarray"),
    "a list": (lambda f: f.close.tolist(), "list"),
    "a path": (lambda f: "prices.csv", "str"),
    "no close": (lambda f: f.drop(columns="close"), "no 'close' column"),
    "words": (lambda f: f.assign(close="high"), "'high'"),
    "no dates": (lambda f: f.reset_index(drop=True), "no dates"),
    "crossed": (lambda f: f.assign(high=f.low * 0.9), "is below low"),
    "several symbols": (
        lambda f: pd.concat([f.assign(symbol="SPY"), f.assign(symbol="DIA")]),
        "column 'symbol' .SPY, DIA.: give",
    ),
    "in no order": (lambda f: f.sample(frac=1, random_state=0), "increasing, unique dates: sort it"),
}


@pytest.mark.parametrize("case", NOT_PRICES)
def test_what_is_no_price_frame_is_refused(case, panel):
    spoil, message = NOT_PRICES[case]
    with pytest.raises(ValueError, match=message):
        Forecaster(**SMALL).fit(spoil(bars()), progress=False)
    for call in (panel.predict, panel.start, panel.update):
        with pytest.raises(SeriesError, match=f"series 'QQQ': .*{message}"):
            call({"SPY": bars(), "QQQ": spoil(bars())})


def long(**columns):
    frame = bars().rename(columns={"close": "y"}).rename_axis("ds").reset_index().assign(unique_id="SPY")
    return frame.assign(**columns)


@pytest.mark.parametrize(
    "frame, message",
    [
        (lambda: long(ds=range(700)), "ds holds numbers"),
        (lambda: long(unique_id=[None] * 3 + ["SPY"] * 697), "3 rows have no unique_id"),
        (lambda: long(close=1.0), "no close"),
        (lambda: long().drop(columns="y"), "needs unique_id, ds, y"),
    ],
)
def test_a_long_frame_loses_no_row_silently(frame, message):
    with pytest.raises(ValueError, match=message):
        Forecaster(**SMALL).fit(frame(), progress=False)


def test_a_series_without_training_rows_is_named():
    tables = price_tables({"OLD": bars(900), "NEW": bars(400)}, 1, None, 15.0)
    with pytest.raises(SeriesError, match="series 'NEW': none of its 150 rows is a training row"):
        fit_panel(tables, {"OLD": slice(0, 400), "NEW": slice(0, 0)}, SMALL["architecture"], SMALL["windows"])


# ---------------------------------------------------------------- holidays, dates, midnights


def test_ordinary_holidays_are_no_gaps():
    for exchange in ("XSHG", "XTKS", "XTAI", "XIDX"):
        sessions = get_calendar(exchange, start="2016-01-01").sessions[:1300]
        assert np.diff(sessions).max() > pd.Timedelta(days=7)
        price_tables(walk(sessions), 1, None, Forecaster().max_gap)
    with pytest.raises(SeriesError, match="a gap of .* begin after it, or raise max_gap=15"):
        price_tables(walk(sessions.delete(range(600, 615))), 1, None, Forecaster().max_gap)


EXCHANGES = {
    "0700.HK": ("XHKG", "2024-07-03", "2024-07-04"),
    "7203.T": ("XTKS", "2024-05-02", "2024-05-07"),
    "SAP.DE": ("XETR", "2024-03-28", "2024-04-02"),
    "2222.SR": ("XSAU", "2024-07-04", "2024-07-07"),
    "SPY": ("XNYS", "2024-07-03", "2024-07-05"),
    "BTC-USD": ("24/7", "2024-07-05", "2024-07-06"),
}


@pytest.mark.parametrize("symbol", EXCHANGES)
def test_the_date_of_a_forecast_is_the_exchange_s_next_session(symbol):
    exchange, last, expected = EXCHANGES[symbol]
    days = get_calendar(exchange, start="2021-01-01", end="2024-12-31").sessions
    frame = walk(days[days <= last][-700:])
    prices = load_prices("SPY", source="sample")
    origin = prices.provenance._replace(ticker=symbol, symbol=symbol)
    made = Forecaster(**SMALL).fit(Prices(frame, origin), progress=False)
    assert made.predict(frame).target_date[0] == pd.Timestamp(expected)
    plain = Forecaster(**SMALL).fit(frame.iloc[:-1], progress=False)  # by the dates alone: weekends at least
    assert plain.update(frame.iloc[-1:]).date[0] == pd.Timestamp(last)


@pytest.mark.parametrize("symbol", ["TEVA.TA", "OPAP.AT"])
def test_a_calendar_that_cannot_be_computed_stops_no_fit(symbol):
    frame, prices = walk(pd.bdate_range(end="2024-06-05", periods=700)), load_prices("SPY", source="sample")
    origin = prices.provenance._replace(ticker=symbol, symbol=symbol)
    made = Forecaster(**SMALL).fit(Prices(frame, origin), progress=False)
    assert made.predict(frame).target_date[0] == pd.Timestamp("2024-06-06")


PATTERNS = {
    "weekly": (pd.date_range("2005-01-07", "2024-06-07", freq="W-FRI"), "2024-06-14"),
    "month starts": (pd.date_range("1960-01-01", "2024-06-01", freq="MS"), "2024-07-01"),
    "month ends": (pd.date_range("1960-01-31", "2024-05-31", freq="ME"), "2024-06-30"),
    "every day": (pd.date_range("2022-01-01", "2024-05-31"), "2024-06-01"),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_the_date_of_a_forecast_follows_the_index(name):
    index, expected = PATTERNS[name]
    frame = walk(index[-760:])
    made = Forecaster(**SMALL).fit(frame.iloc[:-1], progress=False)
    row = made.update(frame.iloc[-1:]).iloc[0]
    assert row.target_date == made.predict(frame).target_date[0] == pd.Timestamp(expected)


def test_a_long_horizon_in_december():
    frame = walk(get_calendar("XNYS", start="2018-01-01").sessions_in_range("2018-01-02", "2024-12-30")[-1700:])
    made = Forecaster(horizon=600, **SMALL).fit(frame, progress=False)
    assert made.predict(frame).target_date[0] > pd.Timestamp("2027-05-01")


def test_midnight_is_what_the_series_makes_of_it():
    index = pd.date_range("2024-01-01", periods=731, freq="h", tz="UTC")
    frame = walk(index)
    assert index[720] == index[720].normalize()
    made = Forecaster(**SMALL).fit(frame.iloc[:720], progress=False)
    row = made.update(frame.iloc[[720]]).iloc[0]  # 00:00 UTC
    assert row.date == index[720] and row.target_date == index[721]
    daily = Forecaster(**SMALL).fit(bars().iloc[:-1].tz_localize("America/New_York"), progress=False)
    assert daily.update(bars().iloc[-1:].tz_localize("America/New_York")).date[0] == bars().index[-1]


def test_no_new_bars_change_nothing(single, panel):
    before = single.predict()
    empty = [bars().iloc[:0], pd.DataFrame(), {}, {"series": bars().iloc[:0]}, long().iloc[:0]]
    empty.append(load_prices("SPY", source="sample")._replace(frame=bars().iloc[:0]))
    for given in empty:
        answer = single.update(given)
        assert len(answer) == 0 and list(answer) == list(before) and (answer.dtypes == before.dtypes).all()
    pd.testing.assert_frame_equal(single.predict(), before)
    some = panel.update({"SPY": bars().iloc[:0], "QQQ": bars(ticker="QQQ").iloc[:0]})
    assert len(some) == 0


# ---------------------------------------------------------------- volatility


def test_the_volatility_shown_is_that_of_returns():
    "On a walk whose bars have a range far too small, the squared returns tell: about two thirds within one deviation."
    frame = walk(get_calendar("XNYS", start="2016-01-01").sessions[:1600])
    frame = frame.assign(open=frame.close, high=frame.close * 1.0001, low=frame.close * 0.9999)
    frame = frame.assign(open=frame.close.shift().fillna(100) * np.exp(0.3 * np.log(frame.close).diff().fillna(0)))
    made, _ = fit_panel({"A": build_table(frame)}, {"A": slice(0, 900)}, SMALL["architecture"], SMALL["windows"])
    tested = made.forecast(build_table(frame), "A").iloc[901:-1]
    moves = np.log(tested.actual_close / tested.close)
    within = (moves.abs() < tested.forecast_volatility).mean()
    assert 0.6 < within < 0.76 and moves.std() / tested.forecast_volatility.mean() == pytest.approx(1, abs=0.15)
    scale = made.series["A"].variance_scale
    train = np.log(frame.close).diff()[: WARMUP + 900]
    assert scale > 1.2 or scale < 0.8
    assert (tested.forecast_volatility**2 / tested.forecast_variance).to_numpy() == pytest.approx(scale)
    assert train.std() == pytest.approx(0.01, rel=0.1)


# ---------------------------------------------------------------- walking forward


def test_a_walk_is_that_of_separate_fits():
    table = build_table(bars(900))
    settings = {"model": SMALL["architecture"]} | {k: SMALL[k] for k in ("windows", "training", "device")}
    steps = list(walk_forward({"A": table}, 2, fit=fit_panel, progress=False, **settings))
    assert [step.number for step in steps] == [0, 1]
    for step in steps:
        made, _ = fit_panel({"A": table}, {"A": step.rows["A"].train}, progress=False, **settings)
        pd.testing.assert_frame_equal(
            step.forecasts["A"].drop(columns="fold"), made.forecast(table, "A").iloc[step.rows["A"].test]
        )
    joined = join_folds(steps)["A"]
    tested = Forecaster(**SMALL).cross_validation(bars(900), 2, level=(), progress=False)
    pd.testing.assert_frame_equal(tested.drop(columns="unique_id"), joined)


def test_a_walk_keeps_its_training_by_fold(tmp_path):
    tables = {"A": build_table(bars(900))}
    settings = {"model": SMALL["architecture"]} | {k: SMALL[k] for k in ("windows", "training", "device")}
    walked = lambda **own: list(
        walk_forward(tables, 2, fit=fit_panel, checkpoint_dir=tmp_path, progress=False, **settings, **own)
    )
    first = walked()
    assert {path.name for path in tmp_path.iterdir()} >= {"fold0", "fold1"}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("fold*/best.safetensors")}
    again = walked(resume=True, folds=panel_folds(tables, 2)[1:])
    assert [step.number for step in again] == [1]
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    pd.testing.assert_frame_equal(again[0].forecasts["A"], first[1].forecasts["A"])


def test_folds_without_a_gap_are_refused():
    table = build_table(bars(900), 5)
    touching = [{"A": Fold(0, slice(0, 300), slice(304, 400))}]
    with pytest.raises(ValueError, match="series 'A': fold 0 leaves a gap of 4 rows, but targets reach 5 ahead"):
        next(walk_forward({"A": table}, fit=fit_panel, folds=touching, progress=False))


def test_a_copy_of_settings_has_nothing_fitted(single):
    assert replace(single, horizon=3).model is None and single.model is not None
