"""Training against torch's own optimizer in a plain loop, and losses, schedules and stopping against values by hand."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smlstm.data.windows import SequenceLoader, create_sequences, create_tpu_dataloader
from smlstm.learning.history import Epoch, History
from smlstm.learning.settings import EarlyStopping, TrainConfig, lr_schedule
from smlstm.learning.training import fit
from smlstm.model.losses import (
    AsymmetricDirectionalLoss,
    Losses,
    MultiObjectiveLoss,
    calibrated_probability,
    curriculum_weights,
)
from smlstm.model.model import Forecast
from smlstm.using.run import describe_fold
from smlstm.using.utilization import Utilization, batch_for_half, describe_utilization, device_milliseconds


class Linear(nn.Module):
    "Three heads on two features, so small that its training can be followed by hand."

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.heads = nn.Linear(2, 3)

    def forward(self, x):
        heads = self.heads(x)
        return Forecast(*heads.unbind(-1), heads.softmax(-1)), None


def loaders(rows=60, stride=7, batch=3):
    "Windows of five, in order; the last batch is not full."
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 2))
    y = np.stack([2 * x[:, 0] + rng.standard_normal(rows), rng.random(rows) < 0.5, x[:, 1] - 1], 1)
    train = create_sequences(x, y, 5, augment=False, stride=stride)
    valid = create_sequences(x[-20:], y[-20:], 5, augment=False, stride=5)
    return create_tpu_dataloader(train, batch, shuffle=False), create_tpu_dataloader(valid, batch, shuffle=False)


def parts(heads, y):
    "The three losses of every row and step, by torch's functions; up moves count twice."
    price = F.huber_loss(heads[..., 0], y[..., 0], reduction="none")
    direction = F.binary_cross_entropy_with_logits(
        heads[..., 1], y[..., 1], reduction="none", pos_weight=torch.tensor(2.0)
    )
    return price, direction, F.mse_loss(heads[..., 2], y[..., 2], reduction="none")


def plain_loop(model, train, valid, config):
    "The same training with `torch.optim.AdamW`: gradients are means over the rows of `accumulate` batches."
    groups = [
        {"params": model.weight, "weight_decay": config.weight_decay},
        {"params": model.bias, "weight_decay": 0.0},
    ]
    optimizer, history = torch.optim.AdamW(groups, lr=config.learning_rate), []
    for epoch in range(config.epochs):
        weights = 1.0, min(0.5 + epoch / 10, 2.0), min(0.2 + epoch / 20, 0.5)
        warm, total = config.warmup_epochs, config.epochs
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * (epoch - warm) / (total - warm))) / 2
        rate = config.learning_rate * (0.1 + 0.9 * epoch / warm if epoch < warm else cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batches = list(train)
        for first in range(0, len(batches), config.accumulate):
            x, y = (
                torch.cat([getattr(b, name)[b.mask > 0] for b in batches[first : first + config.accumulate]])
                for name in ("x", "y")
            )
            optimizer.zero_grad()
            loss = sum(w * part.mean() for w, part in zip(weights, parts(model(x), y)))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
        with torch.no_grad():
            x, y = (torch.cat([getattr(b, name)[b.mask > 0] for b in valid]) for name in ("x", "y"))
            price, direction, volatility = (part.mean().item() for part in parts(model(x), y))
        history.append((price + 2 * direction + 0.5 * volatility, copy.deepcopy(model.state_dict())))
    return history


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_that_of_torch(accumulate):
    config = TrainConfig(
        epochs=6, learning_rate=0.05, warmup_epochs=2, accumulate=accumulate, clip=0.8, weight_decay=0.1, patience=6
    )
    ours, theirs = Linear(), Linear().heads
    train, valid = loaders()
    assert [len(batch.mask) - int(batch.mask.sum()) for batch in train][-1] > 0  # the last batch is not full
    train.set_epoch(0)
    history = fit(ours, train, valid, config, device="cpu", progress=False)
    expected = plain_loop(theirs, *loaders(), config)
    assert [epoch.valid.total for epoch in history.epochs] == pytest.approx([loss for loss, _ in expected], rel=2e-5)
    best = min(range(6), key=lambda epoch: expected[epoch][0])
    assert history.best_epoch == best
    for name, weights in expected[best][1].items():
        torch.testing.assert_close(ours.heads.state_dict()[name], weights, rtol=2e-5, atol=2e-6)


def test_the_weights_of_the_best_epoch_come_back():
    "A learning rate that rises too far: later epochs are worse, and training stops in time."
    config = TrainConfig(epochs=12, learning_rate=3.0, warmup_epochs=11, accumulate=1, clip=100.0, patience=2)
    model, expected = Linear(), plain_loop(Linear().heads, *loaders(), config)
    history = fit(model, *loaders(), config, device="cpu", progress=False)
    losses = [loss for loss, _ in expected]
    assert history.best_epoch == int(np.argmin(losses[: len(history.epochs)])) < len(history.epochs) - 1
    assert len(history.epochs) == history.best_epoch + 3 and history.stopped_early
    torch.testing.assert_close(model.heads.weight, expected[history.best_epoch][1]["weight"], rtol=1e-4, atol=1e-5)


class Interrupted(SequenceLoader):
    "A loader that gives up at the beginning of epoch `last`."

    def __iter__(self):
        if self.epoch == self.last:
            raise KeyboardInterrupt
        return super().__iter__()


def test_patience_is_remembered_by_a_resumed_run(tmp_path):
    "Interrupted after one epoch without improvement: one more ends the run, as it ends the uninterrupted one."
    config = TrainConfig(epochs=12, learning_rate=3.0, warmup_epochs=11, accumulate=1, clip=100.0, patience=2)
    options = dict(config=config, device="cpu", progress=False)
    whole = fit(Linear(), *loaders(), **options)
    train, valid = loaders()
    train.__class__, train.last = Interrupted, whole.best_epoch + 2
    with pytest.raises(KeyboardInterrupt):
        fit(Linear(), train, valid, **options, checkpoint_dir=tmp_path)
    resumed = fit(Linear(), *loaders(), **options, checkpoint_dir=tmp_path, resume=True)
    assert [epoch.valid.total for epoch in resumed.epochs] == [epoch.valid.total for epoch in whole.epochs]
    assert resumed.stopped_early and len(resumed.epochs) == whole.best_epoch + 3


def test_the_seed_decides_what_is_dropped():
    "From the same weights, in the same order: only dropout is drawn."
    found = []
    for seed in (1, 1, 2):
        model = Linear()
        model.heads = nn.Sequential(nn.Dropout(0.5), model.heads)
        fit(model, *loaders(), TrainConfig(epochs=1, warmup_epochs=0, seed=seed), device="cpu", progress=False)
        found.append(model.heads[1].weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_learning_rate_by_hand():
    "From a tenth over two fifths of the warm-up to the top, half-way down after half of the rest, a tenth at the end."
    factors = [lr_schedule(epoch, 15) for epoch in (0, 2, 5, 10, 15)]
    assert factors == pytest.approx([0.1, 0.46, 1.0, 0.55, 0.1])


def test_stopping_by_hand():
    "Improvements smaller than a tenth do not count; after two epochs without one, it is over."
    stopper = EarlyStopping(patience=2, min_delta=0.1)
    improved = [stopper.update(epoch, loss) for epoch, loss in enumerate([1.0, 0.95, 0.85, 0.8, 0.76])]
    assert improved == [True, False, True, False, False]
    assert (stopper.best, stopper.best_epoch, stopper.stop) == (0.85, 2, True)


def test_curriculum_by_hand():
    assert [tuple(curriculum_weights(epoch)) for epoch in (0, 4, 6, 15, 40)] == [
        pytest.approx((1.0, direction, volatility))
        for direction, volatility in ((0.5, 0.2), (0.9, 0.4), (1.1, 0.5), (2.0, 0.5), (2.0, 0.5))
    ]


def test_losses_by_hand():
    "Errors of one half and two: 0.125 and 1.5 by Huber; a logit of ln 3 for a rise and for a fall: 2 ln 4/3 and ln 4."
    forecast = Forecast(torch.tensor([[0.5, 2.0]]), torch.full((1, 2), math.log(3)), torch.tensor([[3.0, 1.0]]), None)
    losses = MultiObjectiveLoss(2.0, 1.0)(forecast, torch.tensor([[[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]]))
    price, direction = (0.125 + 1.5) / 2, (2 * math.log(4 / 3) + math.log(4)) / 2
    assert losses.price.item() == pytest.approx(price) and losses.direction.item() == pytest.approx(direction)
    assert losses.volatility.item() == pytest.approx(2.0)
    assert losses.total.item() == pytest.approx(price + 2 * direction + 0.5 * 2)


def test_direction_of_a_path_by_hand():
    "A rise that was forecast twice as large, a fall forecast as a rise, no move: rises count twice, falls once."
    forecast, actual = torch.tensor([[0.0, 2.0, 3.0, 2.0]]), torch.tensor([[5.0, 6.0, 4.0, 4.0]])
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    smooth = AsymmetricDirectionalLoss(2.0, 1.0, temperature=0.5)(forecast, actual).item()
    assert smooth == pytest.approx((2 * sigmoid(-2 / 0.5) + sigmoid(1 / 0.5)) / 3)
    assert AsymmetricDirectionalLoss(2.0, 1.0, None)(forecast, actual).item() == pytest.approx(1 / 3)


def test_probability_with_the_weight_undone():
    "Where rises count twice, even odds are learned as a logit of ln 2."
    assert calibrated_probability(torch.tensor(math.log(2)), 2.0).item() == pytest.approx(0.5)
    assert calibrated_probability(torch.tensor(math.log(6)), 2.0).item() == pytest.approx(0.75)


# ---------------------------------------------------------------- host and device


def test_the_share_of_the_time_that_a_device_works():
    "Host 4 ms and device 1 ms: a quarter; at twice the batch half, 2 of 4 ms. A device that takes longer always works."
    report = SimpleNamespace(
        program=lambda name: SimpleNamespace(cycles={"gradient": 900_000, "optimizer": 200_000}[name])
    )
    assert device_milliseconds(report, accumulate=2) == pytest.approx(1.0)
    assert Utilization(4.0, 1.0).share == pytest.approx(0.25) and batch_for_half(Utilization(4.0, 1.0), 16) == 32
    assert Utilization(1.0, 3.0).share == 1.0
    text = describe_utilization(4.0, 1.0, 16)
    assert "works 25% of the time" in text and "batch_size=32" in text
    assert "batch_size" not in describe_utilization(1.0, 3.0, 16) and "device" not in describe_utilization(
        4.0, None, 16
    )


def test_a_fold_names_what_a_batch_costs_where_another_device_computes():
    losses = Losses(1.0, 0.2, 0.3, 0.4)
    epoch = Epoch(0, 0.01, losses, losses, 0, 1.0)
    step = lambda epoch: SimpleNamespace(number=0, history=History([epoch], 0))
    job = SimpleNamespace(device_ms=None, parameters={"batch_size": 16})
    assert describe_fold(step(epoch), 5, job).endswith("validation loss 1.0000")
    assert describe_fold(step(epoch._replace(host_ms=2.34)), 5, job).endswith("; host 2.3 ms a batch")
    again = History.from_dict(json.loads(json.dumps(History([epoch._replace(host_ms=2.5)], 0).to_dict())))
    assert again.epochs[0].host_ms == 2.5 and again.to_frame().host_ms.tolist() == [2.5]
