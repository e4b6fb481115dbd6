"""Training on from the last step of a finished fit, from what its posterior has kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch

from deepprob.errors import shown
from deepprob.fitting.objectives import OBJECTIVES, Objective, description, objective_named
from deepprob.fitting.optimizers import Optimizer, optimizer_named
from deepprob.fitting.snapshots import Resumable, from_parts, parts, restore_state, snapshot
from deepprob.posteriors.posterior import Posterior
from deepprob.posteriors.saving import Training
from deepprob.programs.program import Program
from deepprob.programs.relative_guides import RelativeGuide

_LEFT_OUT = ("history.", "best.", "averages.")  # the posterior has the first two; new windows begin anew


def training_after(fit: Resumable) -> Training:
    """What a fit's next steps depend on, beyond the parameters and the record that its posterior will hold."""
    tensors, facts = parts(snapshot(fit))
    held = fit.best.tensors
    found = {
        name: x.clone()
        for name, x in tensors.items()
        if not name.startswith(_LEFT_OUT) and not _is_held(name.removeprefix("state."), x, held)
    }
    return Training(found, facts)


def _is_held(name: str, x: torch.Tensor, held: Mapping[str, torch.Tensor]) -> bool:
    return name in held and torch.equal(x, held[name])


def training_of(posterior: Posterior) -> Training:
    """What a posterior has kept of its fit.

    Raises:
        TypeError: If it is not a posterior.
        ValueError: If its fit cannot go on.
    """
    if not isinstance(posterior, Posterior):
        raise TypeError(f"extend expects a Posterior; got {type(posterior).__name__}. Fit one: svi(program, data).")
    routine = posterior.config.get("routine")
    if posterior.training is not None and routine == "svi":
        return posterior.training
    remedy = "Fit again for longer: raise epochs= or steps="
    reason = "it ended in a step that was cut off or not finite, or an earlier version of deepprob saved it"
    if posterior.kind == "draws":
        reason = "it holds draws that no routine of deepprob made"
    elif routine != "svi":
        reason = f"only fits by svi can be, and this one is by {routine}"
    elif posterior.instance.unsaved:
        reason = "a later run than the first made a network of the program"
    elif posterior.config.get("guide") == "laplace":
        reason = "guide='laplace' has turned the mode into a Gaussian at the end of the fit"
    elif not posterior.history.steps:
        reason = "it is from a loop by hand, which does not keep the optimizer"
        remedy = "Take more steps, step(state), before state.posterior(), or fit with svi"
    raise ValueError(f"this posterior cannot be extended: {reason}. {remedy}.")


def optimizer_after(posterior: Posterior, given: Any) -> Optimizer:
    """The optimizer of a fit, or another one that continues with its memory.

    Raises:
        ValueError: If the given optimizer keeps another memory, or the fit's own cannot be built from its description.
    """
    was = posterior.config["optimizer"]
    if given is None:
        try:
            return Optimizer.described(was)
        except ValueError as error:
            raise ValueError(
                f"the optimizer of this fit cannot be built from its description ({error}). Give it: "
                "extend(..., optimizer=...)."
            ) from error
    found = optimizer_named(given)
    now = found.describe()
    for name in ("name", "accumulate", "options"):
        if now[name] != was[name]:
            raise ValueError(
                f"the optimizer's {name} must be that of the fit, {was[name]!r}, whose memory it continues; got "
                f"{now[name]!r}. Change the learning rate or the schedule only, or fit anew."
            )
    if (now["average"] is None) != (was["average"] is None):
        raise ValueError(
            f"the optimizer's average must be that of the fit, {was['average']}, which it continues; got "
            f"{now['average']}. Change the learning rate or the schedule only, or fit anew."
        )
    return found


def objective_after(posterior: Posterior, given: Any) -> Objective:
    """The objective of a fit, or another one.

    Raises:
        ValueError: If the fit had an objective of the user and none is given.
    """
    if given is not None:
        return objective_named(given)
    settings = dict(posterior.config["objective"])
    own = OBJECTIVES.get(settings.pop("name", None))
    made: Objective | None = None if own is None else type(own)(**settings)
    if made is None or not posterior.config["objective"].items() <= description(made).items():
        raise ValueError(
            f"the objective of this fit, {shown(posterior.config['objective'])}, is not one of deepprob's. Give it: "
            "extend(..., objective=...)."
        )
    return made


def start_as(own: Program, fitted: Program) -> None:
    """Let the guide of a program that is to continue a fit be relative to the Gaussian where that fit started."""
    for mine, other in zip(own.modules(), fitted.modules(), strict=False):
        if isinstance(mine, RelativeGuide) and isinstance(other, RelativeGuide):
            mine.relate_as(other)


def continue_from(fit: Resumable, training: Training, posterior: Posterior) -> None:
    """Continue a fit, before its first step, where a posterior's fit ended.

    Raises:
        ValueError: If the data are not those of the fit.
    """
    was, now = training.facts["fit"], fit.identity()
    if any(now[name] != was.get(name, now[name]) for name in ("num_data", "data", "row_weights")):
        raise ValueError(
            f"extend needs the data of the fit ({was['num_data']} rows); got other values or weights "
            f"({now['num_data']} rows). Give the same data. To fit others from these weights, write "
            "svi(posterior.program, data, weights='keep')."
        )
    history = copy.deepcopy(posterior.history)
    held = posterior.instance.tensors()
    tensors = {f"state.{n}": x for n, x in held.items()} | dict(training.tensors)
    tensors |= {f"best.{n}": x.clone() for n, x in held.items()}
    tensors |= {f"history.{n}": x for n, x in history.to_tensors().items()}
    restore_state(fit, from_parts(tensors, {**training.facts, "history": history.facts()}))
    if not fit.course.holds:
        fit.history.levels = {}  # comparisons of the earlier fit say nothing of this one
    if any(now[name] != was.get(name) for name in ("held_out", "objective")):
        fit.best.value = -math.inf  # a score of other rows, or of another objective, cannot be compared
    if fit.epoch * history.steps_per_epoch > fit.step:  # the last epoch was cut short; it goes on
        fit.epoch -= 1
        fit.history.epochs = {name: values[:-1] for name, values in fit.history.epochs.items()}
