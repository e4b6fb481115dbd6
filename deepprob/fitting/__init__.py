"""Fitting: the parts shared by routines that take gradient steps."""

from __future__ import annotations

from deepprob.fitting.callbacks import Anneal, Callback, Checkpoint, EarlyStopping, Log
from deepprob.fitting.divergence import DivergenceError
from deepprob.fitting.kl_schedules import KLCycles, KLWarmUp
from deepprob.fitting.loggers import CSVLogger, TensorBoard
from deepprob.fitting.objectives import ELBO, IWAE, OBJECTIVES, Objective, Terms
from deepprob.fitting.optimizers import Optimizer

__all__ = [
    "ELBO",
    "IWAE",
    "OBJECTIVES",
    "Anneal",
    "CSVLogger",
    "Callback",
    "Checkpoint",
    "DivergenceError",
    "EarlyStopping",
    "KLCycles",
    "KLWarmUp",
    "Log",
    "Objective",
    "Optimizer",
    "TensorBoard",
    "Terms",
]
