"""deepprob: probabilistic deep models you can trust, on Pyro and PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepprob.data import DataSet, Split, list_data, load_data, table
    from deepprob.data import Table as Table
    from deepprob.data import images as images
    from deepprob.diagnostics import Check, Report
    from deepprob.diagnostics import plots as plots
    from deepprob.diagnostics.compare import compare
    from deepprob.diagnostics.plotting import plot
    from deepprob.diagnostics.report import check
    from deepprob.errors import StorageError as StorageError
    from deepprob.fitting import (
        ELBO,
        IWAE,
        Anneal,
        Callback,
        Checkpoint,
        CSVLogger,
        DivergenceError,
        EarlyStopping,
        KLWarmUp,
        Log,
        Optimizer,
        TensorBoard,
    )
    from deepprob.fitting import KLCycles as KLCycles
    from deepprob.fitting import objectives as objectives
    from deepprob.inference import extend
    from deepprob.networks import (
        MLP,
        Conditional,
        ConvDecoder,
        ConvEncoder,
        Likelihood,
        Recurrent,
        pretrained,
    )
    from deepprob.posteriors import Posterior, Prediction, draws_posterior, sample_prior
    from deepprob.programs import Program
    from deepprob.programs import penalize as penalize

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "IWAE",
    "MLP",
    "Anneal",
    "CSVLogger",
    "Callback",
    "Check",
    "Checkpoint",
    "Conditional",
    "ConvDecoder",
    "ConvEncoder",
    "DataSet",
    "DivergenceError",
    "EarlyStopping",
    "KLWarmUp",
    "Likelihood",
    "Log",
    "Optimizer",
    "Posterior",
    "Prediction",
    "Program",
    "Recurrent",
    "Report",
    "Split",
    "TensorBoard",
    "check",
    "compare",
    "draws_posterior",
    "extend",
    "list_data",
    "load_data",
    "plot",
    "pretrained",
    "sample_prior",
    "table",
]

_HOMES = {
    "deepprob.data": ("DataSet", "Split", "Table", "images", "list_data", "load_data", "table"),
    "deepprob.diagnostics": ("Check", "Report"),
    "deepprob.diagnostics.compare": ("compare",),
    "deepprob.diagnostics.plotting": ("plot",),
    "deepprob.diagnostics.report": ("check",),
    "deepprob.errors": ("StorageError",),
    "deepprob.fitting": (
        *("ELBO", "IWAE", "Anneal", "Callback", "Checkpoint", "DivergenceError", "EarlyStopping", "KLWarmUp", "Log"),
        *("CSVLogger", "KLCycles", "Optimizer", "TensorBoard"),
    ),
    "deepprob.inference": ("extend",),
    "deepprob.networks": (
        *("MLP", "Conditional", "ConvDecoder", "ConvEncoder", "Likelihood", "MixedLikelihood", "Recurrent"),
        *("init_weights", "pretrained"),
    ),
    "deepprob.posteriors": ("Posterior", "Prediction", "draws_posterior", "sample_prior"),
    "deepprob.programs": ("Program", "penalize"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = {
    "data": "deepprob.data",
    "objectives": "deepprob.fitting.objectives",
    "plots": "deepprob.diagnostics.plots",
}


def __getattr__(name: str) -> Any:
    # Importing torch, Pyro and scikit-learn takes seconds: a name brings in only what it needs.
    if name in _MODULES:
        value: Any = importlib.import_module(_MODULES[name])
    elif name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
    else:
        raise AttributeError(f"module 'deepprob' has no attribute {name!r}")
    if name == "Posterior":
        importlib.import_module("deepprob.models")  # a saved posterior finds its program among the registered ones
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
