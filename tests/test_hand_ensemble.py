"""What an ensemble knows of its members, by loops over the rows: correlations, continuation, usual heads, blocks."""

import math

import numpy as np
import pytest
import torch

from smlstm.using.ensemble import SkillRecord, constant_heads, outcome_readout, recent_correlation
from smlstm.using.members import rolling_blocks
from smlstm.using.stacking import inner_folds, return_autocorrelation


def test_correlation_of_forecasts_with_outcomes():
    "At each bar with the outcomes of the forecasts of two bars before; a span of 9 keeps four fifths a bar."
    rng, bars, horizon = np.random.default_rng(0), 30, 2
    forecasts, outcomes = rng.standard_normal((2, 1, bars, 1))
    record = SkillRecord(torch.zeros(1, horizon, 1), torch.zeros(1, 3, 1))
    got, _ = recent_correlation(torch.tensor(forecasts).float(), torch.tensor(outcomes).float(), record, span=9)
    for t in range(bars):
        pairs = [(forecasts[0, s - horizon, 0], outcomes[0, s, 0], 0.8 ** (t - s)) for s in range(horizon, t + 1)]
        squares = sum(w * a * a for a, _, w in pairs)
        total = sum(w * b * b for _, b, w in pairs) + sum(
            0.8 ** (t - s) * outcomes[0, s, 0] ** 2 for s in range(min(horizon, t + 1))
        )
        expected = sum(w * a * b for a, b, w in pairs) / math.sqrt(squares * total + 1e-6)
        assert got[0, t, 0].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("horizon", [1, 3])
def test_continuation_of_returns_that_are_known(horizon):
    "Row t knows the return that came to pass at t, which was the target of row t - horizon."
    y = np.random.default_rng(1).standard_normal((40, 3))
    got = return_autocorrelation(y, horizon, span=9)
    for t in range(2 * horizon, 40):
        known = [
            (y[s - horizon, 0], y[s - 2 * horizon, 0] if s >= 2 * horizon else None, s) for s in range(horizon, t + 1)
        ]
        products = [(0.8 ** (t - s), a * b) for a, b, s in known if b is not None]
        squares = [(0.8 ** (t - s), a * a) for a, _, s in known]
        mean = lambda parts: sum(w * x for w, x in parts) / sum(w for w, _ in parts)
        assert got[t] == pytest.approx(mean(products) / mean(squares))
    assert (got[: 2 * horizon] == 0).all()


def test_usual_heads_less_their_standard_errors():
    "Of 100 rows 70 rose: log odds of 70.5 to 30.5, less 1 / sqrt(n p (1 - p)); rises count twice in the loss."
    y = np.stack([np.full(100, 0.3), np.r_[np.ones(70), np.zeros(30)], np.r_[np.full(50, -1.0), np.ones(50)]], 1)
    rate = 70.5 / 101
    expected = [0.3, math.log(rate / (1 - rate)) - 1 / math.sqrt(100 * rate * (1 - rate)) + math.log(2), 0.0]
    assert constant_heads(y, 2.0) == pytest.approx(expected)


def test_outcomes_are_read_from_later_features():
    "Targets that are a linear function of the features two rows later, a rise as 1 and a fall as -1."
    x = np.random.default_rng(2).standard_normal((200, 2))
    up = (x[:, 1] > 0).astype(float)
    y = np.stack([np.roll(2 * x[:, 0] + 1, -2), np.roll(up, -2), np.roll(x[:, 1], -2)], 1)
    weights = outcome_readout(x, y, horizon=2)
    assert weights[0] == pytest.approx([2, 0, 1]) and weights[2] == pytest.approx([0, 1, 0], abs=1e-9)
    signs = np.linalg.lstsq(np.c_[x[2:], np.ones(198)], 2 * up[2:] - 1, rcond=None)[0]
    assert weights[1] == pytest.approx(signs)


def test_blocks_are_means_of_the_last_rows():
    x, before = torch.arange(1.0, 6.0).view(1, 5, 1), torch.tensor([[[10.0], [20.0]]])
    means, kept = rolling_blocks(x, before, 3)
    assert means.flatten().tolist() == pytest.approx([31 / 3, 23 / 3, 2, 3, 4]) and kept.flatten().tolist() == [4, 5]


def test_inner_folds_by_hand():
    "Of rows 10 to 50 the last twenty are forecast, ten at a time, two rows after those that were learned."
    assert inner_folds(slice(10, 50), 2, horizon=2) == [
        (slice(10, 28), slice(30, 40)),
        (slice(10, 38), slice(40, 50)),
    ]
