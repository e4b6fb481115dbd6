"""Are rows of the fit copies of others?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Check, Verdict
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.diagnostics.overlap import LEVEL, Overlap

NAME = "repeated rows"
_COPIES = "rows of the fit are copies of others, and each copy counts as a measurement of its own."
_REMOVE = "Remove the copies from the training data, and fit again."
_FEW = 0.05  # of the rows of a table of measurements: now and then a row is entered twice
_OWN, _LEAST = 0.9, 10  # share of distinct rows with a value of their own, in a column of measurements; distinct rows


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
        reading=f"{reading}." if verdict == "pass" else f"{reading}: {_COPIES}",
        next_step="" if verdict == "pass" else _REMOVE,
        details={"twins": overlap.twins, "training_rows": overlap.kept, "p": overlap.p_fewer},
    )


def check_copies(twins: int, kept: int) -> Check:
    """The share of training rows that have a twin among them, where a column of measurements tells all others apart.

    Args:
        twins: How many rows have a twin.
        kept: How many rows there are.

    Returns:
        The share; a caution above 5 %, a fail above a half.

    Examples:
        >>> [check_copies(twins, 100).verdict for twins in (2, 20, 100)]
        ['pass', 'caution', 'fail']
    """
    share = twins / kept
    verdict: Verdict = "fail" if share > 0.5 else "caution" if share > _FEW else "pass"
    reading = f"{share:.0%} of the rows of the fit have a twin among them, though all others differ in a measurement"
    return Check(
        name=NAME,
        value=share,
        se=None,
        threshold=_FEW,
        verdict=verdict,
        reading=f"{reading}." if verdict == "pass" else f"{reading}: {_COPIES}",
        next_step="" if verdict == "pass" else _REMOVE,
        details={"twins": twins, "training_rows": kept},
        unit="of rows",
    )


def has_measurements(batch: Sequence[Tensor]) -> bool:
    """Whether a column of real numbers has another value in nearly every distinct row.

    Examples:
        >>> readings, grades = torch.randn(40, 1), torch.arange(40.0)[:, None] % 5
        >>> [has_measurements([x.repeat(3, 1)]) for x in (readings, grades, torch.cat([readings, grades], 1))]
        [True, False, True]
    """
    tables = [x.reshape(len(x), -1) for x in batch]
    distinct = len(torch.unique(torch.cat([x.double() for x in tables], 1), dim=0))
    columns = [column for x in tables if x.is_floating_point() for column in x.T if not column.equal(column.round())]
    return distinct >= _LEAST and any(len(column.unique()) >= _OWN * distinct for column in columns)


def _applies(case: Case) -> bool:
    found = case.overlap
    if not found.twins or found.relation not in ("held-out", "training"):
        return False
    return found.relation == "held-out" or has_measurements(case.batch)


def _run(case: Case, level: float) -> Check:
    found = case.overlap
    return check_repeats(found) if found.relation == "held-out" else check_copies(found.twins, found.kept)


repeated_rows = Diagnostic(
    NAME,
    "Are rows of the fit copies of others?",
    _applies,
    _run,
    about="posterior",  # each copy makes it narrower
)
