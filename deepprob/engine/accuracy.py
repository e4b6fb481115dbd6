r"""How far a sample of an approximation ``q`` is from a density ``p``, by the gradients of ``log p`` at the sample.

The line :math:`\nabla \log p(u) \approx -P (u - \mu)` fitted to the gradients is a normal density with mean
:math:`\mu` and precision :math:`P`. If ``p`` is normal, it is ``p``, however far away ``q`` is. If ``q`` is ``p``, it
has the mean and the covariance of ``q``, by Stein's identities :math:`E_p[\nabla \log p] = 0` and
:math:`E_p[(u - \mu) \nabla \log p^\top] = -I`. Otherwise it is one Newton step from ``q``, with the Hessian averaged
over ``q``. So it sees what importance weights cannot: a sample that is far off, too narrow, or too wide.

References:
    Stein (1981), Estimation of the mean of a multivariate normal distribution.
    Modi, Margossian, Yao, Gower, Blei, Saul (2023), Variational inference with Gaussian score matching.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_Estimate = Callable[[Array, Array], tuple[Array, Array]]

_LEAST_PRECISION = 1e-4  # of a direction in which the density is not seen to fall, in units of the sample's
_ROUNDS, _FEW_ROUNDS, _MANY = 40, 10, 50  # of the bootstrap; fewer from so many coordinates on
_BLOCKS = 10  # of the sample, whose products have no bias


class Accuracy(NamedTuple):
    """How far every coordinate of an approximation is from the target.

    Attributes:
        shift: Its mean less that of the target, in sds of the target.
        shift_se: The standard error.
        log_width: The logarithm of its sd divided by that of the target.
        log_width_se: The standard error.
    """

    shift: Array
    shift_se: Array
    log_width: Array
    log_width_se: Array


def accuracy_by_gradients(values: Array, gradients: Array) -> Accuracy:
    """The accuracy of a sample, by the gradients of the target; see the module.

    Args:
        values: The sample, shape ``(K, D)``, with K well above D.
        gradients: ``grad log p`` at the sample, of the same shape.

    Examples:
        A sample of N(0, 1) beside the target N(1, 2^2):

        >>> u = np.random.default_rng(0).normal(size=(1000, 1))
        >>> found = accuracy_by_gradients(u, (1 - u) / 4)
        >>> float(found.shift[0].round(1)), float(np.exp(found.log_width[0]).round(1))
        (-0.5, 0.5)
    """
    return _with_errors(_fitted_line, values, gradients)


def accuracy_of_rows(values: Array, gradients: Array) -> tuple[Array, Array]:
    """The shift and the log-width of every coordinate in many samples, one for every row, see `Accuracy`.

    Args:
        values: The samples, shape ``(B, K, D)``.
        gradients: ``grad log p`` at them, of the same shape.

    Returns:
        Two arrays of shape ``(B, D)``.
    """
    return _fitted_line(values, gradients)


def accuracy_by_weights(values: Array, weights: Array, own: Array | None = None) -> Accuracy:
    """The accuracy of a sample, from importance weights.

    Args:
        values: The sample, shape ``(K, D)``.
        weights: Those of the target, shape ``(K,)``, up to a factor.
        own: Those of the approximation, if the sample is drawn from another density; by default they are equal.

    Examples:
        >>> u = np.random.default_rng(0).normal(size=(4000, 1))
        >>> raw = np.exp(u[:, 0] - 0.5)  # of N(1, 1)
        >>> float(accuracy_by_weights(u, raw / raw.sum()).shift[0].round())
        -1.0
    """
    own = np.ones(len(values)) if own is None else own
    return _with_errors(_reweighted, values, np.stack([own, weights], 1))


def accuracy_by_number(values: Array, gradients: Array) -> Accuracy:
    """The accuracy of every coordinate given the others, for more coordinates than the sample can tell together.

    The standard errors come from the sample's own spread.

    Args:
        values: The sample, shape ``(K, D)``.
        gradients: ``grad log p`` at the sample, of the same shape.
    """
    count, sd = len(values), np.maximum(values.std(0), 1e-30)
    v, g = (values - values.mean(0)) / sd, gradients * sd
    centred = g - g.mean(0)
    slope = (v * centred).mean(0)
    error = (v * (centred - slope * v)).std(0) / np.sqrt(count)
    precision = np.maximum(-slope, np.maximum(error, _LEAST_PRECISION))  # no flatter than the sample can tell
    shift_error = np.sqrt(np.square(centred - slope * v).mean(0) / count)
    root = np.sqrt(precision)
    return Accuracy(-g.mean(0) / root, shift_error / root, np.log(precision) / 2, error / precision / 2)


def divergence_by_gradients(values: Array, gradients: Array) -> tuple[float, float]:
    r"""The divergence of a sample from the target, in nats for every coordinate, of any number of coordinates.

    By Stein's identity, :math:`E = -E_q[(u - \mu) \nabla \log p^\top] - I` is zero if ``q`` is ``p``. Between normals
    of one mean, the KL divergence is :math:`\tfrac14 \mathrm{tr} E^2` to second order. The products of disjoint
    blocks of the sample have no bias from its noise.

    Args:
        values: The sample, shape ``(K, D)``.
        gradients: ``grad log p`` at the sample, of the same shape.

    Returns:
        The divergence and its standard error, by a jackknife over the blocks.

    Examples:
        Independent numbers beside a target whose pairs have a correlation of 0.6:

        >>> u = np.random.default_rng(0).normal(size=(300, 200)) * 0.8
        >>> partner = np.roll(u, 100, 1)
        >>> [round(divergence_by_gradients(u, g)[0], 2) for g in (-u / 0.64, (0.6 * partner - u) / 0.64)]
        [-0.0, 0.09]
    """
    count, size = values.shape
    sd = np.maximum(values.std(0), 1e-30)
    v, g = (values - values.mean(0)) / sd, gradients * sd
    g = g - g.mean(0)
    found = [v[b::_BLOCKS].T @ -g[b::_BLOCKS] / len(v[b::_BLOCKS]) - np.eye(size) for b in range(min(_BLOCKS, count))]
    traces = np.array([[np.vdot(one, other.T) for other in found] for one in found]) / (4 * size)
    np.fill_diagonal(traces, 0.0)
    n, total, without = len(found), traces.sum(), traces.sum() - 2 * traces.sum(1)
    left_out = without / ((n - 1) * (n - 2))
    return float(total / (n * (n - 1))), float(np.sqrt((n - 1) * left_out.var()))


def _fitted_line(values: Array, gradients: Array) -> tuple[Array, Array]:
    count = values.shape[-2]
    centred, start = values - values.mean(-2, keepdims=True), gradients.mean(-2, keepdims=True)
    covariance = centred.mT @ centred / count
    scale = np.sqrt(np.maximum(np.diagonal(covariance, axis1=-2, axis2=-1), 1e-300))
    correlation = covariance / (scale[..., None] * scale[..., None, :]) + 1e-9 * np.eye(scale.shape[-1])
    factor = scale[..., None] * np.linalg.cholesky(correlation)
    v = np.linalg.solve(factor, centred.mT).mT  # the whitened sample
    g = (gradients - start) @ factor
    slope = g.mT @ v / count
    levels, axes = np.linalg.eigh(-(slope + slope.mT) / 2)
    along, residual = v @ axes, (g - v @ slope.mT) @ axes
    noise = (along * residual).std(-2) / np.sqrt(count)
    levels = np.maximum(levels, np.maximum(noise, _LEAST_PRECISION))  # no flatter than the sample can tell
    rotated = factor @ axes
    sd = np.sqrt((np.square(rotated) / levels[..., None, :]).sum(-1))
    step = (start @ factor @ axes)[..., 0, :] / levels
    return -(rotated @ step[..., None])[..., 0] / sd, np.log(scale / sd)


def _reweighted(values: Array, weights: Array) -> tuple[Array, Array]:
    (own, own_sd), (mean, sd) = (_moments(values, column) for column in weights.T)
    return (own - mean) / sd, np.log(own_sd / sd)


def _moments(values: Array, weights: Array) -> tuple[Array, Array]:
    share = (weights / weights.sum())[:, None]
    mean = (share * values).sum(0)
    return mean, np.sqrt(np.maximum((share * np.square(values - mean)).sum(0), 1e-300))


def _with_errors(estimate: _Estimate, values: Array, others: Array) -> Accuracy:
    """An estimate and its standard errors, by a bootstrap over the sample."""
    generator, count = np.random.default_rng(0), len(values)
    again = []
    for _ in range(_ROUNDS if values.shape[1] < _MANY else _FEW_ROUNDS):
        rows = generator.integers(0, count, count)
        again.append(estimate(values[rows], others[rows]))
    shift, width = estimate(values, others)
    errors = [np.std(np.stack(found), 0, ddof=1) for found in zip(*again, strict=True)]
    return Accuracy(shift, errors[0], width, errors[1])
