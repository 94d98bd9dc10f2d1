"""Another column in place of the price: known dynamics are learned, units come back, it streams, saves and refits."""

import numpy as np
import pandas as pd
import pytest
from test_forecaster_use import SMALL, bars, walk

from smlstm.using.forecaster import Forecaster
from smlstm.using.targets import MARKET, target_series

PHI, DEVIATION = 0.6, 0.2


def reverting(n=1500, seed=3):
    "A market, and beside it a level whose log is an autoregression of known strength, and a signed one."
    index = pd.bdate_range("2010-01-01", periods=n)
    rng, level = np.random.default_rng(seed), np.zeros(n)
    for t in range(1, n):
        level[t] = PHI * level[t - 1] + DEVIATION * rng.normal()
    return walk(index).assign(level=5 * np.exp(level), basis=3 * level)


@pytest.mark.parametrize("column, signed", [("level", False), ("basis", True)])
def test_known_dynamics_are_learned(column, signed):
    """The best forecast of an autoregression has (1 + phi) / 2 of the squared error of persistence, here 0.8.

    It is also that of the same numbers by hand: the outcomes are the column, `horizon` bars later."""
    prices = reverting()
    series = target_series(prices, column, signed)
    forecaster = Forecaster(exogenous=MARKET, **SMALL)
    made = forecaster.cross_validation(series.prices, n_splits=2, progress=False)
    actual, forecast, now = (series.values(made[name]) for name in ("actual_close", "forecast_close", "close"))
    own = prices[column].shift(-1)[made.date].to_numpy()
    assert np.allclose(actual, own) and np.allclose(now, prices[column][made.date])
    log = (lambda x: x) if signed else np.log
    share = np.mean((log(actual) - log(forecast)) ** 2) / np.mean((log(actual) - log(now)) ** 2)
    assert (1 + PHI) / 2 - 0.05 < share < (1 + PHI) / 2 + 0.06
    hits = np.mean((made.up_probability > 0.5) == (own > prices[column][made.date].to_numpy()))
    assert hits > 0.6


def test_the_scale_of_a_signed_target_changes_only_rounding():
    prices = reverting()
    made = []
    for scale in (10.0, 40.0):
        series = target_series(prices, "basis", scale)
        forecast = Forecaster(exogenous=MARKET, **SMALL).fit(series.prices, progress=False).predict()
        made.append(series.values(forecast.forecast_close).item())
    assert made[0] == pytest.approx(made[1], rel=0.02)


def test_a_panel_is_streamed_saved_and_refitted(tmp_path):
    "Volumes of two indices: bars one by one, from a folder, give what the whole gives; and a warm start goes on."
    both = {name: target_series(bars(900, name).query("volume > 0"), "volume").prices for name in ("SPY", "QQQ")}
    early = {name: frame.iloc[:-5] for name, frame in both.items()}
    fitted = Forecaster(exogenous=MARKET, **SMALL).fit(early, progress=False)
    fitted.save(tmp_path)
    loaded = Forecaster.load(tmp_path)
    rows = loaded.update({name: frame.iloc[-5:] for name, frame in both.items()})
    whole = fitted.predict(both).set_index("unique_id")
    for name in both:
        last = rows[rows.unique_id == name].iloc[-1]
        assert last.forecast_close == pytest.approx(whole.loc[name].forecast_close, rel=1e-5)
    assert len(fitted.fit(both, warm_start=True, progress=False).predict()) == 2


def test_nothing_of_the_future_is_in_a_target():
    "Later bars, of the market and of the target, change nothing in earlier rows: also not the scale."
    prices = reverting()
    changed = prices.copy()
    changed.iloc[800:] = changed.iloc[800:] * 1.7
    one, other = (target_series(frame, "basis", True) for frame in (prices, changed))
    assert one.scale == other.scale
    pd.testing.assert_frame_equal(one.prices.iloc[:798], other.prices.iloc[:798])


@pytest.mark.parametrize(
    "change, column, signed, message",
    [
        ({}, "spread", False, "there is no column 'spread'"),
        ({}, "basis", False, "leave such bars out, or give signed=True"),
        (dict(basis=np.nan), "basis", True, "basis is nan at"),
        (dict(basis=1.0), "basis", True, "the scale of basis must be positive"),
        ({}, "basis", 1e-6, "more than 300 times its scale"),
    ],
    ids=["missing", "negative", "holes", "constant", "scale"],
)
def test_a_target_that_cannot_work_is_refused(change, column, signed, message):
    with pytest.raises(ValueError, match=message):
        target_series(reverting().assign(**change), column, signed)
