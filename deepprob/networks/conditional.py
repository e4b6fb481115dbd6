"""Conditional: a network whose output is a distribution, the amortized part of a program."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import constraints, transform_to
from torch.nn.functional import softplus

from deepprob.distributions.per_draw import UNCHECKED
from deepprob.errors import unknown, whole

Family = str | Callable[..., Any]

FAMILIES = (
    *("asymmetric_laplace", "bernoulli", "beta", "categorical", "cauchy", "continuous_bernoulli", "dirichlet"),
    *("exponential", "gamma", "gamma_poisson", "geometric", "gumbel", "half_normal", "inverse_gamma", "laplace"),
    *("log_normal", "logistic", "low_rank", "multivariate_normal", "multivariate_student_t"),
    *("negative_binomial", "normal", "one_hot_categorical", "poisson", "student_t", "von_mises", "weibull"),
    "zero_inflated_poisson",
)

# Each argument on the left is skipped where the family has its equivalent on the right, which is more accurate.
_REDUNDANT = {
    "probs": "logits",
    "gate": "gate_logits",
    "covariance_matrix": "scale_tril",
    "precision_matrix": "scale_tril",
}
# Bound on off-diagonal entries relative to their row's scale; keeps factorizations accurate in float32.
_MAX_RATIO = 30.0


class Conditional(nn.Module):
    r"""Distribution over an event given a context, with parameters computed by a network.

    .. math:: x \mid c \sim F(\theta(c)), \qquad \theta(c) = \mathrm{link}(\mathrm{network}(c))

    The constraint of a parameter determines its link: a positive parameter is
    :math:`\epsilon + \mathrm{softplus}(y)` with a floor :math:`\epsilon`, a probability is given by its logits, a
    parameter in an interval is a scaled sigmoid, and a Cholesky factor is lower triangular with a positive diagonal:

    .. math:: L = \mathrm{diag}(s)\,(I + U), \quad s_i = \epsilon + \mathrm{softplus}(y_i), \quad
              U_{ij} = 30 \tanh(y_{ij} / 30) \text{ for } j < i

    ("multivariate_normal"). For "low_rank", :math:`\Sigma = \mathrm{diag}(s) (I + W W^\top) \mathrm{diag}(s)`, where
    :math:`W` has ``rank`` columns and equally bounded entries. The network's last axis concatenates the parameters,
    each in the shape of the event; for "categorical" it concatenates the classes.

    Args:
        network: Maps a context to ``(*batch, size)``, with ``size`` from :meth:`size`.
        family: The name of a distribution in ``pyro.distributions`` ("normal", "bernoulli", "student_t", ...), its
            class, or a function of real parameters, each of shape ``(*batch, *event_shape)``, that returns a
            distribution.
        event_shape: Shape of one draw. For "multivariate_normal" and "low_rank" the last axis is correlated.
        num_classes: Number of classes of "categorical"; inferred from the network's ``out_features`` if omitted.
        rank: Columns of ``W`` of "low_rank"; the square root of the size of that axis if omitted.
        floor: Lower bound of positive parameters.

    Raises:
        TypeError: If the network, family or event_shape has the wrong type.
        ValueError: If the family is unknown or cannot be built from its name, an option is missing or out of range, or
            the network's output has the wrong size.

    Examples:
        Leading axes of the context are the batch shape:

        >>> from deepprob.networks.dense import MLP
        >>> likelihood = Conditional(MLP(4, Conditional.size("normal", (8, 8))), "normal", (8, 8))
        >>> x = likelihood(torch.zeros(3, 2, 4))
        >>> x.batch_shape, x.event_shape
        (torch.Size([3, 2]), torch.Size([8, 8]))

        The distribution is proper for any output of the network:

        >>> guide = Conditional(nn.Identity(), "normal", (1,))
        >>> guide(torch.tensor([0.0, -1e4])).base_dist.scale
        tensor([1.0000e-04])
    """

    def __init__(
        self,
        network: nn.Module,
        family: Family,
        event_shape: Sequence[int],
        *,
        num_classes: int | None = None,
        rank: int | None = None,
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be a torch.nn.Module; got {type(network).__name__}. Wrap it in one.")
        out_features = getattr(network, "out_features", None)
        self.event_shape = _event(event_shape)
        if num_classes is None and isinstance(out_features, int) and _is_categorical(family):
            num_classes = out_features // math.prod(self.event_shape)
        self.family = family if isinstance(family, str) else getattr(family, "__name__", "function")
        self._plan = _plan(family, self.event_shape, num_classes, rank, floor)
        self.in_size = sum(self._plan.sizes.values())
        self.network = network
        if isinstance(out_features, int):
            self._check_size(out_features)

    @staticmethod
    def size(
        family: Family, event_shape: Sequence[int], *, num_classes: int | None = None, rank: int | None = None
    ) -> int:
        """Number of network outputs that a family needs.

        Args:
            family: As for :class:`Conditional`.
            event_shape: Shape of one draw.
            num_classes: Number of classes of "categorical".
            rank: Columns of the factor of "low_rank".

        Returns:
            The size of the network's last axis.

        Examples:
            A mean and a Cholesky factor:

            >>> Conditional.size("multivariate_normal", (3,)), 3 + 6
            (9, 9)
        """
        return sum(_plan(family, _event(event_shape), num_classes, rank, 1e-4).sizes.values())

    def forward(self, *context: Tensor) -> TorchDistributionMixin:
        """Distribution given a context.

        Args:
            context: Inputs of the network, with leading batch axes.

        Returns:
            A Pyro distribution with the network's leading axes as batch shape and ``event_shape`` as event shape. The
            links of a named family give valid arguments, so Pyro does not validate them.

        Raises:
            ValueError: If the network's output or the result of a user-defined family has the wrong shape.
        """
        return self.distribution(self.network(*context))

    def distribution(self, raw: Tensor) -> TorchDistributionMixin:
        """Distribution given the network's output, ``(*batch, size)``; see `forward`."""
        self._check_size(raw.shape[-1] if raw.dim() else 0)
        parts = dict(zip(self._plan.sizes, raw.split(list(self._plan.sizes.values()), -1), strict=True))
        made = self._plan.make(**parts)
        shape = getattr(made, "batch_shape", ()) + getattr(made, "event_shape", ())
        if not isinstance(made, TorchDistributionMixin) or shape != raw.shape[:-1] + self.event_shape:
            got = f"shape {tuple(shape)}" if isinstance(made, TorchDistributionMixin) else type(made).__name__
            raise ValueError(
                f"family {self.family!r} must return a pyro distribution of batch and event shape "
                f"{tuple(raw.shape[:-1] + self.event_shape)}; got {got}. Give a function of real parameters of the "
                "event's shape instead."
            )
        events: TorchDistributionMixin = made.to_event(len(self.event_shape) - made.event_dim)
        return events

    def extra_repr(self) -> str:
        """Family and event, for ``print``."""
        return f"{self.family!r}, event_shape={tuple(self.event_shape)}"

    def _check_size(self, found: int) -> None:
        if found != self.in_size:
            raise ValueError(
                f"{self.family!r} over event_shape {tuple(self.event_shape)} needs a network with {self.in_size} "
                f"outputs on its last axis; got {found}. Make it with out_features=Conditional.size(...)."
            )


@dataclass(frozen=True)
class _Plan:
    """Number of outputs per parameter, in order, and the function that builds the distribution."""

    sizes: dict[str, int]
    make: Callable[..., Any]


@dataclass(frozen=True)
class _Parameter:
    """One parameter of a family: the shape of its raw values and the link applied to them."""

    raw_shape: tuple[int, ...]
    link: Callable[[Tensor], Tensor]

    def __call__(self, raw: Tensor) -> Tensor:
        return self.link(raw.reshape(raw.shape[:-1] + self.raw_shape))


def _plan(family: Family, event_shape: torch.Size, num_classes: int | None, rank: int | None, floor: float) -> _Plan:
    if not floor > 0:
        raise ValueError(f"floor must be positive to keep scales positive; got {floor}. Try 1e-4.")
    _check_options(family, num_classes, rank)
    if family in ("low_rank", "low_rank_multivariate_normal", dist.LowRankMultivariateNormal):
        _check_axes("low_rank", 1, event_shape)
        rank = rank or max(1, round(math.sqrt(event_shape[-1])))
        count = math.prod(event_shape)
        make = partial(_low_rank, event_shape=event_shape, rank=rank, floor=floor)
        return _Plan({"loc": count, "cov_factor": rank * count, "cov_diag": count}, make)
    if isinstance(family, str):
        return _plan_for_class(_class_named(family), family, event_shape, num_classes, floor)
    if isinstance(family, type):
        if not issubclass(family, TorchDistributionMixin):
            raise TypeError(
                f"family must come from pyro.distributions; got {family.__module__}.{family.__name__}. "
                "Use the class of that name in pyro.distributions."
            )
        return _plan_for_class(family, family.__name__, event_shape, num_classes, floor)
    if not callable(family):
        raise TypeError(
            f"family must be a name, a pyro distribution class, or a function; got {family!r}. "
            'Write for example "normal".'
        )
    names = [name for name, p in inspect.signature(family).parameters.items() if p.default is p.empty]
    shaped = _Parameter(tuple(event_shape), _identity)
    make = partial(_linked, family, dict.fromkeys(names, shaped))
    return _Plan(dict.fromkeys(names, math.prod(event_shape)), make)


def _plan_for_class(family: type, name: str, event_shape: torch.Size, num_classes: int | None, floor: float) -> _Plan:
    """Derive the parameters, shapes and links of a family from its class."""
    try:
        known: dict[str, Any] = dict(family.arg_constraints)  # type: ignore[attr-defined]
        event_dim: int = family.support.event_dim  # type: ignore[attr-defined]
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise _needs_function(name, "the shapes of its parameters are unknown") from error
    _check_axes(name, event_dim, event_shape)
    parameters = {}
    arguments = inspect.signature(family).parameters
    for argument, spec in arguments.items():
        if _REDUNDANT.get(argument) in known or argument == "validate_args":
            continue
        constraint = known.get(argument)
        parameter = _parameter(constraint, event_shape, event_dim, num_classes, name, floor)
        if parameter is not None:
            parameters[argument] = parameter
        elif spec.default is spec.empty:
            raise _needs_function(name, f"its argument {argument!r} is not a real tensor of the event's shape")
    made = partial(family, validate_args=UNCHECKED) if "validate_args" in arguments else family
    sizes = {argument: math.prod(parameter.raw_shape) for argument, parameter in parameters.items()}
    return _Plan(sizes, partial(_linked, made, parameters))


def _parameter(
    constraint: Any, event_shape: torch.Size, event_dim: int, num_classes: int | None, name: str, floor: float
) -> _Parameter | None:
    """Raw shape and link of a parameter under a constraint; None if no link exists."""
    if constraint is None or constraint.is_discrete:
        return None
    own_dim = constraint.event_dim
    shape = tuple(event_shape[: len(event_shape) - event_dim])  # axes over which the family is independent
    if constraint is constraints.lower_cholesky and event_dim == 1:
        size = event_shape[-1]
        return _Parameter((*shape, size * (size + 1) // 2), partial(_lower_triangular, size=size, floor=floor))
    link = _link(constraint, floor)
    if link is None or own_dim > 1:
        return None
    if own_dim > event_dim:  # one more axis than a draw has: the classes
        if link is not _identity:
            return None
        if num_classes is None:
            raise ValueError(f"{name!r} needs num_classes, the number of classes. Give e.g. num_classes=10.")
        return _Parameter((num_classes, *shape), partial(_classes_last, axes=len(shape)))
    return _Parameter((*shape, *event_shape[len(event_shape) - own_dim :]) if own_dim else shape, link)


def _link(constraint: Any, floor: float) -> Callable[[Tensor], Tensor] | None:
    base = getattr(constraint, "base_constraint", constraint)
    if base is constraints.real:
        return _identity
    if isinstance(base, constraints.greater_than | constraints.greater_than_eq):
        return partial(positive_link, floor=float(base.lower_bound) + floor)
    try:
        return transform_to(constraint)  # type: ignore[no-any-return]
    except NotImplementedError:
        return None


# Links, as module-level functions so that a Conditional can be pickled and sent to a worker -----------------


def _linked(family: Callable[..., Any], parameters: dict[str, _Parameter], **raw: Tensor) -> Any:
    return family(**{name: parameter(raw[name]) for name, parameter in parameters.items()})


def _identity(raw: Tensor) -> Tensor:
    return raw


def positive_link(raw: Tensor, floor: float) -> Tensor:
    """Positive parameter from a real number: softplus above a floor."""
    return softplus(raw) + floor


def _bounded(raw: Tensor) -> Tensor:
    return _MAX_RATIO * torch.tanh(raw / _MAX_RATIO)


def _classes_last(raw: Tensor, axes: int) -> Tensor:
    return raw.movedim(-axes - 1, -1)  # (*batch, classes, *event) -> (*batch, *event, classes)


def _lower_triangular(raw: Tensor, size: int, floor: float) -> Tensor:
    """Fill a triangle row by row: (..., D (D + 1) / 2) -> (..., D, D)."""
    row = torch.arange(size, device=raw.device).unsqueeze(-1)  # (D, 1)
    column = row.squeeze(-1)  # (D,)
    square = raw[..., row * (row + 1) // 2 + column]  # (..., D, D); entries above the diagonal are unused
    scale = positive_link(square.diagonal(dim1=-2, dim2=-1), floor)  # (..., D)
    unit = _bounded(square).tril(-1) + torch.eye(size, dtype=raw.dtype, device=raw.device)
    return scale.unsqueeze(-1) * unit


def _low_rank(
    loc: Tensor, cov_factor: Tensor, cov_diag: Tensor, event_shape: torch.Size, rank: int, floor: float
) -> Any:
    batch = loc.shape[:-1]
    scale = positive_link(cov_diag.reshape(batch + event_shape), floor)  # (*batch, *event)
    factor = _bounded(cov_factor.reshape((*batch, rank, *event_shape))).movedim(-len(event_shape) - 1, -1)
    return dist.LowRankMultivariateNormal(
        loc.reshape(batch + event_shape), scale.unsqueeze(-1) * factor, scale.square(), validate_args=False
    )


# Checks -----------------------------------------------------------------------------------------------------


def _event(shape: object) -> torch.Size:
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise TypeError(f"event_shape must be a tuple of sizes; got {shape!r}. Write () for a scalar, (3,) for 3.")
    return torch.Size([whole("every size in event_shape", size) for size in shape])


def _is_categorical(family: Family) -> bool:
    return family in ("categorical", "Categorical", dist.Categorical)


def _check_options(family: Family, num_classes: int | None, rank: int | None) -> None:
    if num_classes is not None and not _is_categorical(family):
        raise ValueError(f"num_classes is only for family 'categorical'; got {family!r}. Leave it out.")
    if rank is not None and family not in ("low_rank", "low_rank_multivariate_normal", dist.LowRankMultivariateNormal):
        raise ValueError(f"rank is only for family 'low_rank'; got {family!r}. Leave it out.")
    for name, value in (("num_classes", num_classes), ("rank", rank)):
        if value is not None:
            whole(name, value)


def _check_axes(name: str, event_dim: int, event_shape: torch.Size) -> None:
    if len(event_shape) < event_dim:
        raise ValueError(
            f"{name!r} needs an event_shape with {event_dim} or more axes; got {tuple(event_shape)}. "
            "Write (1,) for a single number."
        )


def _class_named(name: str) -> type:
    """The class of ``pyro.distributions`` behind "student_t" or "StudentT"."""
    camel = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    found = getattr(dist, camel, None)
    if not (isinstance(found, type) and issubclass(found, TorchDistributionMixin)):
        raise unknown("family", name, FAMILIES)
    return found


def _needs_function(name: str, why: str) -> ValueError:
    return ValueError(
        f"family {name!r} cannot be built from its name: {why}. Give a function of its real parameters instead, "
        "such as lambda logits: dist.Binomial(10, logits=logits)."
    )
