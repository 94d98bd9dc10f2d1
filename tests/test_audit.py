"""The audit catches every leak it is meant to catch, and passes what is causal, over many functions and series."""

import arch.data.nasdaq
import arch.data.sp500
import numpy as np
import pandas as pd
import pytest

from smlstm.data.features import make_targets, prepare_data
from smlstm.data.variance import variance_proxy
from smlstm.data.windows import fit_scaler
from smlstm.judging.audit import CausalityError, audit_causality
from smlstm.judging.baselines import add_baselines, ewma_variance
from smlstm.judging.intervals import conformal_intervals


@pytest.fixture(scope="module")
def prices():
    frame = arch.data.sp500.load().rename(columns=str.lower)[["open", "high", "low", "close", "volume"]]
    return frame.rename_axis("date").iloc[-900:]


CAUSAL = {
    "past mean": lambda p: p.close.rolling(5).mean(),
    "lags": lambda p: p.close.shift(3),
    "expanding scale": lambda p: p.close / p.close.expanding().max(),
    "forward fill": lambda p: p.close.ffill(),
    "array": lambda p: p.close.diff().to_numpy()[1:],
    "two columns": lambda p: p[["close", "volume"]].pct_change(fill_method=None),
    "category": lambda p: pd.Series(np.where(p.close.diff() > 0, "up", "down"), p.index),
    "daily from weekly": lambda p: p.close.where(p.index.day_of_week == 4).ffill(),
    "scaled by the training part": lambda p: (p.close - p.close.iloc[:200].mean()) / p.close.iloc[:200].std(),
}

LEAKS = {
    "whole-series scaling": lambda p: (p.close - p.close.mean()) / p.close.std(),
    "whole-series maximum": lambda p: p.close / p.close.max(),
    "rank of all": lambda p: p.close.rank(),
    "centred mean": lambda p: p.close.rolling(5, center=True).mean(),
    "back fill": lambda p: p.close.bfill(),
    "interpolation": lambda p: p.close.where(p.index.day_of_week == 4).interpolate(),
    "next return": lambda p: p.close.pct_change(fill_method=None).shift(-1),
    "sign of the next return": lambda p: np.sign(p.close.diff().shift(-1)),
    "next day's range": lambda p: np.log(p.high / p.low).shift(-1),
    "next day's weekday volume": lambda p: (p.volume > p.volume.rolling(20).mean()).astype(float).shift(-1),
    "label of the next move": lambda p: pd.Series(np.where(p.close.diff().shift(-1) > 0, "up", "down"), p.index),
    "reversed recursion": lambda p: p.close[::-1].ewm(span=5).mean()[::-1],
    "length of the series": lambda p: pd.Series(np.arange(len(p)) / len(p), p.index),
    "one column of many": lambda p: pd.DataFrame({"fine": p.close, "leak": p.close.shift(-2)}),
    "rows dropped by the future": lambda p: p.close[p.close.shift(-1).notna()],
    "bins over the whole series": lambda p: pd.qcut(p.close.ffill(), 5, labels=False, duplicates="drop"),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_functions_pass(prices, name):
    report = audit_causality(CAUSAL[name], prices)
    assert report.causal, str(report)


@pytest.mark.parametrize("name", LEAKS)
def test_leaks_are_caught(prices, name):
    report = audit_causality(LEAKS[name], prices)
    assert not report.causal, f"{name} passed"


@pytest.fixture(scope="module")
def other_prices():
    "Days that the notebook does not show."
    frame = arch.data.nasdaq.load().rename(columns=str.lower)[["open", "high", "low", "close", "volume"]]
    return frame.rename_axis("date").iloc[-1500:-900]


def next_sign(rows):
    "The sign of the next move on some rows, and of the last one elsewhere; the last row is filled forwards."

    def leak(p):
        move = p.close.diff()
        return np.sign(move.shift(-1)).where(rows(p), np.sign(move)).ffill()

    return leak


def deviation(p):
    move = p.close.pct_change(fill_method=None)
    return move / move.rolling(60, min_periods=20).std()


RARE = {
    **{f"weekday {day}": (lambda p, day=day: p.index.day_of_week == day) for day in range(5)},
    "first of a month": lambda p: np.r_[False, np.diff(p.index.month) != 0],
    "third Friday": lambda p: (p.index.day_of_week == 4) & (p.index.day > 14) & (p.index.day < 22),
    "after long breaks": lambda p: np.r_[False, np.diff(p.index.asi8) > 3.5 * np.min(np.diff(p.index.asi8))],
    "after big rises": lambda p: deviation(p) > 2,
    "after big falls": lambda p: deviation(p) < -2,
    "large volume": lambda p: p.volume > p.volume.rolling(250, min_periods=60).quantile(0.985),
    "new highs": lambda p: p.close >= p.close.cummax(),
    "after three falls": lambda p: (p.close.diff() < 0).rolling(4).sum() == 4,
}


@pytest.mark.parametrize("name", RARE)
def test_leaks_in_rare_rows_are_caught(other_prices, name):
    assert not audit_causality(next_sign(RARE[name]), other_prices, cuts=2, tolerance=1e-5).causal


def held(lookup, index):
    "A function that ignores the prices it is given, but for their dates, and has those of `index` in store."
    store = pd.Series(np.random.default_rng(0).normal(size=len(index)).cumsum(), index)
    return lambda p: lookup(store, p)


@pytest.mark.parametrize(
    "lookup",
    [
        lambda store, p: store.reindex(p.index),
        lambda store, p: store.loc[p.index],
        lambda store, p: store.reindex(p.index, method="nearest"),
        lambda store, p: store.to_numpy()[: len(p)],
        lambda store, p: pd.Series(store.to_numpy()[-len(p) :], p.index),
        lambda store, p: pd.DataFrame({"fine": p.close.diff(), "held": store.reindex(p.index)}),
        lambda store, p: p.close.diff() + store.reindex(p.index),
    ],
)
def test_prices_held_elsewhere_are_noticed(other_prices, lookup):
    report = audit_causality(held(lookup, other_prices.index), other_prices, cuts=1, rows=3)
    assert not report.causal and report.leaks.probes.str.contains("reaction").any() and "reaction" in str(report)


@pytest.mark.parametrize(
    "function",
    [
        lambda p: pd.Series(p.index.hour, p.index),
        lambda p: pd.DataFrame({"month": p.index.month, "bar": np.arange(len(p)), "move": p.close.diff()}, p.index),
        lambda p: pd.Series(p.index.day_of_week == 0, p.index),
        lambda p: pd.Series(np.log(np.diff(p.index.asi8, prepend=p.index.asi8[0] - 1).astype(float)), p.index),
        lambda p: (p.close.diff() > 0.05 * p.close).astype(float),  # hardly ever
        lambda p: p.high / p.low,  # does not move with the level
        lambda p: p.close.to_numpy()[50:],
    ],
)
def test_the_calendar_is_causal(other_prices, function):
    hourly = other_prices.set_axis(pd.date_range("2024-01-01", periods=len(other_prices), freq="h", tz="UTC"))
    for prices in (other_prices, hourly):
        report = audit_causality(function, prices, cuts=1, rows=5)
        assert report.causal, str(report)


def test_rows_may_have_no_dates(other_prices):
    bars = other_prices.reset_index(drop=True)
    assert audit_causality(lambda p: p.close.diff(), bars, cuts=1).causal
    assert audit_causality(lambda p: pd.Series(np.arange(len(p)), p.index), bars, cuts=1).causal
    store = bars.close.pct_change()
    assert not audit_causality(lambda p: store.reindex(p.index), bars, cuts=1, rows=3).causal


def test_an_outlier_hides_nothing(other_prices):
    moves = lambda p: p.close.pct_change(fill_method=None).fillna(0.0)
    leak = lambda p: moves(p).shift(-1, fill_value=0.0).where(np.arange(len(p)) != 3, 1e15)
    assert not audit_causality(leak, other_prices, cuts=2, tolerance=1e-5).causal
    assert not audit_causality(leak, other_prices, cuts=2, probes=("raise", "lower")).causal
    # rounding beside a large typical value is no leak
    rounded = lambda p: (p.close.diff() * 1e9 + (len(p) % 7) * 1e-3).where(np.arange(len(p)) > 100, 0.0)
    assert audit_causality(rounded, other_prices, cuts=2, tolerance=1e-9).causal


def test_report_names_the_column_and_the_first_row(prices):
    evenly = ("raise", "lower", "shuffle", "truncate", "gap")
    cut_free = audit_causality(LEAKS["one column of many"], prices, cuts=1, probes=evenly)
    assert list(cut_free.leaks.column) == ["leak"] and "leak" in str(cut_free)
    cut = int(0.3 * len(prices))
    assert cut_free.leaks.first_row[0] == prices.index[cut - 2] and cut_free.leaks.rows[0] == 2


def test_lookahead_is_exact(prices):
    for horizon in (1, 5):
        targets = lambda p, horizon=horizon: make_targets(p.ffill(), horizon)
        assert audit_causality(targets, prices, lookahead=horizon).causal
        assert not audit_causality(targets, prices, lookahead=horizon - 1).causal


def test_the_library_passes(prices):
    assert audit_causality(lambda p: prepare_data(p.ffill()), prices, cuts=3, rows=9).causal
    assert audit_causality(lambda p: ewma_variance(variance_proxy(p.ffill())), prices).causal
    scaled = lambda p: (lambda f: fit_scaler(f.iloc[:150]).transform(f))(prepare_data(p.ffill()))
    assert audit_causality(scaled, prices, cuts=2, rows=5, tolerance=1e-6).causal
    leaky = lambda p: (lambda f: fit_scaler(f).transform(f))(prepare_data(p.ffill()))
    assert not audit_causality(leaky, prices, cuts=2, tolerance=1e-6).causal


def test_the_model_passes(prices):
    torch = pytest.importorskip("torch")
    from smlstm.model.model import SMLSTM, SMLSTMConfig

    torch.manual_seed(0)
    model = SMLSTM(SMLSTMConfig(n_features=5, hidden_size=8, n_layers=2)).double().eval()
    for head in (model.heads, model.direct):
        torch.nn.init.normal_(head.weight, std=0.3)

    def forecast(p):
        returns = np.log(p.ffill().bfill()).diff().iloc[1:].clip(-1, 1)
        with torch.no_grad():
            heads, _ = model(torch.tensor(returns.to_numpy())[None])
        return pd.DataFrame(torch.stack(heads[:3], -1)[0].numpy(), returns.index)

    report = audit_causality(forecast, prices.iloc[-300:], cuts=3, rows=5, tolerance=1e-7)
    assert report.causal, str(report)
    centred = audit_causality(
        lambda p: forecast(p) - forecast(p).mean(), prices.iloc[-300:], cuts=2, probes=("raise",), tolerance=1e-7
    )
    assert not centred.causal


def test_baselines_and_intervals_do_not_look_ahead(prices):
    close, proxy = prices.close, variance_proxy(prices)
    f = pd.DataFrame(
        {
            "date": prices.index[500:-1],
            "fold": 0,
            "close": close.iloc[500:-1].to_numpy(),
            "target_date": prices.index[501:],
            "actual_close": close.iloc[501:].to_numpy(),
            "forecast_close": close.iloc[500:-1].to_numpy(),
            "up_probability": 0.5,
            "actual_up": (close.diff().iloc[501:] > 0).astype(float).to_numpy(),
            "forecast_variance": proxy.iloc[500:-1].to_numpy(),
            "actual_variance": proxy.iloc[501:].to_numpy(),
            "ewma_variance": proxy.iloc[500:-1].to_numpy(),
            "regime_1": 1.0,
        }
    )
    full, changed = add_baselines(f, prices), prices.astype(float)
    changed.iloc[700:] *= np.exp(np.random.default_rng(0).normal(0, 0.1, (len(prices) - 700, 1)))
    moved = add_baselines(f, changed)
    known = f.date < prices.index[700]
    columns = [c for c in full if c not in f]
    pd.testing.assert_frame_equal(full.loc[known, columns], moved.loc[known, columns])
    assert not np.allclose(full.loc[~known, "garch_variance"], moved.loc[~known, "garch_variance"])
    one = conformal_intervals(f, horizon=5)
    other = conformal_intervals(f.assign(actual_close=f.actual_close.where(f.index < 250, 1.0)), horizon=5)
    assert one.upper_close[:255].equals(other.upper_close[:255]) and one.upper_close[255] != other.upper_close[255]


def test_what_cannot_be_judged_is_refused(prices):
    rng = np.random.default_rng(0)
    with pytest.raises(CausalityError, match="two calls"):
        audit_causality(lambda p: p.close + rng.normal(size=len(p)), prices)
    with pytest.raises(CausalityError, match="no rows"):
        audit_causality(lambda p: p.close.iloc[:0], prices)
    with pytest.raises(ValueError, match="return a frame"):
        audit_causality(lambda p: np.zeros((2, 2, 2)), prices)
    with pytest.raises(ZeroDivisionError):
        audit_causality(lambda p: p.close * (1 / (len(p) - len(prices))), prices)


def test_a_function_that_refuses_gaps_is_still_probed(prices):
    def strict(p):
        if p.close.isna().any():
            raise ValueError("gaps")
        return p.close.diff()

    report = audit_causality(strict, prices)
    assert report.causal and report.skipped == ("gap",) and "not probed: gap" in str(report)


def test_the_function_may_change_its_input(prices):
    before = prices.copy()

    def overwrites(p):
        p["close"] = p.close.shift(1)
        return p

    assert audit_causality(overwrites, prices).causal
    pd.testing.assert_frame_equal(prices, before)
