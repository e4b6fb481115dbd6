"""Log importance weights of the particles of a run, by row or of all data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from deepprob.fitting.particles import check_drawn, is_rough, run_particles
from deepprob.programs.elimination import PARTS, Part, terms
from deepprob.programs.enumeration import any_enumerated, is_enumerated
from deepprob.programs.layout import Layout
from deepprob.programs.random_weights import PER_ROW
from deepprob.programs.run import Run
from deepprob.programs.sites import Site, drawn_sites, is_deterministic, is_local, sample_sites

Parts = dict[Part, Tensor]


class LogWeights:
    r"""The log importance weights of particles, and their parts.

    .. math:: \log w_k = \log p(x \mid z_k) - \beta \, (\log q(z_k \mid x) - \log p(z_k))

    If all sites of model and guide are inside the data plate, every row has weights of its own, R = B. Otherwise there
    is one weight of all data for every particle, R = 1.

    Args:
        run: The program and its batch.
        particles: Number of draws from the guide, K.
        layers: Precision in which linear and convolutional layers multiply.

    Attributes:
        parts: ``likelihood``, ``kl_local``, ``kl_global``, each ``(K, R)``.
        norm: The weight of a row in the bound per datum: a number, or ``(B,)`` if rows have weights.

    Raises:
        ValueError: If the weights need all rows but the batch is smaller, or the guide enumerates a site.
    """

    def __init__(self, run: Run, particles: int, layers: str) -> None:
        together = particles if run.stacks else 1
        runs = [run_particles(run, together, layers) for _ in range(particles // together)]
        for traces in runs:
            _check_guide(traces)
        self.pairs = [traces[0] for traces in runs]
        self.layout = Layout(run.program.row_plate, run.plates, together)
        outside = _outside(self.layout.plate, *self.pairs[0])
        if outside and len(run.rows) < run.num_data:
            raise ValueError(
                f"site {outside!r} is not inside the data plate, so the importance-weighted bound needs all "
                f"{run.num_data} rows; got a batch of {len(run.rows)}. Use batch_size=None, or objective='elbo'."
            )
        _check_row_weights(run, outside, self.pairs[0][0])
        scale: Any = 1.0 if outside else _row_scale(run, self.pairs[0][1])
        if run.row_weights is not None and not outside:
            scale = scale * run.row_weights.values  # (B,); every row's own bound is weighted, not what is inside of it
        self._whole = bool(outside)
        self._divisor = torch.where(scale == 0, 1.0, scale) if isinstance(scale, Tensor) else scale
        self.norm: Any = scale / run.num_data
        found = [self._parts_of(*pair) for pair in self.pairs]
        self.parts: Parts = {part: torch.cat([x[part] for x in found]) / self._divisor for part in PARTS}

    def __call__(self, kl_weight: float | Tensor = 1.0) -> Tensor:
        """The log weights, ``(K, R)``.

        Args:
            kl_weight: The weight of the KL, beta.
        """
        return self.parts["likelihood"] - kl_weight * (self.parts["kl_local"] + self.parts["kl_global"])

    def log_q(self) -> Tensor:
        """``log q`` as it is in the weights, ``(K, R)``."""
        sites = [drawn_sites(guide).values() for guide, _ in self.pairs]
        found = [torch.stack([self._by_row(self.layout.log_prob(s)) for s in each]).sum(0) for each in sites]
        return torch.cat(found) / self._divisor

    def score_log_q(self, *, every: bool = False) -> Tensor | None:
        """Unscaled ``log q`` of the sites without a reparameterized gradient, ``(K, R)``; None if there are none.

        Args:
            every: Whether to take all sites of the guide for such sites.
        """

        def counts(site: Site) -> bool:
            return is_rough(site) or (every and not (site["is_observed"] or is_deterministic(site)))

        found = []
        for guide, _ in self.pairs:
            values = [(_unscaled(s), s["cond_indep_stack"]) for _, s in sample_sites(guide) if counts(s)]
            if not values:
                return None
            found.append(torch.stack([self._by_row(self.layout.by_row(x, frames)) for x, frames in values]).sum(0))
        return torch.cat(found)

    def averages(self) -> dict[str, Tensor]:
        """The mean over particles of the log weight and of its parts, per datum, detached."""
        means: dict[str, Tensor] = {n: (self.norm * x.mean(0)).sum().detach() for n, x in self.parts.items()}
        return {"elbo": means["likelihood"] - means["kl_local"] - means["kl_global"], **means}

    def drawn(self) -> list[tuple[Tensor, Tensor]]:
        """The copies at which guide and model were evaluated, and the draws themselves; see `Run.leaves`."""
        return [pair for guide, _ in self.pairs for pair in drawn_pairs(guide)]

    def _by_row(self, value: Tensor) -> Tensor:
        return value.sum(1, keepdim=True) if self._whole else value

    def _parts_of(self, guide_trace: Trace, model_trace: Trace) -> Parts:
        total: Parts = dict.fromkeys(PARTS, torch.zeros(self.layout.draws, 1))
        for part, value in _log_probs(self.layout, guide_trace, model_trace):
            total[part] = total[part] + self._by_row(value)
        return total


def drawn_pairs(guide_trace: Trace) -> list[tuple[Tensor, Tensor]]:
    """The copies of the draws of a guide that have gradients, and the draws themselves; see `Run.leaves`."""
    sites = (site for site in drawn_sites(guide_trace).values() if "drawn" in site)
    return [(s["value"], s["drawn"]) for s in sites if s["value"].is_leaf and s["value"].requires_grad]


def _unscaled(site: Site) -> Tensor:
    value: Tensor = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
    return value


def _check_guide(traces: list[tuple[Trace, Trace]]) -> None:
    for name, site in sample_sites(traces[0][0]):
        if is_enumerated(site):
            raise ValueError(
                f"site {name!r} is marked for enumeration in the guide, but importance weights need draws. Leave the "
                "site out of the guide to sum it out of the model exactly, or remove the mark there to draw it."
            )
        if site["infer"].get(PER_ROW):
            raise ValueError(
                f"the program draws {name!r} anew for every row, but an importance weight needs one value for all. Use "
                "gradients='shared', or objective='elbo'."
            )


def _check_row_weights(run: Run, outside: str, guide_trace: Trace) -> None:
    """Refuse weights of rows inside of one importance weight of all data, if rows have latents of their own."""
    local = [n for n, s in drawn_sites(guide_trace).items() if is_local(s, run.program.row_plate)]
    if run.row_weights is not None and outside and local:
        raise ValueError(
            f"weights of rows do not fit one importance-weighted bound of all data: {local[0]!r} belongs to rows and "
            f"{outside!r} does not. Use objective='elbo'."
        )


def _outside(plate: str, guide_trace: Trace, model_trace: Trace) -> str:
    """The first site outside the data plate; empty if there is none."""
    sites = [*sample_sites(model_trace), *sample_sites(guide_trace)]
    return next((n for n, s in sites if not is_deterministic(s) and not is_local(s, plate)), "")


def _row_scale(run: Run, model_trace: Trace) -> float:
    """The data plate's scale of log-probabilities, N / B."""
    frames = (f for _, s in sample_sites(model_trace) for f in s["cond_indep_stack"] if f.name == run.program.row_plate)
    frame = next(frames, None)
    if frame is None or frame.size in (-1, len(run.rows)):
        return run.num_data / len(run.rows)
    # The plate does not run over the batch's rows, so Pyro scales it by its own sizes.
    return float((frame.full_size or frame.size) / frame.size)


def _log_probs(layout: Layout, guide_trace: Trace, model_trace: Trace) -> Iterator[tuple[Part, Tensor]]:
    """The log-probabilities that make up the log weights, each with the sign of its part, ``(K, B)``."""
    if any_enumerated([(guide_trace, model_trace)]):
        for term in terms(guide_trace, model_trace, layout.plate, {}, average=False):
            yield term.part, layout.by_row(term.value, term.frames)
        return
    check_drawn(guide_trace, model_trace)
    for _, site in sample_sites(model_trace):
        if not is_deterministic(site):
            observed, value = bool(site["is_observed"]), layout.log_prob(site)
            yield ("likelihood", value) if observed else (_kl_part(layout, site), -value)
    for site in drawn_sites(guide_trace).values():
        yield _kl_part(layout, site), layout.log_prob(site)


def _kl_part(layout: Layout, site: Site) -> Part:
    return "kl_local" if is_local(site, layout.plate) else "kl_global"
