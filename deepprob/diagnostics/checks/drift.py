"""Do the inputs come from the distribution of the training inputs? (Drift, covariate shift)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from deepprob.data.column_encoding import ColumnEncoding
from deepprob.data.table_rows import column_values
from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Array, Check, Verdict, array
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.posteriors.training_rows import Summary, columns_of

NAME = "drift of inputs"
_CAUTION, _FAIL = 0.1, 0.5


@dataclass(frozen=True)
class Shift:
    """The point at which a column's distribution differs most from that of the training rows.

    Attributes:
        column: The column's name.
        point: A quantile of the training rows, a text if the column's own values are no numbers.
        share: The share of given rows up to it.
        expected: The share of training rows up to it.
        p: The p-value of the largest difference, for this column alone.
    """

    column: str
    point: float | str
    share: float
    expected: float
    p: float

    @property
    def distance(self) -> float:
        """The difference of the two shares, a Kolmogorov-Smirnov distance."""
        return abs(self.share - self.expected)


def shifts(name: str, values: ArrayLike, summary: Summary, names: Sequence[str] = ()) -> list[Shift]:
    r"""The largest difference between the distribution functions of given rows and training rows, by column.

    .. math:: P(\sup |F_n - F_N| > d) \le 2 \exp(-2 d^2 n N / (n + N))

    Args:
        name: The input's name.
        values: Its columns, shape ``(rows, C)``.
        summary: The summary of the training rows.
        names: The names of the columns, if they have names.

    References:
        Massart (1990), The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality.
    """
    found, columns = [], array(values)
    for i, (points, shares) in enumerate(zip(summary.points, summary.shares, strict=True)):
        given: Array = columns[np.isfinite(columns[:, i]), i]
        if not len(given) or not np.isfinite(points).all():
            continue
        own = np.searchsorted(np.sort(given), points, side="right") / len(given)
        at = int(np.abs(own - shares).argmax())
        count = len(given) * summary.count / (len(given) + summary.count)
        p = min(1.0, 2 * float(np.exp(-2 * count * (own[at] - shares[at]) ** 2)))
        label = f"{name}[{i}]" if len(summary.points) > 1 else name
        label = names[i] if len(names) == len(summary.points) else label
        found.append(Shift(label, float(points[at]), float(own[at]), float(shares[at]), p))
    return found


def check_drift(found: Sequence[Shift], *, level: float = 0.05) -> Check:
    """Whether some input differs from the training inputs.

    Args:
        found: The shift of every column.
        level: The false-alarm rate for inputs from the distribution of the training inputs, over all columns.

    Returns:
        The largest distance of distribution functions; if it is significant, a caution above 0.1 and a fail above 0.5.

    Examples:
        >>> [check_drift([Shift("age", 40.0, share, 0.5, p=1e-6)]).verdict for share in (0.52, 0.9)]
        ['pass', 'caution']
    """
    significant = [shift for shift in found if shift.p * len(found) <= level]
    worst = max(significant or found, key=lambda shift: shift.distance)
    size, p = worst.distance if significant else 0.0, min(1.0, worst.p * len(found))
    verdict: Verdict = "fail" if size > _FAIL else "caution" if size > _CAUTION else "pass"
    point = worst.point if isinstance(worst.point, str) else f"{worst.point:.3g}"
    where = (
        f"{worst.column} is at most {point} in {worst.share:.0%} of the rows, and in {worst.expected:.0%} of "
        "the training rows"
    )
    return Check(
        name=NAME,
        value=worst.distance,
        se=None,
        threshold=_CAUTION,
        verdict=verdict,
        reading=f"The largest difference from the training inputs: {where} (p = {p:.2g} over {len(found)} "
        f"column{'s' * (len(found) > 1)}).",
        next_step=""
        if verdict == "pass"
        else "The model has seen few rows like these: check their units, or fit on rows that contain such inputs.",
        details={"columns": len(found), "p": p, "level": level}
        | {"drifted": [shift.column for shift in significant if shift.distance > _CAUTION]},
    )


def _shifts(case: Case) -> list[Shift]:
    known, encoding = case.program.origin.columns, case.program.origin.encoding
    own = {c.name: c for c in encoding.columns if c.kind in ("numeric", "date", "ordinal")} if encoding else {}
    return [
        replace(s, point=_in_units(own[s.column], s.point)) if s.column in own else s
        for name, x, summary in case.inputs_of_fit
        for s in shifts(name, columns_of(x), summary, known.get(name, ()))
    ]


def _in_units(column: ColumnEncoding, point: float | str) -> float | str:
    """A standardized number in the units of its column: a number, a date or a level."""
    (value,) = column_values(column, [point])
    if column.kind == "date":
        return f"{value:%Y-%m-%d %H:%M}".removesuffix(" 00:00")
    return str(value) if column.kind == "ordinal" else float(value)


input_drift = Diagnostic(
    NAME,
    "Do the inputs come from the distribution of the training inputs?",
    lambda case: case.overlap.relation in ("mixed", "held-out") and bool(_shifts(case)),
    lambda case, level: check_drift(_shifts(case), level=level),
    about="data",
    tests=True,
)
