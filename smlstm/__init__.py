"""Forecasting of financial time series with a Scalar-Matrix LSTM.

The names below are the library's public face: `from smlstm import Forecaster, load_prices`. Each is imported from its
module when it is first asked for, so that `import smlstm` costs next to nothing. All else is imported from its module.
"""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names, for editors and type checkers; tests/test_api.py compares the two lists
    from .data.cache import get_stock_data as get_stock_data
    from .data.calendars import merge_datasets as merge_datasets
    from .data.features import add_technical_indicators as add_technical_indicators
    from .data.features import make_targets as make_targets
    from .data.features import prepare_data as prepare_data
    from .data.frames import Prices as Prices
    from .data.prices import load_prices as load_prices
    from .data.windows import create_sequences as create_sequences
    from .data.windows import create_tpu_dataloader as create_tpu_dataloader
    from .data.yahoo import fetch_chunk as fetch_chunk
    from .data.yahoo import safe_fetch as safe_fetch
    from .judging.audit import audit_causality as audit_causality
    from .judging.evaluation import compare as compare
    from .judging.evaluation import evaluate as evaluate
    from .learning.callbacks import Callback as Callback
    from .learning.callbacks import TensorBoard as TensorBoard
    from .learning.checkpoints import load_model as load_model
    from .learning.checkpoints import save_model as save_model
    from .learning.settings import TrainConfig as TrainConfig
    from .learning.settings import lr_schedule as lr_schedule
    from .learning.training import fit as fit
    from .model.cell import ParallelSMLSTMCell as ParallelSMLSTMCell
    from .model.losses import AsymmetricDirectionalLoss as AsymmetricDirectionalLoss
    from .model.mixing import MixedState as MixedState
    from .model.mixing import Mixing as Mixing
    from .model.mixing import mixed_chunkwise as mixed_chunkwise
    from .model.mixing import mixed_recurrent as mixed_recurrent
    from .model.model import SMLSTM as SMLSTM
    from .model.model import Forecast as Forecast
    from .model.model import SMLSTMConfig as SMLSTMConfig
    from .model.ssm import StructuredStateSpace as StructuredStateSpace
    from .model.stabilization import MemoryState as MemoryState
    from .model.stabilization import chunkwise as chunkwise
    from .model.stabilization import cumulative as cumulative
    from .model.stabilization import recurrent as recurrent
    from .model.stabilization import stabilize_gates as stabilize_gates
    from .using.ensemble import EnsembleConfig as EnsembleConfig
    from .using.ensemble import MetaNetwork as MetaNetwork
    from .using.ensemble import SMLSTMEnsemble as SMLSTMEnsemble
    from .using.estimator import ForecasterRegressor as ForecasterRegressor
    from .using.forecaster import Forecaster as Forecaster
    from .using.panels import WindowConfig as WindowConfig
    from .using.run import run as run
    from .using.search import search as search
    from .using.sweep import sweep as sweep
    from .using.targets import target_series as target_series

_EXPORTS = {  # module -> its names
    "data.cache": ["get_stock_data"],
    "data.calendars": ["merge_datasets"],
    "data.features": ["add_technical_indicators", "make_targets", "prepare_data"],
    "data.frames": ["Prices"],
    "data.prices": ["load_prices"],
    "data.windows": ["create_sequences", "create_tpu_dataloader"],
    "data.yahoo": ["fetch_chunk", "safe_fetch"],
    "judging.audit": ["audit_causality"],
    "judging.evaluation": ["compare", "evaluate"],
    "learning.callbacks": ["Callback", "TensorBoard"],
    "learning.checkpoints": ["load_model", "save_model"],
    "learning.settings": ["TrainConfig", "lr_schedule"],
    "learning.training": ["fit"],
    "model.cell": ["ParallelSMLSTMCell"],
    "model.losses": ["AsymmetricDirectionalLoss"],
    "model.mixing": ["MixedState", "Mixing", "mixed_chunkwise", "mixed_recurrent"],
    "model.model": ["SMLSTM", "Forecast", "SMLSTMConfig"],
    "model.ssm": ["StructuredStateSpace"],
    "model.stabilization": ["MemoryState", "chunkwise", "cumulative", "recurrent", "stabilize_gates"],
    "using.ensemble": ["EnsembleConfig", "MetaNetwork", "SMLSTMEnsemble"],
    "using.estimator": ["ForecasterRegressor"],
    "using.forecaster": ["Forecaster"],
    "using.panels": ["WindowConfig"],
    "using.run": ["run"],
    "using.search": ["search"],
    "using.sweep": ["sweep"],
    "using.targets": ["target_series"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [*sorted(_MODULE_OF), "__version__"]


def __getattr__(name: str) -> Any:
    "Import a public name from its module and keep it here (PEP 562). AttributeError where there is none of this name."
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    "What an editor or `dir(smlstm)` lists, imported or not."
    return sorted({*globals(), *__all__})
