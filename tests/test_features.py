"""Features: causal, bounded, free of units, and defined for every history that can be loaded."""

import numpy as np
import pandas as pd
import pytest
import talib
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smlstm.data.features import (
    FEATURES,
    SETTLED,
    WARMUP,
    add_technical_indicators,
    latest_features,
    make_targets,
    prepare_data,
)
from smlstm.data.prices import load_prices
from smlstm.data.variance import VARIANCE_FLOOR, variance_proxy, variance_scale

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def history(n=320, seed=0, scale=0.01, kind="full", start=100.0, flat=0.0, index=None):
    "A random history; `flat` is the share of bars that do not move at all."
    rng = np.random.default_rng(seed)
    still = rng.random(n) < flat
    step = np.where(still, 0.0, rng.normal(0, scale, n) * rng.choice([1, 1, 1, 8], n))
    close = start * np.exp(np.cumsum(step))
    before = np.concatenate([[start], close[:-1]])
    open_ = np.where(still, close, before * np.exp(rng.normal(0, scale / 2, n)))
    high = np.maximum(open_, close) * np.where(still, 1.0, np.exp(np.abs(rng.normal(0, scale, n))))
    low = np.minimum(open_, close) * np.where(still, 1.0, np.exp(-np.abs(rng.normal(0, scale, n))))
    volume = rng.integers(0, 5, n) * 1e6
    index = pd.bdate_range("2010-01-01", periods=n, name="date") if index is None else index
    frame = pd.DataFrame({"open": open_, "high": high, "low": low, "close": close, "volume": volume}, index=index)
    if kind == "no volume":
        frame["volume"] = np.nan
    return frame[["close"]] if kind == "close" else frame


KINDS = ["full", "no volume", "close"]


@QUICK
@given(
    st.integers(0, 10**6),
    st.sampled_from([1e-5, 0.002, 0.01, 0.2]),
    st.sampled_from(KINDS),
    st.sampled_from([1e-4, 1.0, 3e5]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(WARMUP + 1, 320),
)
def test_any_history_gives_finite_causal_features_within_their_ranges(seed, scale, kind, start, flat, cut):
    frame = history(seed=seed, scale=scale, kind=kind, start=start, flat=flat)
    features = prepare_data(frame)
    assert (
        np.isfinite(features.to_numpy()).all()
        and features.index.equals(frame.index[WARMUP:])
        and (features.dtypes == np.float64).all()
    )
    for name, column in features.items():
        low, high = FEATURES[name].low, FEATURES[name].high
        assert (low is None or column.min() >= low - 1e-9) and (high is None or column.max() <= high + 1e-9), name
    pd.testing.assert_frame_equal(prepare_data(frame.iloc[:cut]), features.iloc[: cut - WARMUP], check_exact=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_column_is_blind_to_the_future(kind):
    frame = history(400, seed=5, kind=kind)
    whole = prepare_data(frame)
    for k in range(WARMUP + 1, 400, 13):
        changed = frame.copy()
        changed.iloc[k:] *= np.random.default_rng(k).uniform(0.5, 2.0)
        now = prepare_data(changed).iloc[: k - WARMUP]
        moved = (now != whole.iloc[: k - WARMUP]).any()
        assert not moved.any(), list(moved[moved].index)


@pytest.mark.parametrize("ticker", ["SPY", "QQQ"])
def test_real_prices_cut_anywhere(ticker):
    frame = load_prices(ticker, source="sample").frame
    whole = prepare_data(frame)
    for k in np.random.default_rng(0).integers(WARMUP + 1, len(frame), 12):
        pd.testing.assert_frame_equal(prepare_data(frame.iloc[:k]), whole.iloc[: k - WARMUP], check_exact=True)


@pytest.mark.parametrize("factor", [2.0**-20, 0.5, 1024.0])
def test_features_have_no_unit(factor):
    frame = history(seed=1)
    scaled = frame.assign(**{c: frame[c] * factor for c in ("open", "high", "low", "close")})
    pd.testing.assert_frame_equal(prepare_data(scaled), prepare_data(frame), check_exact=True)
    pd.testing.assert_frame_equal(
        prepare_data(frame.assign(volume=frame.volume * 1000)), prepare_data(frame), rtol=1e-9
    )


def test_the_set_of_columns_is_settled_by_the_first_rows():
    frame = history(400)
    sets = {kind: list(prepare_data(history(400, kind=kind))) for kind in KINDS}
    for kind in KINDS:
        assert sets[kind] == [name for name in FEATURES if name in sets[kind]]  # in the table's order
    late = frame.assign(volume=frame.volume.where(np.arange(400) > 300, np.nan))
    assert list(prepare_data(late)) == sets["no volume"] == list(prepare_data(frame.assign(volume=0.0)))
    assert not {"overnight_return", "log_range", "stochastic"} & set(sets["close"]) and "return_1" in sets["close"]
    assert sets["full"] == [name for name in FEATURES if not name.startswith("day_")]  # of intraday bars alone


def test_closes_outside_the_days_range_stay_within_the_table():
    frame = history(seed=4).assign(
        high=lambda f: f[["open", "close"]].max(axis=1) * 0.99, low=lambda f: f[["open", "close"]].min(axis=1) * 0.985
    )
    stochastic = prepare_data(frame).stochastic
    assert stochastic.between(-1, 1).all() and (stochastic == 1).any()


def test_unknown_volume_is_not_zero():
    frame = history(seed=2).assign(volume=1e6)
    holes = frame.assign(volume=frame.volume.where(np.arange(320) % 5 > 0, 0.0))
    assert (prepare_data(holes)[["volume_ratio", "volume_drift"]].abs() < 1e-12).all().all()


def test_intraday_bars_know_the_time_of_day():
    days = pd.bdate_range("2024-01-02", periods=60)
    starts = pd.DatetimeIndex(
        [
            pd.Timestamp(f"{d.date()} 09:30", tz="America/New_York") + pd.Timedelta(hours=h)
            for d in days
            for h in range(7)
        ]
    ).tz_convert("UTC")
    features = prepare_data(history(420, index=starts.rename("date")))
    first = features[features.index.tz_convert("America/New_York").hour == 9]
    assert first.day_sin.nunique() == 1 and features.day_sin.nunique() == 7  # across a change of clocks
    tokyo = prepare_data(history(420, index=starts.rename("date")), zone="Asia/Tokyo")
    assert not np.allclose(tokyo.day_sin, features.day_sin)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda f: f.drop(columns="close"), "no 'close' column"),
        (lambda f: f[::-1], "increasing"),
        (lambda f: pd.concat([f, f]).sort_index(), "unique"),
        (lambda f: f.reset_index(drop=True), "DatetimeIndex"),
        (lambda f: f.assign(close=f.close.where(np.arange(320) != 99)), "close is nan at"),
        (lambda f: f.assign(low=f.low.where(np.arange(320) != 99, 0.0)), "low is 0.0 at"),
        (lambda f: f.assign(high=f.high.where(np.arange(320) != 99, np.inf)), "high is inf at"),
        (lambda f: f.iloc[:WARMUP], "too few"),
        (lambda f: f.iloc[:0], "too few"),
    ],
)
def test_unusable_frames_end_in_one_clear_error(spoil, says):
    with pytest.raises(ValueError, match=says):
        prepare_data(spoil(history()))


def test_indicators_drop_nothing_and_change_nothing():
    frame = history()
    before = frame.copy()
    table = add_technical_indicators(frame)
    pd.testing.assert_frame_equal(frame, before)
    pd.testing.assert_frame_equal(table[frame.columns], frame)
    assert len(table) == len(frame)


@QUICK
@given(st.integers(0, 10**6), st.integers(1, 30), st.sampled_from(KINDS))
def test_targets_are_the_future_and_nothing_else(seed, horizon, kind):
    frame = history(120, seed, kind=kind)
    targets, v = make_targets(frame, horizon), variance_proxy(frame)
    assert targets.iloc[-horizon:].isna().all().all() and targets.index.equals(frame.index)
    for t in (1, 40, 120 - horizon - 1):
        ahead = np.log(frame.close.iloc[t + horizon] / frame.close.iloc[t])
        assert np.isclose(targets.log_return.iloc[t], ahead) and targets.up.iloc[t] == float(
            targets.log_return.iloc[t] > 0
        )
        assert np.isclose(targets.log_variance.iloc[t], np.log(v.iloc[t + 1 : t + horizon + 1].mean()))


@pytest.mark.parametrize("horizon", [0, -1, 1.5])
def test_a_horizon_is_a_number_of_bars(horizon):
    with pytest.raises(ValueError, match="horizon"):
        make_targets(history(), horizon)


def test_the_variance_is_floored_and_scaled():
    flat = history(flat=1.0)
    assert (variance_proxy(flat).iloc[1:] == VARIANCE_FLOOR).all() and np.isnan(variance_proxy(flat).iloc[0])
    with pytest.raises(ValueError, match="never moves"):
        variance_scale(flat)
    frame = history(3000)
    squared = np.log(frame.close).diff() ** 2
    assert np.isclose((variance_proxy(frame) * variance_scale(frame)).mean(), squared.mean())
    assert abs(variance_scale(frame[["close"]]) - 1) < 0.01


def ticks(n=1600, seed=0, tick=0.01, start=7.0):
    "Prices in whole ticks, where the ranges of neighbouring bars are often equal."
    rng = np.random.default_rng(seed)
    close = start + tick * np.cumsum(rng.integers(-3, 4, n)) + 300 * tick
    high, low = close + tick * rng.integers(0, 3, n), close - tick * rng.integers(0, 3, n)
    open_ = np.clip(close + tick * rng.integers(-2, 3, n), low, high)
    frame = pd.DataFrame({"open": open_, "high": high, "low": low, "close": close, "volume": 1e6})
    return frame.round(10).set_index(pd.bdate_range("2015-01-01", periods=n, name="date"))


@pytest.mark.parametrize("seed, tick, start", [(0, 0.01, 7.0), (1, 0.25, 400.0), (2, 1e-7, 3e-5), (3, 0.005, 1.3)])
def test_the_indicators_of_a_stream_are_those_of_the_batch_on_prices_with_ticks(seed, tick, start):
    frame = ticks(seed=seed, tick=tick, start=start)
    whole = prepare_data(frame)
    for stop in range(1300, len(frame) + 1, 7):
        last = frame.iloc[stop - SETTLED : stop]
        bars = {name: last[name].to_numpy(float) for name in frame}
        new = pd.Series(latest_features(bars, *last.index[-2:]))[whole.columns]
        gap = (new - whole.loc[last.index[-1]]).abs()
        assert gap.max() < 1e-7, gap.nlargest(3)


@pytest.mark.parametrize("seed", range(4))
def test_the_adx_is_that_of_the_prices_as_they_are(seed):
    frame = ticks(seed=seed)
    adx = talib.ADX(*(frame[name].to_numpy() for name in ("high", "low", "close")), 14)[WARMUP:] / 100
    np.testing.assert_allclose(prepare_data(frame).adx_14, adx, atol=1e-12)


def test_prices_of_users_are_brought_in_shape():
    frame = history()
    truth, targets = prepare_data(frame), make_targets(frame)
    text = frame.rename(columns=str.title).astype(str).rename_axis("Date").reset_index()
    pd.testing.assert_frame_equal(
        prepare_data(text), truth, check_freq=False, check_names=False, check_index_type=False
    )
    pd.testing.assert_frame_equal(
        make_targets(text), targets, check_freq=False, check_names=False, check_index_type=False
    )


def test_a_high_below_the_low_is_refused():
    frame = history()
    frame.loc[frame.index[100], ["high", "low"]] = frame.loc[frame.index[100], ["low", "high"]].to_numpy() * [
        0.99,
        1.01,
    ]
    with pytest.raises(ValueError, match=f"is below low .* at {frame.index[100].date()}"):
        prepare_data(frame)


def test_too_short_a_history_is_told_what_it_lacks():
    with pytest.raises(ValueError, match="250 rows are too few: .* at least 251 are needed"):
        prepare_data(history(250))
    assert len(prepare_data(history(251))) == 1
