"""Posteriors: the result of every routine."""

from __future__ import annotations

from deepprob.posteriors.encoding import Encoding
from deepprob.posteriors.evidence import Evidence
from deepprob.posteriors.from_draws import draws_posterior
from deepprob.posteriors.history import History
from deepprob.posteriors.posterior import Posterior
from deepprob.posteriors.prediction import Prediction
from deepprob.posteriors.prior import sample_prior
from deepprob.posteriors.recalibration import Conformal, TemperatureScaled

__all__ = [
    "Conformal",
    "Encoding",
    "Evidence",
    "History",
    "Posterior",
    "Prediction",
    "TemperatureScaled",
    "draws_posterior",
    "sample_prior",
]
