"""Every form of the memory, the cell, the model and its stream against the equations in `reference.py`.

Values in float64 to nearly all digits, gradients by central differences of the reference, float32 to its rounding."""

import copy
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import reference
import torch
from reference import Mix
from torch.testing import assert_close

from smlstm.model.cell import CellConfig, ParallelSMLSTMCell
from smlstm.model.mixing import Mixing, RowNetwork, mixed_chunkwise, mixed_recurrent
from smlstm.model.model import SMLSTM, SMLSTMConfig
from smlstm.model.signals import market_signals
from smlstm.model.ssm import StructuredStateSpace
from smlstm.model.stabilization import chunkwise, cumulative, recurrent

PLAIN = {
    "recurrent": recurrent,
    "cumulative": cumulative,
    "chunks as arrays": partial(chunkwise, chunk_size=5, backend="array"),
    "chunks in the kernel": partial(chunkwise, backend="kernel"),
    "chunks laid out for XLA": partial(chunkwise, chunk_size=5, backend="xla"),
}
MIXED = {
    "recurrent": mixed_recurrent,
    "chunks as arrays": partial(mixed_chunkwise, chunk_size=5, backend="array"),
    "chunks in the kernel": partial(mixed_chunkwise, backend="kernel"),
    "chunks laid out for XLA": partial(mixed_chunkwise, chunk_size=5, backend="xla"),
}
TRANSFORMS = {
    "none": {},
    "diagonal values": {"A": "diagonal"},
    "full values": {"A": "full"},
    "full both": {"A": "full", "B": "full"},
    "diagonal keys": {"B": "diagonal"},
    "row networks": {"network": True},
}
CELLS = {
    "default": {},
    "full, bilinear state space": {
        "value_transform": "full",
        "key_transform": "full",
        "ssm_method": "bilinear",
        "theta": 0.3,
    },
    "diagonal keys": {"value_transform": None, "key_transform": "diagonal", "window": 7},
    "row networks": {"regime_transform": "mlp"},
    "bare": {"d_state": 0, "trend": False, "value_transform": None, "input_gate": "sigmoid"},
    "arrays": {"backend": "array"},
    "laid out for XLA": {"backend": "xla"},
}
B, H, T, d, R, N = 2, 2, 37, 4, 3, 2  # more steps than a chunk of the kernel has
WEIGHTS = np.random.default_rng(9).standard_normal(1000)  # of the projections whose gradients are compared


def draw(seed, **shapes):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def memory_inputs(seed=0):
    "Keys, gates of all sizes and values, [B, H, T, ...]; forget gates near 1, so that much is remembered."
    x = draw(seed, q=(B, H, T, d), k=(B, H, T, d), v=(B, H, T, d), log_i=(B, H, T), log_f=(B, H, T))
    return x | {"log_i": 2 * x["log_i"], "log_f": -np.log1p(np.exp(-2 - x["log_f"]))}


def mixing_inputs(A=None, B=None, network=False, seed=1):
    "Coefficients of a mixing, those that are absent left out."
    sizes = {"full": (H, R, d, d), "diagonal": (H, R, d)}
    shapes = {"A": sizes.get(A), "B": sizes.get(B), "V": (H, R, 5, d) if network else None}
    shapes["W"] = (H, R, d, 5) if network else None
    batch = len(memory_inputs()["q"])
    x = draw(seed, w=(batch, T, R), log_a=(batch, T, N), b=(batch, T, N), c=(N,), D=(), s=(batch, T))
    x |= draw(seed + 1, **{name: shape for name, shape in shapes.items() if shape})
    w = np.exp(x["w"])
    return x | {"w": w / w.sum(-1, keepdims=True), "log_a": -np.abs(x["log_a"]), "s": 1 / (1 + np.exp(-x["s"]))}


def tensors(x, dtype=torch.float64):
    return {name: torch.tensor(value, dtype=dtype, requires_grad=True) for name, value in x.items()}


def projection(outputs):
    "One number that every output counts in."
    flat = torch.cat([part.flatten() for part in outputs]) if torch.is_tensor(outputs[0]) else None
    if flat is not None:
        return (flat * torch.tensor(np.resize(WEIGHTS, len(flat)))).sum()
    flat = np.concatenate([np.ravel(part) for part in outputs])
    return flat @ np.resize(WEIGHTS, len(flat))


def check_gradients(ours, expected, leaves, points=3, seed=0, step=1e-5):
    "Gradients of `ours`, at a few coordinates of every leaf, against central differences of `expected`."
    rng = np.random.default_rng(seed)
    gradients = torch.autograd.grad(ours, list(leaves.values()), allow_unused=True)
    values = {name: leaf.detach().numpy().copy() for name, leaf in leaves.items()}
    for (name, value), gradient in zip(values.items(), gradients):
        for place in rng.choice(value.size, min(points, value.size), replace=False):
            at, found = np.unravel_index(place, value.shape), []
            for move in (step, -step):
                moved = value.copy()
                moved[at] += move
                found.append(expected(values | {name: moved}))
            slope = (found[0] - found[1]) / (2 * step)
            got = 0.0 if gradient is None else gradient[tuple(map(int, at))].item()
            assert got == pytest.approx(slope, rel=2e-5, abs=2e-6), f"{name}{list(map(int, at))}"


def expected_plain(x, theta=1.0, state=None):
    "h [B, H, T, d], C and n of the reference, batch by batch and head by head."
    found = []
    for b, h in np.ndindex(x["q"].shape[:2]):
        start = [part[b, h] for part in state] if state else ()
        parts = [x[name][b, h] for name in ("q", "k", "v", "log_i", "log_f")]
        found.append(reference.plain_memory(*parts, theta, *start))
    return [np.stack(part).reshape(*x["q"].shape[:2], *part[0].shape) for part in zip(*found)]


def plain(form, x, theta=1.0, state=None):
    "The same of one of our forms, with the state on its true scale, and the state as it is."
    h, last = form(*(x[name] for name in ("q", "k", "v", "log_i", "log_f")), theta, state)
    scale = torch.exp(last.m)
    return [h, last.C * scale[..., None, None], last.n * scale[..., None]], last


@pytest.mark.parametrize("form", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("theta", [1.0, 0.05])
def test_plain_memory(form, theta):
    x = memory_inputs()
    leaves = tensors(x)
    ours, state = plain(form, leaves, theta)
    want = expected_plain(x, theta)
    for got, value in zip(ours, want):
        assert_close(got.detach(), torch.tensor(value), rtol=1e-10, atol=1e-11)
    later = memory_inputs(seed=5)
    on, _ = plain(form, tensors(later), theta, state)
    for got, value in zip(on, expected_plain(later, theta, want[1:])):
        assert_close(got.detach(), torch.tensor(value), rtol=1e-10, atol=1e-11)
    check_gradients(projection(ours), lambda values: projection(expected_plain(values, theta)), leaves)


@pytest.mark.parametrize("form", PLAIN.values(), ids=PLAIN)
def test_plain_memory_in_float32(form):
    x = memory_inputs()
    ours, _ = plain(form, tensors(x, torch.float32))
    for got, value in zip(ours, expected_plain(x)):
        assert_close(got.detach().double(), torch.tensor(value), rtol=2e-5, atol=2e-5 * np.abs(value).max())


@pytest.mark.parametrize("form", PLAIN.values(), ids=PLAIN)
def test_gates_that_overflow_float32(form):
    "Bare exponentials of 300 fit float64, where the reference lives; float32 needs the stabilizer."
    x = memory_inputs()
    x["log_i"] = 150 * np.sin(np.arange(T)) * np.ones((B, H, 1))
    x["q"][:, :, 7] = 0  # reads nothing: 0, and not 0/0
    leaves = tensors(x, torch.float32)
    h = plain(form, leaves)[0][0]
    assert_close(h.detach().double(), torch.tensor(expected_plain(x)[0]), rtol=2e-4, atol=2e-4)
    h.square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())


def expected_mixed(x, theta=1.0, state=None):
    "h, C, n, X and Cm of the reference."
    found = []
    for b, h in np.ndindex(x["q"].shape[:2]):
        own = [x[name][h] if name in x else None for name in "ABVW"]
        mix = Mix(x["w"][b], *own, np.exp(x["log_a"][b]), x["b"][b], x["c"], x["D"], x["s"][b])
        start = reference.Memory(*(part[b, h] for part in state)) if state else None
        parts = [x[name][b, h] for name in ("q", "k", "v", "log_i", "log_f")]
        out, last = reference.mixed_memory(*parts, mix, theta, start)
        found.append((out, *last))
    return [np.stack(part).reshape(*x["q"].shape[:2], *part[0].shape) for part in zip(*found)]


def mixed(form, x, theta=1.0, state=None):
    "The same of one of our forms, on the true scale, and the state as it is."
    network = RowNetwork(x["V"], x["W"]) if "V" in x else None
    mix = Mixing(x["w"], x.get("A"), x.get("B"), x["log_a"], x["b"], x["c"], x["D"], x["s"], network)
    h, last = form(*(x[name] for name in ("q", "k", "v", "log_i", "log_f")), mix, theta, state)
    scale = torch.exp(last.m)[..., None]
    return [
        h,
        last.C * scale[..., None],
        last.n * scale,
        last.X * scale[..., None, None],
        last.Cm * scale[..., None],
    ], last


@pytest.mark.parametrize("form", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("transforms", TRANSFORMS.values(), ids=TRANSFORMS)
def test_mixed_memory(form, transforms):
    x = memory_inputs() | mixing_inputs(**transforms)
    leaves = tensors(x)
    ours, state = mixed(form, leaves, 0.3)
    want = expected_mixed(x, 0.3)
    for got, value in zip(ours, want):
        assert_close(got.detach(), torch.tensor(value), rtol=1e-10, atol=1e-10)
    later = memory_inputs(seed=5) | mixing_inputs(**transforms, seed=3)
    on, _ = mixed(form, tensors(later), 0.3, state)
    for got, value in zip(on, expected_mixed(later, 0.3, want[1:])):
        assert_close(got.detach(), torch.tensor(value), rtol=1e-10, atol=1e-10)
    check_gradients(projection(ours), lambda values: projection(expected_mixed(values, 0.3)), leaves)


@pytest.mark.parametrize("form", MIXED.values(), ids=MIXED)
def test_gradients_through_a_state_handed_over(form):
    first = memory_inputs() | mixing_inputs(A="diagonal")
    second = memory_inputs(seed=5) | mixing_inputs(A="diagonal", seed=3)
    leaves, later = tensors(first), tensors(second)
    _, state = mixed(form, leaves)
    ours, _ = mixed(form, later, 1.0, state)

    def expected(values):
        return projection(expected_mixed(second, 1.0, expected_mixed(values)[1:]))

    check_gradients(projection(ours), expected, leaves, points=2)


@pytest.mark.parametrize("form", MIXED.values(), ids=MIXED)
def test_mixed_memory_in_float32(form):
    x = memory_inputs() | mixing_inputs(A="diagonal")
    ours, _ = mixed(form, tensors(x, torch.float32))
    for got, value in zip(ours, expected_mixed(x)):
        assert_close(got.detach().double(), torch.tensor(value), rtol=5e-5, atol=2e-5 * np.abs(value).max())


@pytest.mark.parametrize("form", MIXED.values(), ids=MIXED)
def test_mixed_gates_that_overflow_float32(form):
    x = memory_inputs() | mixing_inputs(A="diagonal")
    x["log_i"] = 150 * np.sin(np.arange(T)) * np.ones((B, H, 1))
    x["q"][:, :, 7] = 0
    h = mixed(form, tensors(x, torch.float32))[0][0].detach().double()
    want = torch.tensor(expected_mixed(x)[0])
    assert_close(h, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("backend", ["kernel", "array"])
@pytest.mark.parametrize("window", [1, 2, 5, 20])
def test_signals(window, backend):
    x = np.random.default_rng(window).standard_normal((2, 60)).cumsum(1)
    x[1, 20:45] = 0.5  # a flat stretch, where r is 0/0; means of halves are exact
    leaf = torch.tensor(x, requires_grad=True)
    ours, _ = market_signals(leaf, window, backend=backend)
    got = torch.stack([ours.volatility, ours.trend, ours.agreement, ours.autocorrelation], -1)
    want = np.stack([reference.signals(row, window) for row in x])
    assert_close(got.detach(), torch.tensor(want), rtol=1e-9, atol=1e-9)
    alone = {"x": leaf[:1].detach().requires_grad_()}
    ours, _ = market_signals(alone["x"], window, backend=backend)
    ours = [torch.stack([ours.volatility, ours.trend, ours.agreement, ours.autocorrelation], -1)[:, window:]]
    check_gradients(projection(ours), lambda y: projection([reference.signals(y["x"][0], window)[window:]]), alone, 9)


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_state_space(method):
    "One module alone, on channels of its own: y = sum of c_n x_n + D u."
    torch.manual_seed(0)
    module = StructuredStateSpace(3, method).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    u, volatility, trend = np.random.default_rng(0).random((3, T))
    y, _ = module(*(torch.tensor(part)[None] for part in (u[:, None], 3 * volatility, (1 + trend) / 2)))
    p = arrays(module)
    a, b = reference.state_space(p, method, 3 * volatility, (1 + trend) / 2)
    x = np.zeros(3)
    for t in range(T):
        x = a[t] * x + b[t] * u[t]
        assert y[0, t, 0].item() == pytest.approx(p["c"] @ x + p["skip"] * u[t], rel=1e-10)


def arrays(module):
    return {name: value.detach().double().numpy().copy() for name, value in module.state_dict().items()}


def spread(module, std=0.5):
    "No parameter idle: all drawn at random, in float64, in evaluation mode."
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module.double().eval()


def small_cell(**options):
    "A cell whose parts all count, and 45 steps for two sequences, more than two windows."
    config = CellConfig(**{"hidden_size": 8, "n_heads": 2, "n_regimes": 3, "d_state": 2, "chunk_size": 8} | options)
    return spread(ParallelSMLSTMCell(config)), np.random.default_rng(1).standard_normal((2, 45, 8))


def expected_cell(p, config, x):
    found = [reference.cell(p, config, row) for row in x]
    return [np.stack([h for h, *_ in found]), np.stack([regimes for _, regimes, _ in found])]


@pytest.mark.parametrize("options", CELLS.values(), ids=CELLS)
def test_cell(options):
    cell, x = small_cell(**options)
    want = expected_cell(arrays(cell), cell.config, x)
    whole = cell(torch.tensor(x))
    for got, value in zip(whole[:2], want):
        assert_close(got.detach(), torch.tensor(value), rtol=1e-9, atol=1e-10)
    state, steps = None, []
    with torch.no_grad():
        for t in range(x.shape[1]):
            h, _, state = cell.step(torch.tensor(x[:, t]), state)
            steps.append(h)
    assert_close(torch.stack(steps, 1), torch.tensor(want[0]), rtol=1e-9, atol=1e-10)
    single = copy.deepcopy(cell).float()(torch.tensor(x).float()).h
    assert_close(single.detach().double(), torch.tensor(want[0]), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("options", CELLS.values(), ids=CELLS)
def test_gradients_of_the_cell(options):
    cell, x = small_cell(**options)
    x = x[:1]
    leaves = dict(cell.named_parameters()) | {"x": torch.tensor(x, requires_grad=True)}
    ours = cell(leaves["x"])

    def expected(values):
        return projection(expected_cell(values, cell.config, values["x"]))

    check_gradients(projection(ours[:2]), expected, leaves)


def small_model(**options):
    sizes = {"n_features": 5, "hidden_size": 8, "n_layers": 2, "n_regimes": 3, "d_state": 2, "chunk_size": 8}
    return spread(SMLSTM(SMLSTMConfig(**sizes | options))), np.random.default_rng(2).standard_normal((2, 45, 5))


def expected_model(p, config, x):
    found = [reference.model(p, config, row) for row in x]
    heads, regimes = (np.stack([row[part] for row in found]) for part in (0, 1))
    return [heads[..., 0], heads[..., 1], heads[..., 2], regimes]


MODELS = CELLS | {"one layer, no shortcut": {"n_layers": 1, "shortcut": False, "n_heads": 4}}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_model_whole_streamed_and_in_pieces(options):
    model, x = small_model(**options)
    want = expected_model(arrays(model), model.config, x)
    single = copy.deepcopy(model).float()
    with torch.no_grad():
        for got, value in zip(model(torch.tensor(x))[0], want):
            assert_close(got, torch.tensor(value), rtol=1e-9, atol=1e-10)
        state, bars = None, []
        for t in range(x.shape[1]):
            forecast, state = model.step(torch.tensor(x[:, t]), state)
            bars.append(forecast)
        for got, value in zip(zip(*bars), want):
            assert_close(torch.stack(got, 1), torch.tensor(value), rtol=1e-9, atol=1e-10)
        begun, state = model(torch.tensor(x[:, :19]))
        going_on, _ = model(torch.tensor(x[:, 19:]), state)
        for first, second, value in zip(begun, going_on, want):
            assert_close(torch.cat([first, second], 1), torch.tensor(value), rtol=1e-9, atol=1e-10)
        for got, value in zip(single(torch.tensor(x).float())[0], want):
            assert_close(got.double(), torch.tensor(value), rtol=1e-3, atol=1e-3)


def test_the_reference_streams_as_it_reads_whole():
    "The reference itself may be read a bar at a time, its state handed on."
    model, x = small_model()
    p, states = arrays(model), None
    whole, _, _ = reference.model(p, model.config, x[0])
    for t in range(x.shape[1]):
        heads, _, states = reference.model(p, model.config, x[0, t : t + 1], states)
        np.testing.assert_allclose(heads[0], whole[t], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [CELLS["default"], CELLS["row networks"]], ids=["default", "row networks"])
def test_gradients_of_the_model(options):
    model, x = small_model(**options)
    x = x[:1, :30]
    leaves = dict(model.named_parameters()) | {"x": torch.tensor(x, requires_grad=True)}
    ours = model(leaves["x"])[0]

    def expected(values):
        return projection(expected_model(values, model.config, values["x"]))

    check_gradients(projection(ours), expected, leaves, points=2)


def test_training_recomputes_the_same_gradients():
    "Layers that are recomputed in the backward pass, and kept ones, have the reference's gradients."
    model, x = small_model(checkpoint_above=10, dropout=0.0)
    model.train()
    leaves = dict(model.named_parameters())

    def expected(values):
        return projection(expected_model(values, model.config, x[:1]))

    check_gradients(projection(model(torch.tensor(x[:1]))[0]), expected, leaves, points=1)


@pytest.mark.skipif(not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="ONNX is not installed")
def test_onnx_file_of_one_step(tmp_path):
    from smlstm.using.export import export_step, onnx_state, onnx_step, open_onnx

    model, x = small_model()
    want = np.stack(expected_model(arrays(model), model.config, x)[:3], -1)
    session = open_onnx(export_step(model.float(), tmp_path / "step.onnx"))
    state = onnx_state(session, 2)
    for t in range(x.shape[1]):
        forecast, state = onnx_step(session, x[:, t].astype(np.float32), state)
        np.testing.assert_allclose(np.stack(forecast[:3], -1), want[:, t], rtol=2e-3, atol=1e-3)
