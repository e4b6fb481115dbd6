r"""When has the bound of a fit levelled?

The steps are divided into windows, each half again as long as the last. The parameters are averaged over each window,
which removes most of the noise of the steps. At the end of a window, steps of size zero estimate the bound at its
average :math:`\bar\theta_k`, at the last window's, :math:`\bar\theta_{k-1}`, and at points ahead on the line through
both, on the same rows and with the same noise. The bound of the whole posterior, in nats, has levelled if

.. math:: \big| L(\bar\theta_k) - L(\bar\theta_{k-1}) \big| < m \quad\text{and}\quad
          L\big(\bar\theta_k + c (\bar\theta_k - \bar\theta_{k-1})\big) - L(\bar\theta_k) < m, \qquad c = 8, 64

at an error rate of 5 % each, at the ends of two windows in a row. A single window could be level by chance, where a
slow direction hides in the noise of the others. Without the points ahead, steps that are small beside the way that is
left would pass for level.

References:
    Dhaka, Catalina, Andersen, Magnusson, Huggins, Vehtari (2020), Robust, accurate stochastic optimization for
    variational inference.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepprob.engine.statistics import Change, paired_change
from deepprob.fitting.optimizers import FloatArray
from deepprob.posteriors.history import History
from deepprob.programs.instance import ProgramInstance

NATS_PER_NUMBER, LEAST_NATS = 0.01, 0.1
AHEAD = (8.0, 64.0)

_FIRST_WINDOW, _GROWTH, _SNAPSHOTS = 200, 1.5, 8
_FEWEST, _MOST = 32, 256  # steps of size zero at each point
_MORE = 4  # times as many, if they cannot tell

Groups = list[Tensor]
Bounds = Callable[[Sequence[Groups], int], FloatArray]
"""``bounds(points, count)``: the bound in nats per datum at ``count`` steps from each of some packed parameters, on the
same rows and with the same noise, shape ``(points, count)``."""


def margin(instance: ProgramInstance) -> float:
    """The smallest relevant change of the bound, in nats of the whole posterior.

    It is 0.01 nats for every latent number, at least 0.1 nats. An error of 0.01 nats in a normal is a seventh of an sd
    in its mean, or a tenth in its width. Latents of a row count for every row; without latents, trained numbers count.
    """
    found, rows = instance.structure, instance.num_data
    numbers = sum(found.sites[name].numbers * (rows if found.sites[name].local else 1) for name in found.latent)
    numbers = numbers or sum(p.numel() for p in instance.parameters().values())
    return max(LEAST_NATS, NATS_PER_NUMBER * numbers)


def warn_if_not_level(history: History, first: int, warm_up: int) -> None:
    """Warn that a fit without a fixed length has reached the end of its budget before its bound had levelled.

    Args:
        history: The record of the fit.
        first: The step at which the fit began.
        warm_up: Steps until every warm-up is over.
    """
    levels, steps = history.levels, len(history.steps["elbo"])
    if not levels or levels["step"][-1] <= first:
        text = (
            f"the fit ended after its budget of {steps} steps, and nothing tells whether its bound has levelled: the "
            f"first {warm_up} steps were a warm-up. Shorten the warm-up, or give the fit a length: epochs= or steps=."
        )
    elif levels["level"][-1]:
        return
    else:
        change, se, ahead, least = (levels[name][-1] for name in ("change", "se", "ahead", "margin"))
        moves = max(abs(change) - 2 * se, ahead) > least
        text = (
            f"the bound {'had not levelled' if moves else 'was too noisy to show that it levelled'} at the end of the "
            f"fit's budget of {steps} steps: it changed by {change:.3g} ± {se:.2g} nats over the last window (ahead: "
            f"{ahead:.3g}; margin {least:.3g}). Train on with dp.extend(posterior, data), standardize the data, or "
            "accept this by a fixed length: epochs= or steps= (--epochs)."
        )
    warnings.warn(text, UserWarning, stacklevel=4)


class Levelling:
    """The windows of a fit, and the test whether its bound has levelled.

    Args:
        margin: The smallest relevant change, in nats of the whole posterior; see `margin`.
        num_data: Number of rows, N.
        first: The step at which the first window begins: the end of every warm-up.
    """

    def __init__(self, margin: float, num_data: int, first: int = 0) -> None:
        self.margin, self.num_data = margin, num_data
        self.begins, self.ends = first, first + _FIRST_WINDOW
        self.count, self.was_level = 0, False
        self.sum: Groups = []
        self.before: Groups = []

    def next_stop(self, step: int) -> int:
        """The next step at which `visit` needs the parameters."""
        if step < self.begins:
            return self.begins
        length = self.ends - self.begins
        done = (step - self.begins) * _SNAPSHOTS // length
        return self.begins + -(-(done + 1) * length // _SNAPSHOTS)

    def visit(self, step: int, packed: Groups, bounds: Bounds) -> dict[str, float] | None:
        """Add the parameters after a step to the window's average; at the end of the window, compare.

        Args:
            step: Number of steps done.
            packed: The parameters.
            bounds: Estimates the bound.

        Returns:
            The comparison: step, change, standard error, largest rise ahead, margin, and whether the bound has
            levelled; None if there is nothing to compare yet.
        """
        if step <= self.begins or step != self.next_stop(step - 1):
            return None  # another part of the fit asked for this stop
        if [p.shape for p in packed] != [s.shape for s in self.sum]:  # the first ones, or parameters have joined
            self.sum, self.before, self.count = [torch.zeros_like(p) for p in packed], [], 0
        self.sum, self.count = [s + p for s, p in zip(self.sum, packed, strict=True)], self.count + 1
        if step < self.ends:
            return None
        mean = [s / self.count for s in self.sum]
        found = self._compare(step, mean, bounds) if self.before else None
        self.before, self.sum, self.count = mean, [torch.zeros_like(s) for s in self.sum], 0
        self.begins, self.ends = self.ends, round(self.ends + _GROWTH * (self.ends - self.begins))
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The averages, for a checkpoint."""
        groups = {"sum": self.sum, "before": self.before}
        return {f"{name}.{i}": x for name, group in groups.items() for i, x in enumerate(group)}

    def state(self) -> dict[str, Any]:
        """The rest of the state, as JSON."""
        return {"begins": self.begins, "ends": self.ends, "count": self.count, "was_level": self.was_level}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any], like: Groups) -> None:
        """Restore what `tensors` and `state` returned, for parameters like these."""
        self.begins, self.ends, self.count = state["begins"], state["ends"], state["count"]
        self.was_level = bool(state["was_level"])
        for name in ("sum", "before"):
            found = [tensors[f"{name}.{i}"].to(p.device) for i, p in enumerate(like) if f"{name}.{i}" in tensors]
            setattr(self, name, found)

    def _compare(self, step: int, mean: Groups, bounds: Bounds) -> dict[str, float]:
        count = min(max((self.ends - self.begins) // 16, _FEWEST), _MOST)
        pairs = list(zip(self.before, mean, strict=True))
        ahead = [[b + c * (b - a) for a, b in pairs] for c in AHEAD]
        before, now, *further = self.num_data * bounds([self.before, mean, *ahead], count)
        change = paired_change(before, now)
        if change.is_within(self.margin + change.half_width(0.05)) and not change.is_within(self.margin):
            before, now, *further = self.num_data * bounds([self.before, mean, *ahead], _MORE * count)
            change = paired_change(before, now)
        rises = [paired_change(now, x) for x in further]
        level = change.is_within(self.margin) and not any(_may_rise(r, self.margin) for r in rises)
        ends, self.was_level = level and self.was_level, level
        largest = np.nanmax([0.0, *(r.value for r in rises)])
        return {
            "step": step,
            "change": change.value,
            "se": change.se,
            "ahead": float(largest),
            "margin": self.margin,
            "level": float(ends),
        }


def _may_rise(change: Change, margin: float) -> bool:
    """Whether the bound may rise by more than the margin; where it is not finite, it does not."""
    return change.value + change.half_width(0.05) > margin
