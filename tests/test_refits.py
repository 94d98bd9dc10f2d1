"""Going on from fitted weights, and fits at intervals: what is known when, and what is refused."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_forecaster_use import SMALL, bars, walk

from smlstm.learning.settings import TrainConfig
from smlstm.using.forecaster import Forecaster
from smlstm.using.refits import warm_training
from smlstm.using.tables import SeriesError, build_table
from smlstm.using.walkforward import panel_folds

STILL = TrainConfig(epochs=1, learning_rate=1e-12, warmup_epochs=0)  # a training that moves no weight


@pytest.fixture(scope="module")
def fitted():
    return Forecaster(**SMALL).fit(bars().iloc[:-60], progress=False)


def copied(forecaster):
    "The same fit in a forecaster of its own."
    other = replace(forecaster)
    other.model, other.series, other.streams = forecaster.model, dict(forecaster.series), dict(forecaster.streams)
    return other


def weights(forecaster):
    return torch.cat([p.detach().flatten() for p in forecaster.model.parameters()])


def test_a_warm_start_begins_from_the_fitted_weights(fitted):
    "With a training that moves nothing, the weights are the old ones; everything else is of the new bars."
    before = weights(fitted).clone()
    warm = copied(fitted).fit(bars(), warm_start=STILL, progress=False)
    cold = Forecaster(**SMALL | dict(training=STILL)).fit(bars(), progress=False)
    assert torch.allclose(weights(warm), before, atol=1e-9) and not torch.allclose(weights(cold), before, atol=1e-5)
    assert torch.equal(weights(fitted), before)
    (new,), (old,), (anew,) = (f.series.values() for f in (warm, fitted, cold))
    assert new.scaler == anew.scaler and new.target_scaler == anew.target_scaler and new.scaler != old.scaler
    assert warm.predict().date.iloc[0] == bars().index[-1]


def test_a_warm_start_of_what_was_never_fitted_is_a_fit():
    warm = Forecaster(**SMALL).fit(bars(), warm_start=True, progress=False)
    assert torch.equal(weights(warm), weights(Forecaster(**SMALL).fit(bars(), progress=False)))


def test_a_warm_start_of_a_panel_is_saved_loaded_and_streamed(tmp_path):
    "A panel goes on, with a series that was not there before; its folder and its streams are as after any fit."
    both = {"SPY": bars(), "QQQ": bars(ticker="QQQ")}
    panel = Forecaster(**SMALL).fit({"SPY": both["SPY"].iloc[:-60]}, progress=False)
    panel.fit({name: frame.iloc[:-5] for name, frame in both.items()}, warm_start=True, progress=False)
    panel.save(tmp_path)
    loaded = Forecaster.load(tmp_path)
    assert loaded.bars_since_fit(both) == 5
    rows = loaded.update({name: frame.iloc[-5:] for name, frame in both.items()})
    whole = panel.predict(both).set_index("unique_id")
    for name in both:
        last = rows[rows.unique_id == name].iloc[-1]
        assert last.forecast_variance == pytest.approx(whole.loc[name].forecast_variance, rel=1e-5)
        assert last.forecast_close == pytest.approx(whole.loc[name].forecast_close, rel=1e-6)
    loaded.fit(both, warm_start=True, progress=False)
    assert loaded.bars_since_fit(both) == 0


def test_a_running_forecaster_is_fitted_again_when_it_is_due(fitted, tmp_path):
    """After 60 new bars: not due at 61, due at 60: then the warm fit that one would make, saved and loaded."""
    prices, before = bars(), weights(fitted).clone()
    waiting, due = copied(fitted), copied(fitted)
    assert not waiting.refit_if_due(prices, 61, progress=False)
    assert torch.equal(weights(waiting), before) and waiting.bars_since_fit(prices) == 60
    assert waiting.predict().equals(copied(fitted).start(prices).predict())
    assert due.refit_if_due(prices, 60, progress=False) and due.bars_since_fit(prices) == 0
    by_hand = copied(fitted).fit(prices, warm_start=True, progress=False)
    assert torch.equal(weights(due), weights(by_hand)) and due.predict().equals(by_hand.predict())
    due.save(tmp_path)
    assert not Forecaster.load(tmp_path).refit_if_due(prices, 1, progress=False)
    cold = copied(fitted)
    assert cold.refit_if_due(prices, 1, warm_start=False, progress=False)
    assert torch.equal(weights(cold), weights(Forecaster(**SMALL).fit(prices, progress=False)))


def test_a_running_panel_is_due_with_its_first_series():
    """Ten new bars of one series are enough; the one that stood still is fitted again with it."""
    spy, qqq = bars(), bars(ticker="QQQ")
    panel = Forecaster(**SMALL).fit({"SPY": spy.iloc[:-10], "QQQ": qqq.iloc[:-10]}, progress=False)
    late = {"SPY": spy, "QQQ": qqq.iloc[:-10]}
    assert not copied(panel).refit_if_due(late, 11, progress=False)
    assert panel.refit_if_due(late, 10, progress=False)
    assert panel.predict().date.tolist() == [spy.index[-1], qqq.index[-11]]


def test_an_ensemble_is_fitted_as_a_whole_when_it_is_due():
    several = SMALL | {"architecture": SMALL["architecture"] | {"scales": [1, 5]}}
    ensemble = Forecaster(**several).fit(bars().iloc[:-5], progress=False)
    assert ensemble.refit_if_due(bars(), 5, progress=False) and ensemble.bars_since_fit(bars()) == 0


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "66", True])
def test_when_to_fit_again_is_a_number_of_bars(fitted, wrong):
    with pytest.raises(ValueError, match=f"refit_every={wrong!r}: must be a whole number of bars"):
        copied(fitted).refit_if_due(bars(), wrong)


def test_the_short_training():
    short = warm_training(TrainConfig(epochs=30, learning_rate=0.002, seed=5, pos_weight=1.5))
    assert (short.epochs, short.warmup_epochs, short.patience) == (3, 0, 1)
    assert (short.seed, short.pos_weight, short.learning_rate) == (5, 1.5, pytest.approx(0.0002))
    assert warm_training(TrainConfig(epochs=1)).epochs == 1


@pytest.mark.parametrize(
    "change, prices, message",
    [
        (dict(architecture=dict(hidden_size=8, n_heads=1, n_layers=1)), bars(), "hidden_size=8, fitted with 4"),
        (dict(horizon=2), bars(), r"horizons \[1, 2\] differ"),
        (dict(architecture=dict(scales=[1, 5])), bars(), "an ensemble is fitted as a whole"),
        ({}, bars().drop(columns="volume"), "n_features="),
        ({}, bars().iloc[:-200], "give the rows of the last fit and newer ones"),
    ],
    ids=["architecture", "horizon", "ensemble", "features", "older rows"],
)
def test_weights_that_cannot_be_gone_on_from_are_refused(fitted, change, prices, message):
    other = copied(fitted).set_params(**change)
    with pytest.raises(ValueError, match=message):
        other.fit(prices, warm_start=True, progress=False)
    assert torch.equal(weights(other), weights(fitted))


def test_rows_of_validation_are_new_to_the_weights(fitted):
    "One bar less than the last fit had moves the split back by a row: refused; the same bars again are not."
    same = bars().iloc[:-60]
    copied(fitted).fit(same, warm_start=True, progress=False)
    with pytest.raises(SeriesError, match="validation would begin"):
        copied(fitted).fit(same.iloc[:-2], warm_start=True, progress=False)


# ---------------------------------------------------------------- fits at intervals


def test_parts_of_a_fold_are_fitted_on_all_that_was_known():
    "Every test row once; each part's training ends a horizon before it; new rows join with each part."
    tables = {"A": build_table(walk(pd.bdate_range("2015-01-01", periods=900)), 3)}
    whole, parts = panel_folds(tables, 2, 100), panel_folds(tables, 2, 100, refit_every=30)
    assert [rows["A"].number for rows in parts] == [0] * 4 + [1] * 4
    tested = np.concatenate([np.arange(1000)[rows["A"].test] for rows in parts])
    assert np.array_equal(tested, np.concatenate([np.arange(1000)[rows["A"].test] for rows in whole]))
    assert all(rows["A"].train == slice(0, rows["A"].test.start - 3) for rows in parts)


@pytest.mark.parametrize("warm_start", [True, False])
def test_refits_in_a_walk_are_the_fits_that_one_would_make(tmp_path, warm_start):
    "Each part is what a forecaster fitted by hand on its training rows forecasts, bitwise."
    prices, horizon = bars(700), 2
    own = Forecaster(horizon=horizon, **SMALL)
    options = dict(n_splits=2, test_size=50, refit_every=20, warm_start=warm_start, progress=False)
    made = own.cross_validation(prices, checkpoint_dir=tmp_path, **options)
    assert made.groupby("fold").size().to_list() == [50, 50]
    table, by_hand = build_table(prices, horizon), None
    stop = table.known
    for start in (stop - 50, stop - 30, stop - 10):
        end = min(start + 20, stop)
        known = prices.iloc[: table.warmup + start]  # the last bar before the part is that whose target ends there
        if by_hand is None or not warm_start:
            by_hand = Forecaster(horizon=horizon, **SMALL).fit(known, progress=False)
        else:
            by_hand.fit(known, warm_start=True, progress=False)
        expected = by_hand.forecast(table).iloc[start:end]
        rows = made[made.date.isin(expected.date)]
        for column in ("forecast_close", "up_probability", "forecast_variance"):
            assert np.array_equal(rows[column].to_numpy(), expected[column].to_numpy())
    assert {path.name for path in (tmp_path / "fold1").iterdir() if path.is_dir()} == {"refit1", "refit2"}


def test_later_bars_do_not_change_earlier_parts():
    "Bars from the middle of the test period on are changed: parts that end before them are bitwise the same."
    prices = bars(700)
    options = dict(n_splits=2, test_size=60, refit_every=20, progress=False)
    made = Forecaster(**SMALL).cross_validation(prices, **options)
    changed = prices.copy()
    changed.loc[made.date.iloc[101] :, ["open", "high", "low", "close"]] *= 1.5
    again = Forecaster(**SMALL).cross_validation(changed, **options)
    columns = ["forecast_close", "up_probability", "forecast_variance", "forecast_close-lo-90"]
    pd.testing.assert_frame_equal(made[columns].iloc[:101], again[columns].iloc[:101])
    assert not np.allclose(made.forecast_variance.iloc[102:], again.forecast_variance.iloc[102:])


def test_an_interrupted_walk_goes_on(tmp_path):
    options = dict(n_splits=2, test_size=40, refit_every=20, checkpoint_dir=tmp_path, progress=False)
    first = Forecaster(**SMALL).cross_validation(bars(700), **options)
    pd.testing.assert_frame_equal(first, Forecaster(**SMALL).cross_validation(bars(700), resume=True, **options))


def test_the_interval_must_be_a_bar_or_more():
    with pytest.raises(ValueError, match="refit_every=0: must be at least 1 bar"):
        Forecaster(**SMALL).cross_validation(bars(), n_splits=2, refit_every=0, progress=False)


def test_a_refit_in_a_panel_of_tables():
    "The walk takes series that end early."
    both = {"SPY": bars(), "QQQ": bars(ticker="QQQ").iloc[:-40]}
    made = Forecaster(**SMALL).cross_validation(both, n_splits=2, test_size=60, refit_every=25, progress=False)
    counts = made.groupby("unique_id").size()
    assert counts["SPY"] == 120 and counts["QQQ"] == 120 - 40
