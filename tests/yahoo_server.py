"""A local HTTP server that speaks Yahoo's chart protocol, with series of its own and faults on demand."""

import functools
import json
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import exchange_calendars
import numpy as np
import pandas as pd


@functools.cache
def calendar(name="XNYS"):
    return exchange_calendars.get_calendar(name, start="1998-01-01")


def closed_sessions(name="XNYS", years=21):
    "Sessions that have ended by now."
    now = pd.Timestamp.now("UTC")
    days = calendar(name).closes
    return days[(days < now) & (days > now - pd.DateOffset(years=years))].index


@dataclass
class Series:
    "One symbol: raw prices by UTC timestamp, the factor that adjusts them, and what Yahoo says about it."

    bars: pd.DataFrame  # open, high, low, close, volume, factor; UTC index
    kind: str = "ETF"
    zone: str = "America/New_York"
    exchange: str = "XNYS"
    name: str = "A Fund"
    events: dict = field(default_factory=dict)
    extra_meta: dict = field(default_factory=dict)

    def meta(self):
        first, last = self.bars.index[0], self.bars.index[-1]
        closes = calendar(self.exchange).closes
        market = closes[closes <= last + pd.Timedelta(days=1)].iloc[-1] if self.kind not in ("CURRENCY",) else last
        regular = {
            "timezone": "EST",
            "gmtoffset": -18000,
            "start": int(market.timestamp()) - 23400,
            "end": int(market.timestamp()),
        }
        return {
            "currency": "USD",
            "symbol": "X",
            "exchangeName": "PCX",
            "instrumentType": self.kind,
            "longName": self.name,
            "shortName": self.name,
            "firstTradeDate": int(first.timestamp()),
            "regularMarketTime": int(market.timestamp()),
            "gmtoffset": -18000,
            "timezone": "EST",
            "exchangeTimezoneName": self.zone,
            "priceHint": 2,
            "dataGranularity": "1d",
            "currentTradingPeriod": {"pre": dict(regular), "regular": dict(regular), "post": dict(regular)},
            "validRanges": ["1d", "5d", "1mo", "max"],
        } | self.extra_meta


def walk(index, seed=0, start=100.0, scale=0.01):
    "Prices by a random walk, with bars around them."
    rng = np.random.default_rng(seed)
    close = start * np.exp(np.cumsum(rng.normal(0.0002, scale, len(index))))
    open_ = np.concatenate([[start], close[:-1]]) * np.exp(rng.normal(0, scale / 3, len(index)))
    wide = np.abs(rng.normal(0, scale / 2, (2, len(index))))
    high, low = np.maximum(open_, close) * (1 + wide[0]), np.minimum(open_, close) * (1 - wide[1])
    volume = rng.integers(1_000_000, 9_000_000, len(index)).astype(float)
    return pd.DataFrame(
        {"open": open_, "high": high, "low": low, "close": close, "volume": volume, "factor": 1.0}, index=index
    )


def daily(seed=0, exchange="XNYS", zone="America/New_York", years=21, **more):
    "A daily series; a bar's timestamp is its session's open, as Yahoo has it."
    days = closed_sessions(exchange, years)
    opens = pd.DatetimeIndex(calendar(exchange).opens.loc[days]).tz_convert("UTC")
    return Series(walk(opens, seed), zone=zone, exchange=exchange, **more)


def hourly(seed=0, days=730, **more):
    "Hourly bars of New York's regular sessions, early closes included."
    sessions = closed_sessions(years=3)
    sessions = sessions[sessions > pd.Timestamp.now() - pd.Timedelta(days=days)]
    cal = calendar()
    starts = [t for day in sessions for t in pd.date_range(cal.opens[day], cal.closes[day], freq="h", inclusive="left")]
    return Series(walk(pd.DatetimeIndex(starts).tz_convert("UTC"), seed, scale=0.003), **more)


LONG = ("1d", "1wk", "1mo")  # bars that are labelled by a date and adjusted


def longer(series, rule, seed=0):
    "Weekly or monthly bars of a daily series, labelled by the local midnight of their start; the last is unfinished."
    bars = series.bars.drop(columns="factor")
    local = bars.set_axis(bars.index.tz_convert(series.zone).tz_localize(None).normalize())
    sums = {"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum"}
    bars = local.resample(rule, label="left", closed="left").agg(sums).dropna()
    return Series(bars.set_axis(bars.index.tz_localize(series.zone).tz_convert("UTC")).assign(factor=1.0))


def chart(series, p1, p2, interval, mangle=None):
    "The answer's JSON for bars with p1 <= time < p2."
    seconds = series.bars.index.as_unit("s").asi8
    rows = series.bars[(seconds >= p1) & (seconds < p2)]
    if mangle is not None:
        rows = mangle(rows)
    meta, stamps = series.meta(), [int(t) for t in rows.index.as_unit("s").asi8]
    if interval not in LONG:
        cal = calendar(series.exchange)
        days = sorted(set(rows.index.tz_convert(series.zone).date))
        sessions = [d for d in pd.DatetimeIndex(days) if d in cal.sessions]
        meta["tradingPeriods"] = [
            [
                {
                    "timezone": "EST",
                    "gmtoffset": -18000,
                    "start": int(cal.opens[d].timestamp()),
                    "end": int(cal.closes[d].timestamp()),
                }
            ]
            for d in sessions
        ]
    cell = lambda column: [None if pd.isna(v) else float(v) for v in column]
    quote = {name: cell(rows[name]) for name in ("open", "high", "low", "close", "volume")}
    indicators = {"quote": [quote]} | (
        {"adjclose": [{"adjclose": cell(rows.close * rows.factor)}]} if interval in LONG else {}
    )
    result = {"meta": meta, "timestamp": stamps, "indicators": indicators}
    events = {kind: {k: e for k, e in found.items() if p1 <= int(k) < p2} for kind, found in series.events.items()}
    return {"chart": {"result": [result | ({"events": events} if any(events.values()) else {})], "error": None}}


def refusal(code, description):
    return json.dumps({"chart": {"result": None, "error": {"code": code, "description": description}}}).encode()


UNKNOWN = "No data found, symbol may be delisted"


class YahooServer(ThreadingHTTPServer):
    "`series[(symbol, interval)]`, `faults` taken one a request (or `fault(query)` for rules), `log` of what was asked."

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.series, self.faults, self.log, self.fault, self.mangle = {}, [], [], None, None
        self.body = None  # what is sent in the place of any answer
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is part of the game

    def stop(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, status, body, headers=(), length=None):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if length is not None:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)

    def reset(self, body):
        "Half of a body, then a reset instead of an end."
        self.send(200, body[: len(body) // 2], length=len(body))
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def do_GET(self):
        parts = urlsplit(self.path)
        if not parts.path.startswith("/v8/finance/chart/"):
            return self.send(404, b"{}")
        query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        symbol, interval = unquote(parts.path.rsplit("/", 1)[1]), query["interval"]
        p1, p2 = int(query.get("period1", 0)), int(query.get("period2", time.time()))
        asked = (symbol, interval, p1, p2)
        with self.server.lock:
            self.server.log.append(asked)
            fault = (
                self.server.faults.pop(0)
                if self.server.faults
                else (self.server.fault(asked) if self.server.fault else None)
            )
        series = self.server.series.get((symbol, interval))
        if series is None:
            return self.send(404, refusal("Not Found", UNKNOWN))
        body = self.server.body or json.dumps(chart(series, p1, p2, interval, self.server.mangle)).encode()
        if fault is None:
            return self.send(200, body)
        getattr(self, f"fault_{fault}")(body, series, asked)

    def fault_limit(self, body, *_):
        self.send(429, b"Too Many Requests")

    def fault_limit_after(self, body, *_):
        self.send(429, b"Too Many Requests", [("Retry-After", "1")])

    def fault_limit_until(self, body, *_):
        self.send(429, b"Too Many Requests", [("Retry-After", formatdate(time.time() + 2, usegmt=True))])

    def fault_forbidden(self, body, *_):
        self.send(403, b"<html>Forbidden</html>")

    def fault_error(self, body, *_):
        self.send(500, b"<html>Internal Server Error</html>")

    def fault_error_json(self, body, *_):
        self.send(500, refusal("Internal Server Error", "Unknown Host"))

    def fault_gateway(self, body, *_):
        self.send(502, b"")

    def fault_crumb(self, body, *_):
        self.send(401, refusal("Unauthorized", "Invalid Crumb"))

    def fault_slow(self, body, *_):
        time.sleep(1.6)
        self.send(200, body)

    def fault_reset(self, body, *_):
        self.reset(body)

    def fault_short(self, body, *_):
        self.send(200, body[: len(body) // 2], length=len(body))

    def fault_cut(self, body, *_):
        self.send(200, body[: len(body) // 2])

    def fault_html(self, body, *_):
        self.send(200, b"<html><body>consent</body></html>")

    def fault_blank(self, body, *_):
        self.send(200, b"")

    def fault_null(self, body, *_):
        self.send(200, b"null")

    def fault_back_soon(self, body, *_):
        self.send(200, b"Will be right back...")

    def fault_no_meta(self, body, *_):
        answer = json.loads(body)
        answer["chart"]["result"][0]["meta"] = {}
        self.send(200, json.dumps(answer).encode())

    def fault_no_quotes(self, body, *_):
        answer = json.loads(body)
        answer["chart"]["result"][0]["indicators"] = {"quote": [{}]}
        del answer["chart"]["result"][0]["timestamp"]
        self.send(200, json.dumps(answer).encode())

    def fault_empty(self, body, *_):
        self.send(200, json.dumps({"chart": {"result": [], "error": None}}).encode())

    def fault_half(self, body, series, asked):
        symbol, interval, p1, p2 = asked
        half = chart(series, p1, p2, interval, lambda rows: rows.iloc[: len(rows) // 2])
        self.send(200, json.dumps(half).encode())

    def fault_late(self, body, series, asked):
        symbol, interval, p1, p2 = asked
        self.send(200, json.dumps(chart(series, p1 + 2 * 86400, p2, interval)).encode())

    def fault_holes(self, body, series, asked):
        symbol, interval, p1, p2 = asked
        self.send(200, json.dumps(chart(series, p1, p2, interval, lambda rows: rows.drop(rows.index[3::7]))).encode())

    def fault_nulls(self, body, series, asked):
        symbol, interval, p1, p2 = asked

        def null(rows):
            rows = rows.copy()
            rows.iloc[5::50, rows.columns.get_loc("close")] = np.nan
            return rows

        self.send(200, json.dumps(chart(series, p1, p2, interval, null)).encode())

    def fault_unknown(self, body, *_):
        self.send(404, refusal("Not Found", UNKNOWN))

    def fault_no_range(self, body, *_):
        self.send(400, refusal("Bad Request", "Data doesn't exist for startDate = 1, endDate = 2"))

    def fault_reach(self, body, *_):
        self.send(
            422,
            refusal(
                "Unprocessable Entity",
                "1h data not available for startTime=1 and endTime=2. "
                "The requested range must be within the last 730 days.",
            ),
        )

    def fault_interval(self, body, *_):
        self.send(
            422,
            refusal("Unprocessable Entity", "Invalid input - interval=7q is not supported. Valid intervals: [1m, 2m]"),
        )
