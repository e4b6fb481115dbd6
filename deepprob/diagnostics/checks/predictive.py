"""Do replicated data resemble the data? (Posterior predictive check)"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Array, Check, Verdict, array
from deepprob.diagnostics.checks.p_values import joint_p_value, two_sided_p_values
from deepprob.diagnostics.dependence import (
    AUTOCORRELATION,
    BEND,
    COMPONENT,
    CORRELATION,
    SPREAD,
    autocorrelation,
    of_columns,
    on_predictions,
)
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.diagnostics.table_statistics import of_table

NAME = "posterior predictive check"
CAUTION, FAIL = 0.1, 0.5
_IN_UNITS_OF_DATA = ("mean", "sd", "min", "max", "sd of row means")


def statistics(data: ArrayLike, centre: ArrayLike | None = None, spread: ArrayLike | None = None) -> dict[str, Array]:
    """Test statistics of replicated data sets.

    Args:
        data: Shape ``(R, rows, ...)``: the leading dimension is replicates.
        centre: Predicted means, shape ``(rows, ...)``.
        spread: Predicted standard deviations, shape ``(rows, ...)``.

    Returns:
        Mean, sd, min, max and, given predictions, the root mean square of the standardized
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


def class_shares(labels: ArrayLike, classes: Sequence[str]) -> dict[str, Array]:
    """Share of every class in every data set, shape ``(R,)`` each.

    Args:
        labels: The numbers of the classes, shape ``(R, ...)``.
        classes: The names of the classes.

    Examples:
        >>> {k: v.tolist() for k, v in class_shares([[0, 1, 1, 1]], ["red", "white"]).items()}
        {'share of class red': [0.25], 'share of class white': [0.75]}
    """
    values = array(labels)
    flat = values.reshape(len(values), -1)
    return {f"share of class {c}": (flat == i).mean(1) for i, c in enumerate(classes)}


def check_replicates(
    observed: dict[str, Array],
    replicated: dict[str, Array],
    units: dict[str, float],
    *,
    level: float = 0.05,
) -> Check:
    """Posterior predictive check: statistics of the data against statistics of replicated data.

    A joint p-value of all statistics has exactly the given level if data and replicates are exchangeable.
    Differences too small to matter pass, however significant they are.

    Args:
        observed: Statistics of the data, one number each.
        replicated: Statistics of the replicates, shape ``(R,)`` each.
        units: The unit of each statistic's difference, such as the standard deviation of the data.
        level: The false-alarm rate.

    Returns:
        The p-value; if it is at most the level, a caution for a difference above 0.1 units and a fail above
        0.5.

    References:
        Gelman, Meng, Stern (1996), Posterior predictive assessment of model fitness via realized
        discrepancies.

    Examples:
        >>> again = {"mean": np.random.default_rng(0).normal(size=199)}
        >>> check_replicates({"mean": 0.5}, again, {"mean": 1.0}).verdict
        'pass'
        >>> check_replicates({"mean": 9.0}, again, {"mean": 1.0}).verdict
        'fail'
    """
    names = list(observed)
    seen = np.array([float(np.ravel(observed[n])[0]) for n in names])
    drawn = np.stack([array(replicated[n]) for n in names], 1)
    p_value, separate = joint_p_value(seen, drawn), two_sided_p_values(seen, drawn)
    effects = np.abs(seen - drawn.mean(0)) / np.array([max(units[n], 1e-12) for n in names])
    # Only statistics that are extreme on their own determine the size of the difference.
    significant = effects * (separate <= max(level, 2 / (len(drawn) + 1)))
    size = float(significant.max()) if p_value <= level else 0.0
    verdict: Verdict = "fail" if size > FAIL else "caution" if size > CAUTION else "pass"
    at = int(np.argmax(significant if verdict != "pass" else -separate))
    low, high = np.quantile(drawn[:, at], [0.05, 0.95])
    listed = ", ".join(names) if len(names) < 7 else f"{len(names)} statistics"
    return Check(
        name=NAME,
        value=p_value,
        se=None,
        threshold=level if p_value > level or verdict != "pass" else None,
        verdict=verdict,
        reading=f"p = {p_value:.2g} (level {level:.2g}) for {listed}; the most extreme is {names[at]}: {seen[at]:.3g} "
        f"in the data, {low:.3g} to {high:.3g} in 90% of replicates"
        + (", a difference too small to matter." if verdict == "pass" and p_value <= level else "."),
        next_step="" if verdict == "pass" else _advice(names[at]),
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
        good=">=",
    )


_COLUMNS = "The model misses how columns depend on each other: add latent dimensions, or a covariance."
_ADVICE = {
    "residual": "The noise scale is wrong: learn it, let it depend on the input, or use heavier tails.",
    **dict.fromkeys(("min", "max"), "The extremes do not match: try a likelihood with other tails or another support."),
    AUTOCORRELATION: "Neighboring rows depend on each other in a way that the model does not know: add a season, a "
    "trend, a random walk, or the group that neighbors share.",
    SPREAD: "The noise changes with the prediction: let its scale depend on the inputs, or predict the log.",
    BEND: "The predictions miss a curve: add squares or splines of the inputs, or use a network.",
    CORRELATION: _COLUMNS,
    **{f"{COMPONENT} {k}": _COLUMNS for k in (1, 2, 3)},
}
_CATEGORIES = "The shares of categories do not match: fit longer, add latent dimensions, or a larger decoder."
_OTHER_ADVICE = "The likelihood or the prior does not fit these data: compare the pictures, then change one of them."


def _advice(statistic: str) -> str:
    """What to do about a statistic, such as ``"max"`` or, of one column of a table, ``"max of age"``."""
    what = statistic.partition(" of ")[0]
    return _ADVICE.get(statistic) or (_CATEGORIES if what == "share" else _ADVICE.get(what, _OTHER_ADVICE))


def _run(case: Case, level: float) -> Check:
    return _check_targets(case, level) if case.supervised else _check_rows(case, level)


def _check_targets(case: Case, level: float) -> Check:
    target, first = case.judged(case.target), case.judged(case.finite(case.replicates, "prediction", axis=1), 1)
    chunks = (case.judged(case.finite(drawn, "prediction", axis=1), 1) for drawn in case.replicates_for(level))
    if case.kind in ("classes", "binary"):
        names = case.class_names
        seen = class_shares(target[None], names)
        again = _of_all(chunks, lambda drawn: class_shares(drawn, names))
        return check_replicates(seen, again, dict.fromkeys(seen, 1.0), level=level)
    centre, spread = (
        case.judged(array(x).reshape(case.target.shape)) for x in (case.prediction.mean, case.prediction.sd)
    )
    if not (np.isfinite(centre).all() and np.isfinite(spread).all()):  # tails so heavy that there are no moments
        low, centre, high = np.quantile(first, [0.16, 0.5, 0.84], axis=0)
        spread = (high - low) / 2
    gaps = case.mask is not None and case.target.size > len(case.target)  # neighbors may be columns
    ordered = gaps or _is_sorted(target)

    def found(data: Array) -> dict[str, Array]:
        residual = (data - centre) / np.maximum(spread, 1e-12)
        in_order = {} if ordered else autocorrelation(residual)
        return statistics(data, centre, spread) | in_order | on_predictions(residual, centre)

    seen, again = found(target[None]), _of_all(chunks, found)
    return check_replicates(seen, again, _units(again, float(target.std())), level=level)


def _of_all(chunks: Iterable[Array], statistic: Callable[[Array], dict[str, Array]]) -> dict[str, Array]:
    """Statistics of replicates that come in chunks, so that all replicates are never held at once."""
    found = [statistic(chunk) for chunk in chunks]
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _check_rows(case: Case, level: float) -> Check:
    """Rows of a program without inputs against replicated rows.

    Local latents of replicates come from the prior, because a guide that has seen a row can copy it. Global
    latents come from the posterior.
    """
    sample = case.sample_case
    replicated = case.prior_replicates_for(level)
    seen = np.broadcast_to(sample.target, replicated.shape[1:])
    known = np.broadcast_to(_known(sample), seen.shape)
    everything = np.concatenate([seen[None], replicated])
    if (columns := sample.columns) is not None:
        found, units = of_table(everything, columns.variables, columns.names, known)
    else:
        binary = bool(np.isin(replicated[:, known], (0.0, 1.0)).all())
        found, units = row_statistics(everything, binary, known) | _dependence(everything, known), {}
    observed, again = ({name: x[part] for name, x in found.items()} for part in (slice(1), slice(1, None)))
    spread = float(seen[known].std() or replicated[:, known].std())
    return check_replicates(observed, again, _units(again, spread) | units, level=level)


def _dependence(data: Array, known: NDArray[np.bool_]) -> dict[str, Array]:
    """Statistics of the columns that are known in every row; of rows of one number, of neighboring rows."""
    if data.ndim > 2:
        columns = data.reshape(*data.shape[:2], -1)[:, :, known.reshape(len(known), -1).all(0)]
        return of_columns(columns) if columns.shape[2] > 1 and len(known) > 2 else {}
    values = data[:, known]
    residual = (values - values.mean(0)) / np.maximum(values.std(0), 1e-12)
    return {} if _is_sorted(values[0]) else autocorrelation(residual)


def _is_sorted(values: Array) -> bool:
    """Whether rows are in the order of their values, which is none in time."""
    steps = np.diff(values.reshape(len(values), -1)[:, 0])
    return bool((steps >= 0).all() or (steps <= 0).all())


def _units(again: dict[str, Array], spread: float) -> dict[str, float]:
    """The unit of each statistic: the sd of the data, or one for what has no unit.

    The share of a small component matters if it is twice that of the replicates.
    """
    units = {name: spread if name in _IN_UNITS_OF_DATA else 1.0 for name in again}
    small = {n: float(np.clip(x.mean() / CAUTION, CAUTION, 1.0)) for n, x in again.items() if n.startswith(COMPONENT)}
    return units | small


def _known(case: Case) -> NDArray[np.bool_]:
    """Which values of the target are known, not masked, and within the length of their sequence."""
    known = np.ones(case.target.shape, dtype=bool) if case.mask is None else np.asarray(case.mask, dtype=bool)
    lengths = case.lengths
    if lengths is None or known.ndim < 2 or len(known) != len(lengths):
        return known
    inside = np.arange(known.shape[1]) < lengths[:, None]
    return known & inside.reshape(*inside.shape, *[1] * (known.ndim - 2))


def row_statistics(data: ArrayLike, binary: bool = False, known: NDArray[np.bool_] | None = None) -> dict[str, Array]:
    """`statistics`, and the standard deviation of the row means.

    Args:
        data: Shape ``(R, rows, ...)``.
        known: Which values count, shape ``(rows, ...)``; None for all.
        binary: Whether the likelihood is binary. Then sd, min and max follow from the mean, and would only tell
            zeros and ones from grey values in the data.

    Examples:
        >>> {k: float(v[0]) for k, v in row_statistics([[[0.0, 0.0], [1.0, 1.0]]], binary=True).items()}
        {'mean': 0.5, 'sd of row means': 0.5}
    """
    values = array(data)
    mask = np.ones(values.shape[1:], dtype=bool) if known is None else known
    result = statistics(values[:, mask])
    if binary:
        result = {"mean": result["mean"]}
    if values.ndim > 2:
        by_row, count = values.reshape(*values.shape[:2], -1), mask.reshape(len(mask), -1).sum(1)
        means = (by_row * mask.reshape(len(mask), -1)).sum(2)[:, count > 0] / count[count > 0]
        result["sd of row means"] = means.std(1)
    return result


def _applies(case: Case) -> bool:
    """Where values are observed: a factor as likelihood has none, nor has a site whose values are all masked."""
    if not case.sites:
        return False
    mask = case.sample_case.mask
    return mask is None or bool(mask.any())


posterior_predictive = Diagnostic(
    NAME, "Do replicated data resemble the data?", _applies, _run, about="predictions", tests=True, by_site=True
)
