"""A loss and a metric of one's own: what they learn and measure; the usual ones are untouched by the way in."""

import numpy as np
import pandas as pd
import pytest
import torch
from test_forecaster_use import SMALL, bars
from torch import nn
from training_kit import loaders, settings

from smlstm.data.windows import create_sequences, create_tpu_dataloader
from smlstm.judging.evaluation import evaluate
from smlstm.learning.checkpoints import CheckpointError
from smlstm.learning.objectives import FunctionLoss, loss_identity
from smlstm.learning.settings import TrainConfig
from smlstm.learning.training import fit
from smlstm.model.losses import CurriculumWeights, MultiObjectiveLoss, huber, weighted_cross_entropy
from smlstm.model.model import Forecast
from smlstm.using.forecaster import Forecaster

PLAIN = SMALL | dict(training=dict(epochs=1, pos_weight=1.0))


class Constant(nn.Module):
    "Forecasts three numbers, whatever it is given."

    def __init__(self):
        super().__init__()
        self.config, self.values = {}, nn.Parameter(torch.zeros(3))

    def forward(self, x, state=None):
        return Forecast(*self.values.expand(*x.shape[:2], 3).unbind(-1), torch.ones_like(x[..., :1])), state


def noise(rows=4000):
    "Windows of standard normal targets, and of nothing to see."
    rng = np.random.default_rng(0)
    x, y = np.zeros((rows, 2), np.float32), rng.normal(size=(rows, 3)).astype(np.float32)
    y[:, 1] = y[:, 0] > 0
    make = lambda: create_sequences(x, y, 50, augment=False, stride=50)
    return create_tpu_dataloader(make(), 8), create_tpu_dataloader(make(), 8, shuffle=False)


LONG = TrainConfig(epochs=40, patience=40, learning_rate=0.05, warmup_epochs=1, weight_decay=0.0, pos_weight=1.0)


@pytest.mark.parametrize("share, quantile", [(0.5, 0.0), (0.9, 1.2816), (0.1, -1.2816)])
def test_a_quantile_loss_learns_the_quantile(share, quantile):
    "Of a standard normal target: 1.2816 is its 90% quantile. The volatility head keeps its own loss: the mean."
    model = Constant()
    pinball = lambda head, target: torch.maximum(share * (target - head), (share - 1) * (target - head))
    fit(model, *noise(), LONG, device="cpu", progress=False, loss={"price": pinball})
    assert model.values[0].item() == pytest.approx(quantile, abs=0.08)
    assert model.values[2].item() == pytest.approx(0, abs=0.05)


def test_a_loss_of_all_heads_learns_a_likelihood():
    "The Gaussian likelihood of returns of deviation 2: the volatility head is the log of the variance, ln 4."

    def gaussian(forecast, target):
        return (forecast.volatility + (2 * target.price - forecast.price) ** 2 * torch.exp(-forecast.volatility)) / 2

    model = Constant()
    history = fit(model, *noise(), LONG, device="cpu", progress=False, loss=gaussian)
    assert model.values[2].item() == pytest.approx(np.log(4), abs=0.06)
    last = history.epochs[history.best_epoch].valid
    assert last.total == pytest.approx((np.log(4) + 1) / 2, abs=0.02) and last.total == last.price
    assert last.direction == last.volatility == 0


USUAL = {
    "price": lambda head, target: huber(head - target, 1.0),
    "direction": lambda head, target: weighted_cross_entropy(head, target, 1.0),
    "volatility": lambda head, target: (head - target) ** 2,
}


def weights(forecaster):
    return torch.cat([p.detach().flatten() for p in forecaster.model.parameters()])


@pytest.mark.parametrize("heads", [["price"], ["volatility"], ["price", "direction", "volatility"]])
@pytest.mark.parametrize("horizon", [1, [1, 3]])
def test_the_usual_losses_as_functions_give_the_usual_weights(heads, horizon):
    "To the last bit, of a panel and of several horizons, with its masks, its weights and its curriculum."
    both = {"SPY": bars(), "QQQ": bars(ticker="QQQ")}
    usual = Forecaster(horizon=horizon, **PLAIN).fit(both, progress=False)
    loss = {name: USUAL[name] for name in heads}
    own = Forecaster(horizon=horizon, **PLAIN).fit(both, progress=False, loss=loss)
    assert torch.equal(weights(own), weights(usual))
    other = Forecaster(horizon=horizon, **PLAIN).fit(both, progress=False, loss={"price": lambda h, t: (h - t).abs()})
    assert not torch.equal(weights(other), weights(usual))


def test_weights_of_steps_and_masks_count():
    "A step of weight 0 and a row outside the mask: the mean is over the others, by hand."
    heads = Forecast(torch.tensor([[1.0, 2.0], [9.0, 9.0]]), *torch.zeros(2, 2, 2), None)
    y = torch.tensor([[[0.0, 0, 0, 1], [0, 0, 0, 0]], [[0, 0, 0, 1], [0, 0, 0, 1]]])
    made = FunctionLoss({"price": lambda h, t: 3 * h})(heads, y, CurriculumWeights(2.0, 0, 0), torch.tensor([1.0, 0]))
    assert made.price.item() == pytest.approx((3 * 1 + 0) / 2) and made.total.item() == pytest.approx(3.0)


def test_a_loaded_forecaster_needs_no_loss(tmp_path):
    own = Forecaster(**PLAIN).fit(bars(), progress=False, loss={"volatility": lambda h, t: (h - t).abs()})
    own.save(tmp_path)
    pd.testing.assert_frame_equal(Forecaster.load(tmp_path).predict(bars()), own.predict(bars()))
    walked = Forecaster(**PLAIN).cross_validation(
        bars(), n_splits=2, test_size=40, refit_every=20, progress=False, loss={"price": USUAL["price"]}
    )
    assert len(walked) == 80


def test_a_checkpoint_of_another_loss_is_refused(tmp_path):
    from training_kit import SmallForecaster

    def run(loss, resume=True):
        torch.manual_seed(0)
        own = settings(epochs=2, pos_weight=1.0)
        return fit(SmallForecaster(), *loaders(), own, "cpu", tmp_path, resume, False, loss=loss)

    absolute = {"price": lambda h, t: (h - t).abs()}
    first = run(absolute, False)
    assert run(absolute) == first
    with pytest.raises(CheckpointError, match="loss is .* there and None here"):
        run(None)
    with pytest.raises(CheckpointError, match="loss is"):
        run({"price": lambda h, t: 2 * (h - t).abs()})


def test_the_identity_of_a_loss():
    assert loss_identity(huber) == loss_identity(huber) != loss_identity(weighted_cross_entropy)
    assert loss_identity(nn.L1Loss(reduction="none")).endswith("L1Loss")
    assert isinstance(MultiObjectiveLoss(), nn.Module)


@pytest.mark.parametrize(
    "loss, change, message",
    [
        ({"prices": abs}, {}, "loss has no 'prices': did you mean 'price'?"),
        ({}, {}, "give a function, or functions by head"),
        (5, dict(training=dict(epochs=1, pos_weight=1.0)), "loss=5: give a function"),
        ({"direction": USUAL["direction"]}, {}, "pos_weight=2 belongs to the usual loss"),
        ({"price": lambda h, t: (h - t).abs().mean()}, {}, "the loss of price returns []: return a loss for every"),
        ({"price": lambda h, t: 1.0}, {}, "the loss of price returns float"),
        ({"price": USUAL["price"]}, dict(architecture=dict(scales=[1, 5])), "members are stacked by the usual losses"),
    ],
    ids=["misspelled", "empty", "a number", "rises", "a mean", "no tensor", "ensemble"],
)
def test_a_loss_that_cannot_work_is_refused(loss, change, message):
    with pytest.raises(ValueError) as error:
        Forecaster(**SMALL | change).fit(bars(), progress=False, loss=loss)
    assert message in str(error.value)


# ---------------------------------------------------------------- metrics


@pytest.fixture(scope="module")
def walked():
    return Forecaster(**SMALL).cross_validation(bars(), n_splits=2, test_size=50, progress=False)


def test_a_metric_of_ones_own_is_given_known_rows_fold_by_fold(walked):
    "Counted by hand in NumPy; the last row of the frame has no outcome and is not there."
    error = lambda f: float((f.actual_close - f.forecast_close).abs().max())
    unknown = pd.concat([walked, walked.tail(1).assign(actual_close=np.nan, actual_up=np.nan, actual_variance=np.nan)])
    made = evaluate(unknown, metrics={"largest error": error, "rows": len})
    close, forecast = walked.actual_close.to_numpy(), walked.forecast_close.to_numpy()
    expected = [np.abs(close - forecast)[rows].max() for rows in (slice(0, 50), slice(50, 100), slice(None))]
    found = [scores["own"] for scores in (*made["folds"], made["overall"])]
    assert [own["largest error"] for own in found] == pytest.approx(expected)
    assert [own["rows"] for own in found] == [50.0, 50.0, 100.0]
    assert "own" not in evaluate(walked)["overall"]


def test_a_metric_without_a_number_is_refused(walked):
    for wrong in (lambda f: "good", lambda f: f.close, lambda f: None):
        with pytest.raises(ValueError, match="metric 'mine' gives"):
            evaluate(walked, metrics={"mine": wrong})


def test_a_metric_of_ones_own_is_in_the_report(walked):
    from smlstm.using.report import own_table

    made = evaluate(walked, metrics={"rows": len})
    table = own_table(made)
    assert table[("of one's own", "rows")].to_list() == ["50", "50", "100"]
