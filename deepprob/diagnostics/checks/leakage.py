"""Do held-out data share rows with the training data?"""

from __future__ import annotations

import numpy as np

from deepprob.diagnostics.check import Check, Verdict
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.diagnostics.overlap import LEVEL, Overlap

NAME = "data leakage"


def check_leakage(overlap: Overlap) -> Check:
    """The share of held-out rows that are training rows.

    In tables of few distinct rows, new rows have twins among the training rows by chance, as training rows have among
    each other.

    Args:
        overlap: The rows that the data share with the training data.

    Returns:
        The share; a caution if it is significantly above that of training rows with a twin, at a level of 0.001.

    Examples:
        >>> rows = np.arange(100) < 30
        >>> check_leakage(Overlap("mixed", rows, matches=30, kept=500, twins=2, p=1e-9)).verdict
        'caution'
    """
    rows, count = len(overlap.shared), overlap.matches
    share, twins = count / rows, overlap.twins / overlap.kept
    verdict: Verdict = "caution" if overlap.p <= LEVEL else "pass"
    leaked = (
        f"{count} of {rows} rows were in the fit ({share:.0%}; by chance about {twins:.0%}): scores of these data are "
        "too good."
    )
    return Check(
        name=NAME,
        value=share,
        se=float(np.sqrt(share * (1 - share) / rows)) if count else None,
        threshold=twins,
        verdict=verdict,
        reading=leaked
        if verdict != "pass"
        else f"{count} of {rows} rows are like a row of the fit" + (", as many as by chance." if count else "."),
        next_step="" if verdict == "pass" else "Leave out the rows of the fit, and judge the others.",
        details={"rows": rows, "shared": count, "training_rows": overlap.kept, "twins": overlap.twins, "p": overlap.p},
    )


data_leakage = Diagnostic(
    NAME,
    "Do held-out data share rows with the training data?",
    lambda case: case.overlap.relation in ("part", "mixed", "held-out"),
    lambda case, level: check_leakage(case.overlap),
    about="data",
)
