"""Distributions that compute: log-probabilities and draws of whole structures, not of single numbers."""

from deepprob.distributions.gaussian_path import GaussianPath

__all__ = ["GaussianPath"]
