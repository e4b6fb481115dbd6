"""The importance-weighted bound, with named terms and without synchronization of host and device."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from deepprob.errors import whole
from deepprob.fitting.particles import check_drawn, check_precision, is_rough, run_particles
from deepprob.programs.elimination import PARTS, Part, terms
from deepprob.programs.enumeration import any_enumerated, is_enumerated
from deepprob.programs.layout import Layout
from deepprob.programs.random_weights import PER_ROW
from deepprob.programs.run import Run
from deepprob.programs.sites import Site, drawn_sites, is_deterministic, is_local, sample_sites

Parts = dict[Part, Tensor]


@dataclass(frozen=True)
class IWAE:
    r"""The importance-weighted evidence lower bound, in nats per datum.

    .. math::
        \frac1N \log p(x_{1:N}) \ge \frac1N\, \mathbb E\, \frac NB \sum_{i \in \text{batch}}
        \log \frac1K \sum_{k=1}^K w_{ik}, \qquad
        w_{ik} = \frac{p(x_i, z_{ik})}{q(z_{ik} \mid x_i)}, \quad z_{ik} \sim q(z \mid x_i)

    with :math:`K` particles of the latents :math:`z_i` of a row. With one particle it is the ELBO; it grows with
    :math:`K` and reaches the log evidence in the limit.

    *Minibatches.* If all sites of model and guide are inside the data plate, every row has its own bound, scaled by
    ``N / B``. If a site is outside (global latents), or the guide is one distribution over all rows, there is one bound
    of all data. Its :math:`w_k` is a product over rows, and a minibatch does not estimate the logarithm of its mean,
    so a batch must hold all rows.

    *Gradients.* Reparameterized sites get the gradient of the logarithm. Other sites of the guide get the
    score-function gradient. Its baseline for a particle is the bound with the particle's weight replaced by the
    geometric mean of the others, which takes :math:`K^2` numbers per row.

    *Enumeration.* Discrete sites that the guide leaves out are summed out of the model exactly, inside the weights. A
    site that is enumerated in the guide is refused.

    *Warm-up.* ``kl_weight`` multiplies ``log q - log p`` of the latents inside the weights,
    :math:`\log w = \log p(x \mid z) - \beta (\log q(z \mid x) - \log p(z))`.

    Held-out scores, which choose the best epoch, are ELBOs for this objective too. `Posterior.log_evidence` is this
    bound for any rows.

    Args:
        particles: Draws from the guide per step, K, vectorized in a leading plate if the program broadcasts over it.
        layers: Precision in which linear and convolutional layers multiply, as in `ELBO`.

    References:
        Burda, Grosse, Salakhutdinov (2016), Importance Weighted Autoencoders.
        Mnih, Rezende (2016), Variational Inference for Monte Carlo Objectives.

    Examples:
        For a guide that is too wide, the bound grows with the particles, from the ELBO to the log evidence:

        >>> import pyro, pyro.distributions as dist
        >>> from deepprob.programs.program import Program
        >>> def model(y):
        ...     with pyro.plate("data", len(y)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> def guide(y):
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("z", dist.Normal(y / 2, 1.0))
        >>> _ = torch.manual_seed(0)
        >>> y = torch.zeros(4000)
        >>> run = Run(Program.of(model, guide, data_plate="data"), (y,), torch.arange(4000), 4000)
        >>> bounds = [float(IWAE(particles=k)(run)[1]["iwae"]) for k in (1, 4, 16, 64)]
        >>> evidence = float(dist.Normal(0.0, 2**0.5).log_prob(y[0]))
        >>> bounds == sorted(bounds), abs(bounds[-1] - evidence) < 0.01, evidence - bounds[0] > 0.1
        (True, True, True)
    """

    particles: int = 10
    layers: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "particles", whole("particles", self.particles))
        check_precision(self.layers)

    def __call__(self, run: Run, *, kl_weight: float | Tensor = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimize and the terms of the bound, all per datum.

        Args:
            run: The program and its batch; the number of draws is that of the particles.
            kl_weight: Weight of ``log q - log p`` inside the weights in the loss (not in ``terms``).

        Returns:
            The loss, a scalar whose gradient is unbiased, and detached scalars: ``iwae``, the bound; ``elbo``, the mean
            of the same log weights, with its parts ``likelihood``, ``kl_local``, ``kl_global`` averaged over particles.

        Raises:
            ValueError: If the bound needs all rows but the batch is smaller, or the guide enumerates a site.
        """
        together = self.particles if run.stacks else 1
        runs = [run_particles(run, together, self.layers) for _ in range(self.particles // together)]
        for traces in runs:
            _check_guide(traces)
        pairs = [traces[0] for traces in runs]
        layout = Layout(run.program.row_plate, run.plates, together)
        guide_trace, model_trace = pairs[0]
        outside = _outside(layout.plate, guide_trace, model_trace)
        if outside and len(run.rows) < run.num_data:
            raise ValueError(
                f"site {outside!r} is not inside the data plate, so the importance-weighted bound needs all "
                f"{run.num_data} rows; got a batch of {len(run.rows)}. Use batch_size=None, or objective='elbo'."
            )
        scale: Any = 1.0 if outside else _row_scale(run, model_trace)
        found = [_parts(layout, *pair, bool(outside)) for pair in pairs]
        _check_weights(run, outside, guide_trace)
        if run.row_weights is not None and not outside:
            scale = scale * run.row_weights.values  # (B,); every row's own bound is weighted, not what is inside of it
        divisor = torch.where(scale == 0, 1.0, scale) if isinstance(scale, Tensor) else scale
        parts = {
            part: torch.cat([x[part] for x in found]) / divisor for part in PARTS
        }  # (K, R), R = B or 1 for all data
        norm = scale / run.num_data
        weights = _log_weights(parts, kl_weight)
        bound = _log_mean(weights)
        loss = -(norm * bound).sum()
        if any(is_rough(site) for _, site in sample_sites(guide_trace)):
            log_q = torch.cat([_rough_log_q(layout, guide, bool(outside)) for guide, _ in pairs])
            scores = (norm * _signals(weights, bound) * log_q).sum()
            loss = loss - (scores - scores.detach())  # changes the gradient only, not the value
        averages: dict[str, Tensor] = {part: (norm * value.mean(0)).sum().detach() for part, value in parts.items()}
        elbo = averages["likelihood"] - averages["kl_local"] - averages["kl_global"]
        tight = (norm * _log_mean(_log_weights(parts, 1.0).detach())).sum()
        return loss, {"elbo": elbo, "iwae": tight, **averages}

    def describe(self) -> dict[str, Any]:
        """The objective as JSON."""
        return {"name": "iwae", **asdict(self)}


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


def _check_weights(run: Run, outside: str, guide_trace: Trace) -> None:
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


def _parts(layout: Layout, guide_trace: Trace, model_trace: Trace, whole: bool) -> Parts:
    """The parts of the log weights by particle: of every row, ``(K, B)``, or of all data, ``(K, 1)``."""
    found: list[tuple[Part, Tensor]] = []
    if any_enumerated([(guide_trace, model_trace)]):
        for term in terms(guide_trace, model_trace, layout.plate, {}, average=False):
            found.append((term.part, layout.by_row(term.value, term.frames)))
    else:
        check_drawn(guide_trace, model_trace)
        for _, site in sample_sites(model_trace):
            if not is_deterministic(site):
                observed, value = bool(site["is_observed"]), layout.log_prob(site)
                found.append(("likelihood", value) if observed else (_kl_part(layout, site), -value))
        found += [(_kl_part(layout, s), layout.log_prob(s)) for s in drawn_sites(guide_trace).values()]
    total: Parts = dict.fromkeys(PARTS, torch.zeros(layout.draws, 1))
    for part, value in found:
        total[part] = total[part] + (value.sum(1, keepdim=True) if whole else value)
    return total


def _kl_part(layout: Layout, site: Site) -> Part:
    return "kl_local" if is_local(site, layout.plate) else "kl_global"


def _log_weights(parts: Parts, kl_weight: float | Tensor) -> Tensor:
    return parts["likelihood"] - kl_weight * (parts["kl_local"] + parts["kl_global"])


def _log_mean(weights: Tensor) -> Tensor:
    """Logarithm of the mean weight over particles: ``(R,)``."""
    return weights.logsumexp(0) - math.log(len(weights))


def _rough_log_q(layout: Layout, guide_trace: Trace, whole: bool) -> Tensor:
    """``log q`` of the sites without a reparameterized gradient, unscaled, ``(K, R)``."""
    found = []
    for _, site in sample_sites(guide_trace):
        if is_rough(site):
            value = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
            value = layout.by_row(value, site["cond_indep_stack"])
            found.append(value.sum(1, keepdim=True) if whole else value)
    return torch.stack(found).sum(0)


def _signals(weights: Tensor, bound: Tensor) -> Tensor:
    """The contribution of each particle to the bound, ``(K, R)``, detached."""
    weights, bound, count = weights.detach(), bound.detach(), len(weights)
    if count == 1:
        return bound.unsqueeze(0)
    same = torch.eye(count, dtype=torch.bool, device=weights.device).unsqueeze(2)  # (K, K, 1)
    mean = torch.where(same, 0.0, weights).sum(1) / (count - 1)  # (K, R), of the others' log weights
    without = _log_mean(torch.where(same, mean.unsqueeze(1), weights).transpose(0, 1))  # (K, R)
    return bound - torch.where(torch.isfinite(without), without, 0.0)
