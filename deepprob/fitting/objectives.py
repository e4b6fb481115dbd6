"""Objectives, which routines maximize by gradient steps, and their registry."""

from __future__ import annotations

import inspect
import json
import warnings
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from deepprob.engine.machine import multiplies_bfloat16
from deepprob.engine.random import RandomStream
from deepprob.engine.trace import restore
from deepprob.errors import shown, unknown
from deepprob.fitting.disentangling import Beta, TotalCorrelation
from deepprob.fitting.elbo import ELBO
from deepprob.fitting.importance_weighted import IWAE, WeightedBound
from deepprob.fitting.particles import check_precision
from deepprob.fitting.weighted_bounds import MIWAE, VIMCO, Renyi, WakeSleep
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch
from deepprob.programs.run import Run
from deepprob.programs.tracing import tensors_of

__all__ = [
    "ELBO",
    "IWAE",
    "MIWAE",
    "OBJECTIVES",
    "VIMCO",
    "Beta",
    "Objective",
    "Renyi",
    "Terms",
    "TotalCorrelation",
    "WakeSleep",
    "check_objective",
    "description",
    "objective_named",
    "objective_on",
]

Terms = dict[str, Tensor]
"""Named parts of an objective: detached scalars, in nats per datum; ``elbo`` is always among them."""


class Objective(Protocol):
    """A lower bound on the log evidence per datum, as a loss to minimize.

    An objective with the attribute ``layers``, the precision in which linear and convolutional layers multiply (see
    `ELBO`), must be a dataclass, so that a compiled fit can be compared with one in float32. Compiled fits trace the
    call: an objective that reads a value from the device (``.item()``, ``if tensor:``) is fitted eagerly. A fit calls a
    user's objective once before the first step, to check its results.
    """

    def __call__(self, run: Run, *, kl_weight: float | Tensor = 1.0) -> tuple[Tensor, Terms]:
        """The loss and the terms, both per datum.

        Args:
            run: The program and its batch. The objective chooses the number of draws.
            kl_weight: Weight of ``log q - log p`` of latents in the loss, for warm-ups; the terms are unweighted.

        Returns:
            A scalar to minimize, and detached scalars by name, among them ``elbo``, an estimate of the evidence lower
            bound. A fit records all of them, beside its own ``gradient_norm`` and ``skipped``.
        """

    def describe(self) -> dict[str, Any]:
        """Name and settings as JSON, for a posterior's ``config``."""


_RECORDED = ("gradient_norm", "skipped")  # a step adds these to the terms

OBJECTIVES: dict[str, Objective] = {
    "elbo": ELBO(),
    "stl": ELBO(gradient="stl"),
    "iwae": IWAE(),
    "dreg": IWAE(gradient="dreg"),
    "miwae": MIWAE(),
    "renyi": Renyi(),
    "vimco": VIMCO(),
    "wake_sleep": WakeSleep(),
    "beta": Beta(),
    "total_correlation": TotalCorrelation(),
}


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


def objective_on(objective: Objective, device: torch.device) -> Objective:
    """An objective with layers in float32 where the device has no instructions for bfloat16, which a warning says.

    Args:
        objective: The objective.
        device: The device of the fit.

    Raises:
        ValueError: If the precision of layers is unknown.
        TypeError: If an objective with ``layers`` is not a dataclass.
    """
    _check_layers(objective, type(objective).__name__)
    if getattr(objective, "layers", "float32") == "float32" or multiplies_bfloat16(device):
        return objective
    warnings.warn(
        f"layers multiply in float32: {device} has no instructions for bfloat16, and would take several times as long. "
        "Leave layers='bfloat16' out.",
        UserWarning,
        stacklevel=3,
    )
    return cast(Objective, replace(cast(Any, objective), layers="float32"))


def description(objective: Objective) -> dict[str, Any]:
    """Name and settings of an objective, converted to JSON.

    Raises:
        TypeError: If its ``describe`` does not return a dict that can be written as JSON.
    """
    name, found = type(objective).__name__, objective.describe()
    if not isinstance(found, dict):
        raise TypeError(f"{name}.describe() must return a dict; got {shown(found)}. Return {{'name': {name!r}}}.")
    try:
        converted: dict[str, Any] = json.loads(json.dumps(found))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name}.describe() must return a dict that can be written as JSON; got {shown(found)} ({error}). "
            "Convert numbers by float(...) or int(...), and arrays by .tolist()."
        ) from error
    return converted


def check_objective(objective: Objective, instance: ProgramInstance, batch: Batch) -> None:
    """Call a user's objective once, and check its results; the program's tensors are restored.

    The package's own objectives are not called.

    Args:
        objective: The objective.
        instance: The program to fit.
        batch: The first rows of the data, on the device.

    Raises:
        TypeError: If the objective cannot be called as a fit calls it, or returns other types than it must.
        ValueError: If the loss or a term has the wrong shape or name, the loss has no gradient, or ``elbo`` is missing.
    """
    if isinstance(objective, WeightedBound) and instance.program.has_baselines:
        warnings.warn(
            f"objective {objective.name!r} does not use the baselines of score-function sites, because the other "
            "particles are the baseline of each. Use objective='elbo' for your own.",
            UserWarning,
            stacklevel=3,
        )
    if type(objective) in {type(own) for own in OBJECTIVES.values()}:
        return
    name = type(objective).__name__
    try:
        inspect.signature(objective).bind(None, kl_weight=1.0)
    except TypeError as error:
        raise TypeError(
            f"{name} must be callable as objective(run, kl_weight=1.0), but {error}. "
            f"Write def __call__(self, run, *, kl_weight=1.0)."
        ) from error
    tensors = tensors_of(instance)
    before = [x.clone() for x in tensors]
    rows = torch.arange(len(batch[0]) if batch else instance.num_data, device=instance.device)
    instance.program.train()
    try:
        with instance.running(), RandomStream(0, instance.device).drawing():
            prepared = instance.program.prepare(*batch)
            run = Run(instance.program, prepared, rows, instance.num_data, plates=instance.structure.plates)
            result: Any = objective(run, kl_weight=1.0)
    finally:
        restore(tensors, before)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise TypeError(
            f"{name} must return the loss and a dict of terms; got {shown(result)}. "
            "Write return loss, {'elbo': elbo.detach()}."
        )
    _check_loss(name, result[0])
    _check_terms(name, result[1])


def _check_layers(objective: Any, name: str) -> None:
    """Raise unless an objective with ``layers`` can be copied with another precision."""
    if not hasattr(objective, "layers"):
        return
    check_precision(objective.layers)
    try:
        replace(objective, layers="float32")
    except TypeError as error:
        raise TypeError(
            f"{name} has an attribute layers, the precision of layers, so it must be a dataclass with a field of this "
            f"name. Decorate the class with @dataclass, or rename the attribute."
        ) from error


def _check_loss(name: str, loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss of {name} must be a tensor; got {shown(loss)}. Return it without .item().")
    if loss.shape != ():
        raise ValueError(
            f"the loss of {name} must be one number, of shape (); got shape {tuple(loss.shape)}. Take its mean or sum."
        )
    if not loss.requires_grad:
        raise ValueError(f"the loss of {name} has no gradient, so nothing would train. Return it without .detach().")


def _check_terms(name: str, terms: dict[Any, Any]) -> None:
    if "elbo" not in terms:
        raise ValueError(
            f"the terms of {name} must include 'elbo', an estimate of the evidence lower bound per datum; got "
            f"{', '.join(map(str, terms)) or 'no term'}. Add it."
        )
    for term, value in terms.items():
        if term in _RECORDED:
            raise ValueError(f"{name} has a term named {term!r}, a name that every fit records itself. Rename it.")
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the term {term!r} of {name} must be a tensor; got {shown(value)}. Write torch.tensor(...)."
            )
        if value.shape != ():
            raise ValueError(
                f"the term {term!r} of {name} must be one number, of shape (); got shape {tuple(value.shape)}. "
                "Take its mean or sum."
            )
