"""`Check`, the answer to one question about a posterior, and helpers to print and store it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from deepprob.errors import unknown

Array = NDArray[np.float64]
Verdict = Literal["unchecked", "pass", "caution", "fail"]
Side = Literal["<=", ">="]
About = Literal["", "fit", "posterior", "predictions", "data"]
_LEAST_ERROR = 5e-5  # that shows
VERDICTS: tuple[Verdict, ...] = ("unchecked", "pass", "caution", "fail")


@dataclass(frozen=True)
class Check:
    """The answer to one question about a posterior.

    Args:
        name: The name of the check.
        value: The measured number.
        se: Its standard error; None if it has none.
        threshold: The limit beyond which the verdict is not a pass; None if a test decides.
        verdict: ``"pass"``, ``"caution"``, ``"fail"``, or ``"unchecked"`` if the check could not look.
        reading: The meaning of the number, in one sentence, or the reason why there is none.
        next_step: A remedy; empty after a pass.
        details: Further numbers, as JSON types.
        unit: The unit of the value, the standard error and the threshold; empty for a pure number.
        good: The good side of the threshold: ``"<="`` if values up to it are good, ``">="`` if values from it on.
        question: The question that the check answers, in one line; a report fills it in.
        about: The claim that the check supports, of a `Diagnostic`; a report fills it in.

    Raises:
        ValueError: If the verdict is unknown.

    Examples:
        >>> check = Check("finite steps", 0.0, None, 0.01, "pass", "All 180 steps were finite.")
        >>> check.verdict, check.to_dict()["value"], check.slug, check.limit
        ('pass', 0.0, 'finite-steps', '<= 0.01')
    """

    name: str
    value: float
    se: float | None
    threshold: float | None
    verdict: Verdict
    reading: str
    next_step: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    unit: str = ""
    good: Side = "<="
    question: str = ""
    about: About = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise unknown("verdict", self.verdict, VERDICTS)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types; non-finite numbers become None."""
        return cast(dict[str, Any], jsonable(asdict(self)))

    @property
    def measured(self) -> str:
        """The value and its standard error, rounded for print; empty if the check found none."""
        return "" if self.verdict == "unchecked" or math.isnan(self.value) else number(self.value, self.se)

    @property
    def limit(self) -> str:
        """The threshold with its good side, such as ``"<= 0.08"``; empty if there is none, or no value to compare.

        Examples:
            >>> Check("tightness", 0.34, 0.09, 0.3, "pass", "The gap is 0.34 nats.").limit
            '<= 0.3; not surely beyond'
        """
        if self.threshold is None or math.isnan(self.value):
            return ""
        beyond = self.value > self.threshold if self.good == "<=" else self.value < self.threshold
        unsure = "; not surely beyond" if beyond and self.verdict == "pass" else ""
        return f"{self.good} {number(self.threshold)}{unsure}"

    @property
    def slug(self) -> str:
        """The name in lower case with hyphens, the key of the check in JSON."""
        return re.sub(r"[\W_]+", "-", self.name.lower()).strip("-")


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of several verdicts. One that could not look counts as a caution, and so does an empty report.

    Examples:
        >>> worst(["pass", "caution"]), worst(["pass", "unchecked"]), worst([])
        ('caution', 'caution', 'caution')
    """
    looked: list[Verdict] = ["caution" if verdict == "unchecked" else verdict for verdict in verdicts]
    return max(looked, key=VERDICTS.index, default="caution")


def number(value: float, se: float | None = None) -> str:
    """A number rounded to the precision of its standard error, or to three digits without one that shows.

    Examples:
        >>> number(12.3456, 0.123), number(0.000123), number(float("nan"))
        ('12.35 ± 0.12', '0.000123', 'nan')
    """
    if se is None or not math.isfinite(se) or not math.isfinite(value) or se < _LEAST_ERROR:
        return f"{value:.3g}"
    digits = min(max(1 - math.floor(math.log10(se)), 0), 4)
    return f"{value:.{digits}f} ± {se:.{digits}f}"


def jsonable(value: Any) -> Any:
    """A value as JSON types: arrays become lists, non-finite numbers become None.

    Examples:
        >>> jsonable({"a": np.array([1.0, np.inf]), "b": (np.int64(2), True)})
        {'a': [1.0, None], 'b': [2, True]}
    """
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(v) for v in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def array(values: Any) -> Array:
    """A tensor or array as a float64 array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)
