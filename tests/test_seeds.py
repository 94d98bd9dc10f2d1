"""Scores over seeds: numbers by hand, and each further seed as a run of its own."""

import json
import statistics

import numpy as np
import pandas as pd
import pytest

from smlstm.using.parameters import ParameterError, check_parameters
from smlstm.using.run import run
from smlstm.using.seeds import ONE_SEED, seed_scores, seed_sentence, seed_table

SMALL = dict(ticker="SPY", source="sample", start="2010-01-01", epochs=4, n_splits=2, hidden_size=8, n_heads=1)
SMALL |= dict(n_layers=1, seq_length=64, stride=64, batch_size=8, accumulate=1, learning_rate=0.02)


def frame(price, probability, variance):
    "Four rows whose price rises by a tenth, falls back, and so on, and whose variance is one."
    dates = pd.bdate_range("2024-01-01", periods=5)
    return pd.DataFrame(
        {
            "date": dates[:-1],
            "fold": [1, 1, 2, 2],
            "close": [100.0, 110.0, 100.0, 110.0],
            "target_date": dates[1:],
            "actual_close": [110.0, 100.0, 110.0, 100.0],
            "forecast_close": price,
            "up_probability": probability,
            "actual_up": [1.0, 0.0, 1.0, 0.0],
            "forecast_variance": variance,
            "actual_variance": 1.0,
            "ewma_variance": [2.0, 1.0, 2.0, 1.0],
            "regime_1": 1.0,
        }
    )


def test_scores_of_seeds_by_hand():
    "Forecasts of 100 and about one half, and right ones. A variance twice as high costs 0.5 - log 0.5 - 1."
    first = frame(100.0, [0.5, 0.4, 0.6, 0.5], [2.0, 2.0, 1.0, 1.0]).assign(share_probability=0.5)
    rows = seed_scores({3: first, 4: frame([110.0, 100.0, 110.0, 100.0], [0.9, 0.1, 0.9, 0.1], [1.0, 1.0, 1.0, 1.1])})
    assert [row["seed"] for row in rows] == [3, 4]
    assert [row["mape"] for row in rows] == pytest.approx([100 / 11 / 2, 0])
    assert [row["brier"] for row in rows] == pytest.approx([(0.25 + 0.16 + 0.16 + 0.25) / 4, 0.01])
    assert rows[0]["qlike"] == pytest.approx((0.5 + np.log(2) - 1) / 2)
    assert rows[0]["brier_share"] == rows[1]["brier_share"] == 0.25  # of the first, beside both
    assert set(rows[0]["verdicts"]) == {"price", "direction", "volatility"}
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_the_table_shows_mean_and_deviation():
    rows = [
        {"seed": n, "mape": m, "accuracy": 0.5, "brier": 0.25, "qlike": q, "qlike_ewma": 0.4, "verdicts": {}}
        for n, m, q in ((5, 0.7, 0.31), (6, 0.8, 0.30), (7, 0.9, 0.35))
    ]
    table = seed_table(rows).set_index("score")
    assert table.loc["Volatility, QLIKE"].tolist() == [
        "0.3100",
        f"{statistics.mean([0.31, 0.30, 0.35]):.4f}",
        f"{statistics.stdev([0.31, 0.30, 0.35]):.4f}",
        "0.3000",
        "0.3500",
        "0.4000 (EWMA)",
    ]
    assert table.loc["Price, MAPE", "deviation"] == "0.1000%" and table.loc["Direction, hits", "baseline"] == "–"
    assert table.columns[0] == "seed 5, this run"


def test_verdicts_are_counted():
    rows = [{"verdicts": {"price": p, "volatility": "skill shown"}} for p in ("no skill shown", "too few", "too few")]
    sentence = seed_sentence(rows)
    assert "price: too few (2 of 3), no skill shown (1 of 3)" in sentence and "skill shown (3 of 3)" in sentence
    assert seed_sentence(rows[:1]) == ONE_SEED


@pytest.mark.parametrize("seeds", [0, 1.5, True, 101])
def test_a_number_of_seeds_that_cannot_work_is_refused(seeds):
    with pytest.raises(ParameterError, match="seeds must be a whole number from 1 to 100"):
        check_parameters(seeds=seeds)


@pytest.mark.slow
def test_a_further_seed_is_a_run_with_that_seed(tmp_path):
    several = run(SMALL, seed=7, seeds=2, output_dir=str(tmp_path / "several"))
    alone = run(SMALL, seed=8, output_dir=str(tmp_path / "alone"))
    rows, (other,) = several.metrics["SPY"]["seeds"], alone.metrics["SPY"]["seeds"]
    assert [row["seed"] for row in rows] == [7, 8]
    assert rows[1] == other and rows[0]["qlike"] != rows[1]["qlike"]
    assert rows[0]["qlike"] == several.metrics["SPY"]["overall"]["volatility"]["qlike"]
    page = (several.folder / "report.html").read_text(encoding="utf-8")
    assert "Scores over seeds" in page and "seed 7, this run" in page and "(2 of 2)" in page
    assert ONE_SEED in (alone.folder / "report.html").read_text(encoding="utf-8").replace("\n", " ")
    assert not [path for path in (tmp_path / "several").iterdir() if path.name.startswith(".SPY.") and path.is_dir()]
