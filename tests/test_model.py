"""The model as others take it over: exported, streamed, resumed."""

import pytest
import torch
from kit import Window, check_pieces, state_shapes

from smlstm.model.cell import CellConfig, ParallelSMLSTMCell
from smlstm.model.model import SMLSTM, SMLSTMConfig, empty_state, map_state

SMALL = dict(n_features=5, hidden_size=16, n_heads=2, n_layers=2, chunk_size=8)


def trained_like(**kwargs):
    torch.manual_seed(0)
    model = SMLSTM(SMLSTMConfig(**{**SMALL, **kwargs}))
    for head in (model.heads, model.direct):
        torch.nn.init.normal_(head.weight)
    return model.eval()


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "kind",
    [
        {},
        *(
            pytest.param(kind, marks=slow)
            for kind in (
                dict(value_transform="full", key_transform="full"),
                dict(regime_transform="mlp"),
                dict(d_state=0, trend=False),
            )
        ),
    ],
)
def test_exports_with_a_dynamic_batch(kind, tmp_path):
    model = trained_like(**kind)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(
            Window(model), (torch.randn(4, 20, 5),), dynamic_shapes=({0: batch},), strict=False
        )
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for rows in (1, 7):
        x = torch.randn(rows, 20, 5)
        for new, old in zip(again(x), model(x)[0]):
            torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        dict(value_transform="full", key_transform="diagonal"),
        dict(regime_transform="mlp"),
        dict(input_gate="sigmoid", ssm_method="bilinear"),
    ],
)
def test_any_split_any_batch_gives_the_same_forecasts(kind):
    check_pieces(
        trained_like(**kind).double(),
        torch.randn(3, 45, 5, dtype=torch.float64),
        ([45], [44, 1], [1] * 45, [9, 17, 19]),
    )


def test_the_state_does_not_grow():
    cell = ParallelSMLSTMCell(CellConfig())
    assert state_shapes(cell(torch.randn(1, 3, 32)).state) == state_shapes(cell(torch.randn(1, 300, 32)).state)


def test_gradients_reach_every_parameter():
    model = trained_like(dropout=0.0).train()
    forecast, _ = model(torch.randn(2, 40, 5))
    sum((part * torch.randn_like(part)).sum() for part in forecast).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle, idle


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(dropout=1.5), "dropout=1.5"),
        (dict(n_layers=1.5), "n_layers=1.5: must be a whole number"),
        (dict(backend="arrays"), "did you mean 'array'?"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError) as error:
        SMLSTMConfig(**wrong)
    assert message in str(error.value)


def test_the_configuration_of_a_cell_is_part_of_the_models():
    assert SMLSTMConfig(hidden_size=64).cell == CellConfig(hidden_size=64)


def test_recomputed_layers_have_the_same_gradients():
    "With dropout too, whose masks have to be drawn again."
    torch.manual_seed(0)
    x = torch.randn(3, 40, 5)

    def gradients(checkpoint_above):
        torch.manual_seed(1)
        model = SMLSTM(SMLSTMConfig(**SMALL, dropout=0.2, checkpoint_above=checkpoint_above))
        torch.nn.init.normal_(model.heads.weight)
        torch.manual_seed(2)
        model(x)[0].price.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for kept, recomputed in zip(gradients(1000), gradients(1)):
        torch.testing.assert_close(recomputed, kept, rtol=0, atol=1e-6)


def test_the_empty_state_is_zero_and_shares_no_memory():
    "A tracer would take shared tensors for one input."
    model, places = trained_like(), []
    zeros = []
    map_state(
        lambda part: (zeros.append(part.abs().max() == 0), places.append(part.data_ptr())), empty_state(model.config)
    )
    assert all(zeros) and len(set(places)) == len(places)
