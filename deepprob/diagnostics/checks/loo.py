"""Is every row predicted by the others, or do some rows determine the posterior alone? (PSIS-LOO)"""

from __future__ import annotations

import numpy as np
from scipy import stats

from deepprob.diagnostics.case import Case, given
from deepprob.diagnostics.check import Check, Verdict
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.posteriors.loo import LOO, leave_one_out

NAME = "influential rows"
# An exact posterior of few rows or many parameters has a high k-hat in up to a fifth of its rows (three weights, eight
# rows); in more rows leave-one-out fails as a whole.
_SHARE, _LEVEL = 0.3, 0.01
_NOT_FINITE = "Look at these rows: their values may lie outside of the likelihood's support."
_MANY = (
    "Look at these rows: outliers ask for a likelihood with heavier tails, such as Student's t; if most rows are "
    "influential, the model has too many parameters for the data."
)
_DRAWS = 1000
_MOST_ROWS = 10_000  # two seconds for k-hat alone; more rows are asked for by posterior.loo


def check_loo(found: LOO) -> Check:
    """Whether leave-one-out works for the rows: whether few of them determine the posterior alone.

    Args:
        found: The result of ``posterior.loo``.

    Returns:
        The share of rows whose Pareto k-hat is above its limit; a caution if it is significantly above 30 %, a fail if
        a row has no finite density.

    References:
        Vehtari, Gelman, Gabry (2017), Practical Bayesian model evaluation using leave-one-out cross-validation and
        WAIC.

    Examples:
        >>> khat = np.array([0.1, 0.2, 0.9, 0.3])
        >>> check = check_loo(LOO(-np.ones(4), khat, p_loo=1.0, draws=1000, method="guide corrected"))
        >>> check.value, check.verdict, check.details["influential"]
        (0.25, 'pass', [2])
    """
    rows, influential = len(found.khat), found.influential
    unknown = np.flatnonzero(~np.isfinite(found.pointwise))
    share = len(influential) / rows
    many = float(stats.binom.sf(len(influential) - 1, rows, _SHARE)) < _LEVEL
    verdict: Verdict = "fail" if len(unknown) else "caution" if many else "pass"
    named = ", ".join(map(str, influential[:5])) + (f" and {len(influential) - 5} more" if len(influential) > 5 else "")
    score = f"elpd {found.elpd:.1f} ± {found.se:.1f} nats, {found.p_loo:.1f} effective parameters"
    if len(unknown):
        first = ", ".join(map(str, unknown[:5])) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        reading = f"{len(unknown)} of {rows} rows have no finite log-likelihood under some draws: {first}."
    elif len(influential):
        reading = f"{len(influential)} of {rows} rows have a Pareto k-hat above {found.khat_limit:.2f} when they are "
        reading += f"left out ({named}): the posterior would change much without them ({score})."
    else:
        reading = f"Every row can be left out by importance weights ({score})."
    return Check(
        name=NAME,
        value=share,
        se=float(np.sqrt(share * (1 - share) / rows)),
        threshold=_SHARE,
        verdict=verdict,
        reading=reading,
        next_step="" if verdict == "pass" else _NOT_FINITE if len(unknown) else _MANY,
        details={
            "elpd": found.elpd,
            "elpd_se": found.se,
            "p_loo": found.p_loo,
            "method": found.method,
            "draws": found.draws,
            "khat_limit": found.khat_limit,
            "influential": influential[:100].tolist(),
        },
        unit="of rows",
    )


def _applies(case: Case) -> bool:
    found, rows = case.posterior.structure, case.posterior.instance.num_data
    if not case.knows_train or not found.global_ or rows > _MOST_ROWS:
        return False
    if found.local and (case.posterior.chains or not found.by_row):  # a row alone determines its latents
        return False
    try:
        return len(_loo(case).pointwise) > 1
    except ValueError:  # a point, rows that are not those of the fit, or a likelihood that does not split into rows
        return False


def _loo(case: Case) -> LOO:
    def run() -> LOO:
        fitted = case.posterior._fitted
        batch, draws = fitted.accept(given(case.train)), fitted.num_stored or _DRAWS
        case.posterior.structure.check_rows()
        # The guide's own weights, which all rows would share, are the subject of other checks.
        return leave_one_out(fitted, batch, draws, case.seed, corrected=False)

    found: LOO = case._shared_by("loo", run)
    return found


influential_rows = Diagnostic(
    NAME,
    "Can each row be predicted from the others, or do some rows determine the posterior alone?",
    _applies,
    lambda case, level: check_loo(_loo(case)),
    about="predictions",
)
