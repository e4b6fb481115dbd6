"""The log joint density as an objective, with noise in its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deepprob.fitting.elbo import ELBO
from deepprob.fitting.objectives import Terms
from deepprob.programs.run import Run


@dataclass(frozen=True)
class LogJoint:
    r"""Minus the log joint density of all rows, under an `AutoPoint`, whose noise its gradient has.

    .. math:: L(u) = -\log p(x, u), \qquad \text{with the gradient } \nabla L(u) + \sqrt{s - \hat V} \, \varepsilon

    The terms are those of `ELBO`, per datum, and ``elbo`` is the log joint density.
    """

    def __call__(self, run: Run, *, kl_weight: float | Tensor = 1.0) -> tuple[Tensor, Terms]:
        """The loss and the terms; see `Objective`."""
        loss, terms = ELBO(analytic_kl=False)(run, kl_weight=kl_weight)
        return run.num_data * loss + run.program.current_guide.noise(), terms

    def describe(self) -> dict[str, Any]:
        """The objective as JSON."""
        return {"name": "log_joint"}
