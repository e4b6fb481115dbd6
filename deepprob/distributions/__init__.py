"""Distributions over structures: each evaluates and draws a whole structure, such as a path or a row, at once."""

from pyro.distributions import TorchDistribution

from deepprob.distributions.columns import Columns
from deepprob.distributions.gaussian_path import GaussianPath
from deepprob.distributions.mixture import Mixture

DISTRIBUTIONS: dict[str, type[TorchDistribution]] = {
    "columns": Columns,
    "gaussian_path": GaussianPath,
    "mixture": Mixture,
}

__all__ = ["DISTRIBUTIONS", "Columns", "GaussianPath", "Mixture"]
