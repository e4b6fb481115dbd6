"""Small data for every registered model, and settings that make every registered routine short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepprob.inference import ROUTINES
from deepprob.models import MODELS, VAE, BayesianNeuralNetwork, DeepMarkovModel
from deepprob.networks.dense import MLP
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

_G = torch.Generator().manual_seed(20_140_410)
_X = torch.randn(24, 3, generator=_G)
_BITS = (torch.rand(24, 6, 5, generator=_G) < 0.4).float()


@dataclass(frozen=True)
class Scenario:
    """A model and data to fit it to.

    Attributes:
        make: Builds the program.
        data: The arguments of the program, observed values included.
        inputs: Number of arguments that `predict` needs.
    """

    make: Callable[[], Program]
    data: tuple[Tensor, ...]
    inputs: int = 1


MODEL_SCENARIOS: dict[str, Scenario] = {
    "vae": Scenario(lambda: VAE((3, 2), latent_dim=2, hidden_dims=(8,)), (torch.rand(24, 3, 2, generator=_G),)),
    "bnn": Scenario(lambda: BayesianNeuralNetwork(MLP(3, 1, (5,), "tanh")), (_X, _X.sum(1, keepdim=True))),
    "dmm": Scenario(
        lambda: DeepMarkovModel(5, latent_dim=2, hidden_dim=4, recurrent_dim=4),
        (_BITS, torch.randint(2, 7, (24,), generator=_G)),
        inputs=2,
    ),
}

ROUTINE_SETTINGS: dict[str, dict[str, Any]] = {"svi": {"epochs": 3, "batch_size": 8}}


def fit(name: str, routine: str = "svi", **options: Any) -> Posterior:
    """A short fit of a registered model by a registered routine."""
    scenario = MODEL_SCENARIOS[name]
    return ROUTINES[routine](scenario.make(), scenario.data, **ROUTINE_SETTINGS[routine] | options)


def missing() -> set[str]:
    """Registered names without a scenario here."""
    return (MODELS.keys() - MODEL_SCENARIOS.keys()) | (ROUTINES.keys() - ROUTINE_SETTINGS.keys())
