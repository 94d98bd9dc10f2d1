"""The XLA leg: real tracing and real compiles, on torch_xla's CPU device. Run it with `.ci/xla`."""

import copy
import gc
import os
import re
import subprocess
import sys
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("torch_xla", reason="needs torch_xla: run .ci/xla")
if os.environ.get("PJRT_DEVICE") != "CPU":
    pytest.skip("needs PJRT_DEVICE=CPU: run .ci/xla", allow_module_level=True)

import torch_xla
import torch_xla.debug.metrics as metrics
from test_train import run as main_flow
from test_training import poisoned
from tqdm.auto import tqdm
from training_kit import Outputs, loaders, losses, settings, train, without_noise

import smlstm.learning.runs as runs
import smlstm.learning.steps as learning_steps
import smlstm.learning.training as training
from smlstm.learning.checkpoints import load_checkpoint
from smlstm.learning.device import (
    get_rng_state,
    host_values,
    pick_device,
    seed_everything,
    set_rng_state,
    to_device,
    to_host,
)
from smlstm.learning.optimizer import accumulate_gradient, optimizer_step, write_weights
from smlstm.learning.runs import start_run
from smlstm.learning.traced import Traced
from smlstm.model.cell import CellConfig, ParallelSMLSTMCell
from smlstm.model.losses import CurriculumWeights
from smlstm.model.memory import random_inputs
from smlstm.model.mixing import mixed_chunkwise, mixed_recurrent, random_mixing
from smlstm.model.model import SMLSTM, SMLSTMConfig, map_state
from smlstm.model.stabilization import chunkwise, recurrent
from smlstm.using.streams import flat_tensors, recorded_step
from smlstm.using.xla import optimization_barrier
from smlstm.using.xla_scan import checkpointed_scan


def smlstm(**changes):
    torch.manual_seed(0)
    return SMLSTM(
        SMLSTMConfig(**{"n_features": 4, "hidden_size": 8, "n_heads": 2, "n_layers": 2, "dropout": 0.1, **changes})
    )


def dispatched():
    """Operations that were handed to XLA one by one so far: what tracing costs the host, without its noise."""
    return sum(metrics.counter_value(name) for name in metrics.counter_names() if name.startswith("xla::"))


def compiles():
    return (metrics.metric_data("CompileTime") or [0])[0]


def reads():
    return (metrics.metric_data("TransferFromDeviceTime") or [0])[0]


def fallbacks():
    return {name: metrics.counter_value(name) for name in metrics.counter_names() if name.startswith("aten::")}


# ---- a training run of the real model


@pytest.fixture(scope="module")
def counted():
    """Ten epochs, with validation, dropout and partial last batches: compiles and reads after each epoch and after the
    best weights are back; fallbacks."""
    metrics.clear_all()
    before, after = (compiles(), reads()), []

    def counting(function):
        def counted(*args):
            result = function(*args)
            after.append((compiles() - before[0], reads() - before[1]))
            return result

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in ("finish_epoch", "keep_best"):
            patch.setattr(training, name, counting(getattr(training, name)))
        history, _ = train(config=settings(epochs=10, patience=10), device="xla", model=smlstm())
    return history, after, fallbacks()


def test_compiles_are_few_and_all_in_the_first_epoch(counted):
    found = [c for c, _ in counted[1]]
    assert len(found) == 11 and found[0] <= 5 and set(found) == {found[0]}, (
        f"compiles after each epoch and at the end: {found}"
    )


def test_nothing_falls_back_to_the_host(counted):
    assert counted[2] == {}


def test_the_host_reads_once_per_epoch(counted):
    assert [r for _, r in counted[1]] == [*range(1, 11), 10]


def test_it_learns(counted):
    totals = [epoch.valid.total for epoch in counted[0].epochs]
    assert min(totals) < 0.9 * totals[0]


def test_checkpoints_compile_nothing_and_cost_a_read_a_file(tmp_path, monkeypatch):
    """In each epoch one read decides; the best weights and the checkpoint are one transfer each."""
    before, after, save_epoch = (compiles(), reads()), [], training.save_epoch

    def counting(run, *args):
        save_epoch(run, *args)
        after.append((compiles() - before[0], reads() - before[1]))

    monkeypatch.setattr(training, "save_epoch", counting)
    history, _ = train(tmp_path, config=settings(epochs=3), device="xla", model=smlstm())
    better = [
        epoch.valid.total < min([e.valid.total for e in history.epochs[: epoch.epoch]], default=float("inf")) - 1e-4
        for epoch in history.epochs
    ]
    assert [c for c, _ in after] == [0, 0, 0]
    assert [r for _, r in after] == [sum(2 + b for b in better[:n]) for n in (1, 2, 3)]


def test_other_batches_compile_nothing(counted):
    """A second run of the same shapes, other weights and learning rate: only what is known already."""
    before = compiles()
    train(config=settings(epochs=2, learning_rate=3e-3), device="xla", model=smlstm())
    assert compiles() == before


# ---- what is compiled


def wide(hlo):
    """Lines of a program with a 64-bit array; the key of the random generator is torch_xla's own."""
    lines = [line.strip() for line in hlo.splitlines() if re.search(r"\b[fsuc]64\[\d", line)]
    return [line for line in lines if not re.search(r"\bu64\[[12]\]", line)]


class Pointwise(torch.nn.Module):
    """A forecaster of sums and tanh alone, so that what else is compiled is the loop and the losses."""

    def __init__(self):
        super().__init__()
        self.first, self.heads = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)

    def forward(self, x, state=None):
        return Outputs(*self.heads(self.first(x).tanh()).unbind(-1)), state


def programs(model):
    """The programs of learning from a batch, of an update and of validation."""
    device = pick_device("xla")
    train_loader, valid = loaders()
    run = start_run(model, train_loader, valid, settings(), device)
    model.train()
    schedule, batch = torch.tensor([0.01, 1.0, 0.5, 0.2]).to(device), to_device(next(iter(train_loader)), device)
    learned = accumulate_gradient(model, run.params, run.objective, batch, CurriculumWeights(*schedule[1:]), run.state)
    first = torch_xla._XLAC._get_xla_tensors_hlo(list(learned))
    torch_xla.sync()
    updated = optimizer_step(learned, schedule[0], run.decay, 1.0)
    write_weights(run.params, updated.weights)
    second = torch_xla._XLAC._get_xla_tensors_hlo([*updated, *(p.data for p in run.params)])
    torch_xla.sync()
    with torch.no_grad():
        judged = run.objective(model.eval()(batch.x)[0], batch.y, CurriculumWeights(), batch.mask)
    return first, second, torch_xla._XLAC._get_xla_tensors_hlo(list(judged))


def test_the_loop_and_the_losses_use_no_64_bit_arrays():
    for program in programs(Pointwise()):
        assert not wide(program), wide(program)[:5]


KINDS = [
    {},
    {"checkpoint_above": 8},
    {"value_transform": "full", "key_transform": "full"},
    {"regime_transform": "mlp"},
    {"ssm_method": "bilinear", "input_gate": "sigmoid"},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_model_uses_no_64_bit_arrays(kind):
    for program in programs(smlstm(chunk_size=4, **kind)):
        assert not wide(program), wide(program)[:5]


def test_a_64_bit_array_would_be_seen():
    x = torch.ones(3, device=pick_device("xla"), requires_grad=True)
    with torch.autograd.set_multithreading_enabled(False):
        (gradient,) = torch.autograd.grad(x.clamp(min=0.5).sum(), x)
    assert wide(torch_xla._XLAC._get_xla_tensors_hlo([gradient]))


# ---- the same numbers as elsewhere


def test_losses_are_those_of_the_cpu():
    there, _ = train(dropout=0.0, device="xla", model=smlstm(dropout=0.0), data=without_noise)
    here, _ = train(dropout=0.0, device="cpu", model=smlstm(dropout=0.0), data=without_noise)
    assert torch.allclose(torch.tensor(losses(there)), torch.tensor(losses(here)), atol=1e-4)


def test_the_memory_is_exact_there_too():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 19, 4, generator=generator)
    log_i, log_f = torch.randn(2, 2, 19, generator=generator), -torch.rand(2, 2, 19, generator=generator)
    wanted, _ = recurrent(q, k, v, log_i, log_f)
    found, _ = chunkwise(*(t.to(pick_device("xla")) for t in (q, k, v, log_i, log_f)), chunk_size=8)
    assert torch.allclose(found.cpu(), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "kind", [dict(value="diagonal"), dict(value="full", key="full"), dict(value=None, width=3)], ids=str
)
def test_the_mixed_memory_is_exact_there_too(kind):
    """Outputs and gradients of the chunkwise form on XLA, and those of its definition, step by step on the CPU."""
    inputs, mix = (
        random_inputs(2, 2, 19, 4, dtype=torch.float32),
        random_mixing(2, 2, 19, 4, dtype=torch.float32, **kind),
    )

    def outcome(form, device, **options):
        def moved(part):
            return part.to(device) if torch.is_tensor(part) else part and type(part)(*map(moved, part))

        there = [t.clone().to(device).requires_grad_() for t in inputs]
        h, state = form(*there, moved(mix), **options)
        with torch.autograd.set_multithreading_enabled(False):  # its threads are made once, for the devices known then
            gradients = torch.autograd.grad(h.square().sum(), there)
        return [t.cpu() for t in (h, *state, *gradients)]

    wanted, found = outcome(mixed_recurrent, "cpu"), outcome(mixed_chunkwise, pick_device("xla"), chunk_size=8)
    for one, other in zip(wanted, found):
        assert (one - other).abs().max() < 1e-4 * one.abs().max(), ((one - other).abs().max(), one.abs().max())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_cell_reads_a_sequence_as_it_reads_a_stream(kind):
    cell, x, device = smlstm(chunk_size=8, **kind).cells[0], torch.randn(2, 19, 8), pick_device("xla")
    state, steps = None, []
    with torch.no_grad():
        for x_t in x.unbind(1):
            out = cell.step(x_t, state)
            steps, state = [*steps, out.h], out.state
        found = cell.to(device).parallel_forward(x.to(device))
    assert torch.allclose(torch.stack(steps, 1), found.h.cpu(), atol=1e-5)


def test_recomputed_layers_learn_the_same():
    """Long windows are recomputed in the backward pass instead of kept."""
    kept, recomputed = (
        [*train(config=settings(epochs=1), device="xla", dropout=0.0, model=smlstm(dropout=0.0, checkpoint_above=T))][1]
        for T in (12, 11)
    )
    assert (kept - recomputed).abs().max() < 1e-5


def test_a_model_streams_there_as_here():
    model, x = smlstm().eval(), torch.randn(2, 9, 4)
    with torch.no_grad():
        wanted, _ = model(x)
        model.to(pick_device("xla"))
        found, _ = model(x.to(pick_device("xla")))
    for name, one, other in zip(wanted._fields, wanted, found):
        assert torch.allclose(one, other.cpu(), atol=1e-5), name


def test_bfloat16_stays_near_float32():
    half, _ = train(dropout=0.0, device="xla", config=settings(epochs=3, precision="bfloat16"))
    full, _ = train(dropout=0.0, device="cpu", config=settings(epochs=3))
    assert torch.allclose(torch.tensor(losses(half)), torch.tensor(losses(full)), rtol=0.05)


# ---- the step as one graph


def test_torch_compile_takes_the_whole_loss():
    """Dynamo finds one graph, with the barrier in it."""
    device, model = pick_device("xla"), smlstm(n_layers=1, dropout=0.0)
    train_loader, _ = loaders()
    run = start_run(model, train_loader, [], settings(), device)
    batch = to_device(next(iter(train_loader)), device)

    def loss(x, y, mask):
        return run.objective(model(x)[0], y, CurriculumWeights(), mask).total

    found = torch._dynamo.explain(loss)(*batch)
    assert found.graph_break_count == 0, found.break_reasons
    assert "smlstm.optimization_barrier" in found.graphs[0].code


def test_the_barrier_keeps_numbers_and_gradients():
    x = torch.randn(3, device=pick_device("xla"), requires_grad=True)
    (y,) = optimization_barrier(2 * x)
    with torch.autograd.set_multithreading_enabled(False):
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert "opt-barrier" in torch_xla._XLAC._get_xla_tensors_hlo([y])
    assert torch.equal(y.cpu(), 2 * x.cpu()) and torch.equal(gradient.cpu(), 8 * x.cpu())


# ---- the step traced once


@contextmanager
def traced_every_time():
    """Training as it was before: every operation traced at every step, batches sent from the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "runs_programs", lambda device: False)
        yield


@contextmanager
def batch_by_batch():
    """Training with a program for each batch, as where the tables are too large for the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "DeviceLoader", tuple)
        yield


def started(model, loaders=loaders, **changes):
    """A run on XLA whose programs are compiled: one epoch is over."""
    run = start_run(model, *loaders(), settings(**changes), pick_device("xla"))
    one_epoch(run)
    return run


def one_epoch(run):
    """Operations dispatched to XLA for a batch of an epoch of training; the history has the host's time."""
    before = dispatched()
    with tqdm(disable=True) as bar:
        training.train_epoch(run, bar)
        count = dispatched() - before
        training.finish_epoch(run, 0.0)
    assert run.history.epochs[-1].host_ms > 0
    return count / len(run.train)


def test_stretches_and_batches_learn_what_tracing_every_time_does():
    """Three epochs without random numbers, partial batches among them: weights and losses."""
    options = dict(config=settings(epochs=3), device="xla", data=without_noise)
    with traced_every_time():
        wanted, always = train(model=smlstm(dropout=0.0), **options)
    for by_batch in (False, True):
        with batch_by_batch() if by_batch else nullcontext():
            history, once = train(model=smlstm(dropout=0.0), **options)
        assert (once - always).abs().max() < 2e-6, (by_batch, (once - always).abs().max())
        assert torch.allclose(torch.tensor(losses(history)), torch.tensor(losses(wanted)), rtol=1e-5), by_batch


def test_the_host_dispatches_a_hundredth_of_tracing_every_time():
    """Everything included: drawing batches, gradient, optimizer step, bar."""
    once = one_epoch(started(smlstm()))
    with traced_every_time():
        always = one_epoch(started(smlstm()))
    assert 0 < once < 0.01 * always, f"{once:.1f} operations a batch traced once, {always:.1f} traced every time"


def test_an_epoch_is_one_start_of_one_program():
    """Seven batches, the last partial, are one start; validation and the weights of the model are one each."""

    def starts():
        return (metrics.metric_data("RunCachedGraphInputData") or [0])[0]

    found = {}
    for name, way in (("stretches", nullcontext), ("batches", batch_by_batch)):
        with way():
            run, before = started(smlstm()), starts()
            one_epoch(run)
            found[name] = starts() - before
    assert len(run.train) == 7 and found["stretches"] == 1 + 1 + 1, found
    assert found["batches"] > 2 * 7, found


def test_stretches_of_any_length_give_the_same_bits(tmp_path, monkeypatch):
    """Dropout and noise are on. Checkpoints cut an epoch after 3 batches, or a program holds 2 at most."""
    options = dict(device="xla", data=loaders)
    _, wanted = train(model=smlstm(), config=settings(epochs=2), **options)
    _, cut = train(tmp_path, model=smlstm(), config=settings(epochs=2, checkpoint_every=3), **options)
    for module in (learning_steps, training):
        monkeypatch.setattr(module, "STRETCH", 2)
    _, short = train(model=smlstm(), config=settings(epochs=2), **options)
    assert torch.equal(cut, wanted) and torch.equal(short, wanted)


def test_dropout_and_noise_differ_from_batch_to_batch_of_a_stretch():
    """The same windows twice in a stretch: their gradients differ; with the same seed they do not."""
    run = started(smlstm(dropout=0.5))
    rows, seeds = run.stretches.epoch_inputs(0)
    rows = torch.cat([rows[:1, :-1], torch.zeros(1, 1, dtype=torch.int32)], 1)
    schedule = torch.tensor([0.01, 1.0, 0.5, 0.2]).to(run.device)

    def gradient(*numbers):
        state = run.state._replace(gradient=torch.zeros_like(run.state.gradient))
        there = rows.expand(len(numbers), -1), seeds[list(numbers)]
        return run.stretches.learn(state, run.decay, schedule, *there).gradient.cpu()

    one, other, same, both = gradient(0), gradient(1), gradient(0, 0), gradient(0, 1)
    largest = one.abs().max()
    assert (one - other).abs().max() > 0.01 * largest
    assert (same - 2 * one).abs().max() < 1e-5 * largest and (both - one - other).abs().max() < 1e-5 * largest


def test_a_bar_of_a_stream_dispatches_a_twentieth_and_compiles_nothing():
    """The program of a step beside tracing it for every bar: the same forecasts and states."""
    device, model, bars = pick_device("xla"), smlstm().eval(), torch.randn(12, 1, 4)
    with torch.no_grad():
        _, first = model.step(torch.zeros(1, 4))
        model.to(device)

        def traced_for_every_bar(model, x, state):
            forecast, state = model.step(x, state)
            torch_xla.sync()
            return forecast, state

        def stream(step):
            state, heads, counts = map_state(lambda part: part.to(device), first), [], []
            for bar in bars:
                before = dispatched()
                forecast, state = step(model, bar.to(device), state)
                heads.append(to_host(forecast._asdict())["price"])
                counts.append(dispatched() - before)
            return heads, map_state(lambda part: part.cpu(), state), max(counts)

        stream(recorded_step)
        before = compiles()
        once = stream(recorded_step)
        assert compiles() == before
        always = stream(traced_for_every_bar)
    for one, other in zip(flat_tensors(once[:2]), flat_tensors(always[:2])):
        assert torch.allclose(one, other, atol=1e-6)
    assert 0 < once[2] < 0.05 * always[2], f"{once[2]} operations a bar, {always[2]} traced every time"


def test_a_program_keeps_no_model_alive():
    model, device = smlstm().eval(), pick_device("xla")
    with torch.no_grad():
        _, state = model.step(torch.zeros(1, 4))
    model, state = model.to(device), map_state(lambda part: part.to(device), state)
    recorded_step(model, torch.zeros(1, 4).to(device), state)
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


def test_a_new_fold_compiles_nothing(counted):
    """More rows, another model, another learning rate; only what the first run compiled is needed."""
    before = compiles()
    folds = [lambda rows=rows: loaders(rows=rows) for rows in (320, 410)]
    for number, data in enumerate(folds):
        train(config=settings(epochs=2, learning_rate=2e-3 + number), device="xla", model=smlstm(), data=data)
    assert compiles() == before


def test_dropout_and_noise_differ_from_step_to_step():
    with batch_by_batch():
        run = started(smlstm(dropout=0.5))
    batches, run.state = iter(run.train_batches), run.state._replace(gradient=torch.zeros_like(run.state.gradient))
    batch, schedule = next(batches), torch.tensor([0.01, 1.0, 0.5, 0.2]).to(run.device)
    first, second = (run.steps.accumulate(run.state, batch, schedule).gradient.cpu() for _ in range(2))
    assert not torch.equal(first, second)
    run.train_batches.set_epoch(0)
    again = next(iter(run.train_batches))
    run.train_batches.set_epoch(0)
    assert not torch.equal(next(iter(run.train_batches)).x.cpu(), again.x.cpu())


class LeftToHost(torch.nn.Module):
    """A forecaster with an operation that XLA does not have, so that its host computes it."""

    def __init__(self):
        super().__init__()
        self.inner = Pointwise()

    def forward(self, x, state=None):
        return self.inner(x + torch.special.bessel_j0(x))


def test_an_operation_left_to_the_host_is_no_constant_of_the_program():
    options = dict(config=settings(epochs=2), data=without_noise)
    torch.manual_seed(0)
    model = LeftToHost()
    there, here = (train(device=device, model=copy.deepcopy(model), **options)[0] for device in ("xla", "cpu"))
    assert torch.allclose(torch.tensor(losses(there)), torch.tensor(losses(here)), atol=1e-4)
    assert any("bessel_j0" in name for name in metrics.counter_names())  # the host did compute it


def test_an_argument_is_no_result():
    x = torch.ones(2, device=pick_device("xla"))
    with pytest.raises(ValueError, match="leave it out"):
        Traced(lambda x: (x, x + 1))(x)


# ---- guard, generators, resume


def test_a_bad_batch_is_skipped_and_three_stop():
    history, _ = train(data=poisoned(4), device="xla", config=settings(epochs=2))
    assert history.skipped == 1
    with pytest.raises(training.NonFiniteError):
        train(data=poisoned(4, 5, 6), device="xla")


def test_the_generator_goes_back_to_where_it_was():
    device = pick_device("xla")
    seed_everything(3, device)
    torch.rand(3, device=device)
    saved = get_rng_state(device)
    first = host_values(torch.rand(3, device=device))
    set_rng_state(saved, device)
    assert host_values(torch.rand(3, device=device)) == first


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    config = settings(epochs=3, checkpoint_every=3)
    history, whole = train(config=config, device="xla")
    save_run, saves = training.save_run, []

    def failing(run, path, done=False):
        save_run(run, path, done)
        saves.append(run.batch)
        if len(saves) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_run", failing)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, config=config, device="xla")
    monkeypatch.setattr(training, "save_run", save_run)
    assert load_checkpoint(tmp_path / "latest.safetensors")[1]["batch"] > 0
    again, weights = train(tmp_path, resume=True, config=config, device="xla")
    assert torch.equal(weights, whole) and losses(again) == losses(history)


# ---- processes of their own


def alone(program, *arguments, **environment):
    """Run a program in a process of its own, and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), **environment}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        timeout=900,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


CACHED = """
import sys, torch
import smlstm.learning.device as device
import torch_xla.debug.metrics as metrics
device.xla_hardware = lambda: "TPU"         # where what is compiled is kept without being asked
print(device.host_values(torch.ones(8).to(device.pick_device("auto")) * 3)[0], device.keep_compiled())
print({name for name in metrics.counter_names() if name.startswith("PersistentCache")})
"""


@pytest.mark.slow
def test_what_was_compiled_is_kept_and_found_again(tmp_path):
    """XLA's CPU device finds it too, and only then says that it cannot load it."""
    first, second = (alone(CACHED, XDG_CACHE_HOME=str(tmp_path)).splitlines() for _ in range(2))
    assert first == ["3.0 False", "{'PersistentCacheMiss'}"] and list((tmp_path / "smlstm" / "xla").iterdir())
    assert second == ["3.0 False", "{'PersistentCacheDeserializeFailure'}"]


@pytest.mark.slow
def test_replicas_start_on_two_devices(tmp_path):
    program = "import sys; from smlstm.learning.device import launch; from training_kit import say_who; "
    program += "launch(say_who, sys.argv[1], device='xla')"
    alone(program, tmp_path, CPU_NUM_DEVICES="2")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "0": "Replicas(rank=0, world=2) xla:0",
        "1": "Replicas(rank=1, world=2) xla:1",
    }


TWO = """
import sys, torch
from smlstm.learning.device import split_over_devices
split_over_devices()
import torch_xla.runtime as xr
from training_kit import losses, train, without_noise
history, weights = train(dropout=0.0, device="xla", data=without_noise)
torch.save({"losses": losses(history), "weights": weights, "devices": xr.global_runtime_device_count()}, sys.argv[1])
"""


@pytest.mark.slow
def test_two_devices_find_the_losses_of_one(tmp_path):
    """The compiler splits each batch over two devices; same global batch, same losses."""
    alone(TWO, tmp_path / "two.pt", CPU_NUM_DEVICES="2")
    two = torch.load(tmp_path / "two.pt")
    one, weights = train(dropout=0.0, device="xla", data=without_noise)
    assert two["devices"] == 2
    assert (torch.tensor(losses(one)) - torch.tensor(two["losses"])).abs().max() < 1e-6
    assert (weights - two["weights"]).abs().max() < 1e-5


# ---- the whole flow


def test_the_main_flow_runs_there_with_the_same_forecasts(tmp_path):
    """`train.ipynb` from prices to a report on XLA, beside the CPU: dropout off, because generators differ."""
    there, here = (run_flow(tmp_path / device, device=device, dropout=0.0, epochs=1) for device in ("xla", "cpu"))
    assert {p.name for p in there.iterdir()} == {p.name for p in here.iterdir()}
    xla, cpu = (pd.read_csv(folder / "forecasts.csv") for folder in (there, here))
    for column in ("forecast_close", "up_probability", "forecast_variance"):
        assert np.allclose(xla[column], cpu[column], rtol=1e-3), column


def run_flow(folder, **parameters):
    folder.mkdir()
    return main_flow(folder, **parameters)


# ---- a sequence longer than what is read at once


def test_a_loop_over_a_long_sequence_gives_the_same_numbers():
    """Two blocks of rows, two stretches and a rest after them; forward, last state and every gradient."""
    torch.manual_seed(0)
    cell, x = (
        ParallelSMLSTMCell(CellConfig(hidden_size=4, n_heads=1, n_regimes=2, d_state=1, window=3)).double(),
        torch.randn(4, 14, 4, dtype=torch.float64),
    )

    def numbers(cell, read, x):
        x = x.requires_grad_()
        h, regimes, state = read(x)
        loss = (
            h.square().sum() + (regimes * h[..., :2]).sum() + state.memory.X.square().sum() + state.signals.fast.sum()
        )
        with torch.autograd.set_multithreading_enabled(False):
            grads = torch.autograd.grad(loss, [x, *cell.parameters()])  # as in training
        return [h, regimes, state.memory.Cm, state.signals.window, *grads]

    there = copy.deepcopy(cell).to("xla")
    looped, whole = (
        numbers(there, lambda x: checkpointed_scan(there, x, None, 2, 6), x.to("xla")),
        numbers(cell, cell, x.clone()),
    )
    torch_xla.sync()
    for a, b in zip(looped, whole):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-8, atol=1e-8)
