"""Steps that are not finite: the error of a diverged fit, and the warning of a fit that skipped some."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepprob.posteriors.history import History
from deepprob.programs.finiteness import A_GRADIENT, first_bad_gradient, first_bad_site, run_on_all
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch

if TYPE_CHECKING:
    from deepprob.posteriors.posterior import Posterior


MOST_SKIPPED = 20  # steps in a row; after that the fit has diverged


class DivergenceError(RuntimeError):
    """Too many steps of a fit in a row had a loss or gradient that was not finite.

    Args:
        message: What became non-finite, where, and what to change.
        posterior: The last good posterior, or None if no step succeeded.
    """

    def __init__(self, message: str, posterior: Posterior | None = None) -> None:
        super().__init__(message)
        self.posterior = posterior


def runs_of_skipped(before: int, skipped: Sequence[float], most: int) -> list[int]:
    """How many steps in a row are skipped after each step, up to the first that is the last of ``most``.

    Examples:
        >>> runs_of_skipped(1, [1.0, 0.0, 1.0, 1.0, 1.0, 0.0], 3)
        [2, 0, 1, 2, 3]
    """
    runs: list[int] = []
    for bad in skipped:
        runs.append((runs[-1] if runs else before) + 1 if bad else 0)
        if runs[-1] == most:
            break
    return runs


def description_of_divergence(history: History, first: int, where: str, rate: float) -> str:
    """The message of a fit whose steps are skipped from step ``first`` on.

    Args:
        history: The record of the fit.
        first: Number of the first skipped step.
        where: The site that is not finite, see `place_of_divergence`.
        rate: The learning rate of that step.
    """
    value = history.steps["elbo"][first]
    if first == 0:
        now = "the gradient is not finite" if math.isfinite(value) else f"elbo is {value:g}"
        return description_at_start(now, where)
    problem = "the gradient stopped being finite" if math.isfinite(value) else f"elbo became {value:g}"
    best = f"epoch {history.best_epoch}" if history.best_epoch else "the start"
    return (
        f"{problem} at epoch {first // history.steps_per_epoch + 1}, step {first + 1} ({where}). "
        f"The best state so far ({best}) is kept. "
        f"Lower the learning rate, now {rate:g} (optimizer=dp.Optimizer(learning_rate={rate / 3:.1g}); in the command: "
        f"--learning-rate {rate / 3:.1g}), clip the gradient (clip_norm=10 of dp.Optimizer), or bound the scale."
    )


def description_at_start(problem: str, where: str) -> str:
    """The message of a fit that cannot take its first step, where a lower learning rate is of no help.

    Args:
        problem: What is not finite.
        where: The site, and what of it is not finite.
    """
    what = where.rpartition(": ")[2]
    remedy = "Standardize the data, or start elsewhere, by an AutoGuide with init_loc_fn="
    if "gradient" in what:
        remedy = "Look for a square root or a division at 0 there, also inside torch.where"
    elif "scale" in what:
        remedy = "Bound the scale away from 0"
    elif "outside" in what:
        remedy = "Change the values, or choose another distribution"
    return f"{problem} at the first step: {where}. {remedy}."


def place_of_divergence(instance: ProgramInstance, data: Batch) -> str:
    """Describe the first site of a running program that is not finite, or whose gradient is not.

    Args:
        instance: The program, at the parameters of the skipped steps.
        data: All rows.
    """
    program = instance.program
    run = run_on_all(program, program.prepare(*data), instance.num_data)
    where = first_bad_site(run)
    if where != A_GRADIENT:
        return where
    names = instance.constrained(trained=True)
    return first_bad_gradient(run, dict(zip(names, instance.parameters().values(), strict=True)))


def warn_of_skipped(history: History) -> None:
    """Warn at the end of a fit that steps were skipped, with their number."""
    flags = history.steps["skipped"]
    skipped = [step for step, bad in enumerate(flags, 1) if bad]
    if skipped:
        warnings.warn(
            f"{len(skipped)} of {len(flags)} steps were not finite and were skipped; the last was step {skipped[-1]}. "
            "All of them: posterior.history.steps['skipped'].",
            UserWarning,
            stacklevel=5,
        )
