"""Training under adversity: kills, damaged files, several processes, batches that are not finite."""

import errno
import json
import math
import multiprocessing
import os
import random
import signal
import time

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm
from training_kit import SmallForecaster, count_saves, loaders, losses, settings, train, train_shared

import smlstm.learning.training as training
from smlstm.data.files import FolderInUse
from smlstm.data.windows import create_sequences, create_tpu_dataloader
from smlstm.learning.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from smlstm.learning.device import launch
from smlstm.learning.history import replica_batch
from smlstm.learning.optimizer import flatten
from smlstm.learning.runs import start_run
from smlstm.learning.settings import TrainConfig
from smlstm.learning.training import NonFiniteError, fit
from smlstm.model.losses import CurriculumWeights, MultiObjectiveLoss
from smlstm.model.model import SMLSTM, SMLSTMConfig


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- killed and resumed


def forkserver():
    """Processes that start with everything imported: a kill costs milliseconds, not an import of torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["smlstm.data.windows", "smlstm.learning.training"]
    )  # not the kit: Python 3.11 does not look in its folder
    return context


def run_killed_at(context, saves, delay, arguments):
    "Start a training and kill it `delay` seconds after it begins its `saves`-th checkpoint; True if it had not ended."
    count = context.RawValue("i", 0)
    process = context.Process(target=count_saves, args=(count, *arguments))
    process.start()
    while process.is_alive() and (saves is None or count.value < saves):
        process.join(0.001)
    process.join(delay)
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    else:
        assert process.exitcode == 0
    return alive


def kill_until(folder, kills, seed):
    """Kill and resume runs at random moments, `kills` times in all; a finished run equals the uninterrupted one.

    A moment is a random checkpoint and a random time after it: while it is written, in the next batch, or later."""
    context, draw = forkserver(), random.Random(seed)
    config = settings(epochs=4, checkpoint_every=1)
    assert not run_killed_at(context, None, None, (folder / "whole.pt", folder / "whole", False, config))
    whole, saves = torch.load(folder / "whole.pt"), 4 * len(loaders()[0])
    killed, places, finished = 0, [], 0
    while killed < kills or not finished:
        run = folder / f"run{finished}"
        at, delay = (
            (draw.randrange(saves), draw.choice([0.002, 0.02, 0.2]) * draw.random()) if killed < kills else (None, None)
        )
        if run_killed_at(context, at, delay, (folder / "again.pt", run, True, config)):
            killed += 1
            if (run / "latest.safetensors").exists():
                facts = load_checkpoint(run / "latest.safetensors")[1]
                places.append((facts["epoch"], facts["batch"]))
        else:
            again = torch.load(folder / "again.pt")
            assert torch.equal(again["weights"], whole["weights"])
            assert again["losses"] == whole["losses"]
            assert not list(run.glob("*.tmp"))
            finished += 1
    return places


def test_killed_three_times_ends_with_the_same_bits(tmp_path):
    assert kill_until(tmp_path, kills=3, seed=0)


@pytest.mark.slow
def test_killed_fifty_times_ends_with_the_same_bits(tmp_path):
    places = kill_until(tmp_path, kills=50, seed=1)
    assert len(set(places)) > 10 and sum(batch > 0 for _, batch in places) > 20, places


@pytest.mark.parametrize("at", [1, 3, 7, 8, 11])
def test_stopped_after_any_save_ends_with_the_same_bits(tmp_path, monkeypatch, at):
    """Stopped right after the `at`-th checkpoint: no randomness in where."""
    history, whole = train(config=settings(checkpoint_every=2))
    saves, save_run = [], training.save_run

    def failing(run, path, *args):
        save_run(run, path, *args)
        saves.append(path)
        if len(saves) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_run", failing)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, config=settings(checkpoint_every=2))
    monkeypatch.setattr(training, "save_run", save_run)
    random.random(), torch.rand(3)
    again, weights = train(tmp_path, resume=True, config=settings(checkpoint_every=2))
    assert torch.equal(weights, whole)
    assert losses(again) == losses(history)


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    history, weights = train(tmp_path)
    monkeypatch.setattr(training, "train_epoch", None)
    again, same = train(tmp_path, resume=True)
    assert torch.equal(weights, same) and again.to_dict() == history.to_dict()


def test_early_stopping_survives_an_interruption(tmp_path):
    config = settings(epochs=12, patience=2, min_delta=0.3, checkpoint_every=1)
    history, weights = train(config=config)
    assert history.stopped_early and len(history.epochs) < 12
    stopped = tmp_path / "latest.safetensors"
    train(tmp_path, config=config)
    tensors, facts = load_checkpoint(stopped)
    assert facts["done"] and facts["waiting"] == 2
    again, same = train(tmp_path, resume=True, config=config)
    assert again.stopped_early and torch.equal(weights, same)


# ---- files


def revised(name, row):
    """The usual loaders, with one number of the training data changed."""
    train_loader, valid = loaders()
    if name == "starts":
        train_loader.dataset.starts[row] += 1
    else:
        getattr(train_loader.dataset, name)[row, 0] += 1e-6
    return train_loader, valid


def test_files_hold_the_best_weights_and_the_log(tmp_path):
    history, weights = train(tmp_path)
    best, facts = load_checkpoint(tmp_path / "best.safetensors")
    assert facts["epoch"] == history.best_epoch
    model = SmallForecaster()
    model.load_state_dict(best)
    assert torch.equal(flatten(model.parameters()), weights)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == len(history.epochs) + 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "best.safetensors", "latest.safetensors", "log.csv"]
    assert json.loads(json.dumps(history.to_dict(), allow_nan=False))["best_epoch"] == history.best_epoch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    train(path, config=settings(epochs=1))
    return path / "latest.safetensors"


@examples(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_flipped_byte_goes_unnoticed(checkpoint, data):
    content = bytearray(checkpoint.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 3000))
    content[place] ^= data.draw(st.integers(1, 255))
    damaged = checkpoint.with_name("damaged")
    damaged.write_bytes(content)
    try:
        tensors, facts = load_checkpoint(damaged)
    except CheckpointError as error:
        assert str(damaged) in str(error)
    else:
        wanted, wanted_facts = load_checkpoint(checkpoint)
        assert facts == wanted_facts and wanted.keys() == tensors.keys()
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("length", [0, 1, 8, 100, -1])
def test_a_cut_file_is_refused(checkpoint, length):
    cut = checkpoint.with_name("cut")
    cut.write_bytes(checkpoint.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(cut)


def test_foreign_files_are_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "latest.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        train(tmp_path, resume=True)
    torch.save({"a": 1}, tmp_path / "latest.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train(tmp_path, resume=True)


@pytest.mark.parametrize(
    "other, named",
    [
        ({"config": settings(learning_rate=0.5)}, "learning_rate is 0.01 there and 0.5 here"),
        ({"config": settings(seed=1)}, "seed is 0 there and 1 here"),
        ({"model": SmallForecaster(hidden_size=6)}, "hidden_size"),
        (
            {"model": SmallForecaster().double()},
            r"lstm.weight_ih_l0 is \[32, 4\] torch.float32 there and \[32, 4\] torch.float64 here",
        ),
        ({"data": lambda: loaders(rows=280)}, "train_batches is 15 there and 13 here|checksum"),
        ({"data": lambda: revised("data", 0)}, "checksum of the training data"),
        ({"data": lambda: revised("data", -1)}, "checksum of the training data"),
        ({"data": lambda: revised("targets", 100)}, "checksum of the training data"),
        ({"data": lambda: revised("starts", 3)}, "checksum of the training data"),
        ({"data": lambda: loaders(seq_length=11)}, "checksum of the validation data"),
        (
            {"data": lambda: (create_tpu_dataloader(loaders()[0].dataset, 16, seed=1), loaders()[1])},
            "checksum of the training data",
        ),
    ],
)
def test_another_runs_checkpoint_is_refused(tmp_path, other, named):
    train(tmp_path, config=settings())
    before = (tmp_path / "latest.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=named):
        train(tmp_path, resume=True, **other)
    assert (tmp_path / "latest.safetensors").read_bytes() == before


def test_what_differs_is_named_briefly(tmp_path):
    train(tmp_path, config=settings(epochs=1))
    with pytest.raises(CheckpointError, match="; and [0-9]+ more") as error:
        train(
            tmp_path,
            resume=True,
            config=settings(epochs=3, seed=1, accumulate=3, clip=2.0),
            model=SmallForecaster(hidden_size=6),
        )
    assert len(str(error.value)) < 700


def test_weights_alone_are_no_run_to_continue(tmp_path):
    train(tmp_path)
    (tmp_path / "best.safetensors").rename(tmp_path / "latest.safetensors")
    with pytest.raises(CheckpointError, match="holds weights alone"):
        train(tmp_path, resume=True)


def test_a_folder_under_the_name_is_refused(tmp_path):
    (tmp_path / "latest.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train(tmp_path, resume=True)


def test_a_run_keeps_others_out_of_its_folder(tmp_path, monkeypatch):
    def second(*_):
        with pytest.raises(FolderInUse, match="another process is writing to .*another folder"):
            train(tmp_path)
        raise KeyboardInterrupt

    whole = train()[1]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "finish_epoch", second)
        train(tmp_path)
    assert torch.equal(train(tmp_path, resume=True)[1], whole)  # an ended run lets go of it


def test_a_killed_run_lets_go_of_its_folder(tmp_path):
    context = forkserver()
    assert run_killed_at(
        context, 2, 0.0, (tmp_path / "never.pt", tmp_path, False, settings(epochs=50, patience=50, checkpoint_every=1))
    )
    train(tmp_path)


def test_a_full_disk_is_named_and_the_run_can_go_on(tmp_path):
    """The system itself refuses the write, in the middle of a file, as a full disk does."""
    resource = pytest.importorskip("resource")
    history, whole = train(config=settings(checkpoint_every=3))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, config=settings(checkpoint_every=3), data=lambda: interrupted(20))
    size, limits = (tmp_path / "latest.safetensors").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="make room .*latest.safetensors"):
            train(tmp_path, resume=True, config=settings(checkpoint_every=3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("*.tmp"))
    again, weights = train(tmp_path, resume=True, config=settings(checkpoint_every=3))
    assert torch.equal(weights, whole) and losses(again) == losses(history)


def interrupted(at):
    """The usual loaders, interrupted before the `at`-th batch of the run."""
    train_loader, valid = loaders()

    class Interrupted(Poisoned):
        def __iter__(self):
            for batch in self.loader:
                if self.count in self.places:
                    raise KeyboardInterrupt
                self.count += 1
                yield batch

    return Interrupted(train_loader, (at,)), valid


def test_tied_weights_can_be_saved(tmp_path):
    save_checkpoint(
        tmp_path / "tied",
        {"a": (shared := torch.arange(6.0)), "b": shared, "c": shared[2:4], "d": torch.arange(6.0).view(2, 3).T},
        {},
    )
    tensors, _ = load_checkpoint(tmp_path / "tied")
    assert (
        torch.equal(tensors["a"], tensors["b"])
        and tensors["c"].tolist() == [2, 3]
        and tensors["d"].tolist() == [[0, 3], [1, 4], [2, 5]]
    )


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "latest.safetensors"
    save_checkpoint(path, {"a": torch.ones(2)}, {"n": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match="No space left on device: make room or choose another folder.*latest.safetensors"
    ):
        save_checkpoint(path, {"a": torch.zeros(2)}, {"n": 2})
    assert load_checkpoint(path)[1] == {"n": 1} and [p.name for p in tmp_path.iterdir()] == ["latest.safetensors"]


def test_checkpoints_are_plain_safetensors(checkpoint):
    assert "state.weights" in load_file(checkpoint)


# ---- the guard


class Poisoned:
    """Makes the batches at some places, counted over the run, not finite."""

    def __init__(self, loader, places, value=math.nan):
        self.loader, self.places, self.value, self.count = loader, places, value, 0

    def __len__(self):
        return len(self.loader)

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __iter__(self):
        for batch in self.loader:
            yield batch._replace(x=batch.x + self.value) if self.count in self.places else batch
            self.count += 1


def poisoned(*places, value=math.nan):
    train_loader, valid = loaders()
    return lambda: (Poisoned(train_loader, places, value), valid)


def test_a_skipped_batch_is_reported(tmp_path, capfd):
    train_loader, valid = poisoned(4)()
    fit(SmallForecaster(), train_loader, valid, settings(), device="cpu", checkpoint_dir=tmp_path)
    assert "skipped=1" in capfd.readouterr().err
    log = pd.read_csv(tmp_path / "log.csv")
    assert log.skipped.tolist() == [1, 0, 0, 0]


def test_one_bad_batch_is_left_out_exactly():
    """With the bad batch skipped, the run equals one whose loader masks that batch out."""
    train_loader, valid = loaders()

    class Masked(Poisoned):
        def __iter__(self):
            for batch in self.loader:
                yield batch._replace(mask=batch.mask * 0) if self.count in self.places else batch
                self.count += 1

    history, weights = train(data=poisoned(9), dropout=0.0)
    masked, wanted = train(data=lambda: (Masked(train_loader, (9,)), valid), dropout=0.0)
    assert history.skipped == 1 and masked.skipped == 0
    assert torch.equal(weights, wanted)


def test_an_update_with_nothing_left_changes_nothing():
    history, _ = train(data=poisoned(0, 1), config=settings(epochs=1))
    assert history.skipped == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_three_in_a_row_stop_and_leave_finite_weights(value, tmp_path):
    model, n = SmallForecaster(), len(loaders()[0])
    with pytest.raises(NonFiniteError, match="3 batches in a row were not finite in epoch 1"):
        train(tmp_path, model=model, data=poisoned(n - 1, n, n + 1, value=value))  # across the border of two epochs
    assert all(p.isfinite().all() for p in model.parameters())
    assert load_checkpoint(tmp_path / "latest.safetensors")[1]["epoch"] == 1  # from before the trouble


def test_two_and_two_in_a_row_do_not_stop():
    history, _ = train(data=poisoned(2, 3, 5, 6))
    assert history.skipped == 4


def test_validation_that_is_never_finite_is_an_error():
    train_loader, valid = loaders()
    with pytest.raises(NonFiniteError, match="never finite"):
        train(data=lambda: (train_loader, Poisoned(valid, range(1000))), config=settings(patience=2))


# ---- reads


class CountReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a device's value."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(function) or "nonzero" in str(function):
            self.reads.append(str(function))
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_inside_an_epoch(monkeypatch):
    counters = []

    def counted(run, *args):
        with CountReads() as counter:
            train_epoch(run, *args)
        counters.append(counter.reads)

    train_epoch = training.train_epoch
    monkeypatch.setattr(training, "train_epoch", counted)
    train()
    assert counters == [[]] * 4


def test_the_host_reads_once_per_epoch(monkeypatch):
    calls, host_values = [], training.host_values
    monkeypatch.setattr(training, "host_values", lambda values: calls.append(1) or host_values(values))
    train()
    assert len(calls) == 4


# ---- its cost


@pytest.mark.slow
def test_the_loop_costs_less_than_five_percent():
    "CPU time of an epoch by the loop, and of bare forward, backward and step on ready batches; the usual size."
    generator, schedule = torch.Generator().manual_seed(0), TrainConfig(accumulate=1)
    x, y = torch.randn(1200, 25, generator=generator).numpy(), torch.rand(1200, 3, generator=generator).numpy()
    loader = create_tpu_dataloader(create_sequences(x, y, 128, stride=16), 16)

    def model():
        torch.manual_seed(0)
        return SMLSTM(SMLSTMConfig(n_features=25))

    run, batches, plain, objective = (
        start_run(model(), loader, loader, schedule, torch.device("cpu")),
        list(loader),
        model(),
        MultiObjectiveLoss(),
    )
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)

    def bare():
        for batch in batches:
            optimizer.zero_grad()
            objective(plain(batch.x)[0], batch.y, CurriculumWeights(), batch.mask).total.backward()
            optimizer.step()

    def loop():
        run.batch = 0
        with tqdm(total=len(loader)) as bar:
            training.train_epoch(run, bar)

    def seconds(work):
        began = time.process_time()
        work()
        return time.process_time() - began

    times = [(seconds(bare), seconds(loop)) for _ in range(12)]
    fastest = [min(column) for column in zip(*times)]
    print(f"bare {1000 * fastest[0] / len(loader):.1f} ms a batch, the loop {fastest[1] / fastest[0] - 1:+.1%}")
    assert fastest[1] < 1.05 * fastest[0]


# ---- several processes


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The same run by one process and by two, which share each batch."""
    folder = tmp_path_factory.mktemp("shared")
    launch(train_shared, folder / "two.pt", 0.0, None, 8, device="cpu", processes=2)
    train_shared(folder / "one.pt", 0.0, None, 8)
    return torch.load(folder / "one.pt"), torch.load(folder / "two.pt")


def test_two_processes_find_the_losses_of_one(shared):
    one, two = shared
    gap = (torch.tensor(one["losses"]) - torch.tensor(two["losses"])).abs().max()
    assert gap < 1e-6, gap
    assert (one["weights"] - two["weights"]).abs().max() < 1e-5


@pytest.mark.slow
def test_two_processes_resume_with_the_same_bits(tmp_path):
    """Each replica has its own dropout and its own unfinished sums; both go on where they were."""
    launch(train_shared, tmp_path / "whole.pt", 0.2, tmp_path / "whole", 8, device="cpu", processes=2)
    run = tmp_path / "again"
    run.mkdir()
    with pytest.raises(Exception, match="stopped on purpose"):
        launch(train_and_stop, tmp_path / "again.pt", run, device="cpu", processes=2)
    facts = load_checkpoint(run / "latest.safetensors")[1]
    assert (facts["epoch"], facts["batch"]) == (1, 3)  # an odd batch: half of an update is under way
    launch(train_shared, tmp_path / "again.pt", 0.2, run, 8, device="cpu", processes=2)
    whole, again = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "again.pt")
    assert torch.equal(whole["weights"], again["weights"]) and whole["losses"] == again["losses"]


def train_and_stop(path, folder):
    """Stops both replicas after the first checkpoint inside the second epoch."""
    save_run = training.save_run

    def stopping(run, *args):
        save_run(run, *args)
        if (run.epoch, run.batch) == (1, 3):
            raise RuntimeError("stopped on purpose")

    training.save_run = stopping
    train_shared(path, 0.2, folder, 8)


def test_a_batch_that_cannot_be_shared_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="a batch of 15 rows cannot be shared evenly by 2"):
        replica_batch(next(iter(loaders(batch_size=15)[0])), 0, 2)


# ---- settings


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"seed": "0"},
        {"accumulate": 0},
        {"learning_rate": -1.0},
        {"learning_rate": math.nan},
        {"clip": 0.0},
        {"patience": 0},
        {"min_delta": -1.0},
        {"precision": "float16"},
        {"pos_weight": 0.0},
        {"warmup_epochs": -1},
    ],
)
def test_settings_that_make_no_sense_are_named(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=name) as error:
        TrainConfig(**change)
    assert str(value) in str(error.value)


def test_accumulation_equals_one_large_batch():
    """Two batches of 16 accumulated, or one of 32: the same weights, partial last batch and all."""
    _, two = train(data=lambda: plain(16), config=settings(accumulate=2), dropout=0.0)
    _, one = train(data=lambda: plain(32), config=settings(accumulate=1), dropout=0.0)
    assert (one - two).abs().max() < 1e-5


def plain(batch_size):
    """Loaders without shuffling and noise, the same rows in the same order whatever the batch size."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 4, generator=generator).numpy(), torch.rand(200, 3, generator=generator).numpy()
    dataset = create_sequences(x, y, 12, augment=False)
    return create_tpu_dataloader(dataset, batch_size, shuffle=False), create_tpu_dataloader(dataset, 32, shuffle=False)
