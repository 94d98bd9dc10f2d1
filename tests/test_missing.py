"""Missing bars and values: never filled from the future, the same in tables and streams, left out of what is scored."""

import numpy as np
import pandas as pd
import pytest
from test_covariates import PROBES
from test_forecaster import SMALL, bars, long_frame, numbers

import smlstm.using.missing as missing
from smlstm.data.features import prepare_data
from smlstm.judging.audit import audit_causality
from smlstm.judging.evaluation import evaluate
from smlstm.using.ensemble import constant_heads, outcome_readout
from smlstm.using.forecaster import Forecaster
from smlstm.using.members import FOCUS
from smlstm.using.stacking import weight_by_focus
from smlstm.using.streams import table_of
from smlstm.using.tables import SeriesError, price_tables

PRICE = ["forecast_close", "up_probability", "forecast_variance", "ewma_variance"]


def with_holes(prices, share=0.1, seed=0):
    "Prices of which bars are missing: as rows without values, never the first or the last ones."
    lost = np.random.default_rng(seed).random(len(prices)) < share
    lost[:2] = lost[-2:] = False
    out = prices.copy()
    out[lost] = np.nan
    return out


@pytest.fixture(scope="module")
def holed():
    return with_holes(bars("SPY"))


@pytest.fixture(scope="module")
def fitted(holed):
    return Forecaster(**SMALL).fit(holed[:1500], progress=False)


def test_features_are_those_of_the_last_bar(holed):
    ((_, table),) = price_tables(holed, 1, None, 15.0, mask=True).items()
    known, there = prepare_data(missing.spread_holes(missing.blank_rows(holed))), holed.close.notna()
    names = [name for name in known if not name.startswith(("week_", "year_", "log_elapsed"))]
    for date in table.features.index:
        last = known.index[known.index.searchsorted(date, "right") - 1]
        assert table.features.bar_missing[date] == float(not there[date])
        np.testing.assert_array_equal(table.features.loc[date, names], known.loc[last, names])


def test_targets_of_missing_bars_are_not_known(holed):
    ((_, table),) = price_tables(holed, 1, None, 15.0, mask=True).items()
    there = holed.close.notna().loc[table.features.index].to_numpy()
    expected = there[:-1] & there[1:]
    assert (table.targets.notna().all(axis=1).to_numpy()[:-1] == expected).all()
    returns = np.log(holed.close).diff().shift(-1).loc[table.features.index]
    np.testing.assert_allclose(table.targets.log_return, returns)


@pytest.mark.parametrize("horizon", [1, 5, [1, 5]])
def test_streams_go_on_as_a_table_does(holed, horizon):
    made = Forecaster(horizon=horizon, **SMALL).fit(holed[:1300], progress=False)
    followed = [made.update(holed[a:b]) for a, b in [(1300, 1301), (1301, 1500)]]
    rows = pd.concat(followed, ignore_index=True)
    whole = made.predict(holed[:1500])
    np.testing.assert_allclose(rows[PRICE].tail(len(whole)), whole[PRICE], rtol=1e-6)
    every = made.forecast(table_of(made.series["series"], holed[:1500]))
    streamed = rows.merge(every, on=["date", *(["horizon"] if "horizon" in every else [])])
    assert len(streamed) == len(rows)
    for name in PRICE:
        np.testing.assert_allclose(streamed[f"{name}_x"], streamed[f"{name}_y"], rtol=1e-6)


def test_intervals_of_a_stream_are_those_of_the_whole(holed):
    made = Forecaster(**SMALL).fit(holed[:1300], progress=False)
    rows = made.update(holed[1300:1500])
    table = table_of(made.series["series"], holed[:1500])
    tested = made.forecast_rows(table, None, slice(0, len(table.features)), 90).set_index("date")
    last = rows[rows.date.isin(tested.index)].set_index("date").tail(100)
    names = ["forecast_close-lo-90", "forecast_variance-hi-90"]
    np.testing.assert_allclose(last[names], tested.loc[last.index, names], rtol=1e-6)


def test_absent_sessions_are_missing_bars(holed, fitted):
    "Rows without values and rows that are not there are the same where the exchange had a session."
    absent = holed.dropna()
    assert fitted.series["series"].covariates.sessions == "XNYS"
    made = Forecaster(**SMALL).fit(absent[absent.index <= holed.index[1499]], progress=False)
    pd.testing.assert_frame_equal(made.predict(), fitted.predict())
    later = absent[absent.index > holed.index[1499]]
    new = holed[1500:]
    pd.testing.assert_frame_equal(made.update(later).tail(1), fitted.update(new).tail(1))
    fitted.start(holed[:1500])


def test_a_halt_is_carried_through(fitted, holed):
    halted = holed[:1500].copy()
    halted.iloc[-30:] = np.nan
    last = fitted.predict(halted)
    assert last.date[0] == holed.index[1499] and np.isfinite(numbers(last)).all()
    assert last.close[0] == halted.close.dropna().iloc[-1]


def test_a_whole_series_is_as_it_was():
    prices = bars("QQQ")
    one = Forecaster(**SMALL).cross_validation(prices, n_splits=2, progress=False)
    two = Forecaster(missing="raise", **SMALL).cross_validation(prices, n_splits=2, progress=False)
    pd.testing.assert_frame_equal(one, two)


def test_cross_validation_scores_what_is_known(holed):
    tested = Forecaster(**SMALL).cross_validation(holed, n_splits=2, progress=False)
    there = holed.close.notna()
    assert there[tested.date].all() and there[tested.target_date].all()
    assert np.isfinite(numbers(tested.drop(columns=["unique_id"]))).all()
    assert np.isfinite(evaluate(tested)["overall"]["volatility"]["qlike"])


def test_a_panel_with_holes_saves_and_loads(tmp_path):
    frames = {"SPY": with_holes(bars("SPY")), "QQQ": bars("QQQ")}  # one has none
    panel = Forecaster(**SMALL).fit({name: f[:1500] for name, f in frames.items()}, progress=False)
    panel.save(tmp_path)
    loaded = Forecaster.load(tmp_path)
    assert loaded.series == panel.series and loaded.missing == "mask"
    new = {name: f[1500:1550] for name, f in frames.items()}
    one, two = panel.update(new), loaded.update(new)
    pd.testing.assert_frame_equal(one, two)
    whole = loaded.predict({name: f[:1550] for name, f in frames.items()})
    np.testing.assert_allclose(one.groupby("unique_id", sort=False).tail(1)[PRICE], whole[PRICE], rtol=1e-6)
    long = long_frame(**{name: f[:1550] for name, f in frames.items()})
    pd.testing.assert_frame_equal(loaded.predict(long), whole)


def test_exogenous_values_are_the_last_known_ones(holed):
    prices = bars("SPY").assign(vix=np.arange(1600.0) % 50)
    prices.iloc[:400, -1] = np.nan
    prices.iloc[700:720, -1] = np.nan
    prices.iloc[1520, -1] = np.nan
    ((_, table),) = price_tables(prices, 1, ("vix",), 15.0, mask=True).items()
    assert (table.features.vix.loc[prices.index[700:720]] == prices.vix.iloc[699]).all()
    assert table.features.vix_missing.sum() == 150 + 20 + 1
    made = Forecaster(exogenous="vix", **SMALL).fit(prices[:1500], progress=False)
    followed, whole = made.update(prices[1500:1530]), made.predict(prices[:1530])
    np.testing.assert_allclose(followed[PRICE].tail(1), whole[PRICE], rtol=1e-6)
    tested = Forecaster(exogenous="vix", **SMALL).cross_validation(prices, n_splits=3, progress=False)
    assert np.isfinite(numbers(tested.drop(columns="unique_id"))).all()


def test_a_series_that_starts_later_joins_when_it_can(caplog):
    frames = {"SPY": bars("SPY"), "QQQ": bars("QQQ").tail(900)}
    frames["QQQ"] = frames["QQQ"].reindex(frames["SPY"].index)  # a wide table has empty rows before
    tested = Forecaster(**SMALL).cross_validation(frames, n_splits=4, progress=False)
    folds = tested.groupby("unique_id").fold.unique()
    assert list(folds["SPY"]) == [0, 1, 2, 3] and 3 in folds["QQQ"] and 0 not in folds["QQQ"]
    assert "left out of this fit: series 'QQQ'" in caplog.text


@pytest.mark.parametrize("column", ["close", "vix"])
def test_holes_can_be_errors(holed, column):
    prices = bars("SPY").assign(vix=1.0)
    prices.iloc[1400, prices.columns.get_loc(column)] = np.nan
    with pytest.raises(SeriesError, match=f"{column} is nan at"):
        Forecaster(missing="raise", exogenous="vix", **SMALL).fit(prices, progress=False)
    whole = Forecaster(missing="raise", exogenous="vix", **SMALL).fit(bars("SPY").assign(vix=1.0), progress=False)
    for use in (whole.predict, lambda p: whole.start(p[:1300]).update(p[1300:])):
        with pytest.raises(SeriesError, match=f"{column} is nan at"):
            use(prices)
    with pytest.raises(ValueError, match="missing='drop': must be one of 'mask', 'raise'"):
        Forecaster(missing="drop")


def test_nothing_is_filled_from_the_future(monkeypatch, fitted, holed):
    frame = holed.tail(700).assign(volume=lambda f: f.volume)
    features = lambda p: table_of(fitted.series["series"], p).features
    options = dict(cuts=2, rows=9, probes=(*PROBES, "gap"))
    report = audit_causality(features, frame, **options)
    assert report.causal and not report.skipped, str(report)
    monkeypatch.setattr(missing, "carried", lambda values, index: values.reindex(index).bfill())
    carry = missing.carried_features
    monkeypatch.setattr("smlstm.using.tables.carried_features", lambda p: carry(p).mask(p.close.isna()).bfill())
    assert not audit_causality(features, frame, **options).causal


def test_an_ensemble_estimates_nothing_from_missing_bars():
    "What the zeros in the place of unknown targets hold has no part in any of its parts, by any focus."
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((400, 5)), rng.standard_normal((400, 3))
    y[:, 1] = y[:, 1] > 0
    lost = rng.random(400) < 0.2
    given = missing.with_weights(np.where(lost[:, None], np.nan, y))
    np.testing.assert_allclose(constant_heads(given), constant_heads(y[~lost]), rtol=1e-5)
    kept = ~lost[:-1]  # by numpy itself: the readout of those rows that have an outcome
    outcomes = (y * [1, 2, 1] - [0, 1, 0])[:-1][kept]
    by_hand = np.linalg.lstsq(np.column_stack([x[1:], np.ones(399)])[kept], outcomes, rcond=None)[0].T
    np.testing.assert_allclose(outcome_readout(x, given), by_hand, atol=1e-5)
    for focus in FOCUS:
        focused = weight_by_focus(given, focus, slice(0, 300))
        assert focused.shape == (400, 4) and (focused[lost, 3] == 0).all() and set(focused[~lost, 3]) == {0, 2}


def test_an_ensemble_goes_through_holes(holed):
    settings = SMALL | {"architecture": SMALL["architecture"] | {"scales": [1, 5]}}
    made = Forecaster(**settings).fit(holed[:1500], progress=False)
    followed, whole = made.update(holed[1500:1550]), made.predict(holed[:1550])
    np.testing.assert_allclose(followed[PRICE].tail(1), whole[PRICE], rtol=1e-6)
    frame = made.forecast(table_of(made.series["series"], holed))
    assert np.isfinite(frame[PRICE].to_numpy()).all()
