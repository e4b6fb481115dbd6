r"""When has the bound of a fit levelled?

The steps are divided into windows, each half again as long as the last. The parameters are averaged over each window,
which removes most of the noise of the steps. At the end of a window, steps of size zero estimate the bound at its
average :math:`\bar\theta_k`, at the last window's, :math:`\bar\theta_{k-1}`, and at points ahead on the line through
both, on the same rows and with the same noise. The bound of the whole posterior, in nats, has levelled if

.. math:: \big| L(\bar\theta_k) - L(\bar\theta_{k-1}) \big| < m \quad\text{and}\quad
          L\big(\bar\theta_k + c (\bar\theta_k - \bar\theta_{k-1})\big) - L(\bar\theta_k) < m, \qquad c = 8, 64

at an error rate of 5 % each, at the ends of two windows in a row. A single window could be level by chance, where a
slow direction hides in the noise of the others. Without the points ahead, steps that are small beside the way that is
left would pass for level. Where noise hides whether the bound has levelled, four times as many steps estimate it.

If the constant rate of the budget ends before the bound has levelled, four windows of equal length follow the schedule,
and the last one tells how the fit ended. The points ahead then lie on the way since the last window of the constant
rate, since the steps themselves become small. The second half of a fit of a fixed length is divided in the same way.
At its end, the last window is compared with the first of the four, by a tenth as many steps as the fit has: a schedule
that falls hides from two windows near its end what longer steps would gain. Half of a fit may change the bound by twice
the margin: what is ahead is less than what this half has gained.

The state that the fit holds is compared, too. It lies below the average of the last window if the last steps are large.

References:
    Dhaka, Catalina, Andersen, Magnusson, Huggins, Vehtari (2020), Robust, accurate stochastic optimization for
    variational inference.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepprob.engine.statistics import Change, paired_change
from deepprob.fitting.optimizers import FloatArray
from deepprob.posteriors.history import History

AHEAD = (8.0, 64.0)

_FIRST_WINDOW, _GROWTH, _SNAPSHOTS = 200, 1.5, 8
_FEWEST, _MOST = 32, 256  # steps of size zero at each point
_MORE = 4  # times as many, if they cannot tell
_GROUPS = "sum", "before", "origin"
_STATE = "begins", "ends", "growth", "needed", "count", "in_a_row", "once"
_LAST_WINDOWS = 4  # of a fit that follows its schedule before its bound has levelled
_HALF = 2.0  # margins that half of a fit of a fixed length may change the bound by
_SHORTEST, _SHARE, _FEWEST_ONCE = 100, 40, 8  # steps of a fixed length: to compare, for one at each point; the fewest

Groups = list[Tensor]
Bounds = Callable[[Sequence[Groups], int], FloatArray]
"""``bounds(points, count)``: the bound in nats per datum at ``count`` steps from each of some packed parameters, on the
same rows and with the same noise, shape ``(points, count)``."""


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
        last = {name: values[-1] for name, values in levels.items()}
        numbers = (
            f"over the last window before step {last['step']:.0f} it changed by {last['change']:.3g} ± {last['se']:.2g}"
            f" nats (ahead: {last['ahead']:.3g} ± {last['ahead_se']:.2g}; margin {last['margin']:.3g})"
        )
        if max(abs(last["change"]) - 2 * last["se"], last["ahead"] - 2 * last["ahead_se"]) > last["margin"]:
            what = "had not levelled"
            remedy = "Train on with dp.extend(posterior, data), or try several starts: restarts=4"
        else:
            what = "was too noisy to show that it levelled"
            remedy = "Take larger batches (batch_size=), or train on with dp.extend(posterior, data)"
        text = (
            f"the bound {what} when the fit's budget of {steps} steps ended: {numbers}. {remedy}. A fixed length, "
            "epochs= or steps=, accepts this."
        )
    warnings.warn(text, UserWarning, stacklevel=4)


class Levelling:
    """The windows of a fit, and the test whether its bound has levelled.

    Args:
        margin: The smallest relevant change, in nats of the whole posterior; see `deepprob.posteriors.margin`.
        num_data: Number of rows, N.
        first: The step at which the first window begins: the end of every warm-up.
    """

    def __init__(self, margin: float, num_data: int, first: int = 0) -> None:
        self.margin, self.num_data = margin, num_data
        self.begins, self.ends, self.growth = first, first + _FIRST_WINDOW, _GROWTH
        self.needed = 2  # level windows in a row
        self.once = 0  # the only step at which to compare, of a fixed length
        self.count, self.in_a_row = 0, 0
        self.sum: Groups = []
        self.before: Groups = []
        self.origin: Groups = []  # in the place of the last window's average, for points ahead

    def to_the_end(self, step: int, end: int) -> None:
        """Go on with equal windows over the last steps of a fit."""
        self.begins, self.ends, self.growth = step, step + max(1, (end - step) // _LAST_WINDOWS), 1.0
        self.origin, self.before, self.sum = self.before, [], [torch.zeros_like(x) for x in self.sum]
        self.needed, self.count, self.in_a_row = 1, 0, 0

    def fixed(self, first: int, end: int) -> None:
        """Compare only once, at the end of a fit of a fixed length.

        Args:
            first: The step at which the fit begins, or its warm-up ends.
            end: Its last step.
        """
        if end - first >= _SHORTEST:
            self.to_the_end(end - (end - first) // 2 // _LAST_WINDOWS * _LAST_WINDOWS, end)
            self.once, self.margin = end, _HALF * self.margin
        else:
            self.begins = self.ends = end  # too short to tell

    def next_stop(self, step: int) -> int:
        """The next step at which `visit` needs the parameters."""
        if step < self.begins:
            return self.begins
        length = self.ends - self.begins
        done = (step - self.begins) * _SNAPSHOTS // length
        return self.begins + -(-(done + 1) * length // _SNAPSHOTS)

    def visit(self, step: int, packed: Groups, held: Groups, bounds: Bounds) -> dict[str, float] | None:
        """Add the parameters after a step to the window's average; at the end of the window, compare.

        Args:
            step: Number of steps done.
            packed: The parameters.
            held: Those that the posterior would hold: the same, or their average.
            bounds: Estimates the bound.

        Returns:
            The comparison, as ``History.levels`` describes it; None if there is nothing to compare yet.
        """
        if step <= self.begins or step != self.next_stop(step - 1):
            return None  # another part of the fit asked for this stop
        if [p.shape for p in packed] != [s.shape for s in self.sum]:  # the first ones, or parameters have joined
            self.sum, self.before, self.origin, self.count = [torch.zeros_like(p) for p in packed], [], [], 0
        self.sum, self.count = [s + p for s, p in zip(self.sum, packed, strict=True)], self.count + 1
        if step < self.ends:
            return None
        mean = [s / self.count for s in self.sum]
        found = self._compare(step, mean, held, bounds) if self.before and self.once in (0, step) else None
        if self.once and not self.origin:
            self.origin = mean
        self.before, self.sum, self.count = mean, [torch.zeros_like(s) for s in self.sum], 0
        self.begins, self.ends = self.ends, round(self.ends + self.growth * (self.ends - self.begins))
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The averages, for a checkpoint."""
        return {f"{name}.{i}": x for name in _GROUPS for i, x in enumerate(getattr(self, name))}

    def state(self) -> dict[str, Any]:
        """The rest of the state, as JSON."""
        return {name: getattr(self, name) for name in _STATE}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any], like: Groups) -> None:
        """Restore what `tensors` and `state` returned, for parameters like these."""
        for name in _STATE:
            setattr(self, name, state.get(name, getattr(self, name)))
        for name in _GROUPS:
            found = [tensors[f"{name}.{i}"].to(p.device) for i, p in enumerate(like) if f"{name}.{i}" in tensors]
            setattr(self, name, found)

    def _compare(self, step: int, mean: Groups, held: Groups, bounds: Bounds) -> dict[str, float]:
        pairs, window = list(zip(self.origin or self.before, mean, strict=True)), self.ends - self.begins
        points = [
            self.origin if self.once else self.before,
            mean,
            held,
            *([b + c * (b - a) for a, b in pairs] for c in AHEAD),
        ]

        def compared(count: int) -> tuple[Change, Change, Change]:
            before, now, last, *ahead = self.num_data * bounds(points, count)
            rises = [paired_change(now, x) for x in ahead]
            return paired_change(before, now), _largest(rises), paired_change(now, last)

        count = min(max(window // 16, _FEWEST), _MOST) if self.needed > 1 else _MOST
        if self.once:
            count = min(max(2 * _LAST_WINDOWS * window // _SHARE, _FEWEST_ONCE), _MOST)
        change, ahead, last = compared(count)
        if self._is_hidden(change, ahead):
            change, ahead, last = compared(_MORE * count if not self.once else min(_MORE * count, _MOST))
        level = change.is_within(self.margin) and not self._may_rise(ahead)
        self.in_a_row = self.in_a_row + 1 if level else 0
        return {
            "step": step,
            "change": change.value,
            "se": change.se,
            "ahead": max(0.0, float(np.nan_to_num(ahead.value))),
            "ahead_se": float(np.nan_to_num(ahead.se)),
            "held": last.value,
            "held_se": last.se,
            "margin": self.margin,
            "windows": float(self.in_a_row),
            "level": float(self.in_a_row >= self.needed),
        }

    def _is_hidden(self, change: Change, ahead: Change) -> bool:
        """Whether the bound may be level, and only noise keeps it from being seen."""
        level = change.is_within(self.margin) and not self._may_rise(ahead)
        return not (level or _rises(ahead, self.margin) or change.is_beyond(self.margin))

    def _may_rise(self, ahead: Change) -> bool:
        """Whether the bound may still rise ahead; over half of a fit, only where it surely does."""
        return _rises(ahead, self.margin) if self.once else _upper_end(ahead) > self.margin


def _largest(rises: Sequence[Change]) -> Change:
    """The largest rise ahead, up to the first point where the bound surely falls: numbers beyond it may overflow."""
    falls = [k for k, rise in enumerate(rises) if _upper_end(rise) < 0.0]
    return max(rises[: falls[0] + 1] if falls else rises, key=_upper_end)


def _rises(ahead: Change, margin: float) -> bool:
    """Whether the bound surely rises by more than a margin."""
    return ahead.value - ahead.half_width(0.05) > margin


def _upper_end(rise: Change) -> float:
    """The most that the bound may rise, at an error rate of 5 %; where it is not finite, it does not."""
    most = rise.value + rise.half_width(0.05)
    return most if math.isfinite(most) else -math.inf
