"""Does the posterior have other modes than the one that the guide describes?"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Check, Verdict, array, number
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.posteriors.label_switching import Switching
from deepprob.posteriors.margin import margin_of
from deepprob.posteriors.other_modes import POINTS, OtherMode

_LABELS, _STARTS, _OTHER = "label switching", "agreement of restarts", "other modes"
_MASS_CAUTION, _MASS_FAIL = 0.05, 0.5
APART = 3.0  # posterior sds between the means of two starts


def check_label_switching(switching: Switching | None) -> Check:
    """Whether entries of latent sites can change places without changing the posterior.

    Args:
        switching: The entries that can, as the fit has found them.

    Returns:
        The number of equal modes; a caution if there are several, of which a guide describes one.

    Examples:
        >>> check_label_switching(Switching(("weights", "locs"), 3)).value
        6.0
    """
    modes = 1 if switching is None else math.factorial(switching.labels)
    if switching is None:
        reading, next_step = "No entries of the latent sites can change places without changing the posterior.", ""
    else:
        sites = " and ".join(switching.sites)
        reading = (
            f"The {switching.labels} entries of {sites} can change places without changing the posterior. It has "
            f"{modes} equal modes, and the guide describes one: what it says about a single entry depends on the start."
        )
        next_step = (
            "Use predictions and other quantities that do not depend on the labels, or tell the entries apart in the "
            "prior, such as by an order."
        )
    return Check(
        name=_LABELS,
        value=float(modes),
        se=None,
        threshold=1.0,
        verdict="caution" if modes > 1 else "pass",
        reading=reading,
        next_step=next_step,
        details={} if switching is None else {"sites": list(switching.sites), "labels": switching.labels},
    )


def check_other_modes(other: OtherMode | None) -> Check:
    """Whether a climb from draws of the prior has found a mode that the guide does not cover.

    Args:
        other: The mode, if one was found.

    Returns:
        Its share of the mass of both, by Laplace's method; a caution above 5 %, a fail above a half.

    Examples:
        >>> check_other_modes(None).verdict, check_other_modes(OtherMode(2.0, 9.0, "mu")).verdict
        ('pass', 'fail')
    """
    share = 0.0 if other is None else 1 / (1 + math.exp(-min(max(other.log_mass, -700.0), 700.0)))
    verdict: Verdict = "fail" if share > _MASS_FAIL else "caution" if share > _MASS_CAUTION else "pass"
    if other is None:
        reading = f"Climbs from {POINTS} draws of the prior found no mode that the guide does not cover."
    else:
        reading = (
            f"Climbs from {POINTS} draws of the prior found a mode {number(other.distance)} sds away (in "
            f"{other.site}), with {f'{share:.1%}' if share >= 1e-3 else 'less than 0.1%'} of the mass of both."
        )
    return Check(
        name=_OTHER,
        value=share,
        se=None,
        threshold=_MASS_CAUTION,
        verdict=verdict,
        reading=reading,
        next_step="" if verdict == "pass" else "Fit several starts, restarts=4, and report the modes side by side.",
        details={} if other is None else {"log_mass": other.log_mass, "distance": other.distance, "site": other.site},
    )


def check_restarts(
    behind: ArrayLike, se: ArrayLike, distance: ArrayLike, margin: float, *, level: float = 0.05
) -> Check:
    """Whether the starts of a fit ended in the same place.

    Args:
        behind: How far the bound of every start lies below the best one's, in nats of the whole posterior.
        se: The standard errors.
        distance: The largest distance over sites of every start's means from the kept start's, in posterior sds.
        margin: The smallest relevant difference of two bounds, in nats.
        level: The error rate for a start that is as good as the best.

    Returns:
        The number of other places with a bound as high as the best one's, up to log 20: a twentieth of its mass. A
        caution if there are any, or if all other starts ended in worse places, so that chance has chosen.
    """
    gaps, errors, far = (array(x) for x in (behind, se, distance))
    reach = float(stats.norm.ppf(1 - level))
    other = (far > APART) & (gaps - reach * errors <= np.log(20.0))
    worse = gaps - reach * errors > max(margin, np.log(20.0))
    count, starts = int(other.sum()), len(gaps)
    alone = starts > 1 and int(worse.sum()) == starts - 1
    verdict: Verdict = "caution" if count or alone else "pass"
    if count:
        reading = (
            f"{count} of {starts} starts ended up to {number(float(far[other].max()))} posterior sds away with about "
            "as high a bound: the posterior has several modes, and the guide describes one."
        )
        next_step = "Report the modes side by side, one fit each, or use a sampler or a guide with several modes."
    elif alone:
        reading = (
            f"All {starts - 1} other starts ended in worse places, by {number(float(gaps[worse].min()))} nats or more: "
            "a better one may exist."
        )
        next_step = "Try more starts: restarts=16."
    else:
        reading = f"No start of {starts} found another place with about as high a bound."
        next_step = ""
    return Check(
        name=_STARTS,
        value=float(count),
        se=None,
        threshold=0.0,
        verdict=verdict,
        reading=reading,
        next_step=next_step,
        details={"behind": gaps.tolist(), "behind_se": errors.tolist(), "distance": far.tolist()},
        unit="modes",
    )


def _applies(case: Case) -> bool:
    return case.accuracy is not None and bool(case.accuracy.by_gradients or case.accuracy.by_weights)


def _has_searched(case: Case) -> bool:
    return case.accuracy is not None and case.accuracy.searched


def _run(case: Case, level: float) -> Check:
    return check_label_switching(None if case.accuracy is None else case.accuracy.switching)


def _run_other(case: Case, level: float) -> Check:
    return check_other_modes(None if case.accuracy is None else case.accuracy.other)


def _run_starts(case: Case, level: float) -> Check:
    found = case.posterior.history.restarts
    finite = np.isfinite(array(found["behind"]))
    distances = [array(x)[finite] for name, x in found.items() if name.startswith("distance.")]
    far = np.max(distances, axis=0) if distances else np.zeros(int(finite.sum()))
    margin = margin_of(case.posterior.instance)
    return check_restarts(array(found["behind"])[finite], array(found["behind_se"])[finite], far, margin)


label_switching = Diagnostic(
    _LABELS,
    "Can entries of latent sites change places without changing the posterior?",
    _applies,
    _run,
    about="posterior",
)
other_modes = Diagnostic(
    _OTHER, "Are there modes that the guide does not cover?", _has_searched, _run_other, about="posterior"
)
agreement_of_restarts = Diagnostic(
    _STARTS,
    "Did the starts of the fit end in the same place?",
    lambda case: bool(case.posterior.history.restarts),
    _run_starts,
    about="posterior",
)
