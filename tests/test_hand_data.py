"""Values computed by hand for what goes into a model: variances, targets, features, folds, scales, windows."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from smlstm.data.features import latest_features, make_targets, prepare_data
from smlstm.data.files import find_committed, is_sealed, write_together
from smlstm.data.variance import variance_proxy, variance_scale
from smlstm.data.windows import Fold, create_sequences, create_tpu_dataloader, fit_scaler, learned_stop, time_folds
from smlstm.using.panels import WindowConfig, split_panel, split_rows
from smlstm.using.walkforward import panel_folds, walk_forward


def frame(close, volume=None, start="2020-01-01", **columns):
    "A price frame on business days."
    index = pd.bdate_range(start, periods=len(close), name="date")
    return pd.DataFrame({**columns, "close": close} | ({} if volume is None else {"volume": volume}), index=index)


def test_variance_of_a_bar():
    "Squared overnight gap, and Garman and Klass (1980) from the open on."
    bars = frame(
        [100.0, 102.0, 102.0], open=[100.0, 101.0, 102.0], high=[100.0, 103.0, 102.0], low=[100.0, 99.0, 102.0]
    )
    night = math.log(101 / 100) ** 2
    day = math.log(103 / 99) ** 2 / 2 - (2 * math.log(2) - 1) * math.log(102 / 101) ** 2
    assert variance_proxy(bars).tolist()[1:] == pytest.approx([night + day, 1e-8])
    assert variance_proxy(frame([100.0, 110.0])).iloc[1] == pytest.approx(math.log(1.1) ** 2)


def test_scale_from_proxy_to_squared_returns():
    "Hansen and Lunde (2005): sum of squared returns over sum of proxies."
    bars = frame(
        [100.0, 104.0, 101.0], open=[100.0, 101.0, 103.0], high=[101.0, 105.0, 104.0], low=[99.0, 100.0, 100.0]
    )
    squared = math.log(1.04) ** 2 + math.log(101 / 104) ** 2
    assert variance_scale(bars) == pytest.approx(squared / variance_proxy(bars).iloc[1:].sum())


def test_targets_two_bars_ahead():
    close = [100.0, 110.0, 99.0, 99.0, 120.0]
    targets, moved = make_targets(frame(close), 2), np.log(np.divide(close[1:], close[:-1])) ** 2
    moved[2] = 1e-8  # the close stood still: the floor
    expected = {
        "log_return": [math.log(0.99), math.log(0.9), math.log(120 / 99)],
        "up": [0, 0, 1],
        "log_variance": [math.log((moved[t] + moved[t + 1]) / 2) for t in range(3)],
    }
    for name, values in expected.items():
        assert targets[name].tolist()[:3] == pytest.approx(values)
        assert targets[name].isna().tolist() == [False] * 3 + [True] * 2
    assert make_targets(frame([1.0, 1.0]), 1).up.iloc[0] == 0  # standing still is no rise


G = 0.01  # growth of a bar, in logs


def steady(n=400):
    "Prices that grow by the same factor every bar, so that every feature has a closed form."
    close = 50 * np.exp(G * np.arange(n))
    return frame(close, np.full(n, 1000.0), open=close, high=close * np.exp(0.002), low=close * np.exp(-0.001))


def test_features_of_steady_growth():
    "Sums of geometric series. The variance is the gap from the last close to the open, and the range within the bar."
    row = prepare_data(steady()).iloc[-1]
    v = G**2 + 0.003**2 / 2
    mean = lambda n: (1 - math.exp(-n * G)) / (n * (1 - math.exp(-G)))  # of n closes, over the last one
    average = lambda n: 2 / (n + 1) / (1 - (n - 1) / (n + 1) * math.exp(-G))  # an EMA of span n, likewise
    past = np.exp(-G * np.arange(20))
    expected = {
        "return_1": G,
        "overnight_return": G,
        "return_5": 5 * G,
        "return_22": 22 * G,
        "return_lag_1": G,
        "return_lag_2": G,
        "ema_12": average(12) - 1,
        "ema_50": average(50) - 1,
        "sma_200": mean(200) - 1,
        "macd": (average(12) - average(26)) / math.sqrt(v),
        "macd_histogram": (average(12) - average(26)) * (1 - average(9)) / math.sqrt(v),
        "drawdown": 0,
        "rsi_14": 1,
        "bollinger": (1 - past.mean()) / (2 * past.std()),
        "stochastic": 2 * (1 - math.exp(-0.001 - 13 * G)) / (math.exp(0.002) - math.exp(-0.001 - 13 * G)) - 1,
        "adx_14": 1,
        **{f"log_variance_{n}": math.log(v) for n in (1, 5, 22, 66)},
        "log_squared_return": 2 * math.log(G),
        "downside_22": 0,
        "shock": G / math.sqrt(v),
        "variance_ratio": math.log(G**2 / v),
        "volatility_of_volatility": 0,
        "log_range": math.log(0.003),
        "volume_ratio": 0,
        "volume_drift": 0,
        "obv_22": 1,
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-9), name
    true_range = math.exp(0.002) - math.exp(-G)  # from the last close to the high, over the close
    atr = true_range / 14 / (1 - 13 / 14 * math.exp(-G))
    assert row.log_atr_ratio == pytest.approx(math.log(atr / math.sqrt(v)), rel=1e-4)


def test_features_of_one_fall():
    "The bar after steady growth falls by a twentieth on twice the volume, on a Wednesday after a holiday."
    bars = steady(400)
    bars.iloc[-1, :4] *= np.exp([-0.05 - G] * 4)
    bars.iloc[-1, 4] = 2000.0
    bars.index = pd.DatetimeIndex([*bars.index[:-1], pd.Timestamp("2021-07-14")]).rename("date")
    bars.index = bars.index[:-2].union(pd.DatetimeIndex(["2021-07-12", "2021-07-14"]))
    row = prepare_data(bars).iloc[-1]
    assert row.return_1 == pytest.approx(-0.05)
    assert row.return_5 == pytest.approx(4 * G - 0.05)
    assert row.return_lag_1 == pytest.approx(G)
    assert row.drawdown == pytest.approx(-0.05)
    assert row.downside_22 == pytest.approx(0.05**2 / (0.05**2 + 21 * G**2))
    assert row.shock == pytest.approx(-0.05 / math.sqrt(G**2 + 0.003**2 / 2))
    assert row.volume_ratio == pytest.approx(math.log(2000 / (23000 / 22)))
    assert row.volume_drift == pytest.approx(math.log((6000 / 5) / (67000 / 66)))
    assert row.obv_22 == pytest.approx((21_000 - 2000) / 23_000)
    assert row.log_elapsed == pytest.approx(math.log(2))
    assert (row.week_sin, row.week_cos) == pytest.approx((math.sin(4 * math.pi / 7), math.cos(4 * math.pi / 7)))
    angle = 2 * math.pi * 194 / 365.25  # the 14th of July is day 195
    assert (row.year_sin, row.year_cos) == pytest.approx((math.sin(angle), math.cos(angle)))


def test_the_last_bar_alone_has_the_features_of_the_table():
    "What a stream computes from its last bars, against pandas' rolling columns."
    rng = np.random.default_rng(8)
    close = 40 * np.exp(rng.normal(0.0003, 0.01, 1200).cumsum())
    spread = np.exp(np.abs(rng.normal(0, 0.004, (2, 1200))))
    gap = close * np.exp(rng.normal(0, 0.003, 1200))
    high, low = np.maximum(close, gap) * spread[0], np.minimum(close, gap) / spread[1]
    bars = frame(close, rng.integers(1000, 9000, 1200).astype(float), open=gap, high=high, low=low)
    expected, recent = prepare_data(bars).iloc[-1], bars.iloc[-1000:]
    got = latest_features({c: recent[c].to_numpy() for c in recent}, *bars.index[-2:])
    assert set(got) == set(expected.index)
    for name, value in got.items():
        assert value == pytest.approx(expected[name], rel=1e-8, abs=1e-10), name


def test_folds_of_one_series():
    "Twenty rows in three folds: a test part is a quarter, and targets that reach two rows ahead cost two rows."
    folds = [(range(20)[fold.train], range(20)[fold.test]) for fold in time_folds(20, 3, gap=2)]
    assert folds == [(range(0, 3), range(5, 10)), (range(0, 8), range(10, 15)), (range(0, 13), range(15, 20))]


def test_rows_to_learn_from_have_their_outcomes_before_the_test():
    "Row 100 is tested first, targets reach 5 rows ahead: the outcome of row 94 is on row 99, that of 95 on row 100."
    assert learned_stop(100, 5) == 95
    assert (learned_stop(5, 5), learned_stop(3, 5)) == (0, 0)  # none, never rows from the end


def calendar_table(index, horizon):
    return SimpleNamespace(features=pd.DataFrame(index=index), horizon=horizon, known=len(index) - horizon)


def test_folds_of_a_panel_with_two_calendars():
    """One market trades every day, the other on weekdays: no target of a training row reaches the first test date.

    1 January 2024 is a Monday. With a horizon of 2 the last known rows are the 26th (daily) and the 24th (weekdays):
    26 dates, and in two folds test parts of 8 dates, the 11th to the 18th and the 19th to the 26th."""
    daily, weekdays = pd.date_range("2024-01-01", "2024-01-28"), pd.bdate_range("2024-01-01", "2024-01-26")
    tables = {"daily": calendar_table(daily, 2), "weekdays": calendar_table(weekdays, 2)}
    first, second = panel_folds(tables, 2)
    dates = lambda fold, name: (
        tables[name].features.index[fold[name].train],
        tables[name].features.index[fold[name].test],
    )
    train, test = dates(first, "daily")
    assert (train[-1].day, test[0].day, test[-1].day) == (8, 11, 18)
    train, test = dates(first, "weekdays")  # the 9th and the 10th are the two rows before the 11th
    assert (train[-1].day, test[0].day, test[-1].day) == (8, 11, 18)
    train, test = dates(second, "daily")
    assert (train[-1].day, test[0].day, test[-1].day) == (16, 19, 26)
    train, test = dates(second, "weekdays")  # Friday the 19th; the 17th and the 18th are left out
    assert (train[-1].day, test[0].day, test[-1].day) == (16, 19, 24)
    for fold in (first, second):
        for name, table in tables.items():
            reached = table.features.index[fold[name].train.stop - 1 + table.horizon]
            assert reached < min(tables[n].features.index[fold[n].test.start] for n in tables)


def test_learning_and_validation_rows():
    "Of rows 10 to 110 the last fifteen validate; the two before them are left out, since targets reach that far."
    assert split_rows(slice(10, 110), 2, WindowConfig(seq_length=8, valid_share=0.15)) == (
        slice(10, 93),
        slice(95, 110),
    )
    assert split_rows(slice(0, 100), 1, WindowConfig(seq_length=30, valid_share=0.15)).valid == slice(70, 100)


def test_validation_of_a_panel_begins_on_one_date():
    "The 20th of 25 dates; the market without weekends leaves out its own two rows before it."
    daily, weekdays = pd.date_range("2024-01-01", "2024-01-31"), pd.bdate_range("2024-01-01", "2024-01-31")
    tables = {"daily": calendar_table(daily, 2), "weekdays": calendar_table(weekdays, 2)}
    train = {"daily": slice(0, 25), "weekdays": slice(0, 19)}  # both to the 25th
    splits = split_panel(tables, train, WindowConfig(seq_length=4, valid_share=0.2))
    assert splits["daily"] == (slice(0, 18), slice(20, 25))  # the 21st, a Sunday
    assert splits["weekdays"] == (slice(0, 13), slice(15, 19))  # Monday the 22nd


def test_a_walk_keeps_the_gap():
    "Folds of somebody's own, whose last training target would come to pass on the first test row."
    tables = {"daily": calendar_table(pd.date_range("2024-01-01", periods=30), 2)}
    folds = [{"daily": Fold(0, slice(0, 9), slice(10, 20))}]
    with pytest.raises(ValueError, match="gap of 1 rows, but targets reach 2 ahead"):
        next(walk_forward(tables, folds=folds, fit=None, progress=False))


def test_a_market_that_pauses_gives_up_rows_before_the_pause():
    "Its last training target would come to pass on its first test row: rows are counted on its own calendar."
    daily = pd.date_range("2024-01-01", periods=30)
    paused = daily[:8].union(daily[16:])
    tables = {"daily": calendar_table(daily, 2), "paused": calendar_table(paused, 2)}
    for fold in panel_folds(tables, 2, test_size=6):
        for name in tables:
            assert fold[name].test.start - fold[name].train.stop >= 2, name


def test_scaler_by_hand():
    table = pd.DataFrame({"a": [1.0, 2.0, 3.0, 4.0], "constant": [5.0] * 4})
    scaler = fit_scaler(table)
    assert scaler.center == pytest.approx((2.5, 5.0)) and scaler.scale == pytest.approx((math.sqrt(1.25), 1.0))
    new = pd.DataFrame({"a": [3.5, 100.0, -100.0], "constant": [6.0, 5.0, 5.0]})
    scaled = scaler.transform(new)
    assert scaled.ravel().tolist() == pytest.approx([1 / math.sqrt(1.25), 1, 6, 0, -6, 0])
    assert scaler.inverse(scaled)[0].tolist() == pytest.approx([3.5, 6.0])
    assert fit_scaler(table, clip=None).transform(new)[1, 0] == pytest.approx(97.5 / math.sqrt(1.25))


def test_windows_by_hand():
    "Ten rows, windows of four, a new one every three: the last one ends with the last row."
    x = np.arange(20.0).reshape(10, 2)
    windows = create_sequences(x, x[:, :1] + 100, 4, augment=True, stride=3)
    assert [window[0][:, 0].tolist() for window in windows] == [[2.0 * (s + i) for i in range(4)] for s in (0, 3, 6)]
    assert windows[2][1].ravel().tolist() == [112.0, 114.0, 116.0, 118.0]
    assert windows.noise.tolist() == pytest.approx([0.001 * math.sqrt(33)] * 2)  # 2 sqrt((10^2 - 1) / 12)


def test_the_last_batch_is_filled_and_does_not_count():
    x = np.arange(10.0)[:, None]
    windows = create_sequences(x, x, 4, augment=False, stride=3)
    first, second = create_tpu_dataloader(windows, 2, shuffle=False)
    assert (first.mask.tolist(), second.mask.tolist()) == ([1, 1], [1, 0])
    assert torch.equal(second.x[0], windows[2][0]) and second.x.shape == first.x.shape


def test_what_was_never_committed_is_thrown_away(tmp_path):
    "A writer killed before its index was in place leaves a new file, and the next one fails: the old folder is whole."
    write_together(tmp_path, {"model": b"old"}, {"version": 1})
    (tmp_path / "model.next").write_bytes(b"never committed")
    with pytest.raises(TypeError):
        write_together(tmp_path, {"model": "no bytes"}, {"version": 2})
    index = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (
        is_sealed(index)
        and index["version"] == 1
        and sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model"]
    )
    assert find_committed(tmp_path, "model", index["files"]["model"]).read_bytes() == b"old"
    assert not is_sealed(index | {"version": 2})
