"""The report under kills, crowds, strange input and a real browser."""

import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import die_at

from smlstm.data.files import atomic_folder, jsonable, write_json
from smlstm.using.parameters import RULES, ParameterError, check_history, check_parameters
from smlstm.using.report import build_report, next_sentence, score_table, summary_table
from smlstm.using.runfolder import manifest, write_run

# ---------------------------------------------------------------- parameters

GOOD = dict(
    ticker="SPY",
    source="auto",
    start=None,
    end=None,
    interval="1d",
    seq_length=128,
    horizon=1,
    hidden_size=64,
    n_layers=2,
    n_heads=4,
    n_regimes=4,
    d_state=4,
    dropout=0.1,
    epochs=30,
    batch_size=16,
    learning_rate=1e-3,
    n_splits=5,
    seed=0,
    device="auto",
    output_dir="runs",
)
anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=30),
    st.binary(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=1),
    st.just(np.int64(3)),
    st.just(float("nan")),
    st.just(10**400),
)


def test_good_parameters_pass():
    assert check_parameters(**GOOD) == GOOD


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([name for name in RULES if name != "output_dir"]), anything)
def test_any_value_passes_or_is_refused_by_name(name, value):
    try:
        assert check_parameters(**{name: value})[name] is not None or value is None
    except ParameterError as error:
        assert str(error).startswith(name) and repr(value) in str(error) and "must be" in str(error)


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("epochs", -1, "a whole number from 1 to"),
        ("epochs", 2.5, "a whole number"),
        ("epochs", True, "a whole number"),
        ("interval", "7q", "bar length"),
        ("ticker", "SPY,../../etc", "plain symbol"),
        ("ticker", "SPY,", "plain symbol"),
        ("ticker", "SPY,spy", "different"),
        ("ticker", "../../etc/passwd", "plain symbol"),
        ("ticker", "", "plain symbol"),
        ("ticker", None, "plain symbol"),
        ("n_regimes", 3, "4"),
        ("dropout", 1.0, "0.9"),
        ("learning_rate", 0, "above 0"),
        ("learning_rate", math.inf, "at most 1"),
        ("device", "tpu9", "'auto', 'cpu', 'cuda', 'xla'"),
        ("device", None, "'auto'"),
        ("start", "2018-02-30", "a date"),
        ("start", 2018, "a date"),
        ("source", "nowhere.csv", "exists"),
        ("n_heads", 5, "whole"),
        ("seed", -1, "whole"),
        ("n_splits", 1, "whole"),
        ("epochs", 0, "from 1"),
        ("epochs", "30", "whole"),
        ("epochs", None, "whole"),
        ("epochs", math.nan, "whole"),
        ("horizon", 251, "to 250"),
        ("horizon", 1.0, "whole"),
        ("seq_length", 10**9, "to 4096"),
        ("seq_length", 7, "from 8"),
        ("hidden_size", 0, "from 4"),
        ("n_layers", 0, "from 1"),
        ("d_state", 0, "from 1"),
        ("n_regimes", 5, "4"),
        ("dropout", -0.1, "from 0"),
        ("dropout", math.nan, "0.9"),
        ("batch_size", 0, "from 1"),
        ("learning_rate", "0.003", "number"),
        ("learning_rate", -1e-3, "above 0"),
        ("weight_decay", -1, "from 0"),
        ("clip", 0, "above 0"),
        ("augment", 1, "True, False"),
        ("augment", "yes", "True, False"),
        ("seed", 2**32, "to 4294967295"),
        ("stride", 0, "from 1"),
        ("accumulate", 0, "from 1"),
        ("patience", 0, "from 1"),
        ("n_splits", 51, "to 50"),
        ("ticker", "..", "plain symbol"),
        ("ticker", "SPY/../X", "plain symbol"),
        ("ticker", "SPY\n", "plain symbol"),
        ("ticker", 600519, "plain symbol"),
        ("ticker", math.inf, "plain symbol"),
        ("interval", "1m", "1d, 1h"),
        ("interval", None, "1d, 1h"),
        ("source", "", "'auto'"),
        ("source", "SAMPLE", "'sample'"),
        ("source", "x" * 256 + ".csv", "exists"),
        ("source", "\0.csv", "exists"),
        ("start", "0001-01-01", "a date"),
        ("start", "now", "a date"),
        ("start", "2010-01-01T00:00:00+25:00", "a date"),
        ("end", "", "a date"),
        ("end", "2018-13-45", "a date"),
        ("output_dir", "\0", "written to"),
        ("output_dir", "x" * 256, "written to"),
        ("output_dir", None, "written to"),
    ],
)
def test_refusals_name_value_and_rule(name, value, says):
    with pytest.raises(ParameterError) as caught:
        check_parameters(**GOOD | {name: value})
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300 + len(repr(value))
    if name != "n_heads":
        assert message.startswith(f"{name}={value!r}") and says in message


def test_a_file_is_not_an_output_folder_and_looking_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    for value in (str(tmp_path / "file"), str(tmp_path / "file" / "runs"), 3, ""):
        with pytest.raises(ParameterError, match="output_dir"):
            check_parameters(output_dir=value)
    check_parameters(output_dir=str(tmp_path / "a" / "b"))
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_folder_of_the_home_is_there_and_not_one_named_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    checked = check_parameters(output_dir="~/runs", cache_dir="~/kept")
    assert checked == {"output_dir": str(tmp_path / "runs"), "cache_dir": str(tmp_path / "kept")}
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ParameterError, match="device='cuda'.*be there"):
        check_parameters(device="cuda")


def test_a_file_is_of_one_ticker(tmp_path):
    (tmp_path / "a.csv").write_text("")
    check_parameters(ticker="SPY", source=str(tmp_path / "a.csv"))
    with pytest.raises(ParameterError, match="a file holds one series"):
        check_parameters(ticker="SPY,QQQ", source=str(tmp_path / "a.csv"))


def test_dates_with_and_without_a_zone_compare():
    assert check_parameters(start="2010-01-01T00:00:00Z", end="2012-01-01")
    with pytest.raises(ParameterError, match="before end"):
        check_parameters(start="2013-01-01T00:00:00Z", end="2012-01-01")


@pytest.mark.parametrize(
    "change",
    [
        dict(seq_length=4096),
        dict(n_splits=50),
        dict(horizon=250, n_splits=15),
        dict(rows=300),
        dict(rows=252),
        dict(rows=1),
    ],
    ids=str,
)
def test_a_history_too_short_for_its_folds_is_refused(change):
    asked = dict(rows=5031, ticker="SPY", seq_length=128, horizon=1, n_splits=5)
    check_history(asked.pop("rows"), asked)
    with pytest.raises(ParameterError, match="bars of SPY are too few for seq_length"):
        check_history(change.pop("rows", 5031), asked | change)


# ---------------------------------------------------------------- whole folders

NAMES = ["config.json", "forecasts.csv", "metrics.json", "model.safetensors"]


def write(runs, text):
    "A run all of whose files hold the same text."
    write_run(runs, "SPY", {name: text for name in NAMES[:3]}, save=lambda folder: (folder / NAMES[3]).write_text(text))


def texts(folder):
    return {f.name: f.read_text() for f in folder.iterdir()}


def whole(folder, *of):
    return any(texts(folder) == {name: text for name in NAMES} for text in of)


def dies(runs, moment):
    "Write a new run, and die without a word at the n-th operation on the file system."
    die_at(
        moment,
        (Path, "write_text"),
        (Path, "write_bytes"),
        (Path, "rename"),
        (Path, "mkdir"),
        (os, "fsync"),
        (os, "replace"),
        (shutil, "rmtree"),
    )
    write(runs, "new")


@pytest.mark.parametrize("there_was_one", [True, False])
def test_a_killed_run_leaves_no_half_folder(tmp_path, there_was_one):
    outcomes, context = set(), multiprocessing.get_context("fork")
    for moment in range(90):
        runs = tmp_path / str(moment)
        if there_was_one:
            write(runs, "old")
        process = context.Process(target=dies, args=(runs, moment))
        process.start()
        process.join()
        folder = runs / "SPY"
        state = "gone" if not folder.exists() else texts(folder)["config.json"]
        assert state == "gone" or whole(folder, state)
        with pytest.raises(ZeroDivisionError), atomic_folder(runs / "SPY"):
            raise ZeroDivisionError
        after = "gone" if not folder.exists() else texts(folder)["config.json"]
        assert after == (state if state != "gone" or not there_was_one else "old")  # what stepped aside is back
        assert {f.name for f in runs.iterdir()} <= {"SPY", ".SPY.lock"}
        outcomes.add((process.exitcode, state))
        if process.exitcode == 0:
            break
    assert process.exitcode == 0 and state == "new"
    assert (
        outcomes >= {(-9, "old"), (-9, "gone"), (-9, "new"), (0, "new")}
        if there_was_one
        else outcomes >= {(-9, "gone"), (-9, "new"), (0, "new")}
    )


def crowd(runs, name):
    for turn in range(15):
        write(runs, f"{name}{turn}")


def test_two_runs_at_once_never_mix(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=crowd, args=(tmp_path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert whole(tmp_path / "SPY", "a14", "b14") and {f.name for f in tmp_path.iterdir()} <= {"SPY", ".SPY.lock"}


def test_a_failing_write_leaves_the_old_run(tmp_path):
    write(tmp_path, "old")
    for files in (
        {"config.json": "new", "metrics.json": {"x": lambda: 0, 1: object()}, "sub/none.json": {}},
        {"../escaped.json": "new"} | {"missing/x": "y"},
    ):
        with pytest.raises(OSError):
            write_run(tmp_path, "SPY", files)
    assert whole(tmp_path / "SPY", "old")


def test_json_is_json(tmp_path):
    value = {
        "nan": math.nan,
        "inf": np.float32("inf"),
        "array": np.arange(3),
        "bool": np.bool_(True),
        1: (None, pd.NaT),
        "when": pd.Timestamp("2018-12-31"),
    }
    text = write_json(tmp_path / "x.json", value).read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "nan": None,
        "inf": None,
        "array": [0, 1, 2],
        "bool": True,
        "1": [None, None],
        "when": "2018-12-31T00:00:00",
    }


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.floats(), st.text()),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    )
)
def test_plain_survives_a_round_trip(value):
    assert json.loads(json.dumps(jsonable(value), allow_nan=False)) == jsonable(value)


# ---------------------------------------------------------------- the page


def a_run(n=300, name="S&P 500 index"):
    rng = np.random.default_rng(0)
    dates, close = pd.bdate_range("2017-01-02", periods=n), 100 * np.exp(np.cumsum(rng.normal(0, 0.01, n)))
    regimes = rng.dirichlet([2, 1, 1, 1], n)
    forecasts = pd.DataFrame(
        {
            "date": dates,
            "fold": 1 + np.arange(n) // (n // 2 + 1),
            "close": close,
            "target_date": dates + pd.offsets.BDay(),
            "actual_close": np.append(close[1:], np.nan),
            "forecast_close": close * np.exp(rng.normal(0, 1e-3, n)),
            "up_probability": rng.uniform(0.4, 0.6, n),
            "actual_up": np.append((np.diff(close) > 0) * 1.0, np.nan),
            "forecast_variance": rng.uniform(0.5, 2, n) * 1e-4,
            "usual_move": rng.uniform(0.01, 0.02, n),
            "actual_variance": np.append(rng.uniform(0.5, 2, n - 1) * 1e-4, np.nan),
            "ewma_variance": 1e-4,
            **{f"regime_{r + 1}": regimes[:, r] for r in range(4)},
        }
    )
    data = {
        "ticker": "SPY",
        "symbol": "^GSPC",
        "name": name,
        "source": "sample",
        "interval": "1d",
        "rows": n,
        "first": "2017-01-02",
        "last": "2018-02-23",
        "sha256": "ab" * 32,
        "retrieved": "2026-01-01T00:00:00+00:00",
        "substitute": True,
        "banner": f"NOT SPY: these rows are the {name} (^GSPC).",
    }
    return data, forecasts


def a_page(name="S&P 500 index", figures=None, mixed=False):
    "A page from real scores of made-up forecasts."
    from smlstm.judging.evaluation import evaluate

    data, forecasts = a_run(name=name)
    metrics = jsonable({"data": data} | evaluate(forecasts))
    if mixed:  # the last row came from elsewhere: every column is of mixed type
        forecasts = pd.concat([forecasts.iloc[:-1], forecasts.iloc[-1].to_frame().T], ignore_index=True)
    return build_report(metrics, forecasts, manifest(GOOD, data, {"training": 12.3456}), figures or {}), metrics


class Outline(HTMLParser):
    "Tags, in order, and whether each is closed by its own."

    VOID = {"meta", "img", "br", "hr", "link"}

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.crossed = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.crossed.append(tag)


def outline(page):
    parser = Outline()
    parser.feed(page)
    assert (parser.crossed, parser.open) == ([], [])
    return parser.tags


@pytest.mark.parametrize("mixed", [False, True])
def test_real_scores_fill_the_page(mixed):
    page, metrics = a_page(mixed=mixed)
    outline(page)
    text = unescape(re.sub(r"<[^>]+>", " ", page))
    for verdict in metrics["overall"]["verdicts"].values():
        assert verdict["outcome"] in text and verdict["reason"] in text
    assert (
        f"{metrics['overall']['price']['mape']:.3f}%" in text
        and f"{metrics['overall']['direction']['base_rate']:.1%}" in text
    )
    assert page.index("NOT SPY") < page.index('class="cards"') < page.index("Scores beside their baselines")
    assert "Next: for" in text and "12.346" in text and GOOD["ticker"] in text


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "</style><b>", '"><img src=x onerror=alert(1)>', "&amp; é 漢 \u202e"]
)
def test_no_text_becomes_markup(name):
    assert outline(a_page(name)[0]) == outline(a_page()[0])


def test_a_bar_whose_time_is_unknown_has_words():
    data, forecasts = a_run()
    hours = forecasts.assign(
        **{name: pd.to_datetime(forecasts[name]).dt.tz_localize("UTC") for name in ("date", "target_date")}
    )
    hours.loc[hours.index[-1], ["target_date", "actual_close"]] = [pd.NaT, np.nan]
    assert "Next: for <strong>the bar ahead</strong>" in next_sentence(hours)


def test_missing_scores_are_dashes():
    data, _ = a_run()
    hole = {"price": {"mape": None}, "direction": {"accuracy": math.nan, "base_rate": 0.5}}
    metrics = {
        "data": data,
        "folds": [{"number": 1, "test": {"first": "a", "last": "b"}} | hole],
        "overall": hole | {"verdicts": dict.fromkeys(["price", "direction", "volatility"], "no skill shown")},
    }
    table = score_table(metrics)
    assert table.iloc[0].tolist() == ["1", "a to b", "–", "–", "–", "50.0%", "–", "–"] and table.iloc[-1, 0] == "all"
    assert summary_table(metrics)["Model"].tolist() == ["–", "–", "–"]


# ---------------------------------------------------------------- in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PROBE = """<script>
const errors = []; addEventListener("error", e => errors.push(e.message));
addEventListener("load", () => setTimeout(() => parent.postMessage(JSON.stringify({
  errors, width: innerWidth, wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  drawn: document.querySelectorAll(".plotly-graph-div .main-svg").length,
  pictures: [...document.images].map(i => i.naturalWidth),
  figures: [...document.querySelectorAll("figure > *")].map(f => f.getBoundingClientRect().width),
  ink: getComputedStyle(document.body).color,
  fetched: performance.getEntriesByType("resource").map(r => r.name).filter(n => !n.startsWith("data:"))
}), "*"), 1500));
</script>"""
WINDOW = """<!doctype html><iframe src="report.html" style="width: {}px; height: 900px; border: 0"></iframe>
<pre id="seen"></pre><script>addEventListener("message",
  e => document.getElementById("seen").textContent = "SEEN" + e.data + "NEES")</script>"""


def browse(page, tmp_path, width):
    "What a browser sees on the page in a frame of this width (a window of its own cannot be as narrow as a telephone)."
    (tmp_path / "report.html").write_text(page.replace("<title>", PROBE + "<title>", 1), encoding="utf-8")
    (tmp_path / "window.html").write_text(WINDOW.format(width), encoding="utf-8")
    command = [
        BROWSER,
        *QUIET,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=10000",
        "--dump-dom",
        f"file://{tmp_path / 'window.html'}",
    ]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return json.loads(unescape(re.search(r"SEEN({.*?})NEES", seen, re.DOTALL).group(1)))


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium here")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_works_offline_in_a_browser(tmp_path, width):
    _, forecasts = a_run()
    drawn, axis = plt.subplots(figsize=(9, 3))
    axis.plot(forecasts.date, forecasts.close)
    plt.close(drawn)
    moving = go.Figure(go.Scatter(x=forecasts.date, y=forecasts.close, name="</script><b>"))
    seen = browse(a_page(figures={"Prices and regimes": moving, "Forecast": drawn})[0], tmp_path, width)
    assert seen["errors"] == seen["fetched"] == [] and seen["width"] == width
    assert (
        seen["drawn"] >= 1 and min(seen["figures"]) > 250 and len(seen["pictures"]) == 1 and seen["pictures"][0] > 100
    )
    assert seen["wide"] <= 0


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium here")
def test_a_broken_page_would_be_seen(tmp_path):
    page = a_page()[0].replace("</body>", "<div style='width: 3000px'>.</div><script>missing()</script></body>")
    seen = browse(page, tmp_path, 1280)
    assert seen["wide"] > 0 and any("missing" in error for error in seen["errors"])
