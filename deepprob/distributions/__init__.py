"""Distributions over structures: each evaluates and draws a whole structure, such as a path, at once."""

from pyro.distributions import TorchDistribution

from deepprob.distributions.gaussian_path import GaussianPath

DISTRIBUTIONS: dict[str, type[TorchDistribution]] = {"gaussian_path": GaussianPath}

__all__ = ["DISTRIBUTIONS", "GaussianPath"]
