"""Were all optimisation steps applied?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from deepprob.diagnostics.case import Case, Diagnostic
from deepprob.diagnostics.check import Check, Verdict, array

LIMIT = 0.01


def applied_steps(skipped: ArrayLike) -> Check:
    """The share of steps that were skipped because their loss or gradient was not finite.

    Args:
        skipped: One flag per step.

    Examples:
        >>> applied_steps([0, 0, 0, 1]).verdict
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
        reading = f"{count} of {steps} steps were not finite and were not applied, the last of them step {last}."
    return Check(
        name="finite steps",
        value=share,
        se=None,
        threshold=LIMIT,
        verdict=verdict,
        reading=reading,
        next_step="" if verdict == "pass" else "Lower the learning rate, clip the gradient, or bound the scales.",
        details={"skipped": count, "steps": steps},
    )


def _run(case: Case, level: float) -> Check:
    return applied_steps(case.posterior.history.steps["skipped"])


def _applies(case: Case) -> bool:
    return len(case.posterior.history.steps.get("skipped", ())) > 0


finite_steps = Diagnostic("finite steps", "Were all optimisation steps applied?", _applies, _run)
