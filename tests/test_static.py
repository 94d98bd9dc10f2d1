"""Columns that do not change in time: the same in tables, streams, folds and folders, and known from unknown."""

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from test_covariates import audit
from test_forecaster import SMALL, bars, long_frame, numbers

from smlstm.evidence.inputs import gain_shares, sector_scores
from smlstm.learning.settings import TrainConfig
from smlstm.using.forecaster import Forecaster
from smlstm.using.panels import WindowConfig, make_loaders, split_panel
from smlstm.using.streams import table_of
from smlstm.using.tables import SeriesError, price_tables, scale_table

PRICE = ["forecast_close", "up_probability", "forecast_variance"]
FACTS = pd.DataFrame({"sector": ["broad", "tech", "broad"], "beta": [1.0, 1.3, 0.8]}, ["SPY", "QQQ", "DIA"])
FEATURES = ["sector=broad", "sector=tech", "beta"]
# by hand: two of three series are broad, (1 - 4/9 - 1/9) / 2 = 2/9; the mean beta is 31/30, its variance 0.38/9
BY_HAND = {
    "SPY": [0.5**0.5, -(0.5**0.5), (1.0 - 31 / 30) / np.sqrt(0.38 / 9)],
    "QQQ": [-(2**0.5), 2**0.5, (1.3 - 31 / 30) / np.sqrt(0.38 / 9)],
    "DIA": [0.5**0.5, -(0.5**0.5), (0.8 - 31 / 30) / np.sqrt(0.38 / 9)],
}


def panel_of(stop=1500, start=0):
    frames = {"SPY": bars("SPY"), "QQQ": bars("QQQ"), "DIA": bars("SPY").iloc[::-1].set_axis(bars("SPY").index)}
    frames["DIA"][["open", "close"]] = frames["DIA"][["close", "open"]].to_numpy()  # time reversed: a third series
    return {name: frame[start:stop] for name, frame in frames.items()}


@pytest.fixture(scope="module")
def fitted():
    return Forecaster(**SMALL).fit(panel_of(), static=FACTS, progress=False)


def test_every_bar_has_the_features_of_its_series(fitted):
    for name, table in price_tables(panel_of(), 1, None, 15.0, static=FACTS).items():
        assert list(table.features)[-3:] == FEATURES
        np.testing.assert_allclose(table.features[FEATURES], [BY_HAND[name]] * len(table.features))
        scaler = fitted.series[name].scaler
        assert scaler.columns[-3:] == tuple(FEATURES)  # the panel's scale is kept, though nothing varies in the series
        assert scaler.center[-3:] == (0, 0, 0) and scaler.scale[-3:] == (1, 1, 1)
    assert fitted.model.config.n_features == len(scaler.columns)


def test_a_frame_with_unique_id_codes_and_further_rows_is_the_same(fitted):
    given = pd.concat([FACTS, pd.DataFrame({"sector": [None], "beta": [np.nan]}, ["IWM"])])  # nobody asks for IWM
    given = given.assign(sector=given.sector.astype("category")).rename_axis("unique_id").reset_index()
    made = Forecaster(static=given, **SMALL).fit(long_frame(**panel_of()), progress=False)
    assert made.series == fitted.series
    made, fitted = (one.start(panel_of()) for one in (made, fitted))  # other tests may have gone on from the fit
    pd.testing.assert_frame_equal(made.predict(), fitted.predict())
    assert clone(made).static.equals(given)


def test_streams_go_on_as_a_table_does(fitted):
    fitted.start(panel_of())
    followed = [fitted.update(panel_of(b, a)) for a, b in [(1500, 1501), (1501, 1520)]][-1]
    whole = fitted.predict(panel_of(1520)).set_index("unique_id")
    last = followed.groupby("unique_id").tail(1).set_index("unique_id").loc[whole.index]
    np.testing.assert_allclose(last[PRICE], whole[PRICE], rtol=1e-6)


def test_a_panel_is_saved_loaded_and_gone_on_from(tmp_path):
    made = Forecaster(horizon=[1, 5], **SMALL).fit(panel_of(), static=FACTS, progress=False)
    made.save(tmp_path)
    loaded = Forecaster.load(tmp_path)
    assert loaded.series == made.series
    pd.testing.assert_frame_equal(loaded.predict(), made.predict())
    pd.testing.assert_frame_equal(loaded.update(panel_of(1510, 1500)), made.update(panel_of(1510, 1500)))
    loaded.fit(panel_of(1600), warm_start=True, progress=False)  # the columns are those of the folder
    assert loaded.series["QQQ"].covariates.static == made.series["QQQ"].covariates.static
    with pytest.raises(SeriesError, match="series 'IWM': static has no row for it"):
        loaded.fit(panel_of(1600) | {"IWM": bars("QQQ")}, warm_start=True, progress=False)


def test_a_new_series_of_an_unknown_category_joins_by_a_warm_start(caplog):
    made = Forecaster(**SMALL).fit(panel_of(), static=FACTS, progress=False)
    more = pd.concat([FACTS, pd.DataFrame({"sector": ["small"], "beta": [1.2]}, ["IWM"])])
    with caplog.at_level(logging.WARNING):
        made.fit(panel_of(1600) | {"IWM": bars("QQQ")}, static=more, warm_start=True, progress=False)
    assert [r.message for r in caplog.records if "unknown to the fit" in r.message] == [
        "unknown to the fit, and forecast as a category that is left out: static sector=small (IWM)"
    ]
    own = table_of(made.series["IWM"], bars("QQQ")).features[FEATURES].iloc[0]
    np.testing.assert_allclose(own, [0, 0, (1.2 - 31 / 30) / np.sqrt(0.38 / 9)])
    assert np.isfinite(numbers(made.predict())).all()


def test_cross_validation_takes_them(fitted):
    tested = Forecaster(static=FACTS, **SMALL).cross_validation(panel_of(), n_splits=2, progress=False)
    given = Forecaster(**SMALL).cross_validation(panel_of(), n_splits=2, static=FACTS, progress=False)
    plain = Forecaster(**SMALL).cross_validation(panel_of(), n_splits=2, progress=False)
    pd.testing.assert_frame_equal(tested, given)
    assert tested.date.equals(plain.date) and np.isfinite(numbers(tested)).all()
    assert not np.allclose(tested.regime_1, plain.regime_1)  # of another network
    refits = Forecaster(static=FACTS, **SMALL).cross_validation(
        panel_of(1000), n_splits=2, refit_every=100, progress=False
    )
    assert refits.groupby(["unique_id", "date"]).size().max() == 1


@pytest.fixture(scope="module")
def trained():
    "Trained until the heads are not zero, so that inputs move the forecasts."
    settings = SMALL | {"training": TrainConfig(epochs=5, learning_rate=0.01, accumulate=1)}
    made = Forecaster(**settings).fit(panel_of(), static=FACTS, progress=False)
    shares = {"price_share": 1.0, "direction_share": 1.0, "volatility_share": 1.0}
    made.series = {n: f._replace(calibration=f.calibration._replace(**shares)) for n, f in made.series.items()}
    return made


def test_another_sector_moves_the_forecast_until_it_is_taken_back(trained, caplog):
    own = trained.predict(panel_of())
    moved = trained.predict(panel_of(), static=FACTS.assign(sector="tech"))
    changed = np.abs(moved.forecast_variance / own.forecast_variance - 1) > 1e-6
    assert changed.tolist() == [True, False, True]  # QQQ was tech before
    only = trained.predict(panel_of(), static=FACTS[:1].assign(sector="tech"))
    assert (np.abs(only.forecast_variance / own.forecast_variance - 1) > 1e-6).tolist() == [True, False, False]
    pd.testing.assert_frame_equal(trained.predict(panel_of()), own)
    assert "unknown" not in caplog.text
    trained.start(panel_of(), static=FACTS.assign(sector="tech"))
    followed = trained.update(panel_of(1510, 1500)).groupby("unique_id", sort=False).tail(1)
    whole = trained.predict(panel_of(1510), static=FACTS.assign(sector="tech"))
    np.testing.assert_allclose(followed[PRICE], whole[PRICE], rtol=1e-6)
    trained.start(panel_of(), static=FACTS)
    pd.testing.assert_frame_equal(trained.predict(), own)


def test_an_unknown_category_counts_as_the_average_and_is_said_once(trained, caplog):
    "The vector of zeros: the same for every unknown name, another one than that of each known category."
    space, mining = (trained.predict(panel_of(), static=FACTS.assign(sector=name)) for name in ("space", "mining"))
    assert caplog.text.count("unknown to the fit") == 2  # one for each call, for all three series
    assert "static sector=space (SPY, QQQ, DIA)" in caplog.text
    pd.testing.assert_frame_equal(space, mining)
    assert np.isfinite(numbers(space)).all()
    for known in ("broad", "tech"):
        other = trained.predict(panel_of(), static=FACTS.assign(sector=known))
        assert (np.abs(other.forecast_variance / space.forecast_variance - 1) > 1e-6).all()


def test_nothing_looks_ahead(trained):
    one = Forecaster(**SMALL)
    one.model, one.series = trained.model, {"series": trained.series["QQQ"]}
    assert audit(one, bars("QQQ").tail(600), None)


def test_a_forecast_is_explained_by_them_too(trained):
    parts = trained.explain(panel_of(1000), by="feature")
    assert set(FEATURES) <= set(parts.feature)
    assert parts[parts.feature.isin(FEATURES)].contribution.abs().max() > 0


def test_one_series_has_nothing_to_differ_from(caplog):
    made = Forecaster(**SMALL).fit(bars("SPY"), static=FACTS[:1], progress=False)
    assert "left out, since one series has nothing to differ from: static sector, beta" in caplog.text
    plain = Forecaster(**SMALL).fit(bars("SPY"), progress=False)
    assert made.series == plain.series
    with pytest.raises(ValueError, match="fitted without such columns"):
        made.predict(bars("SPY"), static=FACTS[:1])


def test_a_column_that_all_series_share_is_left_out(caplog):
    tables = price_tables(panel_of(), 1, None, 15.0, static=FACTS.assign(country="US", index=1))
    assert "left out, since all 3 series have the same: static country, index" in caplog.text
    assert list(tables["SPY"].features)[-3:] == FEATURES


def dated(frame):
    return frame.assign(listed=pd.Timestamp("2000-01-01"))


@pytest.mark.parametrize(
    "static, message",
    [
        ("sector", "static='sector': give a frame"),
        (FACTS[:2], r"series 'DIA': static has no row for it \(its rows are SPY, QQQ\)"),
        (FACTS.assign(sector=["a", None, "b"]), "series 'QQQ': sector of static is .*name the category"),
        (FACTS.assign(sector=pd.Categorical(["a", None, "b"])), "series 'QQQ': sector of static is .*name the cat"),
        (FACTS.assign(beta=[1, 2, np.nan]), "series 'DIA': beta of static is nan for it: fill in a number"),
        (pd.concat([FACTS, FACTS]), "static has two rows named 'SPY'"),
        (FACTS.rename(columns={"beta": "rsi_14"}), "column 'rsi_14' of static has the name of another one: rename it"),
        (FACTS.rename(columns={"beta": "volume"}), "column 'volume' of static has the name of another one: rename it"),
        (FACTS.rename(columns={"sector": "vix"}), "column 'vix' of static has the name of another one: rename it"),
        (dated(FACTS), "listed of static holds datetime64"),
    ],
)
def test_what_cannot_be_used_is_one_clear_error(static, message):
    frames = {name: frame.assign(vix=1.0) for name, frame in panel_of(900).items()}
    with pytest.raises(ValueError, match=message):
        Forecaster(exogenous="vix", **SMALL).fit(frames, static=static, progress=False)


def test_what_cannot_be_used_later_is_one_clear_error(fitted):
    for static, message in [
        (FACTS[["sector"]], "static lacks the column 'beta' of the fit"),
        (FACTS.assign(beta="high"), "beta of static holds text"),
        (FACTS.assign(sector=np.nan), "sector of static is nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            fitted.predict(panel_of(), static=static)
    with pytest.raises(ValueError, match="give prices too"):
        fitted.predict(static=FACTS)


@pytest.mark.slow
def test_a_planted_sector_is_found():
    "Most of the best gain with the column and nothing without it; an unknown sector costs less than it gains."
    shares = gain_shares(sector_scores([2]))  # not every seed finds it in so few epochs
    assert (shares["with"] > 0.7).all() and (shares["without"].abs() < 0.1).all() and (shares["unknown"] > -0.6).all()


def test_a_share_of_windows_has_the_category_left_out():
    "A quarter again in training and validation, without the category and with all else; none where there is none."
    train = {name: slice(0, 900) for name in panel_of()}
    plain, own = (price_tables(panel_of(), 1, None, 15.0, static=given) for given in (None, FACTS))
    windows, made = WindowConfig(32, stride=16, augment=False), {}
    for kind, given in (("plain", plain), ("own", own)):
        scaled = {name: scale_table(given[name], train[name]) for name in given}
        made[kind] = make_loaders(scaled, split_panel(given, train, windows), windows)
    for part, least in (("train", 0.2), ("valid", 0.1)):
        before, after = (getattr(made[kind], part).dataset for kind in ("plain", "own"))
        extra = len(after) - len(before)
        assert least < extra / len(before) < 0.4
        sector = torch.stack([after[i][0][:, -3:-1].abs().sum() for i in range(len(after))])
        beta = torch.stack([after[i][0][:, -1].abs().min() for i in range(len(after))])
        assert int((sector == 0).sum()) == extra and (beta > 0).all()
