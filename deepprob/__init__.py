"""deepprob: probabilistic deep models you can trust, on Pyro and PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepprob.data import list_data, load_data
    from deepprob.diagnostics import Check
    from deepprob.diagnostics.report import Report, check
    from deepprob.posteriors.posterior import Posterior
    from deepprob.posteriors.prediction import Prediction
    from deepprob.programs.program import Program

__version__ = "0.1.0"

__all__ = ["Check", "Posterior", "Prediction", "Program", "Report", "check", "list_data", "load_data"]

_HOMES = {
    "Check": "deepprob.diagnostics",
    "Posterior": "deepprob.posteriors.posterior",
    "Prediction": "deepprob.posteriors.prediction",
    "Program": "deepprob.programs.program",
    "Report": "deepprob.diagnostics.report",
    "check": "deepprob.diagnostics.report",
    "list_data": "deepprob.data",
    "load_data": "deepprob.data",
}


def __getattr__(name: str) -> Any:
    # Importing torch, Pyro and scikit-learn takes seconds: a name brings in only what it needs.
    if name not in _HOMES:
        raise AttributeError(f"module 'deepprob' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
