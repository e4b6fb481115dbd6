"""The record of a fit, by step and by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

_RENAMED = {"specialisations": "compiled_graphs"}  # earlier names of facts


@dataclass
class History:
    """The record of a fit.

    Attributes:
        steps: One value per step: the objective's terms (nats per datum; ``elbo`` is the evidence lower bound whatever
            the objective; `ELBO` adds its parts ``likelihood``, ``kl_local``, ``kl_global``, and `IWAE` the tighter
            ``iwae`` too), ``gradient_norm``, ``skipped`` (1 where the step was not finite and not applied).
        epochs: One value per epoch: the mean ``elbo``; for held-out rows ``held_out_elbo``, or with global latents
            ``held_out_log_likelihood``, expected over the guide, without their KL; ``learning_rate``, ``kl_weight``,
            ``skipped``, ``seconds``, and ``annealed.<buffer>`` for each buffer that a callback anneals. The last epoch
            may have fewer steps.
        levels: One value per comparison of the bound, see `deepprob.fitting.levelling`; a fit of a fixed length
            compares once, at its end. ``step``, ``change`` since the last window in nats of the whole posterior, its
            standard error ``se``, the largest rise ``ahead`` and its ``ahead_se``, the bound of the parameters that are
            ``held`` less that of their average over the window and its ``held_se``, the ``margin``, how many
            ``windows`` in a row are level, and ``level`` (1 where the bound has levelled, by as many as are needed).
        restarts: One value per start of a fit with restarts, see `deepprob.fitting.restarts`: its ``bound`` at the end
            in nats of the whole posterior and the standard error ``se``; how far it lies ``behind`` the kept start on
            the same rows and noise, and ``behind_se``; ``kept`` (1 for the kept start); the number of ``skipped``
            steps; ``distance.<site>`` for each global latent site, the root mean square distance of its guide's mean
            from the kept start's, in the sd of the kept start's guide (of a point estimate, in the site's units).
        gradients: By trained parameter the signal-to-noise ratio of one step's gradient of the ELBO at the end of the
            fit, and its standard error; see `deepprob.engine.statistics.signal_to_noise`.
        steps_per_epoch: Steps in one epoch.
        best_epoch: The epoch whose parameters the posterior holds.
        interrupted: Whether the fit was interrupted from outside.
        stopped_early: Whether a callback ended the fit.
        compiled_graphs: Number of graphs compiled for the fit, 0 if it ran eagerly: one for its steps (one for each
            length bucket if the graph depends on the length, and on a GPU), and one for each batch size at which
            held-out rows are scored.
    """

    steps: dict[str, list[float]] = field(default_factory=dict)
    epochs: dict[str, list[float]] = field(default_factory=dict)
    levels: dict[str, list[float]] = field(default_factory=dict)
    restarts: dict[str, list[float]] = field(default_factory=dict)
    gradients: dict[str, list[float]] = field(default_factory=dict)
    steps_per_epoch: int = 1
    best_epoch: int = 0
    interrupted: bool = False
    stopped_early: bool = False
    compiled_graphs: int = 0

    @property
    def held_out(self) -> tuple[str, list[float]]:
        """The score of held-out rows: its name in words, and one value per epoch; empty if there are no such rows."""
        names = {"held_out_elbo": "held-out ELBO", "held_out_log_likelihood": "held-out log-likelihood"}
        return next(((words, self.epochs[name]) for name, words in names.items() if name in self.epochs), ("", []))

    def of_epochs(self, first: int, count: int) -> dict[str, list[float]]:
        """The mean ``elbo`` and the number of ``skipped`` steps of some epochs, of which the last may be shorter."""
        start, end = first * self.steps_per_epoch, (first + count) * self.steps_per_epoch
        elbo, skipped = (np.array(self.steps[name][start:end]) for name in ("elbo", "skipped"))
        missing = count * self.steps_per_epoch - len(elbo)
        kept = np.pad(skipped == 0, (0, missing)).reshape(count, -1)
        with np.errstate(invalid="ignore"):  # without a finite step the mean is nan
            means = np.where(kept, np.pad(elbo, (0, missing)).reshape(count, -1), 0.0).sum(1) / kept.sum(1)
        return {"elbo": means.tolist(), "skipped": np.pad(skipped, (0, missing)).reshape(count, -1).sum(1).tolist()}

    def add_epochs(self, values: Mapping[str, Sequence[float]]) -> None:
        """Append the values of one or more epochs; a column that only some epochs have is nan for the others."""
        before, new = (max(map(len, columns.values()), default=0) for columns in (self.epochs, values))
        for name in {**self.epochs, **values}:
            self.epochs.setdefault(name, [math.nan] * before).extend(values.get(name, [math.nan] * new))

    def add_levels(self, values: Mapping[str, float]) -> None:
        """Append one comparison of the bound."""
        for name, value in values.items():
            self.levels.setdefault(name, []).append(value)

    def to_tensors(self) -> dict[str, Tensor]:
        """The record as tensors to save, named ``steps.<name>``, ``epochs.<name>``, ``levels.<name>`` and so on."""
        kinds = ("steps", "epochs", "levels", "restarts", "gradients")
        rows = {f"{kind}.{n}": v for kind in kinds for n, v in getattr(self, kind).items()}
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}

    def facts(self) -> dict[str, int | bool]:
        """Everything except the curves, as JSON."""
        return {
            "steps_per_epoch": self.steps_per_epoch,
            "best_epoch": self.best_epoch,
            "interrupted": self.interrupted,
            "stopped_early": self.stopped_early,
            "compiled_graphs": self.compiled_graphs,
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, int | bool]) -> History:
        """The inverse of `to_tensors` and `facts`; it also reads files that an earlier version saved.

        Examples:
            >>> past = History(steps={"elbo": [1.0, 2.0]}, best_epoch=3)
            >>> History.restore(past.to_tensors(), past.facts()) == past
            True
        """
        named = {_RENAMED.get(name, name): value for name, value in facts.items()}
        record = cls(**named)  # type: ignore[arg-type]
        for key, values in tensors.items():
            kind, _, name = key.partition(".")
            getattr(record, kind)[name] = values.tolist()
        return record
