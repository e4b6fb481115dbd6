"""Priors of the weights of a network: their sites, means and units."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from deepprob.errors import positive, shown, unknown
from deepprob.networks.layer_choice import by_parameter
from deepprob.networks.lifting import fans, gains, input_axis

PRIORS = ("hierarchical", "normal", "student_t", "horseshoe", "plain_horseshoe", "pretrained")

SCALE, INPUT_SCALE = "scale", "input_scale"
_DEGREES_OF_FREEDOM = 3.0  # the fewest whole ones with a finite variance


@dataclass(frozen=True)
class WeightPrior:
    r"""The prior of one parameter of a network, given positive numbers with priors of their own.

    With the fan-in :math:`n` of a matrix of weights and ``prior_scale`` :math:`c`:

    ===================== ======================================================================= ====================
    kind                  matrix                                                                  other parameters
    ===================== ======================================================================= ====================
    ``"hierarchical"``    :math:`N(0, s^2 / n)`, :math:`s \sim \text{LogNormal}(\log c, 1)`       :math:`N(0, 1)`
    ``"normal"``          :math:`N(0, c^2)`                                                       the same
    ``"student_t"``       Student's t with 3 degrees of freedom, scale :math:`c / \sqrt n`        the same, scale 1
    ``"horseshoe"``       :math:`N(0, u_j^2)` for input j, :math:`u_j^{-2} = n / (s \lambda_j)^2  :math:`N(0, 1)`
                          + c^{-2}`, :math:`s \sim C^+(0, c)`, :math:`\lambda_j \sim C^+(0, 1)`
    ``"plain_horseshoe"`` the same with :math:`u_j = s \lambda_j / \sqrt n`                       :math:`N(0, 1)`
    ``"pretrained"``      :math:`N(w_0, c^2)` around the given weights                            the same
    ===================== ======================================================================= ====================

    The scale of a normalization layer is centered on 1 instead of 0.

    Attributes:
        kind: A name in ``PRIORS``.
        scale: ``prior_scale``.
        fan: Fan-in of a matrix; None for other parameters.
        axis: The axis of the inputs of a matrix.
        neutral: Center of the prior, unless it is pretrained.

    References:
        Neal (1996), Bayesian Learning for Neural Networks.
        Fortuin et al. (2022), Bayesian Neural Network Priors Revisited.
        Carvalho, Polson, Scott (2010), The Horseshoe Estimator for Sparse Signals.
        Piironen, Vehtari (2017), Sparsity Information and Regularization in the Horseshoe.
        Ghosh, Yao, Doshi-Velez (2018), Structured Variational Learning of Bayesian Neural Networks with Horseshoe
        Priors.
        Krishnan, Subedar, Tickoo (2020), Specifying Weight Priors in Bayesian Deep Neural Networks with Empirical
        Bayes.
    """

    kind: str
    scale: float
    fan: int | None = None
    axis: int = 1
    neutral: float = 0.0

    def hypers(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The positive numbers of a parameter of this shape, by suffix: their own shapes."""
        if self.fan is None or self.kind in ("normal", "student_t", "pretrained"):
            return {}
        return {SCALE: ()} if self.kind == "hierarchical" else {SCALE: (), INPUT_SCALE: (shape[self.axis],)}

    def hyper_start(self, suffix: str) -> float:
        """Where a fit starts a positive number: at its prior median."""
        return 1.0 if suffix == INPUT_SCALE else self.scale

    def hyper_prior(self, suffix: str, like: Tensor) -> Any:
        """The prior of a positive number, of the shape of ``like``."""
        start = torch.full_like(like, self.hyper_start(suffix))
        one = dist.LogNormal(start.log(), 1.0) if self.kind == "hierarchical" else dist.HalfCauchy(start)
        return one.to_event(like.dim())

    def moments(self, start: Tensor, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and unit of the prior given the positive numbers.

        Args:
            start: The network's own value.
            values: The positive numbers by suffix, ``(*K, 1, *shape)`` with leading dimensions or none.

        Returns:
            The mean, of the shape of ``start``, and the unit, ``(*K, 1, *shape)``.
        """
        loc = start.detach() if self.kind == "pretrained" else torch.full_like(start, self.neutral)
        return loc, self._unit(start, values) * torch.ones_like(start)

    def distribution(self, loc: Tensor, unit: Tensor) -> Any:
        """The prior given its mean and unit."""
        loc = loc.expand_as(loc + unit)
        if self.kind == "student_t":
            return dist.StudentT(torch.full_like(loc, _DEGREES_OF_FREEDOM), loc, unit.expand_as(loc))
        return dist.Normal(loc, unit.expand_as(loc))

    def _unit(self, start: Tensor, values: Mapping[str, Tensor]) -> Tensor | float:
        if self.kind in ("normal", "pretrained"):
            return self.scale
        if self.fan is None:
            return 1.0
        if self.kind == "student_t":
            return self.scale / math.sqrt(self.fan)
        scale = values[SCALE]
        unit = scale.reshape(*scale.shape, *(1,) * start.dim()) / math.sqrt(self.fan)  # (*K, 1, 1, 1)
        if self.kind == "hierarchical":
            return unit
        local = values[INPUT_SCALE]
        places = [1] * start.dim()
        places[self.axis] = local.shape[-1]
        unit = unit * local.reshape(*local.shape[:-1], *places)  # (*K, 1, 1, inputs)
        if self.kind == "plain_horseshoe":
            return unit
        return unit * self.scale / (unit.square() + self.scale**2).sqrt()


def check_prior(prior: Any, prior_scale: float) -> Any:
    """Check a prior or a mapping from layers to priors.

    Returns:
        The prior: its name, or a mapping from layers to pairs of name and scale.

    Raises:
        TypeError: If it is neither a name nor a mapping.
        ValueError: If a name is unknown or a scale is not a positive number.
    """
    if isinstance(prior, Mapping):
        return {layer: _pair(one, prior_scale) for layer, one in prior.items()}
    _pair(prior, prior_scale)
    return prior


def weight_priors(net: nn.Module, names: list[str], prior: Any, prior_scale: float) -> dict[str, WeightPrior]:
    """The priors of some parameters of a network, by name.

    Args:
        net: The network; the sizes of its layers are known.
        names: Names of the parameters.
        prior: A name, or a mapping from layers to priors; parameters that it does not name are hierarchical.
        prior_scale: The scale of priors without one of their own.

    Raises:
        ValueError: If the mapping names a layer that the network lacks.
    """
    parameters = dict(net.named_parameters())
    chosen = by_parameter(net, prior, "prior") if isinstance(prior, Mapping) else dict.fromkeys(names, prior)
    fan_in, gain = fans(net, {name: parameters[name] for name in names}), gains(net)
    found = {}
    for name in names:
        kind, scale = _pair(chosen.get(name, "hierarchical"), prior_scale)
        neutral = 1.0 if name in gain else 0.0
        found[name] = WeightPrior(kind, scale, fan_in.get(name), input_axis(net, name), neutral)
    return found


def _pair(prior: Any, prior_scale: float) -> tuple[str, float]:
    """Name and scale of a prior, ``"normal"`` or ``("normal", 0.5)``."""
    name, scale = (prior, prior_scale) if isinstance(prior, str) else _parts(prior)
    if name not in PRIORS:
        raise unknown("prior", name, PRIORS)
    return name, positive("prior_scale", scale)


def _parts(prior: Any) -> tuple[str, float]:
    if isinstance(prior, tuple | list) and len(prior) == 2 and isinstance(prior[0], str):
        return prior[0], prior[1]
    raise TypeError(
        f"prior must be a name, a pair of name and scale, or a mapping from layers to these; got {shown(prior)}. Write "
        "prior='normal', or prior={'last': ('normal', 0.5)}."
    )
