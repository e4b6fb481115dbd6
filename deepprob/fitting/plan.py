"""The plan of a fit: which tier takes its steps from which step on, decided from sizes and never by a clock.

The tiers are ``eager`` (Python runs the program), ``traced`` (its graph runs operation by operation) and ``compiled``
(native code).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

# Seconds of one processor, measured by benchmarks/compile_time.py.
_TRACE_SECONDS, _TRACE_SECONDS_PER_OPERATION = 1.3, 6.2e-4
_COMPILE_SECONDS, _COMPILE_SECONDS_PER_OPERATION = 7.7, 6.1e-3
_ANY_LENGTH_FACTOR = 1.5  # a graph for sequences of any length takes this many times as long to compile
_PYTHON_SECONDS_PER_OPERATION = 3.7e-6  # what tracing saves of an eager step
_QUERY_SECONDS_PER_OPERATION = 1.5e-5  # what it saves of a score, whose draws are stacked by Python
_DISPATCH_SECONDS_PER_OPERATION = 3.4e-6  # what compiling saves of a traced step
_MEMORY_SECONDS_PER_NUMBER = 3.1e-10  # and what it saves by not writing intermediate numbers to memory
_SECONDS_PER_MULTIPLICATION = 7.4e-11
_BESIDE_FACTOR = 1.3  # another process, which imports torch anew, takes this many times as long to compile
_FITS_AHEAD = 5  # code is built for the next fits if this many of them pay for it


@dataclass(frozen=True)
class Work:
    """The size of a graph.

    Attributes:
        operations: Number of its operations.
        numbers: How many numbers they write.
        multiplications: Approximate number of its multiplications.
        recurs: Whether it has a loop over time.
    """

    operations: int
    numbers: int = 0
    multiplications: int = 0
    recurs: bool = False

    @property
    def uncompiled(self) -> str:
        """The faster tier without a compiler; a graph with a loop over time is slower than eager steps."""
        return "eager" if self.recurs else "traced"

    @property
    def saved_seconds(self) -> float:
        """What compiling saves in one run."""
        return _DISPATCH_SECONDS_PER_OPERATION * self.operations + _MEMORY_SECONDS_PER_NUMBER * self.numbers

    @property
    def seconds(self) -> float:
        """The time of one run, operation by operation."""
        return self.saved_seconds + _SECONDS_PER_MULTIPLICATION * self.multiplications


@dataclass(frozen=True)
class Plan:
    """Which tier takes a fit's steps from which step on.

    Attributes:
        tiers: Name and first step of each tier, in order.
        reason: Why, in words.
        operations: Number of operations of the step's graph, or of its eager run if it was not traced.
        cached: Whether native code was in the cache when the fit began.
        build: Whether native code is built beside the fit.
        score: The tier of the held-out score.

    Examples:
        >>> planned("auto", 100_000, Work(300, 100_000), cached=False).tiers
        (('compiled', 0),)
        >>> [name for name, _ in planned("auto", 100_000, Work(300, 100_000), cached=False, beside=True).tiers]
        ['traced', 'compiled']
        >>> planned("auto", 2_000, Work(300, 100_000), cached=False).tiers
        (('traced', 0),)
        >>> planned("auto", 2_000, Work(300, 100_000), cached=True).tiers
        (('compiled', 0),)
    """

    tiers: tuple[tuple[str, int], ...]
    reason: str
    operations: int = 0
    cached: bool = False
    build: bool = False
    score: str = "eager"

    @property
    def compiles(self) -> bool:
        """Whether compiled steps take over."""
        return self.tiers[-1][0] == "compiled"

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON."""
        return asdict(self) | {"tiers": [list(tier) for tier in self.tiers]}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote."""
        return cls(**{**found, "tiers": tuple((name, first) for name, first in found["tiers"])})

    def without_tracing(self, reason: str) -> Plan:
        """The plan of a fit whose steps cannot be traced, or differ from eager ones."""
        return replace(self, tiers=(("eager", 0),), reason=reason, build=False)

    def without_compiling(self, reason: str, tier: str) -> Plan:
        """The plan of a fit whose graph cannot be compiled, with the tier that takes its steps."""
        return replace(self, tiers=((tier, 0),), reason=reason, build=False)


def compile_seconds(operations: int, *, any_length: bool = False) -> float:
    """What compiling a graph costs.

    Args:
        operations: Number of its operations.
        any_length: Whether it serves sequences of any length.
    """
    return (_COMPILE_SECONDS + _COMPILE_SECONDS_PER_OPERATION * operations) * (_ANY_LENGTH_FACTOR if any_length else 1)


def pays_to_trace(steps: int, operations: int) -> bool:
    """Whether ``steps`` eager steps of ``operations`` gain more from being traced than tracing takes."""
    cost = _TRACE_SECONDS + _TRACE_SECONDS_PER_OPERATION * operations
    return steps * operations * _PYTHON_SECONDS_PER_OPERATION > cost


def pays_to_trace_score(times: int) -> bool:
    """Whether this many held-out scores gain more from being traced than tracing takes, in a fit whose step is traced.

    Gain and cost grow alike with the number of operations.
    """
    return times * _QUERY_SECONDS_PER_OPERATION > _TRACE_SECONDS_PER_OPERATION


def planned(
    compile: bool | str, steps: int, work: Work, *, cached: bool, building: bool = False, beside: bool = False
) -> Plan:
    """The plan of a fit whose step was traced.

    Args:
        compile: True, False or ``"auto"``.
        steps: Planned steps.
        work: The graph of one step.
        cached: Whether its native code is in the cache.
        building: Whether another process builds it, so that the fit would wait for it.
        beside: Whether native code can be built while the fit runs.
    """
    if compile != "auto":
        name = "compiled" if compile else work.uncompiled
        return Plan(((name, 0),), f"compile={compile}", work.operations, cached)
    gain, cost = steps * work.saved_seconds, compile_seconds(work.operations)
    own = Plan(((work.uncompiled, 0),), "compiling costs more than this fit gains", work.operations, cached)
    compiled = replace(own, tiers=(("compiled", 0),), reason="this fit gains more than compiling costs")
    if cached:
        return replace(compiled, reason="its native code is in the cache")
    if building:
        return replace(compiled, reason="an earlier fit has its native code built")
    if gain <= cost:
        if not (beside and gain * _FITS_AHEAD > cost):
            return own
        return replace(own, reason=f"{own.reason}; {_FITS_AHEAD} fits like it would pay for it", build=True)
    first = math.ceil(cost / work.seconds)
    if not beside or (steps - first) * work.saved_seconds < _BESIDE_FACTOR * cost:
        return compiled
    return replace(compiled, tiers=(*own.tiers, ("compiled", first)), build=True)
