"""Are rows of the fit copies of others?"""

from __future__ import annotations

import numpy as np

from deepprob.diagnostics.check import Check, Verdict
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.diagnostics.overlap import LEVEL, Overlap

NAME = "repeated rows"


def check_repeats(overlap: Overlap) -> Check:
    """The share of training rows that have a twin among them, against the share of held-out rows that have one.

    In tables of few distinct rows both shares are alike. If training rows have twins where new rows have none, rows of
    the fit are copies: the posterior counts each copy as a measurement of its own, and is too narrow.

    Args:
        overlap: The rows that held-out data share with the training data, some of which have a twin.

    Returns:
        The share of training rows with a twin; a caution if it is significantly above that of the held-out rows, at a
        level of 0.001, and a fail if it is so and above a half.

    Examples:
        >>> new = np.zeros(60, dtype=bool)
        >>> check_repeats(Overlap("held-out", new, matches=0, kept=240, twins=240, p_fewer=1e-9)).verdict
        'fail'
    """
    share, rows = overlap.twins / overlap.kept, len(overlap.shared)
    verdict: Verdict = "pass" if overlap.p_fewer > LEVEL else "fail" if share > 0.5 else "caution"
    reading = (
        f"{share:.0%} of the rows of the fit have a twin among them, and {overlap.matches} of {rows} held-out rows"
    )
    return Check(
        name=NAME,
        value=share,
        se=float(np.sqrt(share * (1 - share) / overlap.kept)),
        threshold=None,
        verdict=verdict,
        reading=f"{reading}."
        if verdict == "pass"
        else f"{reading}: rows of the fit are copies of others, and each copy counts as a measurement of its own.",
        next_step="" if verdict == "pass" else "Remove the copies from the training data, and fit again.",
        details={"twins": overlap.twins, "training_rows": overlap.kept, "p": overlap.p_fewer},
    )


repeated_rows = Diagnostic(
    NAME,
    "Are rows of the fit copies of others?",
    lambda case: case.overlap.relation == "held-out" and case.overlap.twins > 0,
    lambda case, level: check_repeats(case.overlap),
    about="posterior",  # each copy makes it narrower
)
