"""The real yfinance client pointed at a local server, and the frame that a perfect client would build."""

import functools
import logging

import pandas as pd
import yfinance
import yfinance.base
import yfinance.scrapers.history
from yahoo_server import YahooServer, daily, hourly

from smlstm.data import yahoo

START, END = "2015-01-05", "2016-01-04"
FAST = dict(delay=0.01)


@functools.cache
def spy():
    return daily(seed=1, name="SPDR S&P 500")


@functools.cache
def spy_hours():
    return hourly(seed=2)


def point_at(url, monkeypatch):
    "Make the real client ask the server at `url`, without cookies, and forget what it knew."
    for module in (yfinance.base, yfinance.scrapers.history):
        monkeypatch.setattr(module, "_BASE_URL_", url)
    monkeypatch.setattr(yfinance.data.YfData, "_get_cookie_and_crumb", lambda self, timeout=30: (None, "basic"))
    monkeypatch.setattr(yahoo, "pace", yahoo.Pace(0.0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def serve(monkeypatch):
    "A server that knows SPY, and the client pointed at it: the body of the fixture `yahoo_server`."
    logging.getLogger("yfinance").setLevel(logging.CRITICAL)
    server = YahooServer()
    server.series[("SPY", "1d")] = spy()
    point_at(server.url, monkeypatch)
    monkeypatch.setattr(yahoo, "request_chart", functools.partial(yahoo.request_chart, timeout=1.0))
    yield server
    server.stop()


def point_nowhere(monkeypatch):
    "The client pointed at a port where nobody listens: the body of the fixture `nowhere`."
    server = YahooServer()
    server.stop()
    point_at(server.url, monkeypatch)


def truth(series, start, end, interval="1d"):
    "The frame that a perfect client would build."
    bars = series.bars
    frame = (
        bars[["open", "high", "low", "close"]].mul(bars.factor, axis=0).assign(volume=bars.volume).rename_axis("date")
    )
    if interval == "1d":
        frame.index = frame.index.tz_convert(series.zone).tz_localize(None).normalize()
        return frame[(frame.index >= start) & (frame.index < end)]
    return frame[(frame.index >= pd.Timestamp(start, tz="UTC")) & (frame.index < pd.Timestamp(end, tz="UTC"))]


def same(frame, expected):
    pd.testing.assert_frame_equal(frame, expected, check_index_type=False, check_freq=False, rtol=1e-9)
