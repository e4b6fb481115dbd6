"""Did every optimization step have a finite loss and gradient?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Check, Verdict, array
from deepprob.diagnostics.diagnostic import Diagnostic

LIMIT = 0.01
NAME = "finite steps"


def check_steps(skipped: ArrayLike) -> Check:
    """The share of steps that were skipped because of a non-finite loss or gradient.

    Args:
        skipped: Whether each step was skipped.

    Examples:
        >>> check_steps([0, 0, 0, 1]).verdict
        'fail'
    """
    flags = array(skipped) > 0
    count, steps = int(flags.sum()), flags.size
    share = count / steps if steps else 0.0
    verdict: Verdict = "pass" if share <= LIMIT else "caution" if share <= 10 * LIMIT else "fail"
    if not count:
        reading = f"All {steps} steps were finite."
    else:
        last = int(np.flatnonzero(flags)[-1]) + 1
        reading = f"{count} of {steps} steps were not finite and were skipped; the last was step {last}."
    return Check(
        name=NAME,
        value=share,
        se=None,
        threshold=LIMIT,
        verdict=verdict,
        reading=reading,
        next_step="" if verdict == "pass" else "Lower the learning rate, clip the gradient, or bound the scales.",
        details={"skipped": count, "steps": steps},
    )


def _run(case: Case, level: float) -> Check:
    return check_steps(case.posterior.history.steps["skipped"])


def _applies(case: Case) -> bool:
    return len(case.posterior.history.steps.get("skipped", ())) > 0


finite_steps = Diagnostic(
    NAME, "Did every optimization step have a finite loss and gradient?", _applies, _run, about="fit"
)
