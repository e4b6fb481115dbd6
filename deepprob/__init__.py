"""deepprob: probabilistic deep models you can trust, on Pyro and PyTorch."""

from deepprob.data import list_data, load_data
from deepprob.diagnostics import Check
from deepprob.posterior import Posterior
from deepprob.prediction import Prediction
from deepprob.program import Program
from deepprob.report import Report, check

__version__ = "0.1.0"

__all__ = ["Check", "Posterior", "Prediction", "Program", "Report", "check", "list_data", "load_data"]
