"""What several tests share: a process that dies at a chosen moment, and a network read in pieces."""

import os
import signal

import torch

from smlstm.model.model import Forecast, map_state
from smlstm.using.members import join_states


def die_at(moment, *places):
    "From now on the n-th call of `places`, pairs of an owner and an attribute, kills this process: for a child."
    left = [moment]

    def mortal(operation):
        def step(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **options)

        return step

    for owner, name in places:
        setattr(owner, name, mortal(getattr(owner, name)))


class Window(torch.nn.Module):
    "A network that returns a plain tuple: saved programs know no NamedTuples."

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return tuple(self.network(x)[0])


@torch.no_grad()
def check_pieces(network, x, splits):
    "Any split of x [B, 45, F] into pieces, and any batch, give the forecasts of the whole, and the state after it."
    whole, last = network(x)
    for split in splits:
        state, parts = None, []
        for piece in x.split(split, 1):
            forecast, state = network(piece, state)
            parts.append(forecast)
        for name, *pieces in zip(Forecast._fields, *parts):
            torch.testing.assert_close(torch.cat(pieces, 1), getattr(whole, name), rtol=1e-9, atol=1e-10)
        join_states(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10), state, last)
    alone, _ = network(x[1:2])
    torch.testing.assert_close(alone.price, whole.price[1:2], rtol=1e-9, atol=1e-10)


def state_shapes(state):
    "The shape of every tensor of a state."
    shapes = []
    map_state(lambda part: shapes.append(tuple(part.shape)) or part, state)
    return shapes
