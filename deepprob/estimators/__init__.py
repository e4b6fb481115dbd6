"""Estimators with the interface of scikit-learn."""

from __future__ import annotations

from deepprob.estimators.neural_network import BayesianClassifier, BayesianRegressor

__all__ = ["BayesianClassifier", "BayesianRegressor"]
