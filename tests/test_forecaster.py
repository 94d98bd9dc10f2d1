"""The forecaster under kills, tampering, odd frames, and streams cut anywhere."""

import copy
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from kit import die_at

import smlstm.using.streams as streams
from smlstm.data.features import WARMUP
from smlstm.data.prices import load_prices
from smlstm.learning.settings import TrainConfig
from smlstm.model.model import SMLSTM
from smlstm.using.forecaster import Forecaster, fit_panel
from smlstm.using.horizons import to_long
from smlstm.using.panels import WindowConfig
from smlstm.using.storage import ForecasterFileError
from smlstm.using.streams import flat_tensors, open_stream
from smlstm.using.tables import SeriesError, build_table, price_tables

SMALL = dict(
    architecture=dict(hidden_size=8, n_heads=1, n_layers=1),
    windows=WindowConfig(seq_length=64, stride=64),
    training=TrainConfig(epochs=1, learning_rate=0.001),
)
NAMES = {"config.json", "model.safetensors", "stream.safetensors"}


def bars(ticker):
    return load_prices(ticker, source="sample").frame.tail(1600)


def long_frame(**frames):
    return pd.concat(
        [
            f.rename(columns={"close": "y"}).rename_axis("ds").reset_index().assign(unique_id=name)
            for name, f in frames.items()
        ],
        ignore_index=True,
    )


@pytest.fixture(scope="module")
def panel():
    return Forecaster(horizon=3, **SMALL).fit(long_frame(SPY=bars("SPY"), QQQ=bars("QQQ")), progress=False)


@pytest.fixture(scope="module")
def single():
    return Forecaster(**SMALL).fit(bars("SPY"), progress=False)


def test_prices_of_another_series_are_announced():
    learned = load_prices("SPY", source="sample", start="2012-01-01")  # the index, in the fund's place
    forecaster = Forecaster(**SMALL).fit(learned, progress=False)
    fund = learned._replace(provenance=learned.provenance._replace(symbol="SPY", substitute=False))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this forecaster was fitted on")
        same = forecaster.predict(learned)
    for given in (fund, {"SPY": fund}):
        with pytest.warns(UserWarning, match=r"fitted on \^GSPC, and these prices are of SPY"):
            forecaster.predict(given)
    with pytest.warns(UserWarning, match="these prices are of SPY"):
        pd.testing.assert_frame_equal(forecaster.predict(fund), same)


def numbers(frame):
    return frame.select_dtypes("number").to_numpy()


# ---------------------------------------------------------------- folders


def changed(forecaster):
    "The same forecaster with other weights and another limit, so that a mixture of the two would show."
    model = copy.deepcopy(forecaster.model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    other = dataclasses.replace(forecaster, max_gap=99.0)
    other.model, other.series, other.streams = model, forecaster.series, forecaster.streams
    return other


def which(folder, old, new):
    "Whether the folder holds exactly the one or the other."
    loaded = Forecaster.load(folder)
    is_new = loaded.max_gap == 99.0
    for a, b in zip(loaded.model.parameters(), (new if is_new else old).model.parameters()):
        assert torch.equal(a, b)
    return "new" if is_new else "old"


def dies(forecaster, folder, moment):
    "Save, and die without a word at the n-th operation on the file system."

    def half(path, content, **options):  # nothing may be written in place: such a write ends halfway
        with open(path, "wb") as file:
            file.write(
                content[: len(content) // 2] if isinstance(content, bytes) else content.encode()[: len(content) // 2]
            )
        os.kill(os.getpid(), signal.SIGKILL)

    Path.write_bytes = Path.write_text = half
    die_at(moment, (Path, "unlink"), (Path, "mkdir"), (os, "replace"), (os, "fsync"))
    forecaster.save(folder)


@pytest.mark.parametrize("there_was_one", [True, False])
def test_a_killed_save_leaves_the_old_or_the_new(tmp_path, single, there_was_one):
    new, outcomes, context = changed(single), set(), multiprocessing.get_context("fork")
    for moment in range(60):
        folder = tmp_path / str(moment)
        if there_was_one:
            single.save(folder)
            (folder / "metrics.json").write_text("{}")
        process = context.Process(target=dies, args=(new, folder, moment))
        process.start()
        process.join()
        try:
            state = which(folder, single, new)
        except ForecasterFileError as error:
            assert not there_was_one and "does not exist" in str(error)
            state = "none"
        outcomes.add((process.exitcode, state))
        new.save(folder)
        assert which(folder, single, new) == "new"
        assert {p.name for p in folder.iterdir()} == NAMES | ({"metrics.json"} if there_was_one else set())
        if process.exitcode == 0:
            break
    before = "old" if there_was_one else "none"
    assert outcomes == {(-9, before), (-9, "new"), (0, "new")}


def test_a_failing_save_changes_nothing(tmp_path, single, monkeypatch):
    single.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (name,) = single.series
    broken = changed(single)
    broken.series = {name: single.series[name]._replace(origin={"x": object()})}
    with pytest.raises(TypeError):
        broken.save(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        changed(single).save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def leaves(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(min(len(value), 2)):
            yield from leaves(value[key], (*path, key))


def put(config, path, value):
    config = copy.deepcopy(config)
    if not path:
        return value
    *way, last = path
    at = config
    for key in way:
        at = at[key]
    if value is KeyError:
        del at[last]
    else:
        at[last] = value
    return config


def signed(config):
    if isinstance(config, dict):
        config["sha256"] = hashlib.sha256(
            json.dumps({k: v for k, v in config.items() if k != "sha256"}, indent=1).encode()
        ).hexdigest()
    return config


@pytest.mark.parametrize(
    "value",
    [KeyError, "x", [["x"]], *(pytest.param(x, marks=pytest.mark.slow) for x in (None, 7, -1.5, [], {}))],
    ids=repr,
)
def test_whatever_is_in_the_file_one_kind_of_error(tmp_path, single, value):
    single.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for path in list(leaves(config)):
        if value is KeyError and not path:
            continue
        bad = put(config, path, value)
        if bad == config:
            continue
        (tmp_path / "config.json").write_text(json.dumps(bad))
        with pytest.raises(ForecasterFileError):  # the checksum tells
            Forecaster.load(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(signed(bad)))
        try:  # and where somebody has seen to that, still no raw error
            Forecaster.load(tmp_path)
        except ForecasterFileError as error:
            assert "\n" not in str(error)[:40]


@pytest.mark.parametrize("name", ["model.safetensors", "stream.safetensors"])
def test_damaged_tensors_are_refused(tmp_path, single, name):
    single.save(tmp_path)
    content = (tmp_path / name).read_bytes()
    for bad in (
        content[:-1],
        content[:100],
        b"",
        content[:-9] + b"\0" + content[-8:] if content[-9] else content[:-9] + b"\1" + content[-8:],
    ):
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(ForecasterFileError, match=name.replace(".", r"\.")):
            Forecaster.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ForecasterFileError, match="missing"):
        Forecaster.load(tmp_path)


def test_pretrained_names_and_pickles(tmp_path, panel):
    panel.save_pretrained(tmp_path / "a" / "b")
    frame = long_frame(SPY=bars("SPY"), QQQ=bars("QQQ"))
    for other in (
        Forecaster.from_pretrained(tmp_path / "a" / "b"),
        pickle.loads(pickle.dumps(panel)),
        copy.deepcopy(panel),
    ):
        pd.testing.assert_frame_equal(other.predict(frame), panel.predict(frame))
        pd.testing.assert_frame_equal(other.predict(), panel.predict())
        assert other.series == panel.series and other.windows == panel.windows and other.training == panel.training


# ---------------------------------------------------------------- panels


def test_a_panel_killed_within_an_epoch_goes_on_with_the_same_moving_windows(tmp_path):
    tables = {name: build_table(bars(name)) for name in ("SPY", "QQQ")}
    own = dict(
        model=SMALL["architecture"],
        windows=WindowConfig(seq_length=64, stride=None, batch_size=4),
        training=TrainConfig(epochs=3, checkpoint_every=1),
        device="cpu",
        progress=False,
    )

    def dying(config):
        net, calls = SMLSTM(config), iter(range(14))
        net.register_forward_pre_hook(lambda *_: (next(calls), None)[1])
        return net

    straight, history = fit_panel(tables, **own)
    with pytest.raises((StopIteration, RuntimeError)):
        fit_panel(tables, build=dying, checkpoint_dir=tmp_path, **own)
    resumed, again = fit_panel(tables, checkpoint_dir=tmp_path, resume=True, **own)
    assert all(torch.equal(a, b) for a, b in zip(straight.model.parameters(), resumed.model.parameters()))
    assert [e.valid for e in again.epochs] == [e.valid for e in history.epochs] and resumed.series == straight.series


@pytest.mark.parametrize("horizon, stop", [(1, 700), (5, 700), (5, None)])
def test_training_leaves_streams_where_a_reading_of_the_same_bars_does(horizon, stop):
    table = build_table(bars("SPY"), horizon)
    made, _ = fit_panel(
        {"SPY": table},
        {"SPY": slice(0, stop)},
        SMALL["architecture"],
        SMALL["windows"],
        SMALL["training"],
        device="cpu",
        progress=False,
    )
    left = made.streams["SPY"]
    made.series["SPY"] = made.series["SPY"]._replace(price_scores=(), variance_scores=())
    history = table.prices.iloc[: WARMUP + (stop or table.known) + horizon]
    read = open_stream(made.model, made.series["SPY"], history)
    assert (
        left.row == read.row and left.last == read.last and left.weight == read.weight and left.pattern == read.pattern
    )
    assert all(np.array_equal(getattr(left, name), getattr(read, name)) for name in ("variances", "waiting"))
    assert all(np.array_equal(a, b) for a, b in zip(left.scores, read.scores)) and all(
        np.array_equal(left.bars[c], read.bars[c], equal_nan=True) for c in read.bars
    )
    assert all(torch.equal(a, b) for a, b in zip(flat_tensors(left.state), flat_tensors(read.state)))


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_any_split_of_a_stream_ends_where_one_reading_ends(panel, seed):
    rng, frames = np.random.default_rng(seed), {"SPY": bars("SPY"), "QQQ": bars("QQQ")}
    cuts = np.sort(rng.choice(np.arange(700, 1599), 6, replace=False))
    follower = copy.deepcopy(panel).start({name: f.iloc[: cuts[0]] for name, f in frames.items()})
    for a, b in zip(cuts, cuts[1:]):
        rows = follower.update({name: f.iloc[a:b] for name, f in frames.items()})
        expected = panel.predict({name: f.iloc[:b] for name, f in frames.items()})
        last = rows.groupby("unique_id", sort=False).tail(1)
        assert (last.target_date.to_numpy() == expected.target_date.to_numpy()).all()
        np.testing.assert_allclose(numbers(last), numbers(expected), rtol=1e-6)
        np.testing.assert_allclose(numbers(follower.predict()), numbers(last), rtol=1e-12)
    assert len(rows) == 2 * (cuts[-1] - cuts[-2])


def test_a_stream_that_loses_its_memory_is_noticed(single, monkeypatch):
    "The comparison above can fail: with a shorter memory of bars the forecasts differ."
    frame = bars("SPY")
    monkeypatch.setattr(streams, "SETTLED", 260)
    follower = copy.deepcopy(single).start(frame.iloc[:1500])
    row = follower.update(frame.iloc[1500:1510]).iloc[-1]
    expected = single.predict(frame.iloc[:1510]).iloc[0]
    assert abs(row["forecast_variance"] / expected["forecast_variance"] - 1) > 1e-9


def test_saved_in_the_middle_of_a_stream(tmp_path, panel):
    frames = {"SPY": bars("SPY"), "QQQ": bars("QQQ")}
    follower = copy.deepcopy(panel).start({name: f.iloc[:1500] for name, f in frames.items()})
    follower.update({"SPY": frames["SPY"].iloc[1500:1510]})  # one is ahead of the other
    follower.save(tmp_path)
    loaded, rest = (
        Forecaster.load(tmp_path),
        {"SPY": frames["SPY"].iloc[1510:1520], "QQQ": frames["QQQ"].iloc[1500:1520]},
    )
    pd.testing.assert_frame_equal(loaded.update(rest), follower.update(rest))


def test_volume_of_zero_and_close_alone():
    frame = bars("QQQ").copy()
    frame.iloc[1400:1420, 4] = 0
    for given in (frame, frame[["close"]]):
        fitted = Forecaster(**SMALL).fit(given.iloc[:1300], progress=False)
        row = fitted.update(given.iloc[1300:1415]).iloc[-1]
        expected = fitted.predict(given.iloc[:1415]).iloc[0]
        np.testing.assert_allclose(row.iloc[4:].to_numpy(float), expected.iloc[4:].to_numpy(float), rtol=1e-6)
        assert row["target_date"] == expected["target_date"]


def test_intraday_bars():
    days = pd.bdate_range("2018-01-02", periods=200)
    index = pd.DatetimeIndex([d + pd.Timedelta(hours=h, minutes=30) for d in days for h in range(9, 16)]).tz_localize(
        "America/New_York"
    )
    rng = np.random.default_rng(0)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.003, len(index))))
    frame = pd.DataFrame(
        {"open": close, "high": close * 1.002, "low": close * 0.998, "close": close, "volume": 1e6}, index
    )
    fitted = Forecaster(**SMALL).fit(frame.iloc[:1300], progress=False)
    row, expected = fitted.update(frame.iloc[1300:].tz_convert("UTC")).iloc[-1], fitted.predict(frame).iloc[0]
    np.testing.assert_allclose(row.iloc[4:].to_numpy(float), expected.iloc[4:].to_numpy(float), rtol=1e-6)
    assert pd.isna(row["target_date"]) and row["date"] == frame.index[-1]  # holidays have bars: of no known exchange
    with pytest.raises(SeriesError, match="tz_localize"):
        fitted.predict(frame.tz_localize(None))


# ---------------------------------------------------------------- frames

REFUSED = {
    "too short": (lambda f: f.tail(250), "250 rows are too few"),
    "a hole": (lambda f: f.drop(f.index[800:814]), "gap of"),
    "no volume": (lambda f: f.drop(columns="volume"), "volume"),
    "no range": (lambda f: f.drop(columns=["high"]), "high"),
    "backwards": (lambda f: f.iloc[::-1], "increasing"),
    "twice": (lambda f: pd.concat([f, f.tail(1)]), "increasing"),
    "no dates": (lambda f: f.reset_index(drop=True), "DatetimeIndex"),
    "no close": (lambda f: f.drop(columns="close"), "close"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(panel, case):
    spoil, says = REFUSED[case]
    frames = {"SPY": bars("SPY"), "QQQ": spoil(bars("QQQ"))}
    with pytest.raises(SeriesError, match=f"series 'QQQ': .*{says}"):
        panel.predict(frames)
    with pytest.raises(SeriesError, match=f"QQQ.*{says}"):
        Forecaster(**SMALL).fit(frames, progress=False)


def test_plain_long_and_mapping_give_the_same(single):
    frame = bars("SPY")
    plain, mapped, long_one = (
        single.predict(given, level=(80, 95)) for given in (frame, {"series": frame}, long_frame(series=frame))
    )
    pd.testing.assert_frame_equal(plain, mapped)
    pd.testing.assert_frame_equal(plain, long_one)
    row, long = plain.iloc[0], to_long(plain).iloc[0]
    assert row["target_date"] == long["ds"] and row["date"] == long["cutoff"]
    for level in (80, 95):
        for side in ("lo", "hi"):
            assert row[f"forecast_close-{side}-{level}"] == long[f"SMLSTM-{side}-{level}"]
    assert long["SMLSTM-lo-95"] < long["SMLSTM-lo-80"] < long["SMLSTM"] < long["SMLSTM-hi-80"] < long["SMLSTM-hi-95"]


def test_panel_of_one_is_the_single_fit(single):
    ((_, table),) = price_tables(bars("SPY"), 1, None, 15.0, mask=True).items()
    made, _ = fit_panel(
        {"series": table}, None, SMALL["architecture"], SMALL["windows"], SMALL["training"], progress=False
    )
    assert made.series == single.series
    pd.testing.assert_frame_equal(made.forecast(table), single.forecast(table))


def test_integer_names_and_shuffled_rows(tmp_path):
    frame = long_frame(a=bars("SPY"), b=bars("QQQ")).replace({"unique_id": {"a": 1, "b": 2}})
    made = Forecaster(**SMALL).fit(frame.sample(frac=1, random_state=0), progress=False)
    made.save(tmp_path)
    told = Forecaster.load(tmp_path).predict(frame)
    assert set(told.unique_id) == {1, 2}


def test_series_of_different_length_meet_at_one_date():
    frames = {"SPY": bars("SPY"), "NEW": bars("QQQ").tail(1100)}
    made = Forecaster(**SMALL).fit(frames, progress=False)
    assert len({fitted.held_out for fitted in made.series.values()}) == 1
    with pytest.raises(SeriesError, match="series 'NEW': .*too few"):
        Forecaster(missing="raise", **SMALL).fit({"SPY": bars("SPY"), "NEW": bars("QQQ").tail(400)}, progress=False)


def test_cross_validation_looks_at_no_later_bar():
    frame = bars("SPY")
    moved = frame.copy()
    moved.iloc[-200:, :4] *= np.linspace(1, 2, 200)[:, None]
    a, b = (Forecaster(**SMALL).cross_validation(f, n_splits=2, progress=False) for f in (frame, moved))
    early = a.date < moved.index[-200]
    told = [c for c in a if c.startswith("forecast_") or c == "up_probability"]
    assert early.sum() > 300
    pd.testing.assert_frame_equal(a.loc[early, told], b.loc[early, told])
