"""Inference, imported as ``deepprob.inference``: one file per routine."""

from __future__ import annotations

from collections.abc import Callable

# Imported under a second name, the module would define a second copy of every class, and isinstance would fail.
if __name__ == "inference":
    raise ImportError(
        "this folder is imported as deepprob.inference, not as inference. Write: from deepprob.inference import svi"
    )

from deepprob.inference.dropout import dropout
from deepprob.inference.ensemble import ensemble
from deepprob.inference.laplace import laplace
from deepprob.inference.map_estimate import map_estimate
from deepprob.inference.sghmc import sghmc
from deepprob.inference.svi import extend, svi
from deepprob.inference.swag import swag
from deepprob.posteriors.posterior import Posterior

#: The routines by their names in commands.
ROUTINES: dict[str, Callable[..., Posterior]] = {
    "svi": svi,
    "map_estimate": map_estimate,
    "laplace": laplace,
    "ensemble": ensemble,
    "swag": swag,
    "dropout": dropout,
    "sghmc": sghmc,
}

__all__ = [
    "ROUTINES",
    "dropout",
    "ensemble",
    "extend",
    "laplace",
    "map_estimate",
    "sghmc",
    "svi",
    "swag",
]
