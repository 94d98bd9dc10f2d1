"""A search: rows it may use, what it finds, what it does after it was killed, and what is refused."""

import multiprocessing
import os
import signal

import numpy as np
import pandas as pd
import pytest
from joblib import parallel_config
from test_forecaster_use import bars
from test_sweep import two_workers

import smlstm.using.search as module
from smlstm.using.forecaster import Forecaster
from smlstm.using.search import inner_prices, plot_search, search
from smlstm.using.sweep import sweep
from smlstm.using.tables import build_table
from smlstm.using.walkforward import panel_folds

pytest.importorskip("optuna")
SPACE = dict(hidden_size=[4, 8], learning_rate=(1e-3, 3e-2, "log"), n_heads=[1], n_layers=[1], epochs=[1])
SPACE |= dict(seq_length=[32], stride=[64])


@pytest.fixture(autouse=True)
def in_this_process():
    "Fits without new processes, whose start takes longer than these fits."
    with parallel_config(backend="threading", n_jobs=1):
        yield


def searched(folder, prices=None, n_trials=4, space=SPACE, **options):
    own = dict(n_splits=3, inner_splits=2, device="cpu", progress=False, attempts=1) | options
    return search(bars(1400) if prices is None else prices, space, n_trials, folder, **own)


def test_rows_that_are_reported_are_not_used(tmp_path):
    "Bars from the first test period on are changed beyond recognition: the same trials, with the same scores."
    prices = bars(1400)
    table = build_table(prices)
    first = panel_folds({"A": table}, 3)[0]["A"]
    changed = prices.copy()
    changed.loc[table.features.index[first.test.start] :, ["open", "high", "low", "close"]] *= 7.0
    one, other = searched(tmp_path / "a", prices), searched(tmp_path / "b", changed)
    pd.testing.assert_frame_equal(one.trials, other.trials)
    assert one.best == other.best
    (kept,) = (pd.read_parquet(path) for path in (tmp_path / "a" / "prices").iterdir())
    assert kept.index[-1] < table.features.index[first.test.start]
    assert len(inner_prices({"A": prices}, 3)["A"]) == table.warmup + first.train.stop + 1  # the targets of its rows


def test_the_score_of_a_trial_is_that_of_a_sweep(tmp_path):
    "The same settings on the same rows by `sweep`: the mean over its folds. And the best is the least."
    found = searched(tmp_path / "search")
    inner = inner_prices({"series": bars(1400)}, 3)
    for row in found.trials.itertuples():
        chosen = {name: getattr(row, name) for name in SPACE}
        swept = sweep(inner, {"one": chosen}, tmp_path / "sweep", n_splits=2, device="cpu", progress=False)
        assert swept.volatility_qlike.mean() == pytest.approx(row.volatility_qlike, rel=1e-9)
    best = found.trials.loc[found.trials.volatility_qlike.idxmin()]
    assert found.score == best.volatility_qlike
    assert found.best["architecture"]["hidden_size"] == best.hidden_size
    assert found.best["training"]["learning_rate"] == best.learning_rate


def test_the_best_is_a_configuration_of_a_forecaster_and_of_a_run(tmp_path):
    from smlstm.using.parameters import RULES

    found = searched(tmp_path)
    forecaster = Forecaster(**found.best, device="cpu").fit(bars(1400), progress=False)
    assert len(forecaster.predict()) == 1 and forecaster.windows.seq_length == 32
    assert set(found.parameters) <= set(RULES) and found.parameters["search_trials"] == 4
    assert plot_search(found).axes[0].get_title("left") == "4 trials of a search"


def test_a_search_goes_on_and_is_the_same_as_one_without_a_break(tmp_path):
    searched(tmp_path / "broken", n_trials=4)
    on, whole = searched(tmp_path / "broken", n_trials=8), searched(tmp_path / "whole", n_trials=8)
    pd.testing.assert_frame_equal(on.trials, whole.trials)
    again = searched(tmp_path / "whole", n_trials=8)
    pd.testing.assert_frame_equal(again.trials, whole.trials)


def dies(folder):
    "A search whose process is killed in its second batch, after its trials were asked for."
    left, real = [2], module.fan_out

    def mortal(*arguments, **options):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    module.fan_out = mortal
    searched(folder, n_trials=8)


def test_a_killed_search_goes_on(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=dies, args=(tmp_path / "killed",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    on, whole = searched(tmp_path / "killed", n_trials=8), searched(tmp_path / "whole", n_trials=8)
    pd.testing.assert_frame_equal(on.trials, whole.trials)


@pytest.mark.parametrize("name", [pytest.param("loky", marks=pytest.mark.slow), "dask", "ray"])
def test_workers_find_the_same(name, tmp_path):
    with two_workers(name):
        spread = searched(tmp_path / name, n_trials=2)
    pd.testing.assert_frame_equal(spread.trials, searched(tmp_path / "alone", n_trials=2).trials)


def test_calendar_features_reach_the_trials(tmp_path):
    "They are features like others, so that every trial has another score with them."
    plain, known = (searched(tmp_path / str(given), n_trials=2, calendar_features=given) for given in (False, "XNYS"))
    assert (plain.trials.hidden_size == known.trials.hidden_size).all()
    assert (plain.trials.volatility_qlike != known.trials.volatility_qlike).all()
    assert known.best["calendar_features"] == "XNYS" and known.parameters["calendar_features"]
    assert "calendar_features" not in plain.best


def test_settings_that_cannot_work_together_are_a_trial_without_a_score(tmp_path):
    found = searched(tmp_path, space=SPACE | dict(hidden_size=[4, 6], n_heads=[1, 4]), n_trials=8)
    bad = (found.trials.hidden_size == 6) & (found.trials.n_heads == 4)
    assert len(found.trials) == 8 and found.trials.error.notna().equals(bad) and bad.any()
    assert found.trials.volatility_qlike.isna().equals(bad)
    with pytest.raises(RuntimeError, match="no trial of the search in .* has a score"):
        searched(tmp_path / "none", space=SPACE | dict(hidden_size=[6], n_heads=[4]), n_trials=2)


def test_lists_are_choices_and_come_back_as_lists(tmp_path):
    space = SPACE | dict(scales=[[], [1, 5]])
    found = searched(tmp_path, bars(1800), space=space, n_trials=4)
    assert {tuple(scales) for scales in found.trials.scales} == {(), (1, 5)}
    assert found.best["architecture"]["scales"] in ([], [1, 5])


def test_several_series_count_alike(tmp_path):
    both = {"SPY": bars(1400), "QQQ": bars(1400, "QQQ")}
    found = searched(tmp_path / "both", both, n_trials=1)
    each = [searched(tmp_path / name, {name: frame}, n_trials=1).score for name, frame in both.items()]
    assert found.score == pytest.approx(np.mean(each), rel=1e-9)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(space={"hiden_size": [4]}), "did you mean 'hidden_size'?"),
        (dict(space={"epochs": 5}), "space: epochs=5: give a list of values"),
        (dict(space={"dropout": (0.5, 0.1)}), "space: dropout=(0.5, 0.1)"),
        (dict(space={"dropout": (0.1, 0.5, "linear")}), "give a list of values, a range"),
        (dict(space={"dropout": [0.1, 3.0]}), "dropout"),
        (dict(space={}), "space is empty"),
        (dict(n_trials=0), "n_trials=0"),
        (dict(inner_splits=1), "inner_splits=1"),
    ],
    ids=["misspelled", "a number", "upside down", "no scale", "no dropout", "empty", "no trials", "one fold"],
)
def test_a_search_that_cannot_work_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError) as error:
        searched(tmp_path, **change)
    assert message in str(error.value) and not (tmp_path / "study.log").exists()


def test_a_folder_belongs_to_one_search(tmp_path):
    searched(tmp_path, n_trials=1)
    for other in (
        dict(space=SPACE | dict(epochs=[2])),
        dict(score="price_mape"),
        dict(prices=bars(1405)),
        dict(seed=1),
    ):
        with pytest.raises(ValueError, match="holds the trials of another search"):
            searched(tmp_path, n_trials=1, **other)


def test_without_optuna_the_error_tells_what_to_do(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "optuna.samplers", None)
    with pytest.raises(ImportError, match=r'pip install "smlstm\[search\]"'):
        searched(tmp_path)


def test_the_report_counts_the_trials():
    from smlstm.using.score_tables import search_sentence

    assert "best of 40 that a search tried" in search_sentence({"parameters": {"search_trials": 40}})
    assert search_sentence({"parameters": {"search_trials": 0}}) == search_sentence({}) == ""
