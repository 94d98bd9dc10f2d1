"""A small forecaster and a small series for the tests of training, in a module that new processes can import."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from smlstm.data.windows import create_sequences, create_tpu_dataloader
from smlstm.learning.optimizer import flatten
from smlstm.learning.settings import TrainConfig
from smlstm.learning.training import fit


class Outputs(NamedTuple):
    price: torch.Tensor
    direction: torch.Tensor
    volatility: torch.Tensor


class SmallForecaster(nn.Module):
    """An LSTM with three heads: as fast as a causal model can be, with dropout to tell random states apart."""

    def __init__(self, dropout=0.2, n_features=4, hidden_size=8):
        super().__init__()
        self.config = {"dropout": dropout, "n_features": n_features, "hidden_size": hidden_size}
        self.lstm, self.drop, self.heads = (
            nn.LSTM(n_features, hidden_size, batch_first=True),
            nn.Dropout(dropout),
            nn.Linear(hidden_size, 3),
        )

    def forward(self, x, state=None):
        hidden, state = self.lstm(x, state)
        return Outputs(*self.heads(self.drop(hidden)).unbind(-1)), state


def loaders(rows=300, batch_size=16, seq_length=12, n_features=4, augment=True):
    """Training windows, shuffled, with noise, and validation windows; the last batch of each is partial."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, n_features, generator=generator)
    move = 0.8 * x[:, 0] + 0.6 * torch.randn(rows, generator=generator)
    y = torch.stack([move, (move > 0).float(), 0.5 * x[:, 1]], dim=1)
    cut = rows * 3 // 4
    train = create_sequences(x[:cut].numpy(), y[:cut].numpy(), seq_length, augment=augment, stride=2)
    valid = create_sequences(x[cut:].numpy(), y[cut:].numpy(), seq_length, augment=False)
    return create_tpu_dataloader(train, batch_size), create_tpu_dataloader(valid, batch_size, shuffle=False)


def without_noise():
    """The same loaders, whose numbers are the same on every device."""
    return loaders(augment=False)


def settings(**changes):
    return TrainConfig(**{"epochs": 4, "learning_rate": 1e-2, "warmup_epochs": 1, **changes})


def train(checkpoint_dir=None, resume=False, config=None, dropout=0.2, device="cpu", data=loaders, model=None):
    """Train from the same start each time; the history and the final weights."""
    torch.manual_seed(0)
    model = model or SmallForecaster(dropout)
    history = fit(
        model,
        *data(),
        config or settings(),
        device=device,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        progress=False,
    )
    return history, flatten([p.cpu() for p in model.parameters()])


def train_to_file(path, *args, **kwargs):
    """`train` in a process of its own: its losses and weights go to `path`, written by the first replica."""
    from smlstm.learning.device import replicas

    torch.set_num_threads(1)
    history, weights = train(*args, **kwargs)
    if replicas(torch.device("cpu")).rank == 0:
        torch.save({"weights": weights, "losses": losses(history)}, path)


def count_saves(count, *arguments):
    """A training process that counts its checkpoints where its parent sees it, each before it is written."""
    import smlstm.learning.training as training

    save_run = training.save_run

    def counting(*args):
        count.value += 1
        save_run(*args)

    training.save_run = counting
    train_to_file(*arguments)


def train_shared(path, dropout, checkpoint_dir, epochs):
    """One replica of a data parallel run."""
    train_to_file(
        path,
        checkpoint_dir,
        checkpoint_dir is not None,
        settings(epochs=4, patience=epochs, checkpoint_every=3),
        dropout,
    )


def losses(history):
    return [[*epoch.train, *epoch.valid] for epoch in history.epochs]


def say_who(folder):
    """Each replica on XLA writes its place and its device, by its rank."""
    from smlstm.learning.device import pick_device, replicas

    device = pick_device("xla")
    Path(folder, str(replicas(device).rank)).write_text(f"{replicas(device)} {device}")
