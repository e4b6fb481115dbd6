"""How exactly is the evidence known? A check that a report has only if it is asked for, because of its cost."""

from __future__ import annotations

import math

from numpy.typing import ArrayLike
from torch import Tensor

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Check, Verdict, array
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.diagnostics.observed import places_of
from deepprob.posteriors.annealing import sandwich
from deepprob.posteriors.evidence import evidence_of
from deepprob.programs.arguments import Arguments, rows_of
from deepprob.programs.minibatch import Batch, num_rows
from deepprob.programs.sites import observed_sites

NAME = "sandwich of the evidence"
_ROWS, _CHAINS, _STEPS = 20, 10, 150
_NATS = 1.0


def check_sandwich(lower: ArrayLike, upper: ArrayLike, *, guide: float = math.nan, particles: int = 0) -> Check:
    """The gap between a lower and an upper bound of the log evidence of simulated rows.

    Args:
        lower: Bounds from below, ``(rows,)``.
        upper: Bounds from above, ``(rows,)``.
        guide: The mean bound from below by importance sampling with the guide; nan if it is not known.
        particles: Its particles.

    Returns:
        The mean gap in nats per row; a caution if it is surely above 1.

    References:
        Grosse, Ghahramani, Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo.

    Examples:
        >>> check_sandwich([-90.2, -80.4], [-90.0, -80.0]).reading
        'The log evidence of simulated rows is between -85.3 and -85 nats per row.'
    """
    low, high = array(lower), array(upper)
    gaps = high - low
    gap, se = float(gaps.mean()), float(gaps.std(ddof=1) / math.sqrt(len(gaps)))
    verdict: Verdict = "caution" if not gap - 1.645 * se <= _NATS else "pass"
    reading = f"The log evidence of simulated rows is between {low.mean():.3g} and {high.mean():.3g} nats per row"
    if math.isfinite(guide):
        reading += f"; importance sampling with {particles} particles of the guide finds {guide:.3g}"
    return Check(
        name=NAME,
        value=gap,
        se=se,
        threshold=_NATS,
        verdict=verdict,
        reading=f"{reading}.",
        next_step=""
        if verdict == "pass"
        else "Do not compare models by differences of this size; more steps, posterior.evidence(x, annealing=1000), "
        "narrow the gap.",
        details={"lower": float(low.mean()), "upper": float(high.mean()), "guide": guide, "rows": len(gaps)},
        unit="nats per row",
    )


def simulated(case: Case, rows: int) -> tuple[Batch, dict[str, Tensor]]:
    """Rows drawn from the model, and the latent values that they were drawn with.

    Args:
        case: The case; inputs, such as the lengths of sequences, are those of its first rows.
        rows: Number of rows, B.
    """
    fitted = case.posterior._fitted
    batch = rows_of(case.sample_batch, slice(rows))
    with fitted.querying(case.seed):
        drawn = fitted.prior_draws(batch, num_rows(batch), 1)
    parts = [*batch]
    for site, place in _places(case).items():
        parts[place] = drawn[site][0].reshape(parts[place].shape).to(parts[place].dtype)
    found = Arguments(parts, batch.call) if isinstance(batch, Arguments) else tuple(parts)
    return found, {name: drawn[name][0] for name in case.posterior.structure.local}


def _places(case: Case) -> dict[str, int]:
    """The place in the batch of the data of every observed site, which the program may draw anew, such as bits."""
    fitted = case.posterior._fitted
    with fitted.querying(case.seed):
        run = fitted.prepared(case.sample_batch, 1)
        observed = observed_sites(fitted.traces(run)[1])
    return places_of(observed, run.batch, (), fitted.layout(1))


def _applies(case: Case) -> bool:
    posterior, structure = case.posterior, case.posterior.structure
    if posterior.kind != "guide" or not case.per_row or structure.summed or structure.undrawable:
        return False
    fitted = posterior._fitted
    return fitted.amortized and not fitted.keeps_rows and {*_places(case)} == {*structure.observed}


def _run(case: Case, level: float) -> Check:
    batch, latents = simulated(case, _ROWS)
    fitted = case.posterior._fitted
    with fitted.querying(case.seed + 1):
        lower, upper = sandwich(fitted, batch, latents, _CHAINS, _STEPS)
        guide = evidence_of(fitted, batch, case.particles).mean
    return check_sandwich(lower, upper, guide=guide, particles=case.particles)


evidence_sandwich = Diagnostic(NAME, "How exactly is the evidence of a row known?", _applies, _run, about="posterior")
