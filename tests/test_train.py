"""The main job, small, as a user runs it: what it leaves, what it refuses, and that it repeats itself."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import exchange_calendars
import numpy as np
import pandas as pd
import papermill
import pytest

from smlstm.using.parameters import ParameterError
from smlstm.using.run import run as run_here

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "train.ipynb"
SMALL = dict(
    source="sample",
    start="2010-01-01",
    epochs=2,
    n_splits=2,
    hidden_size=8,
    n_heads=1,
    n_layers=1,
    seq_length=64,
    stride=64,
)
FILES = {
    "model.safetensors",
    "stream.safetensors",
    "config.json",
    "metrics.json",
    "forecasts.csv",
    "report.html",
    "manifest.json",
}


def run(folder, **parameters):
    parameters = {"ticker": "SPY", "output_dir": str(folder / "runs"), **SMALL, **parameters}
    papermill.execute_notebook(NOTEBOOK, folder / "out.ipynb", parameters, progress_bar=False, cwd=folder)
    return folder / "runs" / parameters["ticker"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("first"))


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_leaves_every_file_and_nothing_else(finished):
    assert {p.name for p in finished.iterdir()} == FILES
    assert {p.name for p in finished.parent.iterdir()} <= {"SPY", ".SPY.lock", ".SPY.running"}


def test_metrics_put_each_score_beside_its_baseline(finished):
    metrics = read(finished, "metrics.json")
    assert set(metrics) >= {"data", "folds", "overall"} and len(metrics["folds"]) == 2
    for fold in (*metrics["folds"], metrics["overall"]):
        assert {"mape", "mape_persistence"} <= set(fold["price"])
        assert {"accuracy", "base_rate"} <= set(fold["direction"])
        assert {"qlike", "qlike_ewma"} <= set(fold["volatility"])
        assert len(fold["regime"]) == 4 and abs(sum(fold["regime"]) - 1) < 1e-5
    for fold in metrics["folds"]:
        assert fold["train"]["last"] < fold["test"]["first"]


def test_scores_follow_from_the_forecasts(finished):
    metrics, forecasts = read(finished, "metrics.json"), pd.read_csv(finished / "forecasts.csv")
    known = forecasts.dropna(subset="actual_close")
    mape = 100 * ((known.actual_close - known.forecast_close) / known.actual_close).abs().mean()
    assert mape == pytest.approx(metrics["overall"]["price"]["mape"], rel=1e-6)
    ratio = known.actual_variance / known.forecast_variance
    assert (ratio - np.log(ratio) - 1).mean() == pytest.approx(metrics["overall"]["volatility"]["qlike"], rel=1e-6)


def test_every_contender_stands_in_the_tables(finished):
    metrics, page = read(finished, "metrics.json"), (finished / "report.html").read_text(encoding="utf-8")
    who = {head: {row["contender"] for row in rows} for head, rows in metrics["comparison"].items()}
    assert who["price"] >= {"model", "persistence", "drift", "ar", "linear", "lstm"}
    assert who["direction"] >= {"model", "always up", "share", "linear", "lstm"}
    assert who["volatility"] >= set("model ewma constant har log_har garch gjr range_garch linear lstm".split())
    qlike = {row["contender"]: row["QLIKE"] for row in metrics["comparison"]["volatility"]}
    assert qlike["model"] == pytest.approx(metrics["overall"]["volatility"]["qlike"]) and qlike[
        "ewma"
    ] == pytest.approx(metrics["overall"]["volatility"]["qlike_ewma"])
    assert metrics["overall"]["audit"]["causal"] is True and 0.8 < metrics["overall"]["coverage"]["close"] < 1
    for heading in (
        "Against all contenders",
        "Did the 90% intervals hold?",
        "Calibration",
        "Memory",
        "What it would have earned",
        "GJR-GARCH-t",
        "Causality audit",
    ):
        assert heading in page
    assert page.index('class="cards"') < page.index("Causality audit") < page.index("Against all contenders")


def test_forecasts_are_written_plainly(finished):
    lines = (finished / "forecasts.csv").read_text(encoding="utf-8").splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","))) for line in (lines[1], lines[-1])]
    assert all(len(row["date"]) == len("2018-12-31") for row in rows) and [row["fold"] for row in rows] == ["0", ""]
    assert not [name for name in lines[0].split(",") if "-" in name]
    close, lower, upper = (float(rows[-1][name]) for name in ("forecast_close", "lower_close", "upper_close"))
    assert lower < close < upper  # the next forecast has its interval in the same columns


def test_says_which_series_this_is(finished):
    manifest = read(finished, "manifest.json")
    assert manifest["data"]["symbol"] == "^GSPC" and len(manifest["data"]["sha256"]) == 64
    assert manifest["seed"] == 0 and manifest["versions"]["torch"] and manifest["seconds"]["training"] > 0
    assert "S&amp;P 500" in (finished / "report.html").read_text(encoding="utf-8")
    assert "S&P 500" in (finished.parent.parent / "out.ipynb").read_text(encoding="utf-8")


def test_three_lines_repeat_the_last_forecast(finished):
    from smlstm.data.prices import load_prices
    from smlstm.using.forecaster import Forecaster

    again = Forecaster.load(finished).predict(load_prices("SPY", "sample", start=SMALL["start"]).frame).iloc[0]
    written = pd.read_csv(finished / "forecasts.csv").iloc[-1]
    assert str(again["date"].date()) in str(written["date"]) and pd.isna(written["actual_close"])
    for name in ("close", "forecast_close", "up_probability", "forecast_variance", "regime_1", "regime_4"):
        assert again[name] == pytest.approx(float(written[name]), rel=1e-12), name


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("retrieved", "created", "seconds")}
    return [without_times(v) for v in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_same_seed_same_numbers(finished, tmp_path):
    assert without_times(read(run(tmp_path), "metrics.json")) == without_times(read(finished, "metrics.json"))


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(finished, tmp_path):
    "Killed once the second fold has a checkpoint; started again, it ends with the scores of an uninterrupted run."
    flags = [
        word
        for name, value in {"ticker": "SPY", "output_dir": str(tmp_path / "runs"), **SMALL}.items()
        for word in ("-p", name, str(value))
    ]
    child = subprocess.Popen(
        [sys.executable, "-m", "papermill", str(NOTEBOOK), str(tmp_path / "out.ipynb"), *flags],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while (
        not (kept := list(tmp_path.glob("runs/.SPY.*/fold1/latest.safetensors")))
        and child.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    assert kept and child.wait() == -signal.SIGKILL and not (tmp_path / "runs" / "SPY").exists()
    first = kept[0].parent.with_name("fold0") / "latest.safetensors"
    first.write_bytes(first.read_bytes()[:-9])
    with pytest.raises(papermill.PapermillExecutionError, match="damaged.*delete it"):
        run(tmp_path)  # nobody's word is taken for it
    first.unlink()
    folder = run(tmp_path)
    printed = (tmp_path / "out.ipynb").read_text(encoding="utf-8")
    assert "An interrupted run left its training" in printed
    assert without_times(read(folder, "metrics.json")) == without_times(read(finished, "metrics.json"))
    assert {p.name for p in folder.parent.iterdir()} <= {"SPY", ".SPY.lock", ".SPY.running"}


@pytest.mark.slow
def test_a_panel_of_two_leaves_one_model_and_a_report_for_each(tmp_path):
    from smlstm.data.prices import load_prices
    from smlstm.using.forecaster import Forecaster

    folder = run(tmp_path, ticker="spy,QQQ")
    assert not (tmp_path / "runs" / "SPY").exists()
    folder = folder.with_name("SPY,QQQ")
    assert {p.name for p in folder.iterdir()} == FILES - {"report.html"} | {"report-SPY.html", "report-QQQ.html"}
    metrics, forecasts = read(folder, "metrics.json")["tickers"], pd.read_csv(folder / "forecasts.csv")
    assert (
        set(metrics) == set(forecasts.ticker) == {"SPY", "QQQ"}
        and metrics["SPY"]["overall"] != metrics["QQQ"]["overall"]
    )
    for one, other in zip(metrics["SPY"]["folds"], metrics["QQQ"]["folds"]):
        assert one["test"] == other["test"] and one["train"] == other["train"]
    told = (
        Forecaster.load(folder)
        .predict({t: load_prices(t, "sample", start=SMALL["start"]) for t in ("SPY", "QQQ")})
        .set_index("unique_id")
    )
    last = forecasts.groupby("ticker").tail(1).set_index("ticker")
    for name in ("SPY", "QQQ"):
        assert told.forecast_close[name] == pytest.approx(float(last.forecast_close[name]), rel=1e-12)
        assert name in (folder / f"report-{name}.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name, value",
    [
        ("epochs", -1),
        ("ticker", "NO SUCH TICKER"),
        ("interval", "7q"),
        ("ticker", "../../etc/passwd"),
        ("ticker", "SPY,SPY"),
        ("source", "nowhere.csv"),
        ("seq_length", 4096),
    ],
)
def test_a_wrong_value_is_refused_before_any_work(tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParameterError) as caught:
        run_here(SMALL, **{"output_dir": str(tmp_path / "runs"), name: value})
    assert name in str(caught.value) and repr(value) in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_ticker_is_refused_in_the_same_cell(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        papermill.execute_notebook(
            NOTEBOOK,
            tmp_path / "out.ipynb",
            {"output_dir": str(tmp_path / "runs"), **SMALL, "ticker": "NOSUCHTICKER"},
            progress_bar=False,
            cwd=tmp_path,
        )
    assert "NOSUCHTICKER" in caught.value.evalue
    assert "start_job" in "".join(caught.value.source)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_an_ensemble_leaves_the_same_files_and_goes_on_from_them(tmp_path):
    from smlstm.data.prices import load_prices
    from smlstm.using.ensemble import SMLSTMEnsemble
    from smlstm.using.forecaster import Forecaster

    folder = run(tmp_path, ensemble=True, start="2012-01-01", epochs=1)
    assert {p.name for p in folder.iterdir()} == FILES
    assert read(folder, "manifest.json")["parameters"]["ensemble"] is True
    assert "Member weights" in (folder / "report.html").read_text(encoding="utf-8")
    again, written = Forecaster.load(folder), pd.read_csv(folder / "forecasts.csv").iloc[-1]
    assert isinstance(again.model, SMLSTMEnsemble) and [m.scale for m in again.model.config.members] == [
        1,
        1,
        1,
        1,
        5,
        21,
    ]
    tomorrow = again.predict(load_prices("SPY", "sample", start="2012-01-01")).iloc[0]
    for name in ("forecast_close", "up_probability", "forecast_variance", "regime_1"):
        assert tomorrow[name] == pytest.approx(float(written[name]), rel=1e-9), name


def test_one_call_gives_the_numbers_of_the_notebook(finished, tmp_path):
    import smlstm

    result = smlstm.run({"output_dir": str(tmp_path), **SMALL})
    assert result.folder == tmp_path / "SPY" and {p.name for p in result.folder.iterdir()} == FILES
    assert without_times(read(result.folder, "metrics.json")) == without_times(read(finished, "metrics.json"))
    assert result.metrics["SPY"]["overall"]["verdicts"] == read(finished, "metrics.json")["overall"]["verdicts"]
    assert {p.name for p in tmp_path.iterdir()} == {"SPY", ".SPY.lock", ".SPY.running"}


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    "Another process holds the lock: this one is told so, before it has trained; afterwards it may."
    from smlstm.data.files import FolderInUse
    from smlstm.using.run import start_job
    from smlstm.using.runfolder import lock_run

    def hold(ready, release):
        held = lock_run(tmp_path, "SPY")
        ready.set()
        release.wait()
        held.release()

    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(ready, release))
    other.start()
    ready.wait()
    with pytest.raises(FolderInUse, match="another run is writing to .*SPY.*another output_dir"):
        start_job({"output_dir": str(tmp_path), **SMALL})
    start_job({"output_dir": str(tmp_path / "elsewhere"), **SMALL}).lock.release(force=True)
    release.set()
    other.join()
    start_job({"output_dir": str(tmp_path), **SMALL}).lock.release(force=True)


def test_the_training_of_another_code_is_not_continued(tmp_path, monkeypatch):
    from smlstm.data import files
    from smlstm.using.runfolder import training_folder

    asked, known = {"ticker": "SPY", "device": "cpu", "output_dir": str(tmp_path)}, {"SPY": {"sha256": "0" * 64}}
    before = training_folder(asked, known)
    assert training_folder(asked | {"output_dir": str(tmp_path), "preflight": True}, known) == before
    monkeypatch.setattr(files, "code_digest", lambda: "another")
    assert training_folder(asked, known) != before


def test_training_that_nobody_continues_is_removed(tmp_path):
    "Folders of other parameters, two weeks old, which no run holds; younger ones and other folders stay."
    from smlstm.data.files import lock_folder
    from smlstm.using.run import start_job

    names = {"old": ".SPY.0123456789ab", "held": ".QQQ.0123456789ab", "young": ".SPY.ba9876543210"}
    names |= {"run": "SPY", "other": ".SPY.notes"}
    for name in names.values():
        (tmp_path / name / "fold0").mkdir(parents=True)
        (tmp_path / name / "fold0" / ".lock").touch()
    for name in names.values():
        if name != names["young"]:
            for path in [tmp_path / name, *(tmp_path / name).rglob("*")]:
                os.utime(path, (0, 0))
    with lock_folder(tmp_path / names["held"] / "fold0"):
        for path in [tmp_path / names["held"], *(tmp_path / names["held"]).rglob("*")]:
            os.utime(path, (0, 0))
        start_job({"output_dir": str(tmp_path), **SMALL}).lock.release(force=True)
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == set(names.values()) - {names["old"]}


@pytest.mark.slow
def test_hourly_bars_go_all_the_way(tmp_path):
    from yahoo_server import hourly

    series = hourly(seed=2, days=500).bars[["open", "high", "low", "close", "volume"]].rename_axis("date")
    series.to_csv(tmp_path / "hours.csv")
    folder = run(tmp_path, ticker="ABC", source=str(tmp_path / "hours.csv"), interval="1h", start=None, epochs=1)
    last = pd.read_csv(folder / "forecasts.csv").iloc[-1]
    opens = exchange_calendars.get_calendar("XNYS").opens
    assert pd.Timestamp(last["date"]) == series.index[-1]  # the last bar of a session: the next one opens the next
    assert pd.Timestamp(last["target_date"]) == opens[opens > series.index[-1]].iloc[0]
    assert f"Next: for <strong>{pd.Timestamp(last['target_date']):%Y-%m-%d %H:%M}" in (
        folder / "report.html"
    ).read_text(encoding="utf-8")


@pytest.mark.slow
def test_many_short_folds_go_all_the_way(tmp_path):
    folder = run(tmp_path, start="2016-01-01", n_splits=20, seq_length=8, epochs=1)
    coverage = [fold["coverage"]["rows"] for fold in read(folder, "metrics.json")["folds"]]
    assert coverage[0] == 0 and coverage[-1] > 0
