"""Pre-trained contenders, with stubs that keep their packages' interfaces: columns, causality, the leak by name."""

import sys
import types
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from test_forecaster_use import SMALL, bars

from smlstm.data.variance import variance_proxy
from smlstm.judging import foundation
from smlstm.judging.evaluation import compare
from smlstm.judging.foundation import DECILES, add_foundation, leak_sentence
from smlstm.judging.skill import best_so_far
from smlstm.using.forecaster import Forecaster
from smlstm.using.report import _contest, contest_table
from smlstm.using.tables import build_table
from smlstm.using.walkforward import panel_folds

STEP = 0.02  # between two deciles of the stubs
OFFSETS = STEP * np.arange(-4, 5)
LENGTHS = []  # of the contexts that a stub was given


def deciles(contexts, steps):
    "Around the last value, the same at each step."
    LENGTHS.extend(len(one) for one in contexts)
    return np.stack([np.tile(float(one[-1]) + OFFSETS, (steps, 1)) for one in contexts])


class BaseChronosPipeline:
    "As in chronos-forecasting: a list of tensors to quantiles [B, steps, Q] and means [B, steps]."

    @classmethod
    def from_pretrained(cls, weights, *, device_map=None, torch_dtype=None):
        assert weights == "folder" and device_map == "cpu"
        return cls()

    def predict_quantiles(self, context, prediction_length=None, quantile_levels=(0.1, 0.5, 0.9), **kwargs):
        assert all(one.dim() == 1 and one.dtype == torch.float32 for one in context)
        assert quantile_levels == list(DECILES) and not kwargs
        made = torch.tensor(deciles(context, prediction_length))
        return made, made[..., 4]


class Chronos2Pipeline(BaseChronosPipeline):
    "As in Chronos-2: a list of tensors [variates, steps, Q], one for each series."

    def predict_quantiles(self, inputs, prediction_length=None, quantile_levels=(0.1, 0.5, 0.9), **kwargs):
        made, mean = super().predict_quantiles(inputs, prediction_length, quantile_levels)
        return [one[None] for one in made], [one[None] for one in mean]


@dataclass(frozen=True)
class ForecastConfig:
    max_context: int = 0
    max_horizon: int = 0
    normalize_inputs: bool = False
    use_continuous_quantile_head: bool = False
    fix_quantile_crossing: bool = False


class TimesFM_2p5_200M_torch:
    "As in timesfm 2.5: compiled before it forecasts; the mean stands before the deciles."

    @classmethod
    def from_pretrained(cls, model_id):
        assert model_id == "folder"
        return cls()

    def compile(self, forecast_config):
        self.config = forecast_config

    def forecast(self, horizon, inputs):
        assert horizon <= self.config.max_horizon and all(isinstance(one, np.ndarray) for one in inputs)
        made = deciles(inputs, horizon)
        return made[..., 4], np.concatenate([made.mean(-1, keepdims=True) + 9, made], -1)


class TiRex:
    "As in tirex-ts: contexts [B, T] to deciles [B, steps, 9] and means."

    def forecast(self, context, prediction_length):
        assert context.dim() == 2
        made = torch.tensor(deciles(context, prediction_length))
        return made, made[..., 4]


def load_model(path):
    assert path == "folder"
    return TiRex()


PACKAGES = {
    "chronos": dict(BaseChronosPipeline=BaseChronosPipeline),
    "timesfm": dict(TimesFM_2p5_200M_torch=TimesFM_2p5_200M_torch, ForecastConfig=ForecastConfig),
    "tirex": dict(load_model=load_model),
}
NAMES = sorted(PACKAGES)


@pytest.fixture
def installed(monkeypatch):
    for name, content in PACKAGES.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    LENGTHS.clear()


def model_of(name):
    return getattr(foundation, name)("folder")


@pytest.fixture(scope="module", params=[1, 3])
def walked(request):
    prices = bars(900)
    table = build_table(prices, request.param)
    forecasts = Forecaster(horizon=request.param, **SMALL).cross_validation(
        prices, n_splits=2, test_size=60, progress=False
    )
    return prices, table, [fold["a"] for fold in panel_folds({"a": table}, 2, 60)], forecasts


@pytest.mark.parametrize("name", NAMES)
def test_columns_of_a_model_that_repeats_the_last_value(installed, walked, name):
    "Close: the last one. Rises: one half. Variance: the last bar's, times what follows such bars in training."
    prices, table, folds, forecasts = walked
    made = add_foundation(forecasts, table, folds, [model_of(name)], length=100)
    assert np.allclose(made[f"{name}_close"], made.close, rtol=1e-5)
    assert np.allclose(made[f"{name}_probability"], 0.5, atol=1e-3)
    proxy = variance_proxy(prices)
    ahead = proxy.rolling(table.horizon).mean().shift(-table.horizon)
    for fold, rows in zip(folds, (made[made.fold == 0], made[made.fold == 1])):
        late = table.features.index[fold.train][-250:]
        factor = (ahead[late] / proxy[late]).mean()
        assert np.allclose(rows[f"{name}_variance"], factor * proxy[rows.date], rtol=1e-4)
    assert set(LENGTHS) == {100}


def test_chronos_2_returns_lists(installed, walked, monkeypatch):
    _, table, folds, forecasts = walked
    first = add_foundation(forecasts, table, folds, [model_of("chronos")])
    monkeypatch.setattr(sys.modules["chronos"], "BaseChronosPipeline", Chronos2Pipeline)
    pd.testing.assert_frame_equal(first, add_foundation(forecasts, table, folds, [model_of("chronos")]))


@pytest.mark.parametrize("name", NAMES)
def test_no_context_reaches_beyond_its_row(installed, walked, name):
    "With bars from the middle of the last test period on changed, forecasts before them are the same."
    prices, table, folds, forecasts = walked
    changed = prices.copy()
    start = forecasts.date.iloc[-30]
    changed.loc[start:, ["open", "high", "low", "close"]] *= 2.0
    again = build_table(changed, table.horizon)
    one, other = (add_foundation(forecasts, t, folds, [model_of(name)]) for t in (table, again))
    before = forecasts.date < start
    columns = [f"{name}_{ending}" for ending in ("close", "probability", "variance")]
    pd.testing.assert_frame_equal(one.loc[before, columns], other.loc[before, columns])
    assert not np.allclose(one[columns[0]].iloc[-30:], other[columns[0]].iloc[-30:])


def test_a_rise_is_as_likely_as_its_deciles_have_it(installed, walked):
    "A median one decile above today's close: today lies at the 40% quantile, so that 60% are above."
    _, table, folds, forecasts = walked
    shifted = model_of("tirex")._replace(forecast=lambda contexts, steps: deciles(contexts, steps) + STEP)
    made = add_foundation(forecasts, table, folds, [shifted])
    assert np.allclose(made.tirex_probability, 0.6, atol=1e-3)
    assert np.allclose(made.tirex_close, made.close * np.exp(STEP), rtol=1e-5)
    far = model_of("tirex")._replace(forecast=lambda contexts, steps: deciles(contexts, steps) + 1)
    assert np.allclose(add_foundation(forecasts, table, folds, [far]).tirex_probability, 0.95)


def test_the_leak_is_named_beside_the_contender(installed, walked):
    "In the table, in a note above it, and by the share of days; and no verdict is against such a contender."
    _, table, folds, forecasts = walked
    made = add_foundation(forecasts, table, folds, [model_of(name) for name in NAMES])
    comparison = compare(made.assign(chronos_variance=made.actual_variance), table.horizon)
    names = {contest_table(rows).contender.iloc[i] for rows in comparison.values() for i in range(len(rows))}
    assert {f"{name}, pre-trained: may know these days" for name in ("Chronos", "TimesFM", "TiRex")} <= names
    assert "may contain the tested days" in _contest({"comparison": comparison, "overall": {}})
    plain = {head: [row for row in rows if row["contender"] not in NAMES] for head, rows in comparison.items()}
    assert "may contain the tested days" not in _contest({"comparison": plain, "overall": {}})
    perfect = made.assign(chronos_variance=made.actual_variance, ewma_variance=made.ewma_variance)
    assert set(best_so_far(perfect, "volatility")[1].values()) == {"ewma"}  # and not the perfect one


def test_the_share_of_days_that_may_be_known(installed, walked):
    forecasts = walked[3]
    model, middle = model_of("chronos"), forecasts.date.iloc[len(forecasts) // 2]
    assert "Chronos: 100% of the tested days" in leak_sentence(model, forecasts)
    assert "Chronos: 50% of the tested days" in leak_sentence(model._replace(published=str(middle.date())), forecasts)
    assert "come after its weights were published" in leak_sentence(model._replace(published="1990-01-01"), forecasts)


@pytest.mark.parametrize(
    "name, install", [("chronos", "chronos-forecasting"), ("timesfm", "timesfm"), ("tirex", "tirex-ts")]
)
def test_what_is_not_installed_is_named(monkeypatch, name, install):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"{name} is not installed: pip install {install}"):
        getattr(foundation, name)()


def test_a_run_takes_them_among_its_contenders(installed, tmp_path):
    from smlstm.using import run as flow

    parameters = dict(ticker="SPY", source="sample", start="2015-01-01", epochs=1, hidden_size=4, n_heads=1, n_layers=1)
    parameters |= dict(n_splits=2, seq_length=32, stride=64, output_dir=str(tmp_path))
    job = flow.start_job(parameters)
    tables = flow.make_tables(job)
    folds = panel_folds(tables, 2)
    steps = list(flow.train_folds(job, tables, folds))
    own = flow.fold_forecasts(job, steps)
    made = flow.add_contenders(job, tables, folds, own, foundation=[model_of("tirex")])
    (frame,) = made.values()
    known = frame.dropna(subset=["actual_close"])
    assert np.allclose(known.tirex_close, known.close, rtol=1e-5) and "lstm_close" in frame
    job.lock.release(force=True)
