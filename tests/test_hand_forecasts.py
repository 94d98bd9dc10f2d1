"""From heads of a network to numbers of a user, by hand and by statsmodels: units, calibration, intervals, dates.

The network here is a stand-in whose heads are known functions of the features: everything after it can be computed."""

import copy
import json
import math

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import torch
from pandas.tseries.holiday import USFederalHolidayCalendar
from sklearn.linear_model import Ridge
from torch import nn

from smlstm.data.features import make_targets
from smlstm.data.files import seal
from smlstm.data.variance import variance_proxy
from smlstm.learning.settings import TrainConfig
from smlstm.model.model import Forecast
from smlstm.using.estimator import ForecasterRegressor
from smlstm.using.forecaster import Forecaster, fit_forecaster
from smlstm.using.linear import Line, LinearHeads
from smlstm.using.panels import WindowConfig
from smlstm.using.storage import ForecasterFileError
from smlstm.using.tables import build_table

HORIZON, ROWS, KNOWN, SPREAD = 2, 1000, 900, 0.012
WINDOWS = WindowConfig(seq_length=20, stride=20, batch_size=4, valid_share=0.25)
TRAINING = TrainConfig(epochs=1, warmup_epochs=0, pos_weight=2.5)


class Known(nn.Module):
    "Heads that no weight changes: functions of the last return, which no line follows, and of the one of five days."

    def __init__(self, config):
        super().__init__()
        self.idle = nn.Parameter(torch.zeros(()))

    def forward(self, x, state=None):
        wave, other = torch.sin(3 * x[..., 0]), torch.cos(3 * x[..., 0])
        heads = 0.6 * wave + 0.1 * x[..., 1], 1.3 + 1.2 * wave, 0.7 * other - 0.2
        return Forecast(*(head + 0 * self.idle for head in heads), torch.full((*x.shape[:2], 1), 1.0)), ()

    def step(self, x, state=None):
        forecast, state = self(x.unsqueeze(1), state)
        return Forecast(*(part.squeeze(1) for part in forecast)), state


@pytest.fixture(scope="module")
def prices():
    "Waves of the last return in mean and variance, as in the heads above; rises are commoner, volatility persists."
    rng, n = np.random.default_rng(5), ROWS + 250
    noise, level, returns = rng.standard_normal((2, n)), 0.0, np.zeros(n)
    for t in range(1, n):
        level = 0.97 * level + 0.2 * noise[1, t]
        wave, other = math.sin(3 * returns[t - 1] / SPREAD), math.cos(3 * returns[t - 1] / SPREAD)
        returns[t] = 0.001 + SPREAD * (0.1 * returns[t - 1] / SPREAD + 0.9 * wave)
        returns[t] += 0.7 * SPREAD * math.exp(level / 2 + 0.5 * other) * noise[0, t]
    return pd.DataFrame({"close": 100 * np.exp(returns.cumsum())}, index=pd.bdate_range("2015-01-01", periods=n))


@pytest.fixture(scope="module")
def fitted(prices):
    table = build_table(prices, HORIZON)
    forecaster, _ = fit_forecaster(
        table, slice(0, KNOWN), {}, WINDOWS, TRAINING, device="cpu", build=Known, progress=False
    )
    return table, forecaster


@pytest.fixture
def own(fitted):
    "The same forecaster with streams of its own, which a test may move."
    forecaster = copy.copy(fitted[1])
    forecaster.streams = dict(forecaster.streams)
    return forecaster


@pytest.fixture(scope="module")
def expected(fitted, prices):
    "The forecasts of all rows, from the features alone."
    features, train = fitted[0].features.to_numpy(), slice(0, KNOWN)
    center, scale = features[train].mean(0), features[train].std(0)
    x = ((features[:, :2] - center[:2]) / scale[:2]).clip(-6, 6)
    rows = fitted[0].features.index
    targets = make_targets(prices, HORIZON).loc[rows]
    weights = 0.94 ** np.arange(len(prices) - 1)
    proxy = variance_proxy(prices).to_numpy()[1:]
    ewma = pd.Series(
        [weights[: t + 1][::-1] @ proxy[: t + 1] / weights[: t + 1].sum() for t in range(len(proxy))], prices.index[1:]
    ).loc[rows]
    r, ratio = targets.log_return.to_numpy(), targets.log_variance.to_numpy() - np.log(ewma.to_numpy())
    up, close, log_ewma = targets.up.to_numpy(), prices.close.loc[rows], np.log(ewma.to_numpy())
    log_ewma = log_ewma - log_ewma[train].mean()
    every = ((features - center) / np.where(scale > 0, scale, 1)).clip(-6, 6)
    share = (up[train].sum() + 0.5) / (KNOWN + 1)
    every_close, n = prices.close.to_numpy(), KNOWN + 250  # the share of rises counts the bars that features warm up in
    usual = (every_close[HORIZON : n + HORIZON] > every_close[:n]).mean()
    base = math.log(usual / (1 - usual))
    assert base > 0.1  # a share above one half stays as it is
    price, price_out, _ = by_hand(every, r, 1 / ewma.to_numpy(), 2)
    odds, odds_out, _ = by_hand(every, (up - share) / (share * (1 - share)), np.ones(len(r)), 2)
    fits = [by_hand(every, ratio + toward * log_ewma, np.ones(len(r)), 1) for toward in (0, 0.5, 1)]
    best = int(np.argmin([fit[2] for fit in fits]))
    toward, level = best / 2, (ratio + best / 2 * log_ewma)[train].mean()
    volatility, volatility_out = (
        level + fits[best][0] - toward * log_ewma,
        level + fits[best][1] - toward * log_ewma[train],
    )

    head = (0.6 * np.sin(3 * x[:, 0]) + 0.1 * x[:, 1]) * r[train].std()
    logit = 1.3 + 1.2 * np.sin(3 * x[:, 0]) - math.log(2.5)
    log_ratio = (0.7 * np.cos(3 * x[:, 0]) - 0.2) * ratio[train].std() + ratio[train].mean()
    v = slice(KNOWN - 225, KNOWN)  # a quarter of the training rows
    wls = sm.WLS((r - r[train].mean())[v] - price_out[v], (head[train] - price_out)[v], 1 / ewma.to_numpy()[v])
    keep = {"price": kept(wls.fit(cov_type="HC3"), 3)}
    family, offset = sm.families.Binomial(), base + odds_out[v]
    glm = sm.GLM(up[v], logit[v] - offset, family=family, offset=offset).fit(cov_type="HC0")
    keep["direction"] = kept(glm, 3)
    added = log_ratio[train] - volatility_out
    ols = sm.OLS((ratio[train] - volatility_out)[v], (added - added[: KNOWN - 225].mean())[v])
    keep["volatility"] = kept(ols.fit(cov_type="HC3"), 1)
    measured = np.exp(targets.log_variance.to_numpy())[train]
    factor = (measured / (np.exp(volatility_out + keep["volatility"] * added) * ewma.iloc[train])).mean()
    mix = lambda name, line, network: line + keep[name] * (network - line)
    relative = np.exp(mix("volatility", volatility, log_ratio))
    return (
        keep,
        pd.DataFrame(
            {
                "forecast_close": close * np.exp(mix("price", price, head)),
                "up_probability": 1 / (1 + np.exp(-base - mix("direction", odds, logit - base))),
                "forecast_variance": factor * relative * ewma,
                "actual_close": close.shift(-HORIZON),
                "ewma_variance": ewma,
                "mean_log_variance": np.log(relative * ewma),
            }
        ),
    )


def kept(fit, errors):
    "A slope less some standard errors, of which overlapping targets make more; from nothing to all of it."
    return float(np.clip(fit.params[0] - errors * math.sqrt(HORIZON) * fit.bse[0], 0, 1))


def by_hand(x, y, weight, errors):
    "scikit-learn's ridge regression of five blocks and of all training rows; the share by statsmodels."
    x_all, x, y, weight = x, x[:KNOWN], y[:KNOWN], weight[:KNOWN]
    level, found = np.average(y, weights=weight), []
    line = lambda penalty, rows: Ridge(penalty).fit(x[rows], y[rows], weight[rows] / weight[rows].mean())
    for penalty in 10 ** np.arange(1, 6.1, 0.5):
        out = np.zeros(KNOWN)
        for n in range(5):
            start, stop = n * KNOWN // 5, (n + 1) * KNOWN // 5
            rows = np.r_[: max(start - HORIZON, 0), min(stop + HORIZON, KNOWN) : KNOWN]
            out[start:stop] = line(penalty, rows).predict(x[start:stop]) - np.average(y[rows], weights=weight[rows])
        found.append((np.average((y - level - out) ** 2, weights=weight), penalty, out))
    _, penalty, out = min(found, key=lambda one: one[0])
    share = kept(sm.WLS(y - level, out, weight).fit(cov_type="HC3"), errors)
    forecast = share * (line(penalty, slice(None)).predict(x_all) - level)
    return forecast, share * out, np.average((y - level - share * out) ** 2, weights=weight)


def test_units_of_all_three_heads(fitted, expected):
    "Shrunk deviations of price and log odds, the weight of rises undone, and variance on the scale that was measured."
    table, forecaster = fitted
    keep, want = expected
    assert table.known == ROWS - HORIZON
    assert 0.05 < keep["price"] < 0.95 and 0.05 < keep["direction"] < 0.95 and 0.05 < keep["volatility"] < 0.95, keep
    frame = forecaster.forecast(table).set_index("date")
    for column in want.columns.drop("mean_log_variance"):
        np.testing.assert_allclose(frame[column], want[column], rtol=2e-5, err_msg=column)
    assert (pd.to_datetime(frame.target_date[:-HORIZON]).to_numpy() == frame.index[HORIZON:].to_numpy()).all()


@pytest.mark.parametrize("rows", [ROWS, KNOWN + HORIZON], ids=["later", "after the fit"])
def test_interval_of_the_last_bar(fitted, expected, prices, rows):
    "Of the last n <= 250 held-out errors, in deviations, the ceil(0.9 (n + 1))-th smallest (split conformal)."
    _, forecaster = fitted
    held = expected[1].iloc[KNOWN - 225 : rows - HORIZON].iloc[-250:]
    assert len(held) == (250 if rows == ROWS else 225)
    error = np.sort(np.abs(np.log(held.actual_close / held.forecast_close)) / np.sqrt(held.forecast_variance))
    rank = math.ceil(0.9 * (len(error) + 1))
    row, answer = expected[1].iloc[rows - 1], forecaster.predict(prices if rows == ROWS else None).iloc[0]
    width = error[rank - 1] * math.sqrt(row.forecast_variance)
    assert answer["forecast_close"] == pytest.approx(row.forecast_close, rel=1e-5)
    assert answer["forecast_close-lo-90"] == pytest.approx(row.forecast_close * math.exp(-width), rel=1e-5)
    assert answer["forecast_close-hi-90"] == pytest.approx(row.forecast_close * math.exp(width), rel=1e-5)


def test_a_stream_goes_on_as_the_table_does(own, expected, prices):
    "Five bars, one after the other, from where a reading of all bars before them ended."
    own.start(prices.iloc[:-5])
    rows, want = own.update(prices.iloc[-5:]), expected[1].iloc[-5:]
    for column in ("forecast_close", "up_probability", "forecast_variance", "ewma_variance"):
        np.testing.assert_allclose(rows[column], want[column], rtol=2e-5, err_msg=column)


def test_bars_that_cannot_follow(own, prices):
    "The last one again, one in between, and one after a month; then nothing has changed."
    own.start(prices.iloc[:-1])
    day = lambda date: prices.iloc[-1:].set_axis(pd.DatetimeIndex([date]))
    for date in (prices.index[-2], prices.index[-2] - pd.Timedelta(hours=24)):
        with pytest.raises(ValueError, match="is not after the last one"):
            own.update(day(date))
    with pytest.raises(ValueError, match="gap of 30 days"):
        own.update(day(prices.index[-2] + pd.Timedelta(days=30)))
    assert own.predict().date[0] == prices.index[-2]


def test_dates_of_the_next_bars(fitted, prices):
    "Two bars after the 2nd of July 2024: the 5th in New York, the 4th where every day, or every weekday, has a bar."
    _, forecaster = fitted
    days = len(prices)
    closed = USFederalHolidayCalendar().holidays("2000", "2025") + pd.Timedelta(0)
    weekdays = pd.bdate_range("2000-01-03", "2024-12-31")
    good_fridays = pd.to_datetime(["2023-04-07", "2024-03-29"])
    open_then = pd.to_datetime(["2023-10-09", "2023-11-10", "2024-10-14", "2024-11-11"])  # federal holidays
    sessions = weekdays.difference(closed.difference(open_then)).difference(good_fridays)
    ends = [
        ("2024-07-05", sessions[sessions <= "2024-07-02"][-days:]),
        ("2024-12-27", sessions[sessions <= "2024-12-24"][-days:]),
        ("2024-07-04", pd.bdate_range(end="2024-07-02", periods=days)),
        ("2024-07-04", pd.date_range(end="2024-07-02", periods=days)),
    ]
    for date, index in ends:
        assert forecaster.predict(prices.set_axis(index)).target_date.iloc[0] == pd.Timestamp(date)


def test_a_seed_decides_and_nothing_else(prices):
    "Equal seeds give equal forecasts whatever was drawn before, other seeds give others."
    table, found = build_table(prices.iloc[:600], HORIZON), []
    small = dict(hidden_size=4, n_heads=1, n_layers=1, n_regimes=2, d_state=1)
    for seed in (1, 1, 2):
        torch.rand(3), np.random.rand(2)
        training = TrainConfig(epochs=1, warmup_epochs=0, seed=seed)
        forecaster, _ = fit_forecaster(table, slice(0, 300), small, WINDOWS, training, device="cpu", progress=False)
        found.append([weights.clone() for weights in forecaster.model.state_dict().values()])
    first, again, other = found
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))


def test_a_folder_of_another_format_is_refused(prices, tmp_path):
    "Whole and sealed, but of an older version of the library."
    small = dict(hidden_size=4, n_heads=1, n_layers=1, n_regimes=2, d_state=1)
    table = build_table(prices.iloc[:600], HORIZON)
    forecaster, _ = fit_forecaster(table, slice(0, 300), small, WINDOWS, TRAINING, device="cpu", progress=False)
    forecaster.save(tmp_path)
    assert Forecaster.load(tmp_path).horizon == HORIZON
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(seal(config | {"format": config["format"] - 1}), encoding="utf-8")
    with pytest.raises(ForecasterFileError, match=f"format {config['format'] - 1}"):
        Forecaster.load(tmp_path)


def test_estimator_forecasts_means(fitted, expected, prices):
    "What scikit-learn's scorers compare with: the mean of the log return, and of the log of the variance."
    _, forecaster = fitted
    want, last = expected[1].iloc[-30:], prices.iloc[-30:]
    estimator = lambda target: ForecasterRegressor(forecaster, target, frozen=True).fit(prices.iloc[:-30]).predict(last)
    np.testing.assert_allclose(estimator("log_variance"), want.mean_log_variance, rtol=1e-5)
    np.testing.assert_allclose(estimator("log_return"), np.log(want.forecast_close / last.close), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(estimator("up"), want.up_probability, rtol=1e-5)


def test_the_reference_of_the_variance_by_hand():
    """Half way from a variance of 16 to a mean of 4 is 8; the line adds 0.1 for each unit of its feature."""
    still = Line((0.0,), 0.0)
    heads = LinearHeads(still, still, Line((0.1,), 0.0), toward_mean=0.5, log_level=math.log(4.0))
    found = heads(np.array([[0.0], [2.0]]), np.array([16.0, 16.0])).volatility
    assert 16 * np.exp(found) == pytest.approx([8.0, 8.0 * math.exp(0.2)])
