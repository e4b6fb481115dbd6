"""`Diagnostic`, one question about a `Case`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import About, Check
from deepprob.diagnostics.finite import REMEDY, NotFinite


@dataclass(frozen=True)
class Diagnostic:
    """One question about a `Case`.

    Args:
        name: The name of its check in a report.
        question: The question, in one sentence.
        applies: Whether the question makes sense for a case.
        about: The claim that the check supports: that the ``"fit"`` succeeded, that the ``"posterior"`` is right, that
            the ``"predictions"`` are, or that the ``"data"`` are a fair test of them.
        run: Answers the question at a given false-alarm level; the level holds if the posterior is exact. Values that
            are not finite are a fail, see `answer`.
        tests: Whether the answer is a statistical test and uses up part of the level; the false alarms of
            fixed thresholds are negligible.
        by_site: Whether the question is asked about every observed site.
    """

    name: str
    question: str
    applies: Callable[[Case], bool]
    run: Callable[[Case, float], Check]
    about: About = field(kw_only=True)
    tests: bool = False
    by_site: bool = False

    def answer(self, case: Case, level: float) -> Check:
        """The check at a false-alarm level; a fail that names the rows if some of their values are not finite."""
        try:
            found = self.run(case, level)
        except NotFinite as error:
            details = {"rows": error.rows}
            return Check(self.name, math.nan, None, None, "fail", str(error), REMEDY, details)
        if found.verdict == "pass" and math.isnan(found.value):
            return replace(
                found, verdict="fail", reading=f"The value is not a number. {found.reading}", next_step=REMEDY
            )
        return found
