"""Nothing in the pipeline looks ahead: change the prices after a date, and everything before it stays as it was."""

import numpy as np
import pandas as pd
import pytest

from smlstm.data.calendars import merge_datasets
from smlstm.data.prices import load_prices
from smlstm.data.windows import time_folds
from smlstm.judging.audit import audit_causality
from smlstm.judging.scores import evaluate_fold
from smlstm.learning.settings import TrainConfig
from smlstm.using.forecaster import fit_forecaster
from smlstm.using.panels import WindowConfig
from smlstm.using.tables import build_table

QUICK = dict(
    model=dict(hidden_size=8, n_heads=1, n_layers=1),
    windows=WindowConfig(seq_length=32, stride=32),
    training=TrainConfig(epochs=2, learning_rate=0.01),
    progress=False,
)


@pytest.fixture(scope="module")
def prices():
    return load_prices("SPY", "sample", start="2008-01-01", end="2013-01-01").frame


def shaken(prices, after):
    "Prices of which every bar after the date is another one."
    changed = prices.copy()
    late = changed.index > after
    factor = np.exp(np.random.default_rng(0).normal(0, 0.05, late.sum()).cumsum())
    changed.loc[late, ["open", "high", "low", "close"]] *= factor[:, None]
    changed.loc[late, "volume"] *= 3
    return changed


@pytest.mark.parametrize("horizon", [1, 5])
def test_first_fold_does_not_know_what_comes_after_it(prices, horizon):
    table = build_table(prices, horizon)
    fold = time_folds(table.known, 3, gap=horizon)[0]
    last_needed = table.features.index[
        fold.test.stop - 1 + horizon
    ]  # the last bar that an outcome in the fold depends on
    other = build_table(shaken(prices, last_needed), horizon)
    assert time_folds(other.known, 3, gap=horizon)[0] == fold

    pd.testing.assert_frame_equal(other.features.loc[:last_needed], table.features.loc[:last_needed], check_exact=True)
    frames = []
    for t in (table, other):
        forecaster, history = fit_forecaster(t, fold.train, **QUICK)
        frames.append((forecaster.forecast(t).iloc[: fold.test.stop], history.to_frame().drop(columns="seconds")))
    (before, log), (after, other_log) = frames
    pd.testing.assert_frame_equal(other_log, log, check_exact=True)
    # steps of one chunk share a scale, so the last few may differ in the last bits of float32: nothing else may
    pd.testing.assert_frame_equal(after, before, check_exact=False, rtol=1e-6)
    pd.testing.assert_frame_equal(
        after.iloc[: fold.test.stop - 64], before.iloc[: fold.test.stop - 64], check_exact=True
    )
    scores = [evaluate_fold(f.iloc[fold.test].assign(fold=0)) for f in (before, after)]
    assert scores[0].volatility["qlike"] == pytest.approx(scores[1].volatility["qlike"], rel=1e-6)
    assert scores[0].direction["accuracy"] == scores[1].direction["accuracy"]


def test_the_test_can_fail(prices):
    "Bars inside the fold do matter: the same comparison finds a change there."
    table = build_table(prices)
    fold = time_folds(table.known, 3, gap=1)[0]
    inside = table.features.index[fold.test.start + 50]
    other = build_table(shaken(prices, inside))
    forecaster, _ = fit_forecaster(table, fold.train, **QUICK)
    old, new = (forecaster.forecast(t).forecast_variance.to_numpy() for t in (table, other))
    moved = np.abs(new / old - 1)
    assert moved[: fold.test.start + 50].max() < 1e-6
    assert moved[fold.test.start + 51 : fold.test.stop].max() > 1e-3


@pytest.mark.parametrize("how, causal", [("last", True), ("linear_lookahead", False)])
def test_the_audit_tells_the_two_merges_apart(how, causal):
    sessions = pd.bdate_range("2024-06-03", "2024-06-14")
    starts = pd.DatetimeIndex(
        [day + pd.Timedelta(hours=h, minutes=30) for day in sessions for h in range(13, 20)]
    ).tz_localize("UTC")
    close = 100 * np.exp(np.random.default_rng(1).normal(0, 0.01, len(starts)).cumsum())
    hourly = pd.DataFrame(
        {"open": close, "high": close * 1.01, "low": close * 0.99, "close": close, "volume": 1000.0},
        index=starts.rename("date"),
    )

    def merged(frame):
        by_day = frame.groupby(frame.index.tz_localize(None).normalize())
        daily = by_day.agg({"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum"})
        return merge_datasets(daily, frame, how=how)[["close_daily"]]

    report = audit_causality(merged, hourly, probes=("raise", "lower"))
    assert report.causal == causal, str(report)
