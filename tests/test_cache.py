"""Chunks and the cache file: whole, resumable, shared by processes, never worse than before."""

import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet
import pytest
from frame_kit import days, plain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yahoo_kit import END, FAST, START, same, spy, truth
from yahoo_server import Series, daily

from smlstm.data import cache, request
from smlstm.data import yahoo as client
from smlstm.data.cache import Stored, _joined, get_stock_data, split_range
from smlstm.data.frames import frame_hash
from smlstm.data.prices import load_prices
from smlstm.data.request import INTERVALS, FetchError, NoPrices, RateLimited, TransientFailure, UnknownTicker, utc_now
from smlstm.data.yahoo import Answer, fetch_chunk

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_twenty_years_arrive_in_chunks_without_gaps_or_duplicates(yahoo, tmp_path):
    frame = get_stock_data("SPY", None, None, cache_dir=tmp_path, **FAST)
    same(frame, truth(spy(), frame.index[0], "2999-01-01"))
    assert len(yahoo.log) == 3 and len(frame) > 5000
    assert frame.index[0] - (pd.Timestamp.now() - pd.DateOffset(years=20)) < pd.Timedelta(days=7)


def test_never_more_than_max_workers_at_once(yahoo, tmp_path, monkeypatch):
    now, most, lock, ask = [0], [0], threading.Lock(), client.request_chart

    def counted(*args):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        try:
            time.sleep(0.05)
            return ask(*args)
        finally:
            with lock:
                now[0] -= 1

    monkeypatch.setattr(client, "request_chart", counted)
    get_stock_data("SPY", None, None, max_workers=2, cache_dir=tmp_path, **FAST)
    assert most[0] == 2


def test_a_chunk_before_the_first_trade_is_empty(yahoo, tmp_path):
    yahoo.series[("NEW", "1d")] = series = daily(years=3)
    assert fetch_chunk("NEW", "2010-01-01", "2011-01-01", **FAST).empty
    frame = get_stock_data("NEW", None, None, cache_dir=tmp_path, **FAST)
    same(frame, truth(series, "2000-01-01", "2999-01-01"))


def test_a_chunk_fails_while_its_siblings_succeed(yahoo, tmp_path):
    middle = pd.Timestamp.now().timestamp() - 10 * 365 * 86400
    yahoo.fault = lambda asked: "unknown" if asked[2] < middle < asked[3] else None
    with pytest.raises(UnknownTicker):
        get_stock_data("SPY", None, None, cache_dir=tmp_path, **FAST)
    done = len([a for a in yahoo.log if not a[2] < middle < a[3]])
    yahoo.fault, yahoo.log = None, []
    frame = get_stock_data("SPY", None, None, cache_dir=tmp_path, **FAST)
    assert done == 2 and len(yahoo.log) == 1
    same(frame, truth(spy(), frame.index[0], "2999-01-01"))


def test_a_failure_ends_the_waiting_of_its_siblings(yahoo, tmp_path):
    middle = pd.Timestamp.now().timestamp() - 10 * 365 * 86400
    yahoo.fault = lambda asked: "unknown" if asked[2] < middle < asked[3] else "limit"
    with pytest.raises((UnknownTicker, RateLimited)):
        get_stock_data("SPY", None, None, cache_dir=tmp_path, delay=500)


def test_interrupted_between_chunks_and_resumed(yahoo, tmp_path, monkeypatch):
    write, written = cache.write_stored, []

    def interrupted(path, stored):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, stored)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_stored", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_prices("SPY", "yahoo", cache_dir=tmp_path, **FAST)
    yahoo.log.clear()
    got = load_prices("SPY", "yahoo", cache_dir=tmp_path, **FAST)
    same(got.frame, truth(spy(), got.frame.index[0], "2999-01-01"))
    assert len(yahoo.log) == 2


KILLED = """
    import sys, time
    import yfinance, yfinance.base, yfinance.scrapers.history
    from smlstm.data import cache, prices
    for module in (yfinance.base, yfinance.scrapers.history): module._BASE_URL_ = sys.argv[1]
    yfinance.data.YfData._get_cookie_and_crumb = lambda self, timeout=30: (None, "basic")
    write = cache.write_stored
    def slowly(path, stored):
        write(path, stored); print("written", flush=True); time.sleep(30)
    cache.write_stored = slowly
    prices.load_prices("SPY", "yahoo", cache_dir=sys.argv[2], delay=0.01)
"""


def test_killed_between_chunks_and_resumed(yahoo, tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), yahoo.url, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout.readline() == b"written\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "SPY_1d_adjusted.parquet").exists()
    kept = len(list(tmp_path.glob("*.parts/*.parquet")))
    yahoo.log.clear()
    got = load_prices("SPY", "yahoo", cache_dir=tmp_path, **FAST)
    same(got.frame, truth(spy(), got.frame.index[0], "2999-01-01"))
    assert kept >= 1 and len(yahoo.log) == 3 - kept
    assert not list(tmp_path.rglob(".*.tmp*"))


CROWD = """
    import sys
    import yfinance, yfinance.base, yfinance.scrapers.history
    from smlstm.data import prices
    for module in (yfinance.base, yfinance.scrapers.history): module._BASE_URL_ = sys.argv[1]
    yfinance.data.YfData._get_cookie_and_crumb = lambda self, timeout=30: (None, "basic")
    print("ready", flush=True)
    sys.stdin.readline()
    got = prices.load_prices("SPY", "yahoo", start=sys.argv[3], cache_dir=sys.argv[2], delay=0.01)
    print(got.provenance.sha256, flush=True)
"""


def crowd(yahoo, folder, starts):
    "Processes that are ready to load the same symbol into the same folder."
    command = [sys.executable, "-c", textwrap.dedent(CROWD), yahoo.url, str(folder)]
    children = [
        subprocess.Popen(
            [*command, start], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for start in starts
    ]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    return children


@pytest.mark.parametrize("rounds", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_share_a_cache_while_one_of_them_is_killed(yahoo, tmp_path, rounds):
    starts, chance = ["2007-01-03", "2012-01-03", "2007-01-03", "2016-01-04"], random.Random(0)
    for number in range(rounds):
        yahoo.fault, folder = (
            lambda asked: chance.choice(["reset", "null", "error", None, None, None]),
            tmp_path / str(number),
        )
        children = crowd(yahoo, folder, starts)
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        time.sleep(chance.uniform(0.05, 1.5))
        children[0].kill()
        said = [child.communicate(timeout=300)[0].strip().splitlines() or [""] for child in children]
        for start, sha in list(zip(starts, said))[1:]:
            assert sha[-1] == frame_hash(truth(spy(), start, "2999-01-01")), start
        assert {p.name for p in folder.iterdir()} <= {"SPY_1d_adjusted.parquet", "SPY_1d_adjusted.lock"}


def test_chunks_of_another_day_are_not_trusted(yahoo, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "rmtree", lambda *a, **k: None)
        get_stock_data("SPY", "2010-01-04", END, cache_dir=tmp_path, **FAST)
    for path in tmp_path.rglob("*.parts/*.parquet"):
        stored = cache.read_stored(path)
        cache.write_stored(path, cache.Stored(stored.frame * 2, stored.note | {"at": "2001-01-01T12:00:00+00:00"}))
    same(get_stock_data("SPY", "2010-01-04", END, cache_dir=tmp_path, **FAST), truth(spy(), "2010-01-04", END))


def at(patch, moment):
    "The clock of every room stands still."
    for module in (cache, client, request):
        patch.setattr(module, "utc_now", lambda: moment)


def test_a_chunk_that_reaches_into_the_present_ages(yahoo, tmp_path, monkeypatch):
    whole, morning = spy(), utc_now().normalize()
    with monkeypatch.context() as patch:  # stopped in the morning, before the last bar was there
        patch.setattr(cache.shutil, "rmtree", lambda *a, **k: None)
        at(patch, morning)
        yahoo.series[("SPY", "1d")] = Series(whole.bars.iloc[:-1])
        get_stock_data("SPY", "2010-01-04", None, cache_dir=tmp_path, **FAST)
    yahoo.series[("SPY", "1d")], yahoo.log = whole, []
    at(monkeypatch, morning + pd.Timedelta(hours=23))
    same(
        get_stock_data("SPY", "2010-01-04", None, cache_dir=tmp_path, **FAST), truth(whole, "2010-01-04", "2999-01-01")
    )
    assert len(yahoo.log) == 1  # the older chunks were whole and still are


def test_a_second_load_asks_for_nothing(yahoo, tmp_path):
    first = load_prices("SPY", cache_dir=tmp_path, **FAST)
    yahoo.log.clear()
    second = load_prices("SPY", cache_dir=tmp_path, **FAST)
    assert yahoo.log == [] and (first.provenance.source, second.provenance.source) == ("yahoo", "cache")
    assert first.provenance.sha256 == second.provenance.sha256 == frame_hash(second.frame)
    inside = load_prices("SPY", start="2012-01-01", end="2013-01-01", cache_dir=tmp_path)
    assert yahoo.log == []
    same(inside.frame, truth(spy(), "2012-01-01", "2013-01-01"))


def test_only_missing_ranges_are_asked_for(yahoo, tmp_path):
    load_prices("SPY", start="2012-01-03", end="2013-01-01", cache_dir=tmp_path, **FAST)
    for start, end, old in (("2012-01-03", "2014-01-01", "2012-12-01"), ("2011-01-03", "2014-01-01", None)):
        yahoo.log.clear()
        got = load_prices("SPY", start=start, end=end, cache_dir=tmp_path, **FAST)
        same(got.frame, truth(spy(), start, end))
        (asked,) = yahoo.log
        span = pd.Timedelta(seconds=asked[3] - asked[2])
        assert span < pd.Timedelta(days=385), span
        assert old is None or pd.Timestamp(asked[2], unit="s") > pd.Timestamp(old)


def test_years_before_the_first_trade_take_nothing_away(yahoo, tmp_path):
    yahoo.series[("NEW", "1d")] = series = daily(years=3)
    for start in ("2020-01-02", "2012-01-03"):
        same(
            load_prices("NEW", start=start, cache_dir=tmp_path, **FAST).frame, truth(series, "2000-01-01", "2999-01-01")
        )
    with pytest.raises(NoPrices):
        load_prices("NEW", start="2012-01-03", end="2013-01-02", cache_dir=tmp_path, **FAST)


def test_a_null_never_replaces_a_price(yahoo, tmp_path):
    load_prices("SPY", start="2012-01-03", end="2013-01-01", cache_dir=tmp_path, **FAST)
    yahoo.mangle = lambda rows: rows.assign(close=rows.close.where(rows.index > "2012-12-29"))
    same(
        load_prices("SPY", start="2012-01-03", end="2014-01-01", cache_dir=tmp_path, **FAST).frame,
        truth(spy(), "2012-01-03", "2014-01-01"),
    )


def test_a_new_history_full_of_holes_is_no_reason_to_give_up_the_old(yahoo, tmp_path):
    yahoo.series[("DIV", "1d")] = series = daily(seed=1)
    load_prices("DIV", start="2010-01-04", end="2014-01-01", cache_dir=tmp_path, **FAST)
    path, two_years = tmp_path / "DIV_1d_adjusted.parquet", 2 * 365 * 86400
    before = path.read_bytes()
    series.bars.loc[series.bars.index < "2014-03-01", "factor"] = 0.995
    yahoo.fault = lambda asked: "half" if asked[3] - asked[2] > two_years else None
    with pytest.raises(TransientFailure, match="the old one stays"):
        load_prices("DIV", start="2010-01-04", end="2015-01-01", cache_dir=tmp_path, **FAST)
    assert path.read_bytes() == before
    yahoo.fault = None
    same(
        load_prices("DIV", start="2010-01-04", end="2015-01-01", cache_dir=tmp_path, **FAST).frame,
        truth(series, "2010-01-04", "2015-01-01"),
    )


def test_recent_bars_are_refreshed(yahoo, tmp_path):
    load_prices("SPY", start="2015-01-02", cache_dir=tmp_path, **FAST)
    path = tmp_path / "SPY_1d_adjusted.parquet"
    stored = cache.read_stored(path)
    earlier = stored.frame.iloc[:-3].copy()
    earlier.iloc[-1, 4] *= 2  # a volume that was not final
    cache.write_stored(
        path, cache.Stored(earlier, stored.note | {"to": str(pd.Timestamp(stored.note["to"]) - pd.Timedelta(days=4))})
    )
    yahoo.log.clear()
    same(
        load_prices("SPY", start="2015-01-02", cache_dir=tmp_path, **FAST).frame,
        truth(spy(), "2015-01-02", "2999-01-01"),
    )
    assert pd.Timedelta(seconds=yahoo.log[0][3] - yahoo.log[0][2]) < pd.Timedelta(days=30)


def test_rewritten_history_is_fetched_whole_and_told(yahoo, tmp_path, caplog):
    series = daily(seed=1)
    yahoo.series[("DIV", "1d")] = series
    load_prices("DIV", start="2010-01-04", end="2014-01-01", cache_dir=tmp_path, **FAST)
    series.bars.loc[series.bars.index < "2014-03-01", "factor"] = 0.995
    got = load_prices("DIV", start="2010-01-04", end="2015-01-01", cache_dir=tmp_path, **FAST)
    same(got.frame, truth(series, "2010-01-04", "2015-01-01"))
    assert "rewritten" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:1000] + b"x" + b[1001:], lambda b: b"PAR1" * 9],
    ids=["cut", "empty", "one byte", "nonsense"],
)
def test_a_corrupt_file_is_set_aside(yahoo, tmp_path, damage, caplog):
    load_prices("SPY", start=START, end=END, cache_dir=tmp_path, **FAST)
    path = tmp_path / "SPY_1d_adjusted.parquet"
    path.write_bytes(damage(path.read_bytes()))
    same(load_prices("SPY", start=START, end=END, cache_dir=tmp_path, **FAST).frame, truth(spy(), START, END))
    assert (tmp_path / "SPY_1d_adjusted.parquet.corrupt").exists() and "set aside" in caplog.text


@pytest.mark.parametrize(
    "fault, kind",
    [("unknown", UnknownTicker), ("limit", RateLimited), ("cut", TransientFailure), ("reset", TransientFailure)],
)
def test_a_failed_update_leaves_the_cache_as_it_was(yahoo, tmp_path, fault, kind):
    load_prices("SPY", start=START, end=END, cache_dir=tmp_path, **FAST)
    path = tmp_path / "SPY_1d_adjusted.parquet"
    before = path.read_bytes()
    yahoo.fault = lambda asked: fault
    with pytest.raises(kind):
        load_prices("SPY", start=START, end="2018-01-01", cache_dir=tmp_path, retries=2, **FAST)
    assert path.read_bytes() == before
    yahoo.fault = None
    same(
        load_prices("SPY", start=START, end="2018-01-01", cache_dir=tmp_path, **FAST).frame,
        truth(spy(), START, "2018-01-01"),
    )


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    path = tmp_path / "A.parquet"
    cache.write_stored(
        path,
        cache.Stored(
            truth(spy(), "2015-01-05", "2015-02-05"), {"from": "2015-01-05 00:00:00", "to": "2015-02-05 00:00:00"}
        ),
    )
    whole, good = path.read_bytes(), cache.read_stored(path)
    at_note = whole.index(b"2015-02-05")
    for i in (*range(at_note, at_note + 10), *range(0, len(whole), 29)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
        got = cache.read_stored(path)
        assert got is None or got.note == good.note and got.frame.equals(good.frame), i


def test_what_a_killed_writer_left_is_cleared_away(yahoo, tmp_path):
    (tmp_path / ".SPY_1d_adjusted.parquet.12.tmp").write_bytes(b"PAR1")
    load_prices("SPY", start=START, end=END, cache_dir=tmp_path, **FAST)
    assert not list(tmp_path.glob(".*.tmp*"))


def test_a_write_that_fails_halfway_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "A.parquet"
    cache.write_stored(path, cache.Stored(truth(spy(), START, END), {}))
    before = path.read_bytes()

    def torn(table, where):
        Path(where).write_bytes(b"PAR1 and then the power went")
        raise OSError("no space left")

    monkeypatch.setattr(pyarrow.parquet, "write_table", torn)
    with pytest.raises(FetchError, match="no space left"):
        cache.write_stored(path, cache.Stored(truth(spy(), START, END) * 2, {}))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_reader_never_meets_a_half_written_file(tmp_path):
    path, frame = tmp_path / "A.parquet", spy().bars.drop(columns="factor").rename_axis("date")
    cache.write_stored(path, cache.Stored(frame, {}))
    writer = threading.Thread(
        target=lambda: [cache.write_stored(path, cache.Stored(frame * k, {})) for k in range(1, 25)]
    )
    writer.start()
    while writer.is_alive():
        assert cache.read_stored(path) is not None
    writer.join()


def test_two_at_once_fetch_once(yahoo, tmp_path):
    frames = []
    threads = [
        threading.Thread(
            target=lambda: frames.append(load_prices("SPY", start=START, end=END, cache_dir=tmp_path, **FAST).frame)
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(frames) == 4 and len(yahoo.log) == 1
    for frame in frames:
        same(frame, truth(spy(), START, END))


def test_a_cache_that_cannot_be_written_says_so(yahoo, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match="cache_dir"):
        load_prices("SPY", start=START, end=END, cache_dir=tmp_path / "file" / "below", **FAST)


@QUICK
@given(st.integers(1, 9000), st.integers(0, 4000), st.sampled_from(list(INTERVALS)), st.integers(1, 8))
def test_chunks_touch_and_cover(length, offset, interval, workers):
    first = pd.Timestamp("2000-01-01") + pd.Timedelta(days=offset)
    last = first + pd.Timedelta(days=length)
    chunks = split_range(first, last, interval, workers)
    assert chunks[0][0] == first and chunks[-1][1] == last
    assert all(a[1] == b[0] for a, b in zip(chunks, chunks[1:])) and all(a < b for a, b in chunks)
    assert max((b - a).days for a, b in chunks) <= INTERVALS[interval].request


@QUICK
@given(st.sets(days, min_size=1), st.lists(st.sets(days, min_size=1), min_size=1, max_size=4))
def test_joins_keep_every_date_and_the_newest_value(old, pieces):
    stored = Stored(plain(old, 0), {})
    answers = [Answer(plain(piece, i + 1), {}) for i, piece in enumerate(pieces)]
    joined = _joined(stored, answers)
    assert (
        set(joined.index) == set(old).union(*pieces) and joined.index.is_monotonic_increasing and joined.index.is_unique
    )
    for date, row in joined.iterrows():
        newest = [f for f in (stored.frame, *(a.frame for a in answers)) if date in f.index][-1]
        assert (row == newest.loc[date]).all()
