"""Do data drawn from the posterior look like the data?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from deepprob.diagnostics.case import Case, Diagnostic, num_optional
from deepprob.diagnostics.check import Array, Check, Verdict, array
from deepprob.diagnostics.checks.replicates import joint_p, two_sided

NAME = "replicates look alike"
CAUTION, FAIL = 0.1, 0.5


def statistics(data: ArrayLike, centre: ArrayLike | None = None, spread: ArrayLike | None = None) -> dict[str, Array]:
    """Test statistics of data sets, with what they are measured by.

    Args:
        data: Shape ``(R, rows, ...)``: replicates leading.
        centre: Predicted means, shape ``(rows, ...)``.
        spread: Predicted standard deviations, shape ``(rows, ...)``.

    Returns:
        Mean, sd, min, max and, given predictions, the root mean square of the standardised
        residual, each ``(R,)``.

    Examples:
        >>> {k: float(v[0]) for k, v in statistics([[0.0, 2.0]]).items()}
        {'mean': 1.0, 'sd': 1.0, 'min': 0.0, 'max': 2.0}
    """
    values = array(data)
    flat = values.reshape(len(values), -1)
    result = {"mean": flat.mean(1), "sd": flat.std(1), "min": flat.min(1), "max": flat.max(1)}
    if centre is not None and spread is not None:
        residual = ((values - array(centre)) / np.maximum(array(spread), 1e-12)).reshape(len(values), -1)
        result["residual"] = np.sqrt(np.square(residual).mean(1))
    return result


def shares(labels: ArrayLike, classes: int) -> dict[str, Array]:
    """Share of every class in every data set, shape ``(R,)`` each.

    Examples:
        >>> {k: v.tolist() for k, v in shares([[0, 1, 1, 1]], 2).items()}
        {'share of class 0': [0.25], 'share of class 1': [0.75]}
    """
    values = array(labels)
    flat = values.reshape(len(values), -1)
    return {f"share of class {c}": (flat == c).mean(1) for c in range(classes)}


def look_alike(
    observed: dict[str, Array],
    replicated: dict[str, Array],
    units: dict[str, float],
    *,
    level: float = 0.05,
) -> Check:
    """Posterior predictive check: are the data's statistics like those of data drawn from the posterior?

    One p-value for all statistics together holds the level exactly where data and replicates are
    exchangeable; a difference too small to matter is not held against the posterior, however many
    rows show it.

    Args:
        observed: Statistics of the data, one number each.
        replicated: The same of the replicates, shape ``(R,)`` each.
        units: What a difference of one means for each statistic (the data's sd, say).
        level: The false-alarm rate.

    Returns:
        The p-value; a caution if it is below the level and some difference is above 0.1 units, a
        fail above 0.5.

    References:
        Gelman, Meng, Stern (1996), Posterior predictive assessment of model fitness via realized
        discrepancies.

    Examples:
        >>> again = {"mean": np.random.default_rng(0).normal(size=199)}
        >>> look_alike({"mean": 0.5}, again, {"mean": 1.0}).verdict
        'pass'
        >>> look_alike({"mean": 9.0}, again, {"mean": 1.0}).verdict
        'fail'
    """
    names = list(observed)
    seen = np.array([float(np.ravel(observed[n])[0]) for n in names])
    drawn = np.stack([array(replicated[n]) for n in names], 1)
    chance, separate = joint_p(seen, drawn), two_sided(seen, drawn)
    effects = np.abs(seen - drawn.mean(0)) / np.array([max(units[n], 1e-12) for n in names])
    # Only statistics that are themselves out of the ordinary can say how large the difference is.
    real = effects * (separate <= max(level, 2 / (len(drawn) + 1)))
    size = float(real.max()) if chance <= level else 0.0
    verdict: Verdict = "fail" if size > FAIL else "caution" if size > CAUTION else "pass"
    odd = names[int(np.argmax(real if verdict != "pass" else -separate))]
    at = names.index(odd)
    low, high = np.quantile(drawn[:, at], [0.05, 0.95])
    return Check(
        name=NAME,
        value=chance,
        se=None,
        threshold=level,
        verdict=verdict,
        reading=f"p = {chance:.2g} for {', '.join(names) if len(names) < 7 else f'{len(names)} statistics'}; furthest "
        f"is {odd}: {seen[at]:.3g} in the data, {low:.3g} to {high:.3g} in 90 % of replicates"
        + (", a difference too small to matter." if verdict == "pass" and chance <= level else "."),
        next_step="" if verdict == "pass" else _advice(odd),
        details={
            "statistics": {
                n: {
                    "observed": seen[i],
                    "replicated": drawn[:, i].mean(),
                    "p": separate[i],
                    "effect": effects[i],
                }
                for i, n in enumerate(names)
            },
            "replicates": len(drawn),
            "level": level,
        },
    )


def _advice(statistic: str) -> str:
    if statistic == "residual":
        return "The noise is misjudged: learn it, let it depend on the input, or use heavier tails."
    if statistic in ("min", "max"):
        return "The extremes differ: try a likelihood with other tails or the right support."
    return "The likelihood or the prior does not fit these data: look at the pictures, then change it."


def _run(case: Case, level: float) -> Check:
    return _run_targets(case, level) if case.supervised else _run_rows(case, level)


def _run_targets(case: Case, level: float) -> Check:
    target, drawn = case.target, case.replicates
    if case.prediction.kind in ("classes", "binary"):
        count = int(max(target.max(), drawn.max())) + 1
        seen = shares(target[None], count)
        return look_alike(seen, shares(drawn, count), dict.fromkeys(seen, 1.0), level=level)
    fitted = array(case.prediction.mean), array(case.prediction.sd)
    seen, again = statistics(target[None], *fitted), statistics(drawn, *fitted)
    units = {**dict.fromkeys(seen, float(target.std())), "residual": 1.0}
    return look_alike(seen, again, units, level=level)


def _run_rows(case: Case, level: float) -> Check:
    """Rows of a program without inputs, against rows drawn from nothing but the fitted model.

    A guide that has seen a row can copy it, so its own replicates would be too good; only where
    latents are global do replicates come from their posterior.
    """
    site = case.posterior.structure.observed[0]
    seen = array(case.traces[1].nodes[site]["value"])  # as the program prepared it: binarised, say
    if case.per_row:
        drawn = case.posterior.sample_prior(len(seen), draws=case.particles, seed=case.seed)[site]
    else:
        drawn = case.posterior.predict(*case.sample_batch, draws=case.particles, seed=case.seed).draws
    replicated = array(drawn).reshape(case.particles, *seen.shape)
    binary = bool(np.isin(replicated, (0.0, 1.0)).all())
    observed, again = row_statistics(seen[None], binary), row_statistics(replicated, binary)
    spread = float(seen.std())
    return look_alike(observed, again, dict.fromkeys(observed, spread), level=level)


def row_statistics(data: ArrayLike, binary: bool = False) -> dict[str, Array]:
    """`statistics`, and how much the rows' own means differ.

    Args:
        data: Shape ``(R, rows, ...)``.
        binary: Whether the likelihood is of zeros and ones: then sd, min and max are settled by the mean, and would
            only tell zeros and ones from the shades of grey that they are often fitted to.

    Examples:
        >>> {k: float(v[0]) for k, v in row_statistics([[[0.0, 0.0], [1.0, 1.0]]], binary=True).items()}
        {'mean': 0.5, 'sd of row means': 0.5}
    """
    values = array(data)
    result = statistics(values)
    if binary:
        result = {"mean": result["mean"]}
    if values.ndim > 2:
        result["sd of row means"] = values.reshape(*values.shape[:2], -1).mean(2).std(1)
    return result


def _applies(case: Case) -> bool:
    if case.supervised:
        return case.prediction.kind != "classes" or case.target.size == len(case.target)
    if case.ragged or len(case.posterior.structure.observed) != 1:
        return False
    # Rows are drawn from nothing: the model must be able to run without data.
    return not case.per_row or num_optional(case.program) >= len(case.batch)


replicates_look_alike = Diagnostic(
    NAME, "Do data drawn from the posterior look like the data?", _applies, _run, tests=True
)
