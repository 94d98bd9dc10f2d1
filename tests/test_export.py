"""ONNX files of every kind of model, against torch; and what an export leaves alone."""

import json
from dataclasses import asdict
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from smlstm.model.model import SMLSTM, SMLSTMConfig, empty_state
from smlstm.using import export
from smlstm.using.export import ExportError, export_step, export_window, flat_state, onnx_state, onnx_step, open_onnx

needs_onnx = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    reason='ONNX is not installed: pip install ".[onnx]"',
)

KINDS = {
    "default": {},
    "full transforms": {"value_transform": "full", "key_transform": "full"},
    "row networks": {"regime_transform": "mlp"},
    "bilinear state space": {"ssm_method": "bilinear", "key_transform": "diagonal"},
    "three horizons": {"n_horizons": 3},
    "two layers": {"n_layers": 2, "n_heads": 4, "n_regimes": 2, "window": 7},
}
BARE = {"d_state": 0, "trend": False, "value_transform": None, "input_gate": "sigmoid", "shortcut": False}


def made(**options):
    "A model none of whose parts is idle, in training mode as a trainer leaves it."
    torch.manual_seed(0)
    model = SMLSTM(SMLSTMConfig(**{"n_features": 5, "hidden_size": 8, "n_layers": 1, "chunk_size": 8} | options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


@torch.no_grad()
def expected(model, x):
    model.eval()
    forecast, state = model(x)
    return [part.numpy() for part in forecast], flat_state(state)


def check_step(model, path, bars=60):
    x = torch.randn(3, bars, 5)
    session = open_onnx(export_step(model, path))
    state, said = onnx_state(session, 3), []
    for t in range(bars):
        now, state = onnx_step(session, x[:, t].numpy(), state)
        said.append(now)
    parts, after = expected(model, x)
    for got, want in zip((np.stack(part, 1) for part in zip(*said)), parts):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-4)
    assert list(state) == list(after)
    for name, want in after.items():
        np.testing.assert_allclose(state[name], want.numpy(), rtol=1e-3, atol=2e-4, err_msg=name)


def check_window(model, path, bars=21):
    session = open_onnx(export_window(model, path, bars))
    for batch in (1, 2, 5):
        x = torch.randn(batch, bars, 5)
        for got, want in zip(session.run(None, {"x": x.numpy()}), expected(model, x)[0]):
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-4)


@needs_onnx
def test_the_barest_step_says_what_torch_says(tmp_path):
    model = made(**BARE)
    check_step(model, tmp_path / "step.onnx")
    meta = open_onnx(tmp_path / "step.onnx").get_modelmeta().custom_metadata_map
    assert meta["kind"] == "step" and SMLSTMConfig(**json.loads(meta["smlstm_config"])) == model.config
    assert [file.name for file in tmp_path.iterdir()] == ["step.onnx"]


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("options", [*KINDS.values(), BARE], ids=[*KINDS, "bare"])
def test_every_kind_of_model(options, tmp_path):
    check_step(made(**options), tmp_path / "step.onnx")
    check_window(made(**options), tmp_path / "window.onnx")


@needs_onnx
def test_the_model_is_left_alone_and_a_failure_leaves_no_file(tmp_path, monkeypatch):
    model = made(**BARE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (tmp_path / "step.onnx").write_text("the old one")

    def breaks(*arguments, **options):
        assert not arguments[0].model.training and model.training
        raise RuntimeError("no translation")

    monkeypatch.setattr(torch.onnx, "export", breaks)
    with pytest.raises(RuntimeError, match="no translation"):
        export_step(model, tmp_path / "step.onnx")
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["step.onnx"] and (
        tmp_path / "step.onnx"
    ).read_text() == "the old one"


@needs_onnx
def test_a_graph_of_somebody_else_is_refused(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["a"], ["b"])],
        "g",
        [value("a", TensorProto.FLOAT, [1])],
        [value("b", TensorProto.FLOAT, [1])],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(tmp_path / "relu.onnx")
    )
    with pytest.raises(ExportError, match="relu.onnx was not written by export_step or export_window"):
        open_onnx(tmp_path / "relu.onnx")


def test_what_no_file_can_hold_is_refused_before_any_work(tmp_path, monkeypatch):
    "An ensemble, a forecaster, and a folder that is not there, which took a minute of translation to find out."
    from smlstm.using.ensemble import SMLSTMEnsemble
    from smlstm.using.forecaster import Forecaster

    monkeypatch.setattr(torch.onnx, "export", None)
    monkeypatch.setattr(torch.export, "export", None)
    ensemble = SMLSTMEnsemble.__new__(SMLSTMEnsemble)
    writers = {
        "a.onnx": [export.export_step, lambda model, path: export.export_window(model, path, 8)],
        "a.pt2": [export.compile_step],
    }
    for name, several in writers.items():
        for write in several:
            with pytest.raises(ExportError, match="a SMLSTMEnsemble cannot be exported.* without ensemble"):
                write(ensemble, tmp_path / name)
            with pytest.raises(ExportError, match="a Forecaster cannot be exported.* pass its .model"):
                write(Forecaster(), tmp_path / name)
            with pytest.raises(ExportError, match=rf"no folder '.*there' to write {name} to: make it first"):
                write(made(**BARE), tmp_path / "there" / name)
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r'onnx and onnxscript are not installed: pip install "smlstm\[onnx\]"'):
        export_step(made(**BARE), tmp_path / "step.onnx")
    with pytest.raises(ExportError, match="onnxruntime is not installed"):
        open_onnx(tmp_path / "step.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [*KINDS.values(), BARE], ids=[*KINDS, "bare"])
def test_a_stream_begins_with_zeros(options):
    model = made(**options).eval()
    x = torch.randn(2, 5)
    with torch.no_grad():
        (said, after), (same, also) = model.step(x), model.step(x, empty_state(model.config, 2))
    for a, b in zip([*said, *flat_state(after).values()], [*same, *flat_state(also).values()]):
        assert torch.equal(a, b)


def test_names_are_the_same_for_every_batch():
    model = made()
    one, seven = (flat_state(empty_state(model.config, batch)) for batch in (1, 7))
    assert list(one) == list(seven) and all(tensor.shape[0] == 7 for tensor in seven.values())
    assert asdict(model.config)["n_layers"] == 1 and all(name.startswith("state.0.") for name in one)
