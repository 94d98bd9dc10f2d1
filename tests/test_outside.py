"""Whatever stands in a saved folder, a model's file, a setting or an answer of Yahoo's: right, or one clear error.

`HYPOTHESIS_PROFILE=search pytest tests/test_outside.py --fuzz 20` tries twenty times as many cases, and other ones.
"""

import json
import logging
import resource
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from yahoo_kit import END, FAST, START, truth
from yahoo_server import chart

from smlstm.data.files import seal
from smlstm.data.prices import load_prices
from smlstm.data.request import FetchError
from smlstm.data.yahoo import safe_fetch
from smlstm.learning.checkpoints import CheckpointError, ModelFileError, load_checkpoint, load_model, save_model
from smlstm.learning.settings import TrainConfig
from smlstm.model.model import SMLSTM, SMLSTMConfig
from smlstm.using.forecaster import Forecaster
from smlstm.using.panels import WindowConfig
from smlstm.using.storage import ForecasterFileError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**12) | st.just(-1),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)


def most_memory():
    "The most bytes that this process held so far."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def places(tree, at=()):
    "The way to every part of a JSON value."
    yield at
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:3]) if isinstance(tree, list) else ()
    for key, part in items:
        yield from places(part, (*at, key))


def changed(tree, at, value):
    "The tree with another value at one place; without it where the value is `...`."
    if not at:
        return None if value is ... else value
    key, *rest = at
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if not rest and value is ...:
        del copy[key]
    else:
        copy[key] = changed(tree[key], rest, value)
    return copy


def edits(tree):
    "One to three parts of a JSON value replaced or left out."
    one = st.tuples(st.sampled_from(list(places(tree))[1:]), VALUES | st.just(...))
    return st.lists(one, min_size=1, max_size=3)


def edited(tree, some):
    for at, value in some:
        try:
            tree = changed(tree, at, value)
        except (KeyError, IndexError, TypeError):  # the place went with an earlier edit
            pass
    return tree


@pytest.fixture(scope="module")
def prices():
    return load_prices("SPY", source="sample").frame.tail(900)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, prices):
    folder = tmp_path_factory.mktemp("saved")
    sizes = dict(hidden_size=4, n_heads=1, n_layers=1, d_state=1, n_regimes=2)
    small = dict(windows=WindowConfig(seq_length=64, stride=64), training=TrainConfig(epochs=1, warmup_epochs=1))
    Forecaster(architecture=sizes, **small).fit(prices, progress=False).save(folder)
    return folder


def test_any_settings_in_a_saved_folder(saved, tmp_path, request):
    "Signed as the library signs them, so that only what they say can be refused."
    config = json.loads((saved / "config.json").read_text())
    for name in ("model.safetensors", "stream.safetensors"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())

    @settings(max_examples=60 * request.config.getoption("--fuzz"))
    @given(edits(config))
    def check(some):
        odd = edited(config, some)
        text = seal(odd) if isinstance(odd, dict) else json.dumps(odd)
        (tmp_path / "config.json").write_text(text)
        before = time.process_time()
        try:
            Forecaster.load(tmp_path)
        except ForecasterFileError as error:
            assert str(tmp_path) in str(error)
        except ValueError as error:  # it names columns that have to be given again
            assert "give it to load(folder, future_exogenous=...)" in str(error)
        assert time.process_time() - before < 20

    check()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 10_000, "", "\0", '{"format": 1e999}', "NaN"])
def test_text_that_no_run_left(saved, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ForecasterFileError, match=r"config\.json"):
        Forecaster.load(tmp_path)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(hidden_size=2**40),
        dict(n_layers=10**12),
        dict(n_features=2**50),
        dict(n_features=2**26),  # which a machine of today has memory for: a gigabyte
        dict(n_regimes=2**44),
        dict(d_state=2**44),
        dict(n_heads=2**30, hidden_size=2**30),
        dict(window=2**40),
    ],
    ids=str,
)
def test_sizes_are_refused_before_memory_is_taken(tmp_path, sizes):
    torch.manual_seed(0)
    model = SMLSTM(SMLSTMConfig(n_features=3, hidden_size=4, n_heads=1, n_layers=1))
    save_model(model, tmp_path / "model.safetensors")
    config = json.loads(json.dumps(vars(model.config))) | sizes
    path = tmp_path / "odd.safetensors"
    save_file(load_file(tmp_path / "model.safetensors"), path, metadata={"smlstm_config": json.dumps(config)})
    before, used = time.process_time(), most_memory()
    with pytest.raises(ModelFileError, match=r"odd\.safetensors"):
        load_model(path)
    assert time.process_time() - before < 5 and most_memory() - used < 2**28
    load_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("config", ["[" * 50_000, "[]", "7", "null", "{", '{"n_layers": "x"}', '{"members": 3}'])
def test_headers_that_no_model_left(tmp_path, config):
    path = tmp_path / "odd.safetensors"
    save_file({"w": torch.zeros(1)}, path, metadata={"smlstm_config": config})
    with pytest.raises(ModelFileError, match=r"odd\.safetensors"):
        load_model(path)


@pytest.mark.parametrize("length", [2**63 - 1, 2**40, 10**9, 8])
def test_a_header_longer_than_its_file(tmp_path, length):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + save({"w": torch.zeros(1)})[8:])
    with pytest.raises(ModelFileError):
        load_model(path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


@pytest.mark.parametrize("kind", [SMLSTMConfig, TrainConfig, WindowConfig, Forecaster])
def test_any_setting_is_taken_or_refused_by_name(kind, request):
    names = [name for name in kind().__dict__ if name not in ("model", "series", "streams", "history")]

    @settings(max_examples=100 * request.config.getoption("--fuzz"))
    @given(st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=2))
    def check(chosen):
        try:
            kind(**chosen)
        except ValueError as error:
            assert any(name in str(error) for name in chosen) or "scales" in str(error), (chosen, error)

    check()


def test_any_answer_of_yahoo_is_its_prices_or_one_clear_error(yahoo, request):
    "One to three parts of an answer replaced or left out: no price that was not sent, and no raw exception."
    series = yahoo.series[("SPY", "1d")]
    sent = truth(series, START, END)
    answer = chart(series, *(int(pd.Timestamp(at, tz="UTC").timestamp()) for at in (START, END)), "1d")

    @settings(max_examples=25 * request.config.getoption("--fuzz"))
    @given(edits(answer))
    def check(some):
        yahoo.body = json.dumps(edited(answer, some)).encode()
        logging.disable(logging.WARNING)
        try:
            got = safe_fetch("SPY", START, END, retries=0, **FAST)
        except (FetchError, ValueError) as error:
            assert str(error) and "\n" not in str(error)[:40]
        else:
            assert got.index.is_monotonic_increasing and got.index.is_unique
            close = got.close.dropna()
            assert ((close > 0) & np.isfinite(close)).all()
            same = close.index.intersection(sent.index)
            moved = (close[same] / sent.close[same] - 1).abs() > 1e-6
            assert moved.sum() <= 3 or moved.mean() > 0.9, "a few values, or all by one factor of the adjustment"
        finally:
            logging.disable(logging.NOTSET)

    check()
