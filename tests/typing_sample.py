"""Code as a user writes it, for mypy alone: every method and every result must be known to it. Nothing here is run."""

from pathlib import Path

import pandas as pd
import torch
from typing_extensions import assert_type

from smlstm import (
    SMLSTM,
    Forecaster,
    ForecasterRegressor,
    MemoryState,
    MixedState,
    Mixing,
    Prices,
    SMLSTMConfig,
    StructuredStateSpace,
    TrainConfig,
    WindowConfig,
    add_technical_indicators,
    audit_causality,
    chunkwise,
    load_model,
    load_prices,
    mixed_chunkwise,
    prepare_data,
    save_model,
)


def forecast_tomorrow(folder: Path) -> pd.DataFrame:
    prices = load_prices("SPY", start="2014-01-01", source="sample")
    assert_type(prices, Prices)
    forecaster = Forecaster(
        horizon=1,
        architecture={"hidden_size": 16, "n_layers": 1},
        windows=WindowConfig(seq_length=64),
        training=TrainConfig(epochs=2),
        device="cpu",
    )
    assert_type(forecaster.fit(prices), Forecaster)
    forecaster.save(folder)
    again = Forecaster.load(folder)
    assert_type(again, Forecaster)
    scores = again.cross_validation(prices, n_splits=2)
    assert_type(scores, pd.DataFrame)
    return again.predict(prices, level=(80, 90))


def read_a_batch(features: torch.Tensor, file: Path) -> torch.Tensor:
    model = SMLSTM(SMLSTMConfig(n_features=features.shape[-1]))
    save_model(model, file)
    forecast, _ = model(features)
    assert_type(load_model(file), SMLSTM)
    return features.new_tensor(forecast.price.shape)


def remember(q: torch.Tensor, gates: torch.Tensor, mix: Mixing, state: MixedState | None) -> torch.Tensor:
    plain, memory = chunkwise(q, q, q, gates, gates, theta=1.0, chunk_size=32)
    assert_type(memory, MemoryState)
    mixed, state = mixed_chunkwise(q, q, q, gates, gates, mix, state=state)
    return plain + mixed


def prepare_columns(prices: Prices) -> pd.DataFrame:
    StructuredStateSpace(4).train()
    audit_causality(add_technical_indicators, prices.frame)
    table = prepare_data(prices.frame)
    regressor = ForecasterRegressor(Forecaster(device="cpu"))
    regressor.fit(table, table)
    return table
