"""The evidence lower bound, with named terms and without synchronization of host and device."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import MultiFrameTensor
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from deepprob.errors import positive, unknown, whole
from deepprob.fitting.baselines import baseline_of, tracking
from deepprob.fitting.free_bits import free_kl
from deepprob.fitting.log_weights import drawn_pairs
from deepprob.fitting.particles import check_drawn, check_precision, is_rough, run_particles
from deepprob.fitting.path_gradients import check_reparameterized, path_loss
from deepprob.programs.elimination import PARTS, Part, terms
from deepprob.programs.enumeration import any_enumerated
from deepprob.programs.kl import closed_form_kls
from deepprob.programs.run import Run
from deepprob.programs.sites import Site, drawn_sites, is_deterministic, is_local, log_prob, sample_sites


@dataclass(frozen=True)
class ELBO:
    r"""The evidence lower bound, in nats per datum, in three named terms.

    .. math::
        \frac1N \log p(x_{1:N}) \ge
        \frac1N\, \mathbb E_q \Big[ \tfrac NB \sum_{i \in \text{batch}}
        \big( \log p(x_i \mid z_i, w) - \mathrm{KL}(q(z_i) \,\|\, p(z_i)) \big) \Big]
        - \frac1N \mathrm{KL}(q(w) \,\|\, p(w))

    with local latents :math:`z_i` inside the data plate and global latents :math:`w` outside. A minibatch of any
    size gives an unbiased estimate. A site's KL has its closed form if torch or Pyro know one, and if the guide also
    drew, before the site, all that the model drew before it; otherwise ``log q - log p`` is averaged. Sites that
    cannot be reparameterized get the score-function estimator, with a weight summed over the site's own plates only.
    If a site has a baseline, ``infer={"baseline": ...}``, the gradient is that of Pyro's ``TraceGraph_ELBO``.

    A discrete site marked ``infer={"enumerate": "parallel"}`` is summed out exactly. If the guide leaves it out, it is
    summed out of the model, and its part of the evidence counts as likelihood. If the guide draws it (where the mark
    may also be ``"sequential"``), the average of ``log p(x | y)`` over its values counts as likelihood, and that of
    ``log q(y) - log p(y)`` as KL; see `deepprob.programs.elimination.terms`.

    With ``gradient="stl"`` (sticking the landing), the gradient in the guide's parameters follows the draws only and
    leaves out the score :math:`\nabla_\phi \log q_\phi(z)` at fixed draws, whose expectation is zero. Its noise
    vanishes as the guide reaches the posterior. KLs have no closed form then.

    With ``free_bits``, a latent dimension d whose KL is below :math:`\lambda` nats has no gradient of its KL, so that
    it is not pushed to the prior:

    .. math:: \text{loss} = -\text{likelihood} + \beta \sum_d \max\big(\lambda,
              \tfrac1B \textstyle\sum_i \mathrm{KL}(q(z_{id}) \,\|\, p(z_{id}))\big)

    The terms, among them ``elbo``, do not contain the minimum. A site whose guide does not factorize over dimensions,
    or has no closed form, has the minimum :math:`\lambda` times its size.

    Args:
        particles: Draws from the guide per step, vectorized in a leading plate if the program broadcasts over it.
        analytic_kl: Whether to use closed-form KLs.
        layers: Precision in which linear and convolutional layers multiply, ``"float32"`` or ``"bfloat16"``; their
            outputs and all log-probabilities are in float32.
        gradient: ``"total"``, or ``"stl"`` (``objective="stl"``), which needs draws with a reparameterized gradient
            and no ``free_bits``.
        free_bits: The minimum :math:`\lambda` of the KL of a dimension of local latents, in nats; 0 for none.

    References:
        Kingma, Welling (2014), Auto-Encoding Variational Bayes.
        Hoffman, Blei, Wang, Paisley (2013), Stochastic Variational Inference.
        Ranganath, Gerrish, Blei (2014), Black Box Variational Inference.
        Obermeyer et al. (2019), Tensor Variable Elimination for Plated Factor Graphs.
        Roeder, Wu, Duvenaud (2017), Sticking the Landing.
        Kingma et al. (2016), Improved Variational Inference with Inverse Autoregressive Flow (free bits).

    Examples:
        With the exact posterior as guide the bound is the log evidence for any noise:

        >>> import pyro, pyro.distributions as dist
        >>> from deepprob.programs.program import Program
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("mu", dist.Normal(y / 2, 0.5**0.5))
        >>> y = torch.tensor(1.0)
        >>> run = Run(Program.of(model, guide), (y,), torch.arange(1), 1, plates=0)
        >>> loss, terms = ELBO(particles=4000, analytic_kl=False)(run)
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(y)
        >>> bool((terms["elbo"] - exact).abs() < 1e-4)
        True
    """

    particles: int = 1
    analytic_kl: bool = True
    layers: str = "float32"
    gradient: str = "total"
    free_bits: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "particles", whole("particles", self.particles))
        check_precision(self.layers)
        if self.gradient not in ("total", "stl"):
            raise unknown("gradient", self.gradient, ("total", "stl"))
        object.__setattr__(self, "free_bits", positive("free_bits", self.free_bits, zero=True))
        if self.free_bits and self.gradient == "stl":
            raise ValueError("free_bits needs the gradient of the KL, a part of which 'stl' leaves out. Leave out one.")

    def __call__(self, run: Run, *, kl_weight: float | Tensor = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimize and the terms of the bound, all per datum.

        Args:
            run: The program and its batch; the number of draws is that of the particles.
            kl_weight: Weight of both KL terms in the loss (not in ``terms``).

        Returns:
            The loss, a scalar whose gradient is unbiased, and detached scalars ``elbo``, ``likelihood``,
            ``kl_local``, ``kl_global``.

        Raises:
            ValueError: If ``gradient="stl"`` or ``free_bits`` does not fit the program.
        """
        if self.particles > 1 and not run.stacks:
            return self._one_by_one(run, kl_weight)
        along_paths, plate = self.gradient == "stl", run.program.row_plate
        with tracking(run.program):
            traces = run_particles(replace(run, leaves=along_paths), self.particles, self.layers)
        guide_trace, model_trace = traces[0]
        enumerated, closed = any_enumerated(traces), {}
        if enumerated:
            parts = self._enumerated_terms(plate, traces)
        else:
            closed = closed_form_kls(guide_trace, model_trace) if self.analytic_kl and not along_paths else {}
            parts = self._terms(plate, guide_trace, model_trace, closed)
        if run.program.has_baselines:
            parts = (detach_provenance(parts[0]), detach_provenance(parts[1]), detach_provenance(parts[2]))
        norm = 1.0 / (run.num_data * self.particles)
        likelihood, kl_local, kl_global = (part * norm for part in parts)
        kl = kl_local + kl_global
        raised = free_kl(plate, traces, self.free_bits, norm) + kl_global if self.free_bits else kl
        loss = self._kl_loss(kl_weight, raised) - likelihood
        slope = self._kl_slope(kl_weight, kl)
        if along_paths:
            check_reparameterized("stl", guide_trace)
            log_q = torch.stack([log_prob(s).sum() for s in drawn_sites(guide_trace).values()]).sum() * norm
            loss = path_loss(-loss, slope * log_q - loss, -loss, drawn_pairs(guide_trace))
        elif not enumerated and (scores := _score_terms(run, guide_trace, model_trace, closed, slope)) is not None:
            loss = loss - (scores - scores.detach()) * norm  # changes the gradient only, not the value
        terms = {"elbo": likelihood - kl, "likelihood": likelihood, "kl_local": kl_local, "kl_global": kl_global}
        return loss, {name: term.detach() for name, term in terms.items()}

    def describe(self) -> dict[str, Any]:
        """The objective as JSON."""
        return {"name": "stl" if self.gradient == "stl" else "elbo", **asdict(self)}

    def _kl_loss(self, kl_weight: float | Tensor, kl: Tensor) -> Tensor:
        """The part of the loss that the KL makes, per datum."""
        return kl_weight * kl

    def _kl_slope(self, kl_weight: float | Tensor, kl: Tensor) -> float | Tensor:
        """The derivative of `_kl_loss` in the KL."""
        return kl_weight

    def _one_by_one(self, run: Run, kl_weight: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over runs of one particle."""
        one = replace(self, particles=1)
        losses, terms = zip(*(one(run, kl_weight=kl_weight) for _ in range(self.particles)), strict=True)
        return torch.stack(losses).mean(), {name: torch.stack([t[name] for t in terms]).mean() for name in terms[0]}

    def _enumerated_terms(self, plate: str, traces: list[tuple[Trace, Trace]]) -> tuple[Tensor, Tensor, Tensor]:
        total: dict[Part, Tensor] = dict.fromkeys(PARTS, torch.zeros(()))
        for guide_trace, model_trace in traces:
            closed = closed_form_kls(guide_trace, model_trace) if self.analytic_kl else {}
            for term in terms(guide_trace, model_trace, plate, closed):
                total[term.part] = total[term.part] + term.value.sum()
        return total["likelihood"], total["kl_local"], total["kl_global"]

    def _terms(
        self, plate: str, guide_trace: Trace, model_trace: Trace, closed: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_drawn(guide_trace, model_trace)
        likelihood = kl_local = kl_global = torch.zeros(())
        for name, site in sample_sites(model_trace):
            if site["is_observed"]:
                if not is_deterministic(site):
                    likelihood = likelihood + log_prob(site).sum()
            elif name not in closed:
                term = -log_prob(site).sum()
                kl_local, kl_global = _add(kl_local, kl_global, term, is_local(site, plate))
        for name, site in sample_sites(guide_trace):
            if name in closed:
                term = closed[name].sum()
            elif site["is_observed"] and is_deterministic(site):
                continue
            else:
                term = _log_q(site).sum()
            kl_local, kl_global = _add(kl_local, kl_global, term, is_local(site, plate))
        return likelihood, kl_local, kl_global


def _add(local: Tensor, global_: Tensor, term: Tensor, to_local: bool) -> tuple[Tensor, Tensor]:
    return (local + term, global_) if to_local else (local, global_ + term)


def _log_q(site: Site) -> Tensor:
    """Log-probability of a guide's site, detached if the site has the score-function estimator.

    The gradient of ``log q`` itself is zero in expectation there, and would only add noise.
    """
    value = log_prob(site)
    return value.detach() if is_rough(site) else value


def _score_terms(
    run: Run, guide_trace: Trace, model_trace: Trace, closed: dict[str, Tensor], kl_weight: float | Tensor
) -> Tensor | None:
    """Sum of ``log q(z) * stop_gradient(log p(x | z) - kl_weight * KL)`` over sites without a reparameterized draw.

    A baseline is subtracted from the weight, and its squared error from the sum.
    """
    rough = [(n, s) for n, s in sample_sites(guide_trace) if is_rough(s)]
    if not rough:
        return None
    costs = []
    for name, site in sample_sites(model_trace):
        if not site["is_observed"]:
            # A closed-form KL has its gradient in the loss; here its value replaces a sampled log-ratio.
            term = -closed[name] if name in closed else log_prob(site)
            costs.append((site["cond_indep_stack"], (kl_weight * term).detach()))
        elif not is_deterministic(site):
            costs.append((site["cond_indep_stack"], log_prob(site).detach()))
    for name, site in sample_sites(guide_trace):
        if name not in closed:
            costs.append((site["cond_indep_stack"], -(kl_weight * log_prob(site)).detach()))
    total, ratio = torch.zeros(()), MultiFrameTensor(*costs)
    for name, site in rough:
        if run.program.has_baselines:
            ratio = MultiFrameTensor(*((s, detach_provenance(x)) for s, x in costs if name in get_provenance(x)))
        weight = ratio.sum_to(site["cond_indep_stack"])
        unscaled = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
        if (found := baseline_of(run.averages, name, site, weight)) is not None:
            weight, total = weight - found[0].detach(), total - found[1]
        total = total + (detach_provenance(unscaled) * weight).sum()
    return total
