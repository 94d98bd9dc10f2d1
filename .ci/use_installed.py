"""What a user does with an installed smlstm, in seconds: import every public name, learn, forecast, save, load."""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import smlstm

assert Path(smlstm.__file__).is_relative_to(Path(sys.argv[1]).resolve()), smlstm.__file__
assert version("smlstm") == smlstm.__version__
assert Path(smlstm.__file__).with_name("py.typed").exists() and Path(smlstm.__file__).with_name("train.ipynb").exists()
for name in smlstm.__all__:
    getattr(smlstm, name)

prices = smlstm.load_prices("SPY", start="2014-01-01", source="sample")
forecaster = smlstm.Forecaster(
    architecture={"hidden_size": 8, "n_heads": 1, "n_layers": 1, "n_regimes": 2},
    windows=smlstm.WindowConfig(seq_length=32),
    training=smlstm.TrainConfig(epochs=1),
    device="cpu",
)
forecast = forecaster.fit(prices).predict(prices)
with tempfile.TemporaryDirectory() as folder:
    forecaster.save(Path(folder) / "model")
    again = smlstm.Forecaster.load(Path(folder) / "model").predict(prices)
assert again.equals(forecast)
