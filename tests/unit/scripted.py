"""A fit without steps, for tests of callbacks and of progress."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from deepprob.posteriors.history import History


class Scripted:
    """A fit without steps, whose epochs a test ends by hand."""

    def __init__(self, epochs: int = 10, steps_per_epoch: int = 4) -> None:
        self.epoch, self.step, self.first_step, self.stop = 0, 0, 0, False
        self.steps_per_epoch, self.total_steps = steps_per_epoch, epochs * steps_per_epoch
        self.history = History(steps_per_epoch=steps_per_epoch)
        self.warm_up_steps = 0
        self.saved: list[int] = []

    def parameters(self) -> dict[str, Tensor]:
        return {}

    def save_checkpoint(self, path: Path) -> None:
        self.saved.append(self.step)

    def end_epoch(self, **values: float) -> None:
        self.epoch += 1
        self.step += self.steps_per_epoch
        self.history.add_epochs({name: [value] for name, value in values.items()})
