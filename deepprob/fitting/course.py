"""The course of a fit: how many steps it takes, and the learning rate of each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from deepprob.errors import whole
from deepprob.fitting.optimizers import FloatArray, Optimizer

_PASSES, _LEAST, _MOST = 100, 10_000, 100_000  # of the budget: passes over the data, steps
_SHORTEST_DECAY = 200  # steps
_STATE = "total", "schedule_begins", "holds", "levelled"


def budget(steps_per_epoch: int) -> int:
    """The most steps of a fit without a fixed length: 100 passes over the data, from 10 000 to 100 000 steps.

    Examples:
        >>> budget(1), budget(469), budget(10_000)
        (10000, 46900, 100000)
    """
    return min(max(_PASSES * steps_per_epoch, _LEAST), _MOST)


@dataclass(frozen=True)
class Length:
    """The length of a fit that the user asked for.

    Attributes:
        steps_per_epoch: Steps in one pass over the data.
        total: Steps of the fit, or its budget.
        epochs: Passes over the data, if they were given.
        fixed: Whether the length is fixed; otherwise the fit ends when its bound has levelled.
        done: Steps that an earlier fit has taken.
        tail: Steps at a constant learning rate after the others, which are not among ``total``.
        tail_rate: Their learning rate.
    """

    steps_per_epoch: int
    total: int
    epochs: int | None
    fixed: bool
    done: int = 0
    tail: int = 0
    tail_rate: float = 0.0

    @classmethod
    def of(cls, epochs: int | None, steps: int | None, steps_per_epoch: int) -> Length:
        """The length in epochs or in steps; None and None for a fit without a fixed length.

        Raises:
            ValueError: If both are given, or a number is out of range.
        """
        if epochs is not None and steps is not None:
            raise ValueError(
                f"give epochs or steps, not both; got epochs={epochs!r} and steps={steps!r}. Leave one out."
            )
        if steps is not None:
            return cls(steps_per_epoch, whole("steps", steps), None, True)
        if epochs is None:
            return cls(steps_per_epoch, budget(steps_per_epoch), None, False)
        epochs = whole("epochs", epochs)
        return cls(steps_per_epoch, steps_per_epoch * epochs, epochs, True)

    def after(self, done: int) -> Length:
        """The length of a whole fit of which an earlier one has taken some steps."""
        total = self.total + done
        epochs = None if self.epochs is None else total // self.steps_per_epoch
        return replace(self, total=total, epochs=epochs, done=done)

    @property
    def to_take(self) -> int:
        """Planned steps, without those that are done."""
        return self.total - self.done

    @property
    def expected(self) -> int:
        """Steps to plan the fit's speed for: most bounds level in a quarter of the budget."""
        return self.tail + (self.to_take if self.fixed else self.to_take // 4)


class Course:
    """How many steps a fit takes, and the learning rate of each.

    A fit of a fixed length follows the optimizer's schedule from its first step to its last. A fit that ends when its
    bound has levelled holds the schedule's first rate until then, at most for two thirds of its budget; it follows the
    schedule over the steps that are left, half as many as it has taken. A tail of constant steps may follow.

    Args:
        optimizer: The optimizer, with its schedule.
        peak: The peak learning rate.
        length: The length that the user asked for.

    Attributes:
        fixed: Whether the user asked for a fixed length.
        total: Steps of the whole fit, its tail included; of a fit that has not levelled yet, its budget.
        tail: Steps of the tail.
        schedule_begins: The step at which the schedule begins.
        holds: Whether the fit still waits for its bound to level.
        levelled: Whether its bound has levelled.

    Examples:
        >>> course = Course(Optimizer(schedule="linear"), 1.0, Length.of(None, None, steps_per_epoch=1))
        >>> course.level_at(1000)
        >>> course.total, course.rates(1250, 1251).round(3).tolist(), course.rates(0, 2).tolist()
        (1500, [0.505], [1.0, 1.0])
    """

    def __init__(self, optimizer: Optimizer, peak: float, length: Length) -> None:
        self.optimizer, self.peak, self.done = optimizer, peak, length.done
        self.tail, self.tail_rate = length.tail, length.tail_rate
        self.fixed, self.total, self.holds = length.fixed, length.total + self.tail, not length.fixed
        self.levelled = False
        self.schedule_begins = 0 if length.fixed else length.total - length.to_take // 3

    @property
    def tail_begins(self) -> int:
        """The step at which the tail begins, the end of a fit without one."""
        return self.total - self.tail

    @property
    def waits(self) -> bool:
        """Whether the bound is still to level; it may do so while the schedule ends the budget."""
        return not (self.fixed or self.levelled)

    def level_at(self, step: int) -> None:
        """Begin the schedule: the bound has levelled at this step."""
        self.schedule_begins, self.holds, self.levelled = step, False, True
        self.total = min(self.total, step + max(_SHORTEST_DECAY, (step - self.done) // 2) + self.tail)

    def rates(self, first: int, end: int) -> FloatArray:
        """The learning rates of the steps from ``first`` to before ``end``."""
        if end > (begins := self.tail_begins):
            tail = np.full(end - max(first, begins), self.tail_rate)
            return np.concatenate([self.rates(first, begins), tail]) if first < begins else tail
        length, held_until = self.tail_begins - self.schedule_begins, min(max(self.schedule_begins, first), end)
        held = np.repeat(self.optimizer.rates(0, 1, length, self.peak), held_until - first)
        falling = self.optimizer.rates(held_until - self.schedule_begins, end - self.schedule_begins, length, self.peak)
        return np.concatenate([held, falling])

    def state(self) -> dict[str, int | bool]:
        """The state of the course, as JSON."""
        return {name: getattr(self, name) for name in _STATE}

    def restore(self, state: dict[str, int | bool]) -> None:
        """Restore a state that `state` returned."""
        for name in _STATE:
            setattr(self, name, state[name])
