"""What the parts of the model are worth: the record beside the notebook is whole; each is measured anew with --slow."""

import json
import statistics
from pathlib import Path

import pytest

from smlstm.evidence.planted_scores import CONTENDERS, PARTS, Figure, scoreboard
from smlstm.evidence.product import PRODUCT_MEASURES, read_product
from smlstm.evidence.scoreboard import MEASURES, judged, main, measure_figures, random_walk, read_record

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
        assert len(part) >= 5 and part["QLIKE, model"].nunique() == len(part)  # each seed is a run of its own
        assert part["QLIKE, linear"].nunique() == 1  # contenders know no seed
    for part in scores.values():
        for head in ("price", "direction", "volatility"):
            assert set(part[f"verdict, {head}"].str.split(":").str[0]) <= WORDS
        assert (part.filter(like="share of") <= 1.0).all(axis=None)


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
