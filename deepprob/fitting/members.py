r"""Several starts of one fit that are all kept: the members of an ensemble, or chains.

All members take every step together, as the starts of `deepprob.fitting.restarts` do, on the same rows. The fit ends
when the mean of their bounds has levelled. Every member is a chain of the posterior.

With bootstrap, every member has weights of its own for the rows: how often each row is among :math:`N` rows drawn with
replacement. The posterior's rows have the weights that the user gave.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.errors import counted
from deepprob.fitting.intake import instance_of
from deepprob.fitting.judging import accuracy_after
from deepprob.fitting.levelling import Groups
from deepprob.fitting.loop_state import LoopState
from deepprob.fitting.optimizers import FloatArray
from deepprob.fitting.restarts import RestartedFit
from deepprob.fitting.starts import Start, seed_of
from deepprob.posteriors.fitted import FittedProgram
from deepprob.posteriors.latent_draws import latent_draws
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.guides import GuideSpec, with_prior_guide
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch
from deepprob.programs.program import Program


class MembersFit(RestartedFit):
    """A running fit of several members, each of which becomes a chain of one draw.

    Args:
        others: The members beside the first.
        fit: The arguments of `RunningFit`.
        program: The program, as the routine got it.
        batch: The data, as the fit accepted them.
    """

    noun, keyword = "member", "members"

    def __init__(self, others: Sequence[Start], *fit: Any, program: Program, batch: Batch) -> None:
        super().__init__(others, *fit)
        self.program, self.batch = program, batch

    @property
    def kept(self) -> list[int]:
        """The members that the posterior holds: those that are not out, unless all are."""
        return [k for k, start in enumerate(self.starts) if not start.out] or [*range(len(self.starts))]

    def _bounds(self, points: Sequence[Groups], count: int) -> FloatArray:
        """The mean of the members' bounds, each at its own parameters and rows."""
        kept = self.kept
        of = [
            {"packed": [x[k] for x in point], "buffers": self.starts[k].at.carry["buffers"]}
            for point in points
            for k in kept
        ]
        mean: FloatArray = self._bounds_at(of, count).reshape(len(points), len(kept), -1).mean(1)
        return mean

    def _warn_of_skipped(self) -> None:
        counts = self._skipped()
        if not sum(counts):
            return
        named = ", ".join(f"{self.noun} {k} {counted(n, 'step')}" for k, n in enumerate(counts) if n)
        out = [str(k) for k in range(len(counts)) if k not in self.kept]
        left = f" The posterior leaves out {self.noun} {', '.join(out)}." if out else ""
        warnings.warn(
            f"steps that were not finite were skipped: {named} (of {self.step}, counted from 0).{left} Lower the "
            "learning rate, or clip the gradient (clip_norm=10 of dp.Optimizer).",
            UserWarning,
            stacklevel=4,
        )

    def _skipped(self) -> list[int]:
        return [round(float(np.sum(start.steps.get("skipped", [])))) for start in self.starts]

    # -- the end -------------------------------------------------------------------------------------------------

    def _posterior(self) -> Posterior:
        chains = self._chains()
        instance = self._instance(lambda program: with_prior_guide(program, chains))
        return self._judged(Posterior(instance, chains=chains, **self._record()))

    def _chains(self) -> dict[str, Tensor]:
        """Values by site, ``(members, draws, *site)``."""
        found = []
        for k in self.kept:
            self._enter(self.starts[k])
            with self.state.averaged():
                found.append(site_values(self.state.instance))
        self._enter(self._leader)
        return {name: torch.stack([values[name] for values in found]) for name in found[0]}

    def _record(self) -> dict[str, Any]:
        """The record of the fit, its settings and its seed."""
        self.history.best_epoch = self.epoch
        self.history.compiled_graphs = self.stepper.compiled_graphs
        out = [k for k in range(len(self.starts)) if k not in self.kept]
        facts = {"steps": self.total_steps, "skipped": self._skipped(), "left_out": out}
        rows = self.buckets.training_rows(self.state.instance)
        config = {**self.settings.config, **self.stepper.facts(), **facts}
        return {"history": self.history, "config": config, "seed": self.settings.seed, "training_rows": rows}

    def _instance(self, prepared: Any = None, guide: GuideSpec = None) -> ProgramInstance:
        """A new instance of the program for the posterior, with the data and the precision of the fit.

        Args:
            prepared: Makes the program to copy from the user's; None for the user's.
            guide: The guide.
        """
        fitted, size = self.state.instance, self.settings.batch_size
        program = self.program if prepared is None else prepared(self.program)
        count = None if self.buckets.numbers is None else fitted.num_data
        with RandomStream(self.settings.seed, fitted.device).drawing(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the fit gave them
            instance = instance_of(program, self.batch, guide, fitted.device, size, "keep", num_data=count)
        instance.inputs = fitted.inputs
        instance.program.__dict__["origin"] = fitted.program.origin
        return instance

    def _judged(self, posterior: Posterior) -> Posterior:
        """The posterior with a judgement by the training data, unless the fit was cut short."""
        if not (self.history.interrupted or self.bad_in_a_row) and self.buckets.numbers is None:
            seconds = sum(self.history.epochs.get("seconds", ()))
            posterior.accuracy = accuracy_after(posterior, self.data, seconds)
        return posterior


def site_values(instance: ProgramInstance) -> dict[str, Tensor]:
    """The values of the global latent sites of a guide that is a point, each of shape ``(1, *site)``."""
    instance.program.eval()
    found = latent_draws(FittedProgram(instance), (), 1, 0)
    instance.program.train()
    return {name: found[name].detach().clone() for name in instance.structure.global_}


def bootstrapped(state: LoopState, others: Sequence[Start]) -> list[Start]:
    """Give every member its own resampled weights of the rows; the first member's are in the state.

    Args:
        state: The state before the first step.
        others: The other members.

    Returns:
        The other members, with their weights.

    Raises:
        ValueError: If the program does not name its plate over rows, or the rows are read while the fit runs.
    """
    instance, program = state.instance, state.instance.program
    if not program.data_name:
        raise ValueError(
            "bootstrap=True resamples rows, and the program does not name the plate over rows. Write "
            "Program.of(model, data_plate='...'), or leave bootstrap out."
        )
    if state.chunks is not None:
        raise ValueError(
            "bootstrap=True needs all rows in memory, and these are read while the fit runs. Give arrays or tensors, "
            "or leave bootstrap out."
        )
    if outside := [n for n in instance.structure.observed if not instance.structure.all_local((n,))]:
        raise ValueError(
            f"bootstrap=True resamples rows of plate {program.data_name!r}, and site {outside[0]!r} observes values "
            "outside of it. Put it inside, or leave bootstrap out."
        )
    given = program.bound_rows.weights
    own = [resampled(instance.num_data, seed_of(state.seed, k)) for k in range(1 + len(others))]
    weights = [x.to(instance.device) * (1.0 if given is None else given) for x in own]
    program.bound_rows.take(weights[0].clone(), instance.device)
    state.varied = [*state.varied, *program.bound_rows.tensors]
    return [replace(start, varied=[*start.varied, x]) for start, x in zip(others, weights[1:], strict=True)]


def resampled(count: int, seed: int) -> Tensor:
    """How often each row is among as many rows, drawn with replacement."""
    drawn = torch.randint(count, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.bincount(drawn, minlength=count).to(torch.get_default_dtype())
