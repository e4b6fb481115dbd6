"""How much would guides gain that are fitted to each row alone? (Amortization gap)"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Check, Verdict, number
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.programs.arguments import rows_of
from deepprob.programs.minibatch import num_rows
from deepprob.programs.tracing import log_density

NAME = "amortization gap"
NATS_PER_NUMBER = 0.05
_DRAWS, _STEPS, _MOST_ROWS = 16, 20, 64
_SHARE, _FACTOR = 0.7, 4.0  # of a Newton step; most change of a variance in one step

Density = Callable[[Tensor], tuple[Tensor, Tensor]]  # values (K,) and gradients (K, D) at points (K, D)


def check_amortization(gap: float, se: float, *, numbers: int, rows: int, looseness: float) -> Check:
    """Whether guides that are fitted to each row alone have a higher bound than the encoder's.

    Args:
        gap: How much higher their mean bound is, nats per row.
        se: The standard error.
        numbers: How many latent numbers a row has.
        rows: The number of rows that were tried.
        looseness: How far the encoder's bound is at least below the log evidence, nats per row.

    Returns:
        The gap; a caution if it is surely above 0.05 nats for every latent number, a fail above five times that.

    References:
        Cremer, Li, Duvenaud (2018), Inference Suboptimality in Variational Autoencoders.

    Examples:
        >>> check_amortization(0.02, 0.01, numbers=2, rows=100, looseness=0.1).verdict
        'pass'
    """
    limit, surely = NATS_PER_NUMBER * numbers, gap - 1.645 * se
    verdict: Verdict = "fail" if surely > 5 * limit else "caution" if surely > limit else "pass"
    return Check(
        name=NAME,
        value=gap,
        se=se,
        threshold=limit,
        verdict=verdict,
        reading=f"The bound of independent normals fitted to each of {rows} rows alone is {number(abs(gap), se)} nats "
        f"per row {'above' if gap > 0 else 'below'} the guide's, which is {number(looseness)} nats or more below the "
        "evidence.",
        next_step="" if verdict == "pass" else "Train the encoder for longer, or take a larger one.",
        details={"rows": rows, "numbers": numbers, "looseness": looseness},
        unit="nats per row",
    )


def bound_of_own_guides(density: Density, mean: Tensor, sd: Tensor, seed: int) -> Tensor:
    r"""The bound of independent normals, fitted to the density from a start, by draw.

    Each step fits the line :math:`-P(u - \mu)` to the gradients at the draws of the normals, number by number, as
    `deepprob.engine.accuracy` does, and goes a part of the way there.

    Args:
        density: The density, for as many chains as there shall be draws.
        mean: Means to start at, ``(D,)``.
        sd: Standard deviations to start at, ``(D,)``.
        seed: Random seed of the draws.

    Returns:
        The bound at fresh draws, shape ``(K,)``.
    """
    generator = torch.Generator(mean.device).manual_seed(seed)

    def noise() -> Tensor:
        half = torch.randn(_DRAWS // 2, len(mean), generator=generator, device=mean.device, dtype=mean.dtype)
        return torch.cat([half, -half])  # a mean of zero halves the noise of a step

    for step in range(_STEPS):
        share = min(_SHARE, 2.0 / (1 + step))  # a mean over the last steps, whose noise it removes
        eps = noise()
        _, gradient = density(mean + sd * eps)
        precision = -(eps * gradient).mean(0) / (sd * eps.square().mean(0))
        precision = precision.clamp(sd**-2 / _FACTOR, sd**-2 * _FACTOR)
        mean = mean + (share * gradient.mean(0) / precision).clamp(-2 * sd, 2 * sd)
        sd = ((1 - share) * sd.log() - share * precision.log() / 2).exp()
    eps = noise()
    value, _ = density(mean + sd * eps)
    return value + sd.log().sum() + (eps.square().sum(1) + len(mean) * math.log(2 * math.pi)) / 2


def _applies(case: Case) -> bool:
    if case.posterior.kind != "guide" or not case.per_row or case.posterior.structure.plates != 1:
        return False
    if not case.posterior._fitted.amortized:  # a guide of all rows together
        return False
    draws = case.row_draws
    local = case.posterior.structure.local
    return bool(draws.scores) and draws.scores.keys() == set(local) and not case.posterior.structure.summed


def _run(case: Case, level: float) -> Check:
    rows = min(_MOST_ROWS, num_rows(case.sample_batch))
    density = log_density(case.posterior.instance, rows_of(case.sample_batch, slice(rows)), chains=_DRAWS)
    draws, weights = case.row_draws.values, torch.as_tensor(case.log_weights)[:, :rows]
    columns = torch.cat([draws[name][:, :rows].flatten(1) for name in density.shapes], 1)
    varying = columns.std(0) > 0  # steps beyond the end of a sequence have latents too, which are masked

    def density_of_varying(u: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = density(columns[:1].expand(len(u), -1).masked_scatter(varying, u))
        return value, gradient[:, varying]

    start = columns[:, varying]
    own = bound_of_own_guides(density_of_varying, start.mean(0), start.std(0), case.seed).double()
    guides = weights.sum(1)
    gap = float(own.mean() - guides.mean()) / rows
    se = float((own.var() / len(own) + guides.var() / len(guides)).sqrt()) / rows
    looseness = float((weights.logsumexp(0) - math.log(len(weights)) - weights.mean(0)).mean())
    numbers = math.ceil(start.shape[1] / rows)
    return check_amortization(gap, se, numbers=numbers, rows=rows, looseness=looseness)


amortization_gap = Diagnostic(
    NAME, "How much would guides gain that are fitted to each row alone?", _applies, _run, about="posterior"
)
