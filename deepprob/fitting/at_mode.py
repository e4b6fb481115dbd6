"""A program at one point of its latent space: its traces on all rows, its log joint and the information of its data."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to, constraints

from deepprob.engine.random import RandomStream
from deepprob.fitting.fisher import parameters_of
from deepprob.networks.layer_calls import LayerCalls, in_directions, rows_apart
from deepprob.posteriors.draws import Fixed
from deepprob.programs.arguments import rows_of
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch, num_rows
from deepprob.programs.run import Run
from deepprob.programs.sites import Site, is_deterministic, is_local, log_prob, sample_sites
from deepprob.programs.structured_guide import AutoStructuredNormal

ROWS = 512  # at a time
_TRIED = 8  # rows whose gradients are compared one by one
_CLOSE = 1e-3  # relative: gradients of layers against those of the whole run


class AtMode:
    """A program whose latent sites have the values of its guide's mean.

    Args:
        instance: The program, with an `AutoStructuredNormal` as its guide.
        batch: All rows, on the device; empty if the program holds them.

    Attributes:
        covered: The weights of linear and convolutional layers, all of whose uses are calls of these layers.
        by_row: Those of them whose gradients the calls give row by row.
        last: The weight and the bias of the layer that is called last.
    """

    def __init__(self, instance: ProgramInstance, batch: Batch) -> None:
        self.instance, self.batch, self.program = instance, batch, instance.program
        self.guide: AutoStructuredNormal = instance.program.current_guide
        self.num_rows = num_rows(batch) if batch else instance.num_data
        found = instance.structure
        self.is_split = bool(batch) and found.all_local(found.observed) and not found.local
        self.real = frozenset(s["name"] for s in self._latent() if _is_real(s["fn"].support))
        self.covered, self.by_row, self.last = self._layers()

    def _latent(self) -> list[Site]:
        trace: Any = self.guide.prototype_trace
        return [site for _, site in trace.iter_stochastic_nodes()]

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which the program runs as in a query, with gradients and without the caller's random state."""
        with self.instance.evaluating(), RandomStream(0, self.instance.device).drawing(), torch.enable_grad():
            yield

    # -- runs ----------------------------------------------------------------------------------------------------

    def runs(self, rows: int = ROWS, most: int | None = None) -> Iterator[Run]:
        """Runs on all rows, some at a time.

        Args:
            rows: Rows of a run.
            most: The number of rows after which to stop; None for all.
        """
        instance, size = self.instance, rows if self.is_split else self.num_rows
        index = torch.arange(self.num_rows, device=instance.device)
        for start in range(0, self.num_rows if most is None else min(most, self.num_rows), size):
            part = rows_of(self.batch, slice(start, start + size)) if self.is_split else self.batch
            prepared = self.program.prepare(*part)
            yield Run(
                self.program, prepared, index[start : start + size], instance.num_data, plates=instance.structure.plates
            )

    def trace(self, run: Run, values: Mapping[str, Tensor]) -> Trace:
        """The model's trace, with values of all latent sites."""
        with Fixed(values), run.bound():
            return poutine.trace(self.program.model).get_trace(*run.batch)

    def values(self, latent: Tensor) -> dict[str, Tensor]:
        """The values of the sites for unconstrained coordinates; those of a real site are its coordinates."""
        return self.guide.values(latent)

    def leaves(self, names: Collection[str]) -> dict[str, Tensor]:
        """The values at the guide's mean; those of some real sites are leaves to differentiate by."""
        values = self.values(self.guide.loc.detach().clone())
        return {n: x.detach().clone().requires_grad_(n in names) for n, x in values.items()}

    def observed(self, trace: Trace, run: Run) -> list[tuple[Site, Tensor | float]]:
        """The observed sites of a run, each with the weight of its rows in the log-likelihood of all rows.

        A minibatch's plate scales its rows to the number of all rows, which a sum over all minibatches must not.
        """
        share = len(run.rows) / self.instance.num_data
        found = []
        for _, site in sample_sites(trace):
            if not site["is_observed"] or is_deterministic(site):
                continue
            weight = site["scale"] * (share if is_local(site, self.program.row_plate) else 1.0)
            found.append((site, weight if site["mask"] is None else weight * site["mask"]))
        return found

    def log_likelihood(self, trace: Trace, run: Run) -> Tensor:
        """The log-likelihood of a run's rows."""
        total = torch.zeros((), device=self.instance.device)
        for site, weight in self.observed(trace, run):
            total = total + log_prob({**site, "scale": weight, "mask": None}).sum()
        return total

    def log_prior(self, trace: Trace, names: Collection[str]) -> Tensor:
        """The log-density of some latent sites, in unconstrained coordinates."""
        total = torch.zeros((), device=self.instance.device)
        for name, site in sample_sites(trace):
            if name in names and not site["is_observed"]:
                total = total + log_prob(site).sum()
                if name not in self.real:
                    transform = biject_to(site["fn"].support)
                    free = transform.inv(site["value"])
                    total = total + torch.as_tensor(transform.log_abs_det_jacobian(free, site["value"])).sum()
        return total

    def gradient(self, latent: Tensor, names: Collection[str]) -> tuple[float, Tensor]:
        """The log joint of some sites and the data, and its gradient in unconstrained coordinates, ``(D,)``."""
        total, gradient = 0.0, torch.zeros_like(latent, dtype=torch.float64)
        with self.running():
            for number, run in enumerate(self.runs()):
                point = latent.detach().clone().requires_grad_()
                trace = self.trace(run, self.values(point))
                value = self.log_likelihood(trace, run)
                value = value if number else value + self.log_prior(trace, names)
                (slope,) = torch.autograd.grad(value, point)
                total, gradient = total + float(value.detach()), gradient + slope.double()
        return total, gradient

    # -- layers --------------------------------------------------------------------------------------------------

    def _layers(self) -> tuple[frozenset[str], frozenset[str], tuple[str, ...]]:
        """The covered weights, those covered by row, and the sites of the last layer."""
        leaves = self.leaves(self.real)
        weights = {n: x for n, x in leaves.items() if n in self.real}
        with self.running():
            run = next(self.runs(rows=_TRIED))
            with LayerCalls(weights) as layers:
                trace = self.trace(run, leaves)
            if not layers.calls:
                return frozenset(), frozenset(), ()
            results = [x for site, _ in self.observed(trace, run) for x in parameters_of(site["fn"])]
            generator = torch.Generator().manual_seed(0)
            whole = [torch.randn(1, *x.shape, generator=generator).to(x) for x in results]
            covered = self._agree(layers, weights, results, whole, by_row=False)
            rows = self._agree(layers, weights, results, whole, by_row=True) if len(run.rows) > 1 else covered
        last = layers.calls[-1]
        return covered, covered & rows, tuple(n for n in (last.weight, last.bias) if n)

    @staticmethod
    def _agree(
        layers: LayerCalls,
        weights: Mapping[str, Tensor],
        results: list[Tensor],
        directions: list[Tensor],
        *,
        by_row: bool,
    ) -> frozenset[str]:
        """The weights whose gradients are those of their layers' calls."""
        if by_row:
            directions = [x[:_TRIED] for x in rows_apart(directions)]
        exact = dict(zip(weights, in_directions(results, directions, list(weights.values())), strict=True))
        only = layers.on_rows(max(len(x) for x in results if x.dim())) if by_row else None
        found = layers.weight_gradients(layers.gradients(results, directions), by_row=by_row, only=only)
        same = set()
        for name, value in found.items():
            value = torch.stack([rows[k] for k, rows in enumerate(value)]) if by_row else value
            if bool((value - exact[name]).abs().max() <= _CLOSE * exact[name].abs().max().clamp_min(1e-12)):
                same.add(name)
        return frozenset(same)


def _is_real(support: Any) -> bool:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is constraints.real or support is constraints.real_vector
