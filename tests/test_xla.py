"""The XLA leg: real tracing and real compiles, on torch_xla's CPU device. Run it with `.ci/xla`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch_xla", reason="needs torch_xla: run .ci/xla")
if os.environ.get("PJRT_DEVICE") != "CPU": pytest.skip("needs PJRT_DEVICE=CPU: run .ci/xla", allow_module_level=True)

import torch_xla
import torch_xla.debug.metrics as metrics

import smlstm.training as training
from smlstm.device import get_rng_state, pick_device, read, seed_everything, set_rng_state, to_device
from smlstm.losses import CurriculumWeights
from smlstm.memory import chunkwise, recurrent
from smlstm.model import SMLSTM, SMLSTMConfig
from smlstm.training import learn, load_checkpoint, start_run, update, write_weights

from training_kit import Outputs, loaders, losses, settings, train
from test_training import poisoned


def smlstm(**changes):
    torch.manual_seed(0)
    return SMLSTM(SMLSTMConfig(**{"n_features": 4, "hidden_size": 8, "n_heads": 2, "n_layers": 2, "dropout": 0.1, **changes}))


def compiles(): return (metrics.metric_data("CompileTime") or [0])[0]
def reads(): return (metrics.metric_data("TransferFromDeviceTime") or [0])[0]
def fallbacks(): return {name: metrics.counter_value(name) for name in metrics.counter_names() if name.startswith("aten::")}


# ---- a training run of the real model

@pytest.fixture(scope="module")
def counted():
    """Ten epochs, with validation, dropout and partial last batches: the counters after each epoch."""
    metrics.clear_all()
    before, after, finish = (compiles(), reads()), [], training.finish_epoch

    def counting(run, began):
        done = finish(run, began)
        after.append((compiles() - before[0], reads() - before[1]))
        return done

    training.finish_epoch = counting
    try: history, _ = train(config=settings(epochs=10, patience=10), device="xla", model=smlstm())
    finally: training.finish_epoch = finish
    return history, after, compiles() - before[0], fallbacks()


def test_compiles_are_few_and_all_in_the_first_epoch(counted):
    _, after, whole, _ = counted
    assert len(after) == 10
    assert after[0][0] <= 6 and whole == after[0][0], f"compiles after each epoch {[c for c, _ in after]}, at the end {whole}"


def test_nothing_falls_back_to_the_host(counted):
    assert counted[3] == {}


def test_the_host_reads_once_per_epoch(counted):
    assert [r for _, r in counted[1]] == list(range(1, 11))


def test_it_learns(counted):
    totals = [epoch.valid.total for epoch in counted[0].epochs]
    assert min(totals) < 0.9 * totals[0]


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

    def forward(self, x, state=None): return Outputs(*self.heads(self.first(x).tanh()).unbind(-1)), state


def programs(model):
    """The programs of learning from a batch and of an update."""
    device = pick_device("xla")
    train_loader, valid = loaders()
    run = start_run(model, train_loader, valid, settings(), device)
    model.train()
    schedule, batch = torch.tensor([0.01, 1.0, 0.5, 0.2]).to(device), to_device(next(iter(train_loader)), device)
    learned = learn(model, run.params, run.objective, batch, CurriculumWeights(*schedule[1:]), run.state)
    first = torch_xla._XLAC._get_xla_tensors_hlo(list(learned))
    torch_xla.sync()
    updated = update(learned, schedule[0], run.decay, 1.0)
    write_weights(run.params, updated.weights)
    return first, torch_xla._XLAC._get_xla_tensors_hlo([*updated, *(p.data for p in run.params)])


def test_the_loop_and_the_losses_use_no_64_bit_arrays():
    for program in programs(Pointwise()): assert not wide(program), wide(program)[:5]


def test_the_model_uses_no_64_bit_arrays():
    for program in programs(smlstm()): assert not wide(program), wide(program)[:5]


# ---- the same numbers as elsewhere

def test_losses_are_those_of_the_cpu():
    there, _ = train(dropout=0.0, device="xla", model=smlstm(dropout=0.0))
    here, _ = train(dropout=0.0, device="cpu", model=smlstm(dropout=0.0))
    assert torch.allclose(torch.tensor(losses(there)), torch.tensor(losses(here)), atol=1e-3)


def test_the_memory_is_exact_there_too():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 19, 4, generator=generator)
    log_i, log_f = torch.randn(2, 2, 19, generator=generator), -torch.rand(2, 2, 19, generator=generator)
    wanted, _ = recurrent(q, k, v, log_i, log_f)
    found, _ = chunkwise(*(t.to(pick_device("xla")) for t in (q, k, v, log_i, log_f)), chunk_size=8)
    assert torch.allclose(found.cpu(), wanted, atol=1e-5)


def test_a_model_streams_there_as_here():
    model, x = smlstm().eval(), torch.randn(2, 9, 4)
    with torch.no_grad():
        wanted, _ = model(x)
        model.to(pick_device("xla"))
        found, _ = model(x.to(pick_device("xla")))
    for name, one, other in zip(wanted._fields, wanted, found): assert torch.allclose(one, other.cpu(), atol=1e-5), name


def test_bfloat16_stays_near_float32():
    half, _ = train(dropout=0.0, device="xla", config=settings(epochs=3, precision="bfloat16"))
    full, _ = train(dropout=0.0, device="cpu", config=settings(epochs=3))
    assert torch.allclose(torch.tensor(losses(half)), torch.tensor(losses(full)), rtol=0.05)


# ---- guard, generators, resume

def test_a_bad_batch_is_skipped_and_three_stop():
    history, _ = train(data=poisoned(4), device="xla", config=settings(epochs=2))
    assert history.skipped == 1
    with pytest.raises(training.NonFiniteError): train(data=poisoned(4, 5, 6), device="xla")


def test_the_generator_goes_back_to_where_it_was():
    device = pick_device("xla")
    seed_everything(3, device)
    torch.rand(3, device=device)
    saved = get_rng_state(device)
    first = read(torch.rand(3, device=device))
    set_rng_state(saved, device)
    assert read(torch.rand(3, device=device)) == first


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    config = settings(epochs=3, checkpoint_every=3)
    history, whole = train(config=config, device="xla")
    save_run, saves = training.save_run, []

    def failing(run, path, done=False):
        save_run(run, path, done)
        saves.append(run.batch)
        if len(saves) == 5: raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_run", failing)
    with pytest.raises(KeyboardInterrupt): train(tmp_path, config=config, device="xla")
    monkeypatch.setattr(training, "save_run", save_run)
    assert load_checkpoint(tmp_path / "latest.safetensors")[1]["batch"] > 0
    again, weights = train(tmp_path, resume=True, config=config, device="xla")
    assert torch.equal(weights, whole) and losses(again) == losses(history)


# ---- two devices

TWO = """
import sys, torch
from smlstm.device import split_over_devices
split_over_devices()
import torch_xla.runtime as xr
from training_kit import losses, train
history, weights = train(dropout=0.0, device="xla")
torch.save({"losses": losses(history), "weights": weights, "devices": xr.global_runtime_device_count()}, sys.argv[1])
"""


def test_two_devices_find_the_losses_of_one(tmp_path):
    """The compiler splits each batch over two devices; same global batch, same losses."""
    environment = {**os.environ, "CPU_NUM_DEVICES": "2", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", TWO, tmp_path / "two.pt"], env=environment, check=True, timeout=900)
    two = torch.load(tmp_path / "two.pt")
    one, weights = train(dropout=0.0, device="xla")
    assert two["devices"] == 2
    assert (torch.tensor(losses(one)) - torch.tensor(two["losses"])).abs().max() < 1e-6
    assert (weights - two["weights"]).abs().max() < 1e-5
