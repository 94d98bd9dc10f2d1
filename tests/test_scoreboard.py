"""What the parts of the model are worth: the record beside the notebook is whole; each is measured anew with --slow."""

import json
import statistics
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from statsmodels.api import OLS

from smlstm.evidence.ablations import build_models
from smlstm.evidence.planted_scores import CONTENDERS, PARTS, Figure, scoreboard
from smlstm.evidence.product import PRODUCT_MEASURES, pooled_row, read_product
from smlstm.evidence.scoreboard import MEASURES, judged, main, measure_figures, random_walk, read_record
from smlstm.judging.scores import FORECAST_COLUMNS
from smlstm.model.model import SMLSTMConfig

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "nbs" / "evidence" / "scoreboard.json"
PRODUCT = RECORD.with_name("product.json")
WORDS = {"skill shown", "no skill shown", "too few observations to tell"}


def test_the_record_is_whole_and_in_order():
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert list(record) == list(MEASURES)
    for part in record.values():
        assert part["cpu_seconds"] > 0 and part["measured"] and part["torch"]
    assert len(scoreboard(read_record(RECORD))) == sum(len(part["figures"]) for part in record.values())


def test_every_recorded_verdict_follows_from_its_numbers():
    facts = {figure.what.split(", ")[0]: figure for figure in read_record(RECORD)}
    for what in ("momentum", "regime switch", "recall"):
        parts = facts[f"parts of the model on the planted {what}"]
        middle = {name: statistics.median(parts.facts[name]) for name in PARTS}
        assert parts.holds == (middle["SM-LSTM"] >= max(middle.values()) - 0.01)
    assert "nn.LSTM" in facts["parts of the model on the planted regime switch"].facts
    garch = facts["planted GARCH(1,1)"]
    way = sorted(
        (c - ours) / (c - best)
        for c, ours, best in zip(*(garch.facts[name] for name in ("constant", "SM-LSTM", "true variance")), strict=True)
    )[2]
    assert garch.holds == (way >= 0.85) and f"{garch.facts['best possible']:.4f}" in garch.measured
    recall = facts["associative recall"]
    assert recall.holds == (
        statistics.median(recall.facts["SM-LSTM"]) > 0.99
        and max(map(statistics.median, recall.facts["nn.LSTM"].values())) < 0.6
    )
    noise = facts["pure noise"]
    assert set(noise.facts) == set(CONTENDERS) and noise.holds == all(
        len(heads) == 20 and sum(map(bool, heads.values())) <= 1 for heads in noise.facts.values()
    )


def test_the_products_record_is_of_several_seeds():
    scores = read_product(PRODUCT)
    assert list(scores) == [name for name in PRODUCT_MEASURES if name in scores]
    assert {"SPY", "QQQ", "threads", "regime switch", "GJR-GARCH", "constant variance", "noise"} <= set(scores)
    for name in ("SPY", "QQQ"):
        part = scores[name]
        assert len(part) >= 10 and part["QLIKE, model"].nunique() == len(part)  # each seed is a run of its own
        assert part["QLIKE, linear"].nunique() == 1  # contenders know no seed
    worth = scores["ablations"].groupby(["series", "network"]).seed.nunique()
    assert worth.min() >= 5 and set(worth.index.levels[1]) == set(build_models(SMLSTMConfig(n_features=1)))
    assert len(scores["regime switch, 20,000 bars"]) >= 5 and (scores["CPU seconds"] > 0).all(axis=None)
    p_values = pd.concat([part.filter(like="p, ").stack() for part in scores.values()])
    assert p_values.abs().between(0, 1).all()
    for part in scores.values():
        for head in ("price", "direction", "volatility") if "verdict, price" in part else ():
            assert set(part[f"verdict, {head}"].str.split(":").str[0]) <= WORDS
        assert (part.filter(like="share of") <= 1.0).all(axis=None)


def test_pooled_losses_by_a_regression_on_a_constant():
    "On the dates that both series have, the mean of their differences, with the errors of Newey and West."
    rng, days = np.random.default_rng(0), pd.bdate_range("2010-01-01", periods=600)
    actual, model, linear, trees = np.exp(rng.normal(0, 0.3, (4, 2, 600)))
    frames = [
        pd.DataFrame({"date": days, **dict.fromkeys(FORECAST_COLUMNS[1:], 1.0)})
        .assign(
            target_date=days + pd.Timedelta(days=1),
            actual_variance=a,
            forecast_variance=m,
            linear_variance=1.1 * x,
            boosted_variance=1.3 * b,
        )
        .iloc[rows]
        for a, m, x, b, rows in zip(actual, model, linear, trees, (slice(0, 550), slice(50, 600)))
    ]
    loss = lambda forecast: (actual / forecast - np.log(actual / forecast) - 1)[:, 50:550]
    difference = (loss(1.1 * linear) - loss(model)).mean(0)
    fit = OLS(difference, np.ones(500)).fit(
        cov_type="HAC", cov_kwds={"maxlags": 8, "use_correction": False}, use_t=True
    )
    found = pooled_row(frames)
    assert found["QLIKE saved, linear"] == pytest.approx(difference.mean())
    assert found["p, QLIKE against linear"] == pytest.approx(np.copysign(fit.pvalues[0], difference.mean()), rel=0.05)
    assert found["QLIKE saved, boosted"] > found["QLIKE saved, linear"]


def test_the_front_page_shows_the_products_record():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("SPY", "QQQ"):
        own = read_product(PRODUCT)[name]["QLIKE, model"]
        assert f"{own.mean():.4f} ± {own.std():.4f}" in page


def test_nothing_can_be_known_about_a_random_walk():
    walk = random_walk(700, seed=1)
    assert (walk.high >= walk[["open", "close"]].max(axis=1)).all() and (
        walk.low <= walk[["open", "close"]].min(axis=1)
    ).all()
    assert set(judged(walk)) == {"price", "direction", "volatility"}


def test_an_unknown_measure_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "luck"])
    assert "luck" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURES)
def test_the_figure_is_reached(name):
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))[name]["figures"]
    for now, then in zip(measure_figures(name)["figures"], recorded, strict=True):
        assert Figure(**now).holds == then["holds"], f"{now['what']}: {now['measured']}, recorded {then['measured']}"
