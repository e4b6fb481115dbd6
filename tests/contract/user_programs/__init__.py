"""Programs as users write them, by kind: at least five of each, in forms that textbooks and tutorials use.

A program is made at given sizes, so that the tests can make rows, groups and draws differ, and make them equal. To add
one, write a function in the module of its kind, which returns a `UserProgram`, under ``@kind("...")``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from deepprob.fitting.objectives import ELBO, Objective
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

SAMPLED = ELBO(analytic_kl=False)  # averages log q - log p, as Trace_ELBO does


@dataclass(frozen=True)
class Sizes:
    """Numbers of rows, of groups (or classes, features, series), and of draws in a query."""

    rows: int
    groups: int
    draws: int


DIFFERENT = Sizes(rows=11, groups=3, draws=7)
EQUAL = Sizes(rows=4, groups=4, draws=4)
LARGE = Sizes(rows=60, groups=3, draws=400)  # for answers in closed form


@dataclass
class UserProgram:
    """A program, its call, and what the tests may expect of it.

    Attributes:
        model: A Pyro model, written for Pyro alone.
        guide: A callable, an AutoGuide class, or a name.
        args: Positional arguments of the model, as Pyro's ``SVI.step`` takes them.
        kwargs: Keyword arguments of the model.
        rows: Number of columns of the log-likelihood; None if its rows are ambiguous, and queries by row say so.
        observed: The observed sites.
        pyro: Makes Pyro's objective.
        objective: Our objective, which has the same value with the same noise.
        data_plate: Name of the data plate, if the program names one.
        missing: ``missing`` of `Program.of`.
        stored: Parameters that Pyro's store holds before the fit: value and constraint by name.
        eager: Why the program cannot be traced; empty if it can.
        refused: The message of a program that is refused before its first step; empty if it is fitted.
        answer: Compares a posterior of ``steps`` steps with a closed form.
        steps: Steps of the fit that `answer` looks at.
        learning_rate: Its learning rate.
    """

    model: Callable[..., Any]
    guide: Any = "normal"
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None
    observed: tuple[str, ...] = ("y",)
    pyro: Callable[[], Any] = Trace_ELBO
    objective: Objective = SAMPLED
    data_plate: str | None = None
    missing: str | None = None
    stored: dict[str, tuple[Tensor, Any]] = field(default_factory=dict)
    eager: str = ""
    refused: str = ""
    answer: Callable[[Posterior], None] | None = None
    steps: int = 1000
    learning_rate: float = 0.03

    def program(self) -> Program:
        """The program in deepprob's words."""
        options = {} if self.missing is None else {"missing": self.missing}
        return Program.of(self.model, self.guide, data_plate=self.data_plate, **options)

    @property
    def data(self) -> Any:
        """The call in the form that every verb takes."""
        if self.kwargs and self.args:
            raise ValueError("give all arguments by name, or all by position")
        return self.kwargs or self.args or None


Make = Callable[[Sizes], UserProgram]
PROGRAMS: dict[str, tuple[str, Make]] = {}


def kind(name: str) -> Callable[[Make], Make]:
    """Register a program of a kind."""

    def add(make: Make) -> Make:
        key = make.__name__.replace("_", "-")
        assert key not in PROGRAMS, f"two programs are called {key}"
        PROGRAMS[key] = name, make
        return make

    return add


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers that are the same in every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
