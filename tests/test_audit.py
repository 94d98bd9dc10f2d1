"""The audit catches every leak it is meant to catch, and passes what is causal, over many random functions and series."""

import arch.data.sp500
import numpy as np
import pandas as pd
import pytest

from smlstm.evaluation import CausalityError, add_baselines, audit_causality, conformal_intervals, ewma_variance
from smlstm.features import make_targets, prepare_data, variance_proxy
from smlstm.sequences import fit_scaler


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


def test_report_names_the_column_and_the_first_row(prices):
    cut_free = audit_causality(LEAKS["one column of many"], prices, cuts=1)
    assert list(cut_free.leaks.column) == ["leak"] and "leak" in str(cut_free)
    cut = int(0.3 * len(prices))
    assert cut_free.leaks.first_row[0] == prices.index[cut - 2] and cut_free.leaks.rows[0] == 2


def test_lookahead_is_exact(prices):
    for horizon in (1, 5):
        targets = lambda p: make_targets(p.ffill(), horizon)
        assert audit_causality(targets, prices, lookahead=horizon).causal
        assert not audit_causality(targets, prices, lookahead=horizon - 1).causal


def test_the_library_passes(prices):
    assert audit_causality(lambda p: prepare_data(p.ffill()), prices, cuts=3).causal
    assert audit_causality(lambda p: ewma_variance(variance_proxy(p.ffill())), prices).causal
    scaled = lambda p: (lambda f: fit_scaler(f.iloc[:150]).transform(f))(prepare_data(p.ffill()))
    assert audit_causality(scaled, prices, cuts=2, tolerance=1e-6).causal
    leaky = lambda p: (lambda f: fit_scaler(f).transform(f))(prepare_data(p.ffill()))
    assert not audit_causality(leaky, prices, cuts=2, tolerance=1e-6).causal


def test_the_model_passes(prices):
    torch = pytest.importorskip("torch")
    from smlstm.model import SMLSTM, SMLSTMConfig
    torch.manual_seed(0)
    model = SMLSTM(SMLSTMConfig(n_features=5, hidden_size=8, n_layers=2)).double().eval()
    for head in (model.heads, model.direct): torch.nn.init.normal_(head.weight, std=0.3)

    def forecast(p):
        returns = np.log(p.ffill().bfill()).diff().iloc[1:].clip(-1, 1)
        with torch.no_grad():
            said, _ = model(torch.tensor(returns.to_numpy())[None])
        return pd.DataFrame(torch.stack(said[:3], -1)[0].numpy(), returns.index)

    report = audit_causality(forecast, prices.iloc[-300:], cuts=3, probes=("raise", "lower", "shuffle", "truncate"), tolerance=1e-7)
    assert report.causal, str(report)
    centred = audit_causality(lambda p: forecast(p) - forecast(p).mean(), prices.iloc[-300:], cuts=2, probes=("raise",), tolerance=1e-7)
    assert not centred.causal


def test_baselines_and_intervals_do_not_look_ahead(prices):
    close, proxy = prices.close, variance_proxy(prices)
    f = pd.DataFrame({"date": prices.index[500:-1], "fold": 0, "close": close.iloc[500:-1].to_numpy(), "target_date": prices.index[501:],
                      "actual_close": close.iloc[501:].to_numpy(), "forecast_close": close.iloc[500:-1].to_numpy(), "up_probability": 0.5,
                      "actual_up": (close.diff().iloc[501:] > 0).astype(float).to_numpy(), "forecast_variance": proxy.iloc[500:-1].to_numpy(),
                      "actual_variance": proxy.iloc[501:].to_numpy(), "ewma_variance": proxy.iloc[500:-1].to_numpy(), "regime_1": 1.0})
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
    def rude(p):
        p["close"] = p.close.shift(1)
        return p
    assert audit_causality(rude, prices).causal
    pd.testing.assert_frame_equal(prices, before)
