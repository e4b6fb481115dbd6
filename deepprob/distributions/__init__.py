"""Distributions that compute: log-probabilities and draws of whole structures, not of single numbers."""

from deepprob.distributions.chain import GaussianPath

__all__ = ["GaussianPath"]
