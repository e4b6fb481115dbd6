"""Small data for every registered model, and settings that make every registered routine short."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deepprob.inference import ROUTINES
from deepprob.models import MODELS
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program


@dataclass(frozen=True)
class Scenario:
    """A model's `example`, with a new program for every use.

    Attributes:
        model: The model.
        data: Its arguments, the observed ones included.
        inputs: How many of them `predict` needs.
    """

    model: Any
    data: tuple[Tensor, ...]
    inputs: int

    def make(self) -> Program:
        program: Program = self.model.example().program
        return program


def _scenario(model: Any) -> Scenario:
    example = model.example()
    return Scenario(model, example.data, example.inputs)


MODEL_SCENARIOS = {name: _scenario(model) for name, model in MODELS.items()}

ROUTINE_SETTINGS: dict[str, dict[str, Any]] = {
    name: importlib.import_module(routine.__module__).QUICK for name, routine in ROUTINES.items()
}


def fit(name: str, routine: str = "svi", **options: Any) -> Posterior:
    """A short fit of a registered model by a registered routine."""
    scenario = MODEL_SCENARIOS[name]
    return ROUTINES[routine](scenario.make(), scenario.data, **ROUTINE_SETTINGS[routine] | options)
