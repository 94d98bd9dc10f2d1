"""Sweeps in which workers, programs and whole machines die half-way, on every engine that is installed."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from joblib import parallel_config
from tenacity import Retrying, stop_after_attempt

from smlstm.data.prices import load_prices
from smlstm.using.sweep import SweepError, attempt, fan_out, sweep, task_files, task_identity

ENGINES = ("loky", "dask", "ray")


class Toy(NamedTuple):
    number: int
    log: str  # a file that gets a line for each run that came to its end
    seconds: float = 0.2


def slowly(task):
    in_hand = Path(f"{task.log}.{task.number}.in_hand")
    in_hand.touch()
    time.sleep(task.seconds)
    with open(task.log, "a") as log:
        log.write(f"{task.number}\n")
    in_hand.unlink(missing_ok=True)
    return {"score": task.number / 10}


def deadly(task):
    "The first task kills its process, if possible while a neighbour has something in hand."
    if task.number == 0:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not (in_hand := list(Path(task.log).parent.glob("*.in_hand"))):
            time.sleep(0.01)
        for path in in_hand:
            path.unlink(missing_ok=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return slowly(task)


def toys(folder, n, **options):
    return [Toy(i, str(folder / "log"), **options) for i in range(n)]


def ended(folder):
    "How often each task came to its end."
    log = folder / "log"
    return Counter(map(int, log.read_text().split())) if log.exists() else Counter()


def alone(*arguments, **options):
    "`fan_out` in this process."
    with parallel_config(n_jobs=1):
        return fan_out(*arguments, progress=False, **options)


def outcomes(folder):
    return list(Path(folder).glob("*.json"))


def kill_one(folder, after):
    "Wait for `after` outcomes, then kill a process that has a task in hand; returns its id."
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        done = {path.stem for path in outcomes(folder)}
        for path in Path(folder).glob("*.starts") if len(done) >= after else ():
            if path.stem not in done and (line := path.read_text().split()):
                assert int(line[1]) != os.getpid(), "the task runs in this process"
                os.kill(int(line[1]), signal.SIGKILL)
                return int(line[1])
        time.sleep(0.005)
    raise TimeoutError(f"nothing was running in {folder}")


@contextmanager
def dask_cluster():
    distributed = pytest.importorskip("distributed", reason='Dask is not installed: pip install ".[dask]"')
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.wait_for_workers(2)
        yield cluster


def start_ray():
    "Two machines of one worker each, for Ray. Where a busy computer misses their deadlines: once more."
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster()
    try:
        cluster.add_node(**small, include_dashboard=False, include_log_monitor=False)
        cluster.add_node(**small)
        cluster.wait_for_nodes()
    except BaseException:
        cluster.shutdown()
        raise
    return cluster


@contextmanager
def ray_cluster():
    here = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )  # for workers to find this module
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "60", "PYTHONPATH": here}
    ray = pytest.importorskip("ray", reason='Ray is not installed: pip install ".[ray]"')
    from ray.util.joblib import register_ray

    register_ray()
    cluster = Retrying(stop=stop_after_attempt(3), reraise=True)(start_ray)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        assert ray.cluster_resources()["CPU"] == 2
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextmanager
def two_workers(name):
    "joblib's engine `name` with two workers; on Ray and Dask, a real cluster of this machine."
    cluster = {"dask": dask_cluster, "ray": ray_cluster}.get(name)
    if cluster is None:
        with parallel_config(backend=name, n_jobs=2):
            yield None
    else:
        with cluster() as running, parallel_config(backend=name):
            yield running


@pytest.mark.parametrize("name", ENGINES)
def test_a_worker_is_killed_in_the_middle(name, tmp_path):
    tasks, killed = toys(tmp_path, 12), []
    with two_workers(name):
        killer = threading.Thread(target=lambda: killed.append(kill_one(tmp_path / "out", after=4)))
        killer.start()
        results = fan_out(slowly, tasks, tmp_path / "out", pause=0, progress=False)
        killer.join()
    assert killed
    assert [result["scores"]["score"] for result in results] == [i / 10 for i in range(12)]
    assert max(result["attempts"] for result in results) == 2
    assert (
        sorted(ended(tmp_path)) == list(range(12)) and ended(tmp_path).total() <= 13
    )  # a neighbour may have come to its end, too late to be filed


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_forty_fits_and_one_worker_killed(name, tmp_path):
    prices = {ticker: load_prices(ticker, source="sample", start="2012").frame for ticker in ("SPY", "QQQ")}
    quick = dict(epochs=2, hidden_size=16, n_layers=1, stride=128, seq_length=64)
    configs = {f"seed {seed}": quick | {"seed": seed} for seed in range(4)}
    killed = []
    with two_workers(name):
        killer = threading.Thread(target=lambda: killed.append(kill_one(tmp_path, after=12)))
        killer.start()
        results = sweep(prices, configs, tmp_path, pause=0)
        killer.join()
    assert killed
    assert len(results) == 40 and list(results.status) == ["ok"] * 40 and results.attempts.max() == 2
    undisturbed = sweep({"QQQ": prices["QQQ"]}, {"seed 3": configs["seed 3"]}, tmp_path / "again", progress=False)
    there = results[(results.ticker == "QQQ") & (results.config == "seed 3")]
    assert undisturbed.volatility_qlike.to_numpy() == pytest.approx(there.volatility_qlike.to_numpy(), rel=1e-5)


@pytest.mark.slow
def test_a_machine_is_lost_for_good(tmp_path):
    "A Ray cluster of two machines loses one: joblib would work in this process, which the deadly task would end."
    with two_workers("ray") as cluster:

        def unplug():
            while len(outcomes(tmp_path / "out")) < 4:
                time.sleep(0.01)
            cluster.remove_node(next(node for node in cluster.list_all_nodes() if not node.head), allow_graceful=False)

        killer = threading.Thread(target=unplug)
        killer.start()
        tasks = toys(tmp_path, 11, seconds=0.5)
        results = fan_out(deadly, tasks[1:] + tasks[:1], tmp_path / "out", pause=0, progress=False)
        killer.join()
    assert [result["status"] for result in results] == ["ok"] * 10 + ["failed"]


@pytest.mark.slow
def test_only_the_guilty_one_pays(tmp_path):
    "The first task kills its process each time, and its neighbours with it; each of them is run again alone."
    with two_workers("loky"):
        results = fan_out(deadly, toys(tmp_path, 6, seconds=1.0), tmp_path / "out", attempts=2, pause=0, progress=False)
    assert [result["status"] for result in results] == ["failed"] + ["ok"] * 5
    assert results[0]["error"].startswith("the process died") and results[0]["attempts"] == 2
    assert max(result["attempts"] for result in results[1:]) <= 2


def program(folder, n):
    alone(slowly, toys(folder, n), folder / "out")


def test_a_killed_program_goes_on_where_it_was(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=program, args=(tmp_path, 8))
    child.start()
    while len(outcomes(tmp_path / "out")) < 3:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    before = {path.name: path.stat().st_mtime_ns for path in outcomes(tmp_path / "out")}
    assert 3 <= len(before) < 8
    results = alone(slowly, toys(tmp_path, 8), tmp_path / "out")
    assert [result["attempts"] for result in results] == [1] * 8
    assert all(
        path.stat().st_mtime_ns == before.get(path.name, path.stat().st_mtime_ns) for path in outcomes(tmp_path / "out")
    )
    assert ended(tmp_path).total() in (8, 9)  # one more where it was killed between a run's end and its filing


def test_a_second_program_is_refused(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=program, args=(tmp_path, 30))
    child.start()
    try:
        while not outcomes(tmp_path / "out"):
            time.sleep(0.01)
        with pytest.raises(SweepError, match="another program is at work"):
            program(tmp_path, 30)
    finally:
        child.kill()
        child.join()


def test_failures_are_tried_anew_and_successes_are_not(tmp_path):
    def fails(task):
        raise OSError("no route")

    tasks = toys(tmp_path, 4, seconds=0)
    alone(slowly, tasks[:2], tmp_path / "out")
    assert [r["status"] for r in alone(fails, tasks, tmp_path / "out", attempts=2, pause=0)] == [
        "ok",
        "ok",
        "failed",
        "failed",
    ]
    results = alone(slowly, tasks, tmp_path / "out")
    assert [(r["status"], r["attempts"]) for r in results] == [("ok", 1)] * 4
    assert ended(tmp_path) == Counter(range(4))


def test_a_damaged_outcome_is_made_again(tmp_path):
    tasks = toys(tmp_path, 3, seconds=0)
    alone(slowly, tasks, tmp_path / "out")
    damaged = task_files(tmp_path / "out", tasks[1]).outcome
    damaged.write_bytes(damaged.read_bytes()[:7])
    assert [r["status"] for r in alone(slowly, tasks, tmp_path / "out")] == ["ok"] * 3
    assert ended(tmp_path) == Counter({0: 1, 1: 2, 2: 1})


def test_a_folder_that_keeps_nothing_ends_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr("smlstm.using.sweep.write_outcome", lambda path, outcome: None)
    with pytest.raises(SweepError, match="outcomes do not stay in"):
        alone(slowly, toys(tmp_path, 2, seconds=0), tmp_path / "out", attempts=2, pause=0)


def test_scores_that_cannot_be_filed_are_a_failure_of_the_task(tmp_path):
    results = alone(lambda task: {"score": object()}, toys(tmp_path, 1), tmp_path / "out", attempts=1)
    assert results[0]["status"] == "failed" and "AttributeError" in results[0]["error"]
    assert [path.suffix for path in (tmp_path / "out").iterdir() if path.name != ".lock"].count(".tmp") == 0


def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path):
    with pytest.raises(SweepError, match="a drive that all machines share"):
        attempt(slowly, toys(tmp_path, 1)[0], tmp_path / "elsewhere", attempts=1, pause=0)


def test_two_equal_tasks_and_no_attempts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two tasks are the same"):
        fan_out(slowly, toys(tmp_path, 1) * 2, tmp_path / "out")
    with pytest.raises(ValueError, match="attempts=0"):
        fan_out(slowly, toys(tmp_path, 1), tmp_path / "out", attempts=0)
    assert alone(slowly, [], tmp_path / "out") == []


def test_a_changed_module_changes_the_identity_and_old_outcomes_do_not_count(monkeypatch, tmp_path):
    "One line more in a module of a copied library: the task has another name, and is run again."
    from smlstm.data import files

    copy, task = tmp_path / "smlstm", toys(tmp_path, 1, seconds=0)[0]
    shutil.copytree(Path(files.__file__).parent.parent, copy)
    alone(slowly, [task], tmp_path / "out")
    before = task_identity(task)
    digest = files.code_digest
    digest.cache_clear()
    monkeypatch.setattr(files, "code_digest", lambda: digest(copy))
    assert task_identity(task) == before  # the same sources elsewhere
    with open(copy / "model" / "cell.py", "a") as module:
        module.write("# changed")
    digest.cache_clear()
    assert task_identity(task) != before
    alone(slowly, [task], tmp_path / "out")
    assert ended(tmp_path) == Counter({0: 2})


def test_missing_scores_come_back_as_missing_numbers(tmp_path):
    task = toys(tmp_path, 1, seconds=0)[0]
    alone(lambda task: {"score": float("nan"), "rows": 3}, [task], tmp_path / "out")
    text = task_files(tmp_path / "out", task).outcome.read_text()
    assert json.loads(text, parse_constant=pytest.fail)["scores"] == {"score": None, "rows": 3}


def test_files_are_plain_json(tmp_path):
    task = toys(tmp_path, 1, seconds=0)[0]
    alone(slowly, [task], tmp_path / "out")
    assert json.loads(task_files(tmp_path / "out", task).outcome.read_text()) == {
        "status": "ok",
        "scores": {"score": 0.0},
    }
