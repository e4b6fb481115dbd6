"""The labelled set of `trust.py`: posteriors that are good, and posteriors that are wrong in a known way."""

from __future__ import annotations

from verdicts import (
    autoencoders,
    chains,
    data_faults,
    glm,
    hierarchies,
    local,
    mixtures,
    networks,
    regressions,
    sequences,
    styles,
)
from verdicts.registry import CASES, Case, Fitted, Nats

__all__ = [
    "CASES",
    "Case",
    "Fitted",
    "Nats",
    "autoencoders",
    "chains",
    "data_faults",
    "glm",
    "hierarchies",
    "local",
    "mixtures",
    "networks",
    "regressions",
    "sequences",
    "styles",
]
