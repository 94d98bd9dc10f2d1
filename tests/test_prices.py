"""Prices of every source: Yahoo, the cache, the bundled sample, and what is used when there is no network."""

import random

import pytest
from yahoo_kit import END, FAST, START, point_nowhere, same, spy, spy_hours, truth

from smlstm.data import cache
from smlstm.data import yahoo as client
from smlstm.data.prices import load_prices
from smlstm.data.request import YahooUnreachable


@pytest.mark.parametrize(
    "ticker, symbol",
    [("SPY", "^GSPC"), ("VOO", "^GSPC"), ("IVV", "^GSPC"), ("^GSPC", "^GSPC"), ("QQQ", "^IXIC"), ("^IXIC", "^IXIC")],
)
def test_the_twin_stands_in_aloud(nowhere, tmp_path, caplog, ticker, symbol):
    p = load_prices(ticker, cache_dir=tmp_path, delay=1000).provenance
    assert (p.symbol, p.source, p.substitute) == (symbol, "sample", ticker != symbol)
    assert p.banner in caplog.text and "stands in" in p.banner
    assert ticker == symbol or p.banner.startswith(f"NOT {ticker}")


@pytest.mark.parametrize(
    "request_", [dict(ticker="AAPL"), dict(source="yahoo"), dict(interval="1h"), dict(start="2020-01-01")], ids=str
)
def test_nothing_else_stands_in(nowhere, tmp_path, request_):
    with pytest.raises(YahooUnreachable, match="cannot be reached"):
        load_prices(**{"cache_dir": tmp_path, "delay": 1000, **request_})


def test_a_cache_serves_without_a_network_and_says_so(yahoo, tmp_path, monkeypatch, caplog):
    load_prices("SPY", start=START, end=END, cache_dir=tmp_path, **FAST)
    point_nowhere(monkeypatch)
    within = load_prices("SPY", start=START, end=END, cache_dir=tmp_path).provenance
    assert (within.source, within.symbol, "could not be reached" in within.banner) == ("cache", "SPY", False)
    beyond = load_prices("SPY", start=START, end="2018-01-01", cache_dir=tmp_path).provenance
    assert beyond.source == "cache" and "could not be reached" in beyond.banner and beyond.last < END
    with pytest.raises(YahooUnreachable):
        load_prices("SPY", "yahoo", start=START, end="2018-01-01", cache_dir=tmp_path)


def test_the_network_goes_away_in_mid_flight(yahoo, tmp_path, monkeypatch):
    way = iter([True])
    monkeypatch.setattr(client, "yahoo_reachable", lambda timeout=4.0: next(way, False))
    yahoo.fault = lambda asked: "reset"
    with pytest.raises(YahooUnreachable):
        load_prices("SPY", "yahoo", START, END, cache_dir=tmp_path, delay=1000)


KINDS = [
    "limit",
    "error",
    "error_json",
    "reset",
    "short",
    "cut",
    "html",
    "blank",
    "null",
    "no_meta",
    "no_quotes",
    "empty",
    "half",
    "holes",
    "nulls",
]


def load_through_faults(yahoo, folder, seed):
    "Twenty years of days and 730 days of hours while 5% of answers fail; then again, asking for nothing."
    chance = random.Random(seed)
    yahoo.fault = lambda asked: chance.choice(KINDS) if chance.random() < 0.05 else None
    for interval in ("1d", "1h"):
        series = yahoo.series[("SPY", interval)]
        got = load_prices("SPY", "auto", interval=interval, cache_dir=folder, **FAST)
        assert got.provenance.source == "yahoo"
        same(got.frame, truth(series, str(got.frame.index[0].date()), "2999-01-01", interval))
        asked = len(yahoo.log)
        again = load_prices("SPY", "auto", interval=interval, cache_dir=folder, **FAST)
        assert len(yahoo.log) == asked and again.provenance.sha256 == got.provenance.sha256


@pytest.mark.parametrize("runs", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_complete_and_in_order_every_time(yahoo, tmp_path, runs):
    yahoo.series[("SPY", "1h")] = spy_hours()
    for seed in range(runs):
        load_through_faults(yahoo, tmp_path / str(seed), seed)


# --- a home that cannot be written --------------------------------------------------------------------------------


@pytest.fixture
def no_home(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    cache._warn_without_cache.cache_clear()


def test_without_a_home_prices_are_loaded_and_not_kept(yahoo, no_home, caplog):
    for _ in range(2):
        got = load_prices("SPY", "yahoo", START, END, **FAST)
        same(got.frame, truth(spy(), START, END))
        assert got.provenance.source == "yahoo"
    same(cache.get_stock_data("SPY", START, END, **FAST), truth(spy(), START, END))
    assert caplog.text.count("prices are not kept") == 1


def test_without_a_home_and_a_network_the_sample_serves(nowhere, no_home, caplog):
    assert load_prices("SPY", delay=1000).provenance.source == "sample"
    assert "prices are not kept" in caplog.text and "stands in" in caplog.text
    assert load_prices("SPY", "sample").provenance.source == "sample"
