"""Objectives, which routines maximize by gradient steps, and their registry."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from deepprob.errors import unknown
from deepprob.fitting.elbo import ELBO
from deepprob.fitting.importance_weighted import IWAE
from deepprob.programs.run import Run

__all__ = ["ELBO", "IWAE", "OBJECTIVES", "Objective", "Terms", "objective_named"]

Terms = dict[str, Tensor]
"""Named parts of an objective: detached scalars, in nats per datum; ``elbo`` is always among them."""


class Objective(Protocol):
    """A lower bound on the log evidence per datum, as a loss to minimize.

    An objective with the attribute ``layers``, the precision in which linear and convolutional layers multiply (see
    `ELBO`), must be a dataclass, so that a compiled fit can be compared with one in float32. Compiled fits trace the
    call: an objective that reads a value from the device (``.item()``, ``if tensor:``) is fitted eagerly.
    """

    def __call__(self, run: Run, *, kl_weight: float | Tensor = 1.0) -> tuple[Tensor, Terms]:
        """The loss and the terms, both per datum.

        Args:
            run: The program and its batch. The objective chooses the number of draws.
            kl_weight: Weight of ``log q - log p`` of latents in the loss, for warm-ups; the terms are unweighted.

        Returns:
            A scalar to minimize, and detached scalars by name, among them ``elbo``, an estimate of the evidence lower
            bound. A fit records all of them.
        """

    def describe(self) -> dict[str, Any]:
        """Name and settings as JSON, for a posterior's ``config``."""


OBJECTIVES: dict[str, Objective] = {"elbo": ELBO(), "iwae": IWAE()}


def objective_named(objective: str | Objective) -> Objective:
    """Look up an objective by its name; an objective is returned unchanged.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If the value is neither a name nor an objective.
    """
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            raise unknown("objective", objective, OBJECTIVES)
        return OBJECTIVES[objective]
    if isinstance(objective, type):
        name = objective.__name__
        raise TypeError(f"objective must be a name or an object; got the class {name}. Write {name}().")
    if not callable(objective) or not callable(getattr(objective, "describe", None)):
        raise TypeError(
            f"objective must be a name ({', '.join(OBJECTIVES)}) or a callable with a method describe, such as "
            f"ELBO(particles=4); got {type(objective).__name__}."
        )
    return objective
