"""The optimizer factory: algorithm, learning rate schedule, clipping and averaging."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deepprob.errors import unknown, whole
from deepprob.fitting.update_rules import Carry, Rule, advance, rule_named

_CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
}

Schedule = Callable[[int, int], float]
FloatArray = npt.NDArray[np.float64]


def constant(step: Any, total: int) -> Any:
    """The full learning rate throughout."""
    return 1.0


def cosine(step: Any, total: int) -> Any:
    """Half a cosine period, from 1 at the first step to 0.01 after the last.

    Examples:
        >>> [round(float(cosine(step, 10)), 3) for step in (0, 5, 10)]
        [1.0, 0.505, 0.01]
    """
    return 0.01 + 0.99 * 0.5 * (1.0 + np.cos(math.pi * step / max(total, 1)))


def linear(step: Any, total: int) -> Any:
    """A straight line from 1 at the first step to 0.01 after the last."""
    return 1.0 - 0.99 * step / max(total, 1)


_SCHEDULES: dict[str, Callable[[Any, int], Any]] = {"constant": constant, "cosine": cosine, "linear": linear}


@dataclass(frozen=True)
class Optimizer:
    """The optimizer of a routine, built by the routine over its own copy of the parameters.

    Args:
        name: ``"adam"``, ``"adamw"``, ``"sgd"``, ``"rmsprop"``, ``"adagrad"``, ``"nadam"``, or any class of
            ``torch.optim``.
        learning_rate: The peak step size; None takes the program's own.
        schedule: ``"constant"``, ``"cosine"``, ``"linear"``, or a function of (step, number of steps) that returns
            the factor of ``learning_rate``.
        clip_norm: Largest Euclidean norm of the whole gradient; None for no clipping.
        average: Decay of an exponential moving average of the parameters, which the posterior then holds; None
            for no average.
        accumulate: Number of steps whose gradients are averaged for one update of the parameters.
        options: Further arguments of the optimizer's class.

    Raises:
        ValueError: If a name is unknown or a number out of range.

    Examples:
        >>> Optimizer("adm")
        Traceback (most recent call last):
        ...
        ValueError: unknown optimizer 'adm'. Did you mean 'adam'? Choose from: adagrad, adam, ...
    """

    name: str | type[torch.optim.Optimizer] = "adam"
    learning_rate: float | None = None
    schedule: str | Schedule = "cosine"
    clip_norm: float | None = None
    average: float | None = None
    accumulate: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.name, str) and self.name not in _CLASSES:
            raise unknown("optimizer", self.name, _CLASSES)
        if not isinstance(self.name, str | type):
            raise TypeError(f"an optimizer's name must be text or a class of torch.optim; got {self.name!r}.")
        if self.name is torch.optim.LBFGS:
            raise ValueError("LBFGS evaluates the loss several times per step, and noise misleads it. Choose adam.")
        if isinstance(self.schedule, str) and self.schedule not in _SCHEDULES:
            raise unknown("schedule", self.schedule, _SCHEDULES)
        if self.learning_rate is not None and not (0 < self.learning_rate < math.inf):
            raise ValueError(f"learning_rate must be positive; got {self.learning_rate}.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, or None; got {self.clip_norm}.")
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(f"average must lie between 0 and 1, or be None; got {self.average}.")
        object.__setattr__(self, "accumulate", whole("accumulate", self.accumulate))

    @property
    def rule(self) -> tuple[Rule, int] | None:
        """The update rule and its number of moments; None if only ``torch.optim`` has the optimizer."""
        names = [n for n, cls in _CLASSES.items() if self.name in (n, cls)]
        return rule_named(names[0], self.options) if names else None

    def advance(self, carry: Carry, gradients: Sequence[Tensor], finite: Tensor, rate: Tensor, step: Tensor) -> Carry:
        """Update packed parameters by the optimizer's `rule`; see `deepprob.fitting.update_rules.advance`.

        Raises:
            ValueError: If the optimizer has no `rule`.
        """
        if self.rule is None:
            raise ValueError(f"{self.name} has no update rule in deepprob. Use Optimizer.build, and call its step.")
        return advance(
            carry,
            gradients,
            finite,
            rate,
            step,
            self.rule[0],
            clip_norm=self.clip_norm,
            average=self.average,
            accumulate=self.accumulate,
        )

    def build(self, params: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        """Build torch's optimizer over some parameters."""
        cls: Any = _CLASSES[self.name] if isinstance(self.name, str) else self.name
        built: torch.optim.Optimizer = cls(list(params), lr=learning_rate, **self.options)
        return built

    def rate(self, step: int, total: int, peak: float) -> float:
        """The learning rate of one of ``total`` steps."""
        return float(self.rates(step, step + 1, total, peak)[0])

    def rates(self, first: int, end: int, total: int, peak: float) -> FloatArray:
        """The learning rates of the steps from ``first`` to before ``end``, out of ``total`` steps."""
        if isinstance(self.schedule, str):
            return np.broadcast_to(peak * _SCHEDULES[self.schedule](np.arange(first, end), total), end - first)
        schedule = self.schedule
        return np.array([peak * schedule(step, total) for step in range(first, end)])

    @classmethod
    def described(cls, facts: Mapping[str, Any]) -> Optimizer:
        """The factory that `describe` described.

        Raises:
            ValueError: If the description does not tell all: it has a function, an option that is no number, or a class
                of the user.
        """
        unknown = [name for name, x in facts["options"].items() if isinstance(x, str)]
        if unknown:
            raise ValueError(f"its option {unknown[0]} is not a number")
        own = getattr(torch.optim, facts["name"], None)
        return cls(**{**facts, "name": own if isinstance(own, type) else facts["name"]})

    def describe(self) -> dict[str, Any]:
        """The factory as JSON."""
        return {
            "name": self.name if isinstance(self.name, str) else _name_of(self.name),
            "learning_rate": self.learning_rate,
            "schedule": self.schedule
            if isinstance(self.schedule, str)
            else getattr(self.schedule, "__name__", "custom"),
            "clip_norm": self.clip_norm,
            "average": self.average,
            "accumulate": self.accumulate,
            "options": {k: v if isinstance(v, int | float | str | bool) else repr(v) for k, v in self.options.items()},
        }


def _name_of(cls: type[torch.optim.Optimizer]) -> str:
    """The name of a class; that of a class outside of ``torch.optim`` has its module, too."""
    own = getattr(torch.optim, cls.__name__, None) is cls
    return cls.__name__ if own else f"{cls.__module__}.{cls.__qualname__}"


def optimizer_named(optimizer: str | Optimizer | type[torch.optim.Optimizer] | None) -> Optimizer:
    """Make an `Optimizer` from a name or a class of ``torch.optim``; None gives the default.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is of another type, such as a torch optimizer that is already built.
    """
    if optimizer is None:
        return Optimizer()
    if isinstance(optimizer, Optimizer):
        return optimizer
    if isinstance(optimizer, str) or (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        return Optimizer(optimizer)
    raise TypeError(
        "optimizer must be a name, a class of torch.optim, or deepprob's Optimizer(...); "
        f"got {type(optimizer).__name__}. The routine builds it over its own copy of the parameters."
    )
