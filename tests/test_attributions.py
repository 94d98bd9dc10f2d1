"""Contributions add up to the forecasts, are what is known for lines and filters, and name a planted feature."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_forecaster_use import SMALL, bars

from smlstm.evidence.attributed import planted_rank, planted_signal
from smlstm.model.model import SMLSTM, Forecast, SMLSTMConfig
from smlstm.using.attributions import integrated_gradients, network_parts
from smlstm.using.ensemble import HEADS
from smlstm.using.fitted_series import forecasts_in_units
from smlstm.using.forecaster import Forecaster
from smlstm.using.tables import SeriesError, build_table


def with_shares(forecaster, share):
    "The same forecaster with this share of its network in every head, so that there is something to attribute."
    shares = dict.fromkeys(("price_share", "direction_share", "volatility_share"), share)
    other = replace(forecaster)
    other.model, other.streams = forecaster.model, forecaster.streams
    other.series = {
        name: fitted._replace(calibration=fitted.calibration._replace(**shares))
        for name, fitted in forecaster.series.items()
    }
    return other


@pytest.fixture(scope="module")
def panel():
    both = {"SPY": bars(), "QQQ": bars(ticker="QQQ")}
    return Forecaster(**SMALL | dict(training=dict(epochs=2, learning_rate=0.03))).fit(both, progress=False)


def forecast_sums(row):
    "A forecast on the scales on which it is a sum, from the columns that users see."
    return {
        "price": np.log(row.forecast_close / row.close),
        "direction": np.log(row.up_probability / (1 - row.up_probability)),
        "volatility": np.log(row.forecast_variance),
    }


def check_sums(parts, rows, tolerance=2e-5):
    "Contributions of each series and head add up to what `predict` gives."
    sums = parts.groupby(["unique_id", "head"]).contribution.sum()
    for row in rows.itertuples():
        for head, value in forecast_sums(row).items():
            assert sums[row.unique_id, head] == pytest.approx(value, abs=tolerance)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("window", [16, 128, 5000])
def test_contributions_add_up_to_the_forecast(panel, share, window):
    "Of every series and head, for windows that are shorter and longer than the series."
    own, both = with_shares(panel, share), {"SPY": bars(), "QQQ": bars(ticker="QQQ")}
    rows = pd.DataFrame(
        own.forecast(build_table(frame), name).iloc[-1].to_dict() | {"unique_id": name} for name, frame in both.items()
    )
    parts = own.explain(both, bars=window)
    check_sums(parts, rows)
    assert parts[parts.feature == "remainder"].contribution.abs().max() < 2e-3


def test_contributions_to_a_streamed_forecast_of_a_loaded_one(tmp_path, panel):
    panel.save(tmp_path)
    loaded = Forecaster.load(tmp_path).start({"SPY": bars().iloc[:-3]})
    rows = loaded.update({"SPY": bars().iloc[-3:]}).tail(1)
    parts = loaded.explain({"SPY": bars()})
    check_sums(parts, rows)
    pd.testing.assert_frame_equal(parts, panel.explain({"SPY": bars()}))


def test_contributions_of_an_ensemble(tmp_path):
    settings = SMALL | dict(architecture=SMALL["architecture"] | dict(scales=[1, 5]))
    ensemble = with_shares(Forecaster(**settings).fit(bars(), progress=False), 0.5)
    row = ensemble.forecast(build_table(bars()), None).iloc[-1]
    check_sums(ensemble.explain(bars()), pd.DataFrame([row.to_dict() | {"unique_id": "series"}]))


def test_contributions_of_several_horizons():
    "Each horizon's parts add up to its own forecast."
    several = Forecaster(horizon=[1, 5], **SMALL).fit(bars(), progress=False)
    (name,) = several.series
    shares = dict.fromkeys(("price_share", "direction_share", "volatility_share"), 0.5)
    halved = lambda one: one._replace(calibration=one.calibration._replace(**shares))
    fitted = halved(several.series[name])
    several.series = {name: fitted._replace(further=tuple(map(halved, fitted.further)))}
    parts, rows = several.explain(bars()), several.predict(bars())
    assert sorted(parts.horizon.unique()) == [1, 5]
    for horizon, own in parts.groupby("horizon"):
        check_sums(own, rows[rows.horizon == horizon])
    assert len(several.explain(bars(), by="regime")) == 2 * 3 * 2


def test_parts_of_a_line_are_what_its_feature_changes(panel):
    "Without the network: a feature's contribution is the change of the forecast when it alone is put to its mean."
    own = with_shares(panel, 0.0)
    fitted, table = own.series["SPY"], build_table(bars())
    x, close, ewma = fitted.scaler.transform(table.features)[-1:], 100.0, table.bars.ewma_variance.to_numpy()[-1:]
    heads = Forecast(*(np.zeros(1) for _ in range(3)), np.ones((1, 1)))
    made = lambda x: pd.DataFrame(forecasts_in_units(fitted, heads, x, close, ewma)).assign(close=close).iloc[0]
    whole = forecast_sums(made(x))
    sums = own.explain({"SPY": bars()}, by="feature").set_index(["head", "feature"]).contribution
    for at, name in enumerate(fitted.scaler.columns):
        without = x.copy()
        without[0, at] = 0
        for head, value in forecast_sums(made(without)).items():
            assert sums[head, name] == pytest.approx(whole[head] - value, abs=1e-9)


def test_gradients_of_a_product_are_shared_evenly():
    "The head is x_1 x_2 at the last step: along a straight path from zero each of the two has half of it."

    class Product(torch.nn.Module):
        def forward(self, x, state=None):
            product = (x[..., 0] * x[..., 1]) + 3 * x[..., 2]
            return Forecast(product, product, product, torch.ones_like(x[..., :1])), state

    x = torch.tensor([[9.0, 9.0, 9.0], [2.0, -3.0, 0.5]], dtype=torch.float64)
    made = integrated_gradients(Product(), x)["price"]
    assert np.allclose(made, [[0, 0, 0], [-3, -3, 1.5]])


def test_a_bar_long_ago_is_named():
    "The head copies one feature of four bars ago: all of it is that bar's, and the bars before the window have none."

    class Delay(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.zero = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, state=None):
            before = x.new_zeros(len(x), 4, x.shape[-1]) if state is None else state[0]
            joined = torch.cat([before, x], 1)
            made = joined[:, :-4, 1]
            return Forecast(made, made, made, torch.ones_like(x[..., :1])), (joined[:, -4:],)

    x = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    inside = network_parts(Delay(), x, bars=10)
    expected = np.zeros((10, 3))
    expected[-5, 1] = x[-5, 1]
    assert np.allclose(inside.window["price"], expected, atol=1e-6) and inside.earlier["price"] == 0
    outside = network_parts(Delay(), x, bars=3)
    assert np.abs(outside.window["price"]).max() == 0
    assert outside.earlier["price"] == pytest.approx(x[-5, 1], abs=1e-6)


def test_regimes_share_out_the_bars(panel):
    own, frame = with_shares(panel, 0.7), {"QQQ": bars(ticker="QQQ")}
    parts = own.explain(frame)
    weights = parts.filter(like="regime_")
    known = weights.notna().all(axis=1)
    assert np.allclose(weights[known].sum(1), 1, atol=1e-5)
    by = {name: own.explain(frame, by=name) for name in ("feature", "bar", "regime")}
    for head in HEADS:
        of_head = parts[known & (parts["head"] == head)]
        expected = (of_head.regime_2 * of_head.contribution).sum()
        found = by["regime"].set_index(["head", "regime"]).contribution
        assert found[head, "regime_2"] == pytest.approx(expected, abs=1e-9)
        assert by["bar"].set_index(["head", "date"]).contribution[head].index.is_monotonic_increasing
    sizes = by["feature"].groupby("head", sort=False).contribution.apply(lambda s: s.abs().is_monotonic_decreasing)
    assert sizes.all()


def test_the_network_is_complete_in_its_own_right():
    "Random weights, long after initialization: sums of integrated gradients against two runs of the network."
    torch.manual_seed(3)
    model = SMLSTM(SMLSTMConfig(n_features=5, hidden_size=8, n_heads=2, n_layers=2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = torch.randn(120, 5)
    parts = network_parts(model, x.numpy(), bars=40)
    with torch.no_grad():
        whole = model(x[None])[0]
    for head in HEADS:
        total = parts.usual[head] + parts.earlier[head] + parts.window[head].sum() + parts.remainder[head]
        assert total == pytest.approx(float(getattr(whole, head)[0, -1]), abs=1e-5)
        assert abs(parts.remainder[head]) < 0.03 * np.abs(parts.window[head]).sum()


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_column_is_first(seed):
    found = planted_rank(seed)
    assert found["rank"] == 1 and 0.6 < found["of the effect"] < 1.2


@pytest.mark.slow
def test_a_planted_column_is_first_in_nineteen_of_twenty():
    assert sum(planted_rank(seed)["rank"] == 1 for seed in range(20, 40)) >= 19


def test_a_planted_column_moves_the_next_bar():
    "The generator itself: squared returns follow the planted column of the day before, and no other."
    prices, planted = planted_signal(5, 6000)
    size = np.log(np.log(prices.close).diff() ** 2).iloc[1:]
    lagged = prices.filter(like="signal").shift().iloc[1:]
    correlation = lagged.corrwith(size).abs()
    assert correlation.idxmax() == planted and correlation.drop(planted).max() < 0.05 < 0.2 < correlation[planted]


def test_what_is_refused(panel):
    with pytest.raises(ValueError, match="by='day', bars=128: sum by one of feature, bar, regime"):
        panel.explain({"SPY": bars()}, by="day")
    with pytest.raises(ValueError, match="bars=0"):
        panel.explain({"SPY": bars()}, bars=0)
    with pytest.raises(SeriesError, match="series 'SPY': 100 rows are too few"):
        panel.explain({"SPY": bars().tail(100)})
    with pytest.raises(ValueError, match="not fitted yet"):
        Forecaster().explain(bars())
