"""All kinds of columns at once, with holes, in one series and in a panel, of one horizon and of several."""

import numpy as np
import pandas as pd
import pytest
from test_covariates import PROBES, with_column
from test_forecaster import SMALL, bars
from test_missing import with_holes

from smlstm.judging.audit import audit_causality
from smlstm.using.forecaster import Forecaster
from smlstm.using.streams import table_of

AHEAD = 20  # rows without prices behind the last bar: what is known of them
FACTS = pd.DataFrame({"sector": ["broad", "tech"], "beta": [1.0, 1.3]}, ["SPY", "QQQ"])
HEADS = ["forecast_close", "up_probability", "forecast_variance"]


def history(name, stop, ahead=AHEAD):
    "Prices with holes and an exogenous column up to bar `stop`, and a column that is known `ahead` bars further."
    prices = with_holes(bars(name), seed=len(name) + ord(name[0])).assign(vix=np.sin(np.arange(len(bars(name)))))
    prices.iloc[stop:] = np.nan
    return with_column(prices[: stop + ahead])


@pytest.fixture(scope="module", params=[("SPY",), ("SPY", "QQQ")], ids=["single", "panel"])
def names(request):
    return request.param


@pytest.fixture(scope="module", params=[1, [1, 5]], ids=["one horizon", "two"])
def fitted(request, names):
    static = FACTS if len(names) > 1 else None
    settings = dict(horizon=request.param, future_exogenous="fomc", exogenous="vix", calendar_features=True)
    frames = {name: history(name, 1500) for name in names}
    return Forecaster(**settings, **SMALL).fit(frames, static=static, progress=False)


def test_streamed_is_whole_and_loaded_is_saved(fitted, names, tmp_path):
    frames = {name: history(name, 1512) for name in names}
    fitted.start({name: history(name, 1500) for name in names}).save(tmp_path)
    loaded = Forecaster.load(tmp_path)
    new = {name: frame[1500:] for name, frame in frames.items()}
    pieces = [{name: frame[a:b] for name, frame in new.items()} for a, b in [(0, 1), (1, 5), (5, 12 + AHEAD)]]
    made = pd.concat([fitted.update(piece) for piece in pieces], ignore_index=True)
    pd.testing.assert_frame_equal(pd.concat([loaded.update(piece) for piece in pieces], ignore_index=True), made)
    keys = ["unique_id", *(["horizon"] if "horizon" in made else [])]
    last, whole = made.groupby(keys).tail(1).set_index(keys), fitted.predict(frames).set_index(keys)
    assert len(whole) == len(names) * (2 if "horizon" in made else 1)
    np.testing.assert_allclose(last.loc[whole.index, HEADS], whole[HEADS], rtol=1e-5)
    assert (whole.date == bars("SPY").index[1511]).all()


def test_only_what_is_declared_looks_ahead(fitted):
    one = Forecaster(**SMALL)
    one.model, one.series = fitted.model, {"series": fitted.series["SPY"]}
    reach = max(fitted.series["SPY"].horizons)

    def heads(prices):
        known = one.forecast(table_of(one.series["series"], prices))
        wide = known.set_index(["date", *(["horizon"] if "horizon" in known else [])])[HEADS].dropna()
        if "horizon" in known:
            wide = wide.unstack("horizon").dropna()
            wide.columns = [f"{name}_{horizon}" for name, horizon in wide.columns]
        return wide

    frame, options = history("SPY", 1500, 0).tail(600), dict(cuts=1, rows=5, tolerance=1e-5, probes=PROBES)
    assert audit_causality(heads, frame, ahead={"fomc": reach}, **options).causal
    assert not audit_causality(heads, frame, ahead={"fomc": reach - 1}, **options).causal
