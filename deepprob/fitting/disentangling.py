"""Objectives that weigh the parts of the KL for codes whose dimensions are independent: beta and total correlation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent

from deepprob.errors import positive
from deepprob.fitting.elbo import ELBO
from deepprob.fitting.particles import check_drawn, check_precision, is_rough, run_particles
from deepprob.programs.enumeration import any_enumerated
from deepprob.programs.layout import Layout
from deepprob.programs.run import Run
from deepprob.programs.sites import Site, drawn_sites, is_deterministic, is_local, sample_sites


@dataclass(frozen=True)
class Beta(ELBO):
    r"""The ELBO with another weight of the KL, or with a KL that is pulled to a capacity.

    .. math::
        \mathbb E_q \log p(x \mid z) - \beta \, \mathrm{KL}
        \qquad\text{or}\qquad
        \mathbb E_q \log p(x \mid z) - \beta \, |\mathrm{KL} - w \, C|

    per datum, with the KL of all latents. With beta above 1 it is still a lower bound on the log evidence. Codes carry
    less information then, and their dimensions are closer to independent. With a ``capacity`` C, a code holds C nats;
    the weight w of a warm-up (`KLWarmUp`) raises the capacity from 0 to C in the place of the KL's weight.

    The terms, among them ``elbo``, are those of the unweighted ELBO.

    Args:
        beta: The weight.
        capacity: The capacity C in nats; None for a weight of the KL itself.

    The other arguments are those of `ELBO`.

    Raises:
        ValueError: If a number is negative.

    References:
        Higgins et al. (2017), beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework.
        Burgess et al. (2018), Understanding Disentangling in beta-VAE.

    Examples:
        >>> objective = Beta(beta=4.0)
        >>> objective.describe()["name"], objective.beta
        ('beta', 4.0)
    """

    beta: float = 4.0
    capacity: float | None = None
    # Positional arguments are those of this class.
    particles: int = field(default=1, kw_only=True)
    analytic_kl: bool = field(default=True, kw_only=True)
    layers: str = field(default="float32", kw_only=True)
    gradient: str = field(default="total", kw_only=True)
    free_bits: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "beta", positive("beta", self.beta, zero=True))
        if self.capacity is not None:
            object.__setattr__(self, "capacity", positive("capacity", self.capacity, zero=True))

    def describe(self) -> dict[str, Any]:
        """The objective as JSON."""
        return {"name": "beta", **asdict(self)}

    def _kl_loss(self, kl_weight: float | Tensor, kl: Tensor) -> Tensor:
        if self.capacity is None:
            return self.beta * kl_weight * kl
        return self.beta * (kl - kl_weight * self.capacity).abs()

    def _kl_slope(self, kl_weight: float | Tensor, kl: Tensor) -> float | Tensor:
        if self.capacity is None:
            return self.beta * kl_weight
        return self.beta * (kl.detach() - kl_weight * self.capacity).sign()


@dataclass(frozen=True)
class TotalCorrelation:
    r"""The ELBO with its KL in three parts of their own weights (beta-TCVAE).

    .. math::
        \mathbb E_q \log p(x \mid z) - \alpha \, I_q(x; z)
        - \beta \, \mathrm{KL}\Big(q(z) \,\Big\|\, \prod_d q(z_d)\Big) - \gamma \sum_d \mathrm{KL}(q(z_d) \,\|\, p(z_d))

    with the aggregate posterior :math:`q(z) = \frac1N \sum_i q(z \mid x_i)`. The second part, the total correlation,
    is zero if the dimensions of the codes are independent. With all weights 1 it is the ELBO. The aggregate is
    estimated from the batch, in which a row counts 1 / N and the others the rest:

    .. math:: q(z_i) \approx \frac1N q(z_i \mid x_i) + \frac{N - 1}{N (B - 1)} \sum_{j \ne i} q(z_i \mid x_j)

    Its logarithm is biased for small batches.

    Args:
        alpha: Weight of the mutual information of rows and codes.
        beta: Weight of the total correlation.
        gamma: Weight of the KL of each dimension, whose prior must be independent of the others.
        layers: Precision in which linear and convolutional layers multiply, as in `ELBO`.

    Raises:
        ValueError: If a weight is negative.

    References:
        Chen, Li, Grosse, Duvenaud (2018), Isolating Sources of Disentanglement in Variational Autoencoders.

    Examples:
        >>> TotalCorrelation(beta=6.0).describe()["name"]
        'total_correlation'
    """

    alpha: float = 1.0
    beta: float = 6.0
    gamma: float = 1.0
    layers: str = "float32"

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            object.__setattr__(self, name, positive(name, getattr(self, name), zero=True))
        check_precision(self.layers)

    def __call__(self, run: Run, *, kl_weight: float | Tensor = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimize and the terms, all per datum.

        Args:
            run: The program and its batch.
            kl_weight: Weight of all three parts of the KL in the loss (not in ``terms``).

        Returns:
            The loss, and detached scalars: ``elbo``, ``likelihood``, ``kl_local``, ``kl_global``; and the parts of the
            KL, ``mutual_information``, ``total_correlation``, ``dimension_kl``.

        Raises:
            ValueError: If a latent site is not one of the rows' whose dimensions the guide draws independently.
        """
        traces = run_particles(run, 1, self.layers)
        if run.row_weights is not None:
            raise ValueError("'total_correlation' takes no weights of rows. Leave them out, or use objective='beta'.")
        if any_enumerated(traces):
            raise ValueError("'total_correlation' needs codes that the guide draws; this program sums sites out.")
        ((guide_trace, model_trace),) = traces
        check_drawn(guide_trace, model_trace)
        layout, rows = Layout(run.program.row_plate, run.plates, 1), len(run.rows)
        sites = drawn_sites(guide_trace)
        pairs = [_log_q_of_pairs(name, site, layout.plate, rows) for name, site in sites.items()]
        log_q = torch.cat(pairs, -1)  # (B, B, Z): of the code of row i under the guide of row j
        own = log_q.diagonal().sum(0)  # (B,)
        shares = _shares(rows, run.num_data).to(log_q)  # (B, B)
        together = (log_q.sum(-1) + shares).logsumexp(1)  # (B,)
        apart = (log_q + shares.unsqueeze(-1)).logsumexp(1).sum(-1)  # (B,)
        prior = torch.stack([_of_rows(layout, model_trace.nodes[name]) for name in sites]).sum(0)
        observed = [s for _, s in sample_sites(model_trace) if s["is_observed"] and not is_deterministic(s)]
        likelihood = torch.stack([layout.log_prob(s).sum() for s in observed]).sum() / run.num_data
        parts = {
            "mutual_information": (own - together).mean(),
            "total_correlation": (together - apart).mean(),
            "dimension_kl": (apart - prior).mean(),
        }
        weights = (self.alpha, self.beta, self.gamma)
        weighted = torch.stack([w * part for w, part in zip(weights, parts.values(), strict=True)]).sum()
        kl = (own - prior).mean()
        terms = {"elbo": likelihood - kl, "likelihood": likelihood, "kl_local": kl, "kl_global": torch.zeros_like(kl)}
        return kl_weight * weighted - likelihood, {n: x.detach() for n, x in {**terms, **parts}.items()}

    def describe(self) -> dict[str, Any]:
        """The objective as JSON."""
        return {"name": "total_correlation", **asdict(self)}


def _shares(rows: int, num_data: int) -> Tensor:
    """Logarithms of the weights of a batch's rows in the aggregate posterior at each row's code, ``(B, B)``."""
    own, others = 1.0 / num_data, (1.0 - 1.0 / num_data) / max(1, rows - 1)
    same = torch.eye(rows, dtype=torch.bool)
    return torch.where(same, own if rows > 1 else 1.0, others).log()


def _of_rows(layout: Layout, site: Site) -> Tensor:
    """A site's log-probability by row, unscaled, ``(B,)``."""
    value: Tensor = site["fn"].log_prob(site["value"])
    return layout.by_row(value, site["cond_indep_stack"])[0]


def _log_q_of_pairs(name: str, site: Site, plate: str, rows: int) -> Tensor:
    """The log-density of every row's code under the guide of every other row, by dimension: ``(B, B, Z)``."""
    base, value = site["fn"], site["value"]
    while isinstance(base, Independent):
        base = base.base_dist
    apart = is_local(site, plate) and not is_rough(site) and base.batch_shape[:1] == (rows,) == value.shape[:1]
    if not apart or base.event_shape or site["mask"] is not None:
        raise ValueError(
            f"'total_correlation' needs codes whose dimensions the guide draws independently for every row; {name!r} "
            "is not of that kind. Use a guide with posterior='normal', or objective='beta'."
        )
    found: Tensor = base.log_prob(value.unsqueeze(1))  # (B, 1, *event) under (B, *event)
    return found.flatten(2) if found.dim() > 2 else found.unsqueeze(-1)
