"""Do Markov chains agree, and are there enough draws? (R-hat, effective sample size)"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Array, Check, Verdict, array, number
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.posteriors.arviz_compat import ess, mcse, rhat

# Vehtari et al. (2021) ask for 1.01 in long chains; short ones exceed it by chance.
_LEAST_RHAT, _MOST_RHAT = 1.01, 1.1
# At 50 effective draws the error of a mean is 14 % of the posterior's sd. The estimate itself is too noisy to ask more
# than an eighth of the draws of independent ones.
_EFFECTIVE, _SHARE = 50, 1 / 8
_LEAST_DRAWS = 16
_MOST_NUMBERS = 200
RHAT, ESS = "R-hat", "effective sample size"


@dataclass(frozen=True)
class Chains:
    """The chains of one number.

    Args:
        name: The site, with the place of the number in it.
        values: Shape ``(chains, draws)``.
    """

    name: str
    values: Array

    @cached_property
    def compared(self) -> Array:
        """The chains; the two halves of a single one."""
        draws = self.values.shape[1] // 2
        return (
            self.values if len(self.values) > 1 else np.concatenate([self.values[:, :draws], self.values[:, -draws:]])
        )

    @cached_property
    def rhat(self) -> float:
        """Rank-normalized split R-hat; infinite for chains that stay at different values, or are not finite."""
        if not np.isfinite(self.values).all() or (np.ptp(self.compared, axis=1) == 0).all():
            return math.inf
        with np.errstate(invalid="ignore"):
            found = rhat(self.compared)
            # Distances from the median may be all the same, as those of zeros and ones.
            return found if math.isfinite(found) else rhat(self.compared, method="z_scale")

    @cached_property
    def sizes(self) -> tuple[float, float]:
        """Effective sample sizes of the center and of the tails; zero for chains that do not move."""
        if not math.isfinite(self.rhat):
            return 0.0, 0.0
        found = ess(self.values), ess(self.values, method="tail")
        return tuple(x if math.isfinite(x) else 0.0 for x in found)  # type: ignore[return-value]

    @property
    def is_constant(self) -> bool:
        """Whether all draws are the same, as those of a fixed number in a matrix."""
        return bool((self.values == self.values.flat[0]).all())

    def rhat_limit(self, level: float) -> float:
        r"""The value that R-hat exceeds with a small probability if the chains agree.

        .. math:: \hat R^2 \le 1 - \frac1n + \frac{F_{1 - \alpha}}{n_{\mathrm{eff}}}

        with the quantile of an F distribution with :math:`m - 1` and :math:`m (n_{\mathrm{eff}} - 1)` degrees of
        freedom, for :math:`m` half chains of :math:`n` draws, of which each has :math:`n_{\mathrm{eff}}` on average.

        Args:
            level: The probability.
        """
        draws = self.compared.shape[1] // 2
        halves = np.concatenate([self.compared[:, :draws], self.compared[:, -draws:]])
        if not np.isfinite(halves).all() or (np.ptp(halves, axis=1) == 0).any():
            return _LEAST_RHAT
        size = float(np.clip(np.mean([ess(half[None], method="identity") for half in halves]), 2, draws))
        # R-hat is the larger one of the chains' and of their distances from the median.
        quantile = float(stats.f.ppf(1 - level / 2, len(halves) - 1, len(halves) * (size - 1)))
        return max(_LEAST_RHAT, math.sqrt(1 - 1 / draws + quantile / size))


def check_rhat(chains: Mapping[str, ArrayLike], *, level: float = 0.05) -> Check:
    """Whether Markov chains agree, by the R-hat of the worst number.

    Args:
        chains: Draws by site, shape ``(chains, draws, *site)``. One chain is compared with itself, by halves.
        level: The false-alarm rate for chains that agree.

    Returns:
        The largest R-hat relative to its limit: 1.01 in long chains, and more in short ones, where it exceeds that by
        chance. A fail above 1.1, and for chains that are not finite.

    References:
        Vehtari, Gelman, Simpson, Carpenter, Bürkner (2021), Rank-normalization, folding, and localization: an improved
        R-hat.

    Examples:
        >>> noise = np.random.default_rng(0).normal(size=(2, 300))
        >>> check_rhat({"loc": noise}).verdict, check_rhat({"loc": noise + [[0.0], [9.0]]}).verdict
        ('pass', 'fail')
    """
    found = numbers_of(chains)
    share = level / max(len(found), 1)
    limits = {x.name: x.rhat_limit(share) if x.rhat > _LEAST_RHAT else _LEAST_RHAT for x in found}
    worst = max(found, key=lambda x: x.rhat - limits[x.name])
    value, limit, (count, draws) = worst.rhat, limits[worst.name], worst.values.shape
    high = sum(x.rhat > limits[x.name] for x in found)
    verdict: Verdict = "pass" if value <= limit else "caution" if value <= _MOST_RHAT else "fail"
    parts = f"the halves of one chain of {draws} draws" if count == 1 else f"{count} chains of {draws} draws"
    if not np.isfinite(worst.values).all():
        reading = f"The draws of {worst.name} are not all finite numbers."
    elif verdict == "pass":
        reading = f"R-hat of {worst.name} is {value:.3f}, the largest of {len(found)} numbers: {parts} agree."
    else:
        reading = f"R-hat of {worst.name} is {value:.3g}: {parts} do not agree, in {high} of {len(found)} numbers."
    return Check(
        name=RHAT,
        value=value,
        se=None,
        threshold=limit,
        verdict=verdict,
        reading=reading,
        next_step=""
        if verdict == "pass"
        else "Run longer chains from different starts. If they still disagree, the "
        "posterior has several modes or a shape that the sampler cannot follow: reparameterize the model.",
        details={"chains": count, "draws": draws, "numbers": len(found), "level": level, "sites": _by_site(found)},
    )


def check_ess(chains: Mapping[str, ArrayLike]) -> Check:
    """Whether there are enough effective draws, of the center and of the tails, by the worst number.

    Args:
        chains: Draws by site, shape ``(chains, draws, *site)``.

    Returns:
        The smallest effective sample size. A caution below 50 (below an eighth of the draws, if there are fewer than
        400), a fail below a fifth of that.

    Examples:
        >>> noise = np.random.default_rng(0).normal(size=(2, 300))
        >>> check_ess({"loc": noise}).verdict, check_ess({"loc": noise.cumsum(1)}).verdict
        ('pass', 'fail')
    """
    found = numbers_of(chains)
    worst = min(found, key=lambda x: min(x.sizes))
    value, limit = min(worst.sizes), min(_EFFECTIVE, _SHARE * worst.values.size)
    verdict: Verdict = "pass" if value >= limit else "caution" if value >= limit / 5 else "fail"
    of = "tails" if worst.sizes[1] < worst.sizes[0] else "center"
    reading = f"{worst.values.size} draws are worth {value:.0f} independent ones for the {of} of {worst.name}"
    if value > 0:
        error = mcse(worst.values)
        reading += f"; its mean, {number(float(worst.values.mean()), error)}, has a Monte Carlo error of "
        reading += f"{error / float(worst.values.std()):.1%} of its sd."
    else:
        reading += ": its chains do not move, or are not finite."
    return Check(
        name=ESS,
        value=value,
        se=None,
        threshold=limit,
        verdict=verdict,
        reading=reading,
        next_step=""
        if verdict == "pass"
        else "Draw longer chains, or reparameterize the model so that they mix faster.",
        details={"draws": worst.values.size, "numbers": len(found), "sites": _by_site(found)},
        unit="draws",
        good=">=",
    )


def numbers_of(chains: Mapping[str, ArrayLike]) -> list[Chains]:
    """The chains of every number that varies; at most about 200 of them, spread evenly over the large sites.

    Raises:
        ValueError: If the chains are too short, or nothing varies.
    """
    found = []
    for site, values in chains.items():
        draws = array(values)
        count, length, *shape = draws.shape
        if length < _LEAST_DRAWS:
            raise ValueError(f"R-hat needs chains of at least {_LEAST_DRAWS} draws; these have {length}.")
        size = math.prod(shape)
        places = np.unique(np.linspace(0, size - 1, min(size, max(4, _MOST_NUMBERS // len(chains)))).astype(int))
        for place in places:
            index = ", ".join(map(str, np.unravel_index(place, shape))) if shape else ""
            name = f"{site}[{index}]" if shape else site
            found.append(Chains(name, draws.reshape(count, length, size)[:, :, place]))
    found = [x for x in found if not x.is_constant]
    if not found:
        raise ValueError("All draws are the same: there is nothing to compare.")
    return found


def _by_site(found: list[Chains]) -> dict[str, dict[str, float]]:
    """R-hat, effective sample sizes and Monte Carlo error of the worst number of every site."""
    worst: dict[str, Chains] = {}
    for x in found:
        site = x.name.partition("[")[0]
        if site not in worst or min(x.sizes) < min(worst[site].sizes):
            worst[site] = x
    return {
        x.name: {
            "rhat": x.rhat,
            "ess_bulk": x.sizes[0],
            "ess_tail": x.sizes[1],
            "mcse_mean": mcse(x.values) if min(x.sizes) > 0 else math.nan,
            "mcse_sd": mcse(x.values, method="sd") if min(x.sizes) > 0 else math.nan,
        }
        for x in worst.values()
    }


def _applies(case: Case) -> bool:
    return bool(case.posterior.chains) and not case.members


def _chains(case: Case) -> dict[str, Array]:
    return {name: array(values) for name, values in (case.posterior.chains or {}).items()}


rhat_of_chains = Diagnostic(
    RHAT,
    "Do the chains agree?",
    _applies,
    lambda case, level: check_rhat(_chains(case), level=level),
    about="posterior",
    tests=True,
)
effective_draws = Diagnostic(
    ESS, "Are there enough effective draws?", _applies, lambda case, level: check_ess(_chains(case)), about="posterior"
)
