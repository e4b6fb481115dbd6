"""ArviZ 0.23 (Python 3.11) and 1.x (Python 3.12 and later) behind one set of functions on plain arrays.

No other module of the package imports ArviZ. It is imported on first use, because that takes seconds.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_ROUNDING = 64 * float(np.finfo(np.float32).eps)
_FEWEST = 25  # weights that a tail is fitted to


@functools.cache
def arviz() -> ModuleType:
    """The installed ArviZ, imported without its announcement of a new major version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz as az
    return az


def is_modern() -> bool:
    """Whether ArviZ is 1.x, whose containers are ``xarray.DataTree``.

    Examples:
        >>> is_modern() == ("data" in inspect.signature(arviz().from_dict).parameters)
        True
    """
    return int(arviz().__version__.split(".")[0]) >= 1


def rhat(draws: ArrayLike, *, method: str = "rank") -> float:
    """Potential scale reduction of one quantity over chains; near 1 if they agree.

    Args:
        draws: Shape ``(chains, draws)``.
        method: ``"rank"`` (rank-normalized and folded), ``"split"``, or another method of ArviZ.

    Returns:
        R-hat.

    References:
        Vehtari et al. (2021), Rank-normalization, folding, and localization: an improved R-hat.

    Examples:
        Chains with different means do not agree:

        >>> noise = np.random.default_rng(0).normal(size=(4, 100))
        >>> rhat(noise) < 1.05 < rhat(noise + 3 * np.arange(4)[:, None])
        True
    """
    return float(arviz().rhat(_chains(draws), method=method))


def ess(draws: ArrayLike, *, method: str = "bulk", prob: float | Sequence[float] | None = None) -> float:
    """Effective sample size of one quantity.

    Args:
        draws: Shape ``(chains, draws)``.
        method: ``"bulk"``, ``"tail"``, ``"mean"``, ``"sd"``, ``"quantile"`` or another method of ArviZ.
        prob: The quantiles of ``"tail"`` (by default 5 % and 95 %) or ``"quantile"``.

    Returns:
        The number of independent draws that would give the same precision.

    Examples:
        >>> noise = np.random.default_rng(0).normal(size=(4, 500))
        >>> bool(1500 < ess(noise) < 2500)
        True
    """
    if method == "tail" and prob is None:
        prob = (0.05, 0.95)  # the default differs between the major versions, and 1.x has none
    options = {} if prob is None else {"prob": prob}
    return float(arviz().ess(_chains(draws), method=method, **options))


def mcse(draws: ArrayLike, *, method: str = "mean") -> float:
    r"""Monte Carlo standard error of the mean or the standard deviation of one quantity.

    .. math:: \mathrm{mcse}_{mean} = s / \sqrt{S}, \qquad
              \mathrm{mcse}_{sd} = \sqrt{(\overline{c^4} - \overline{c^2}^2) / S'} \, / \, 2 \sqrt{\overline{c^2}}

    with :math:`c` the draws minus their mean, and :math:`S, S'` ArviZ's effective sample sizes of
    the mean and of the mean of :math:`c^2`. The ``mcse`` of ArviZ 0.23 fails with numba and numpy
    2.4.

    Args:
        draws: Shape ``(chains, draws)``.
        method: ``"mean"`` or ``"sd"``.

    Raises:
        ValueError: If the method is neither of the two.

    Examples:
        >>> noise = np.random.default_rng(0).normal(size=(4, 2500))
        >>> round(mcse(noise), 2)
        0.01
    """
    values = _chains(draws)
    sd = float(np.std(values, ddof=1))
    if method == "mean":
        return sd / float(np.sqrt(ess(values, method="mean")))
    if method == "sd":
        squares = np.square(values - values.mean())
        variance = (np.square(squares).mean() - squares.mean() ** 2) / ess(squares, method="mean")
        return float(np.sqrt(variance / squares.mean() / 4))
    raise ValueError(f"method must be 'mean' or 'sd'; got {method!r}. For other quantities use ArviZ.")


def psis(log_weights: ArrayLike) -> tuple[Array, Array]:
    """Pareto-smoothed importance sampling of each row of log weights.

    If all weights of a row agree to within 0.1 %, or to within single-precision rounding, there is no tail and k-hat
    is 0.

    Args:
        log_weights: Shape ``(*batch, K)``, up to a constant per row.

    Returns:
        The smoothed log weights, normalized to sum to one, shape ``(*batch, K)``, and k-hat, shape
        ``batch``.

    Raises:
        ValueError: If there are fewer than 25 weights per row, too few to fit a tail.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling.

    Examples:
        >>> smoothed, khat = psis(np.zeros(100))
        >>> float(khat), float(np.exp(smoothed).sum().round(6))
        (0.0, 1.0)
    """
    weights = np.asarray(log_weights, dtype=np.float64)
    if weights.shape[-1] < _FEWEST:
        raise ValueError(f"psis needs at least {_FEWEST} weights; got {weights.shape[-1]}. Draw more particles.")
    flat = weights.reshape(-1, weights.shape[-1])
    smoothed, khat = np.empty_like(flat), np.zeros(len(flat))
    for i, row in enumerate(flat):  # ArviZ itself loops over rows, so this costs no speed
        if np.ptp(row) < max(1e-3, _ROUNDING * float(np.abs(row).max())):
            smoothed[i] = -np.log(row.size)
        else:
            smoothed[i], khat[i] = _psis_row(row)
    return smoothed.reshape(weights.shape), khat.reshape(weights.shape[:-1])


def khat_limit(draws: int) -> float:
    r"""The largest reliable k-hat of `psis` for S draws, :math:`\min(1 - 1 / \log_{10} S, 0.7)`.

    Examples:
        >>> khat_limit(100), khat_limit(100_000)
        (0.5, 0.7)
    """
    return min(1 - 1 / float(np.log10(draws)), 0.7)


def from_dict(
    groups: Mapping[str, Mapping[str, ArrayLike]],
    *,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Groups of arrays as ArviZ's container: ``InferenceData`` on 0.23, ``DataTree`` on 1.x.

    Args:
        groups: Group name to variable name to array; sampled groups have leading ``(chain, draw)``
            axes, the ``observed_data`` and ``constant_data`` groups have none.
        dims: Names of a variable's other axes.
        coords: Labels along named axes.
        attrs: Attributes of the ``posterior`` group (of the first group, if there is no ``posterior``).

    Returns:
        The container; ``container["posterior"]`` works on both.

    Examples:
        >>> idata = from_dict({"posterior": {"z": np.zeros((1, 5, 2))}}, dims={"z": ["code"]})
        >>> idata["posterior"]["z"].dims
        ('chain', 'draw', 'code')
    """
    az = arviz()
    named = {name: list(axes) for name, axes in (dims or {}).items()}
    arrays = {group: {k: np.asarray(v) for k, v in values.items()} for group, values in groups.items()}
    labels = dict(coords or {})
    with warnings.catch_warnings():
        # ArviZ 0.23 warns of swapped axes if there are more chains than draws; here the order is known.
        warnings.simplefilter("ignore", UserWarning)
        if "data" in inspect.signature(az.from_dict).parameters:
            container = az.from_dict(arrays, dims=named, coords=labels)
        else:
            container = az.from_dict(**arrays, dims=named, coords=labels)
    if attrs and arrays:
        container["posterior" if "posterior" in arrays else next(iter(arrays))].attrs.update(attrs)
    return container


def combined(containers: Sequence[Any]) -> Any:
    """One container with the groups of several, whose names differ.

    Args:
        containers: Results of `from_dict`, at least one.

    Examples:
        >>> parts = [from_dict({group: {"z": np.zeros((1, 5))}}) for group in ("posterior", "prior")]
        >>> combined(parts)["prior"]["z"].shape
        (1, 5)
    """
    first, *others = containers
    for other in others:
        if hasattr(first, "extend"):
            first.extend(other)
        else:
            for group in other.children:
                first[group] = other[group]
    return first


def _chains(draws: ArrayLike) -> Array:
    values = np.asarray(draws, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(
            f"draws must have shape (chains, draws); got {values.shape}. Add a chain axis, or pick one quantity."
        )
    return values


def _psis_row(row: Array) -> tuple[Array, float]:
    if hasattr(arviz(), "psislw"):
        with np.errstate(over="ignore", invalid="ignore"):  # a tail of one weight overflows to an infinite k-hat
            smoothed, khat = arviz().psislw(row)
    else:
        from arviz_stats.base import array_stats  # type: ignore[import-not-found,unused-ignore]

        # 1.x takes log-likelihoods; their negatives are the log weights of leave-one-out.
        smoothed, khat = array_stats.psislw(-row)
    return np.asarray(smoothed, dtype=np.float64), float(khat)
