"""The model as others take it over: exported, streamed, resumed."""

import pytest
import torch

from smlstm.cell import CellConfig, ParallelSMLSTMCell
from smlstm.model import SMLSTM, SMLSTMConfig

from kit import Window, check_pieces, state_shapes

SMALL = dict(n_features=5, hidden_size=16, n_heads=2, n_layers=2, chunk_size=8)


def trained_like(**kwargs):
    torch.manual_seed(0)
    model = SMLSTM(SMLSTMConfig(**{**SMALL, **kwargs}))
    for head in (model.heads, model.direct):
        torch.nn.init.normal_(head.weight)
    return model.eval()


slow = pytest.mark.slow


@pytest.mark.parametrize("kind", [{}, *(pytest.param(kind, marks=slow) for kind in (dict(left="full", right="full"), dict(processor="mlp"), dict(d_state=0, trend=False)))])
def test_exports_with_a_dynamic_batch(kind, tmp_path):
    model = trained_like(**kind)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(Window(model), (torch.randn(4, 20, 5),), dynamic_shapes=({0: batch},), strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for rows in (1, 7):
        x = torch.randn(rows, 20, 5)
        for new, old in zip(again(x), model(x)[0]):
            torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [{}, dict(left="full", right="diagonal"), dict(processor="mlp"), dict(input_gate="sigmoid", ssm_method="bilinear")])
def test_any_split_any_batch_gives_the_same_forecasts(kind):
    check_pieces(trained_like(**kind).double(), torch.randn(3, 45, 5, dtype=torch.float64), ([45], [44, 1], [1] * 45, [9, 17, 19]))


def test_the_state_does_not_grow():
    cell = ParallelSMLSTMCell(CellConfig())
    assert state_shapes(cell(torch.randn(1, 3, 32)).state) == state_shapes(cell(torch.randn(1, 300, 32)).state)


def test_gradients_reach_every_parameter():
    model = trained_like(dropout=0.0).train()
    forecast, _ = model(torch.randn(2, 40, 5))
    sum((part * torch.randn_like(part)).sum() for part in forecast).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle, idle
