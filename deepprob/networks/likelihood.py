"""Likelihood: the distribution of an observed site, with checks and preparation of its data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from deepprob.data.precision import read_dtype
from deepprob.errors import shown, shown_number, unknown, whole
from deepprob.networks.likelihood_families import FAMILIES

LIKELIHOODS = tuple(FAMILIES)
#: The families of sequences, and of rows whose length the network's output determines.
SEQUENCE_LIKELIHOODS = tuple(name for name, family in FAMILIES.items() if family.sequences)


@dataclass(frozen=True)
class Likelihood:
    r"""Distribution over an observation given a network's output: the conditional of an observed site.

    .. math:: x \mid o \sim F(m, \phi)

    with the network's output :math:`o`, a location :math:`l` and a scale :math:`s` of the data, and a dispersion
    :math:`\phi` that all observations share:

    ========================== ================================================= =============================
    family                     :math:`m`                                         :math:`\phi`
    ========================== ================================================= =============================
    ``"bernoulli"``            logits :math:`l + o`
    ``"categorical"``          logits :math:`l + o`, one for every class
    ``"normal"``               mean :math:`l + s\,o`                             noise, the standard deviation
    ``"poisson"``              mean :math:`s\,(\epsilon + \mathrm{softplus}(o))`
    ``"negative_binomial"``    mean :math:`s\,(\epsilon + \mathrm{softplus}(o))` total_count: the variance is
                                                                                 :math:`m + m^2 / \phi`
    ``"student_t"``            location :math:`l + s\,o`                         noise, degrees of freedom > 1
    ``"continuous_bernoulli"`` logits :math:`o` of a value in [0, 1]
    ``"discretized_logistic"`` location :math:`l + o` of a value in [0, 1]       scale of the logistic
    ========================== ================================================= =============================

    ``"zero_inflated_poisson"`` and ``"zero_inflated_negative_binomial"`` have a second output for every value, the
    logits of a gate: with this probability the value is zero, otherwise it is a count of the family without the gate.
    Outputs of a value stand side by side. Values of ``"discretized_logistic"`` are in one of ``levels`` equal bins of
    [0, 1], and have its probability; those of ``"continuous_bernoulli"`` have a density.

    The network does not output the dispersion, because the noise of a single observation could shrink without bound.
    Counts have the softplus link of `Conditional`: it grows linearly, so a large output does not overflow as it would
    under an exponential. The two families of counts have the same mean, and agree in the limit of a large total count.

    Args:
        family: A name in ``LIKELIHOODS``.
        event_shape: Shape of one observation; None for an axis whose length the network's output determines.
        num_classes: Number of classes of ``"categorical"``.
        levels: Number of levels of ``"discretized_logistic"``; None for 256.
        grey: Whether ``"bernoulli"`` takes values in [0, 1] as probabilities, from which `prepare` draws binary values.

    Raises:
        TypeError: If ``event_shape`` is not a sequence.
        ValueError: If the family is unknown, a size is not a whole number of at least 1, ``num_classes`` is missing or
            out of range, or an option belongs to another family.

    Examples:
        The scale sets the mean of counts, and the dispersion does not change it:

        >>> for family in ("poisson", "negative_binomial"):
        ...     counts = Likelihood(family, (2,))
        ...     start = counts.around(torch.tensor([1.0, 20.0]))
        ...     made = counts.distribution(torch.zeros(2), dispersion=torch.tensor(10.0), **start)
        ...     print(made.mean.round(decimals=2), made.variance.round(decimals=1))
        tensor([ 1., 20.]) tensor([ 1., 20.])
        tensor([ 1., 20.]) tensor([ 1.1000, 60.0000])

        An error uses the user's name for the data:

        >>> Likelihood("poisson", ()).validate("visits", torch.tensor([3.0, 0.5]))
        Traceback (most recent call last):
            ...
        ValueError: visits must be whole numbers of at least 0 for likelihood='poisson'; got 0.5 in row 1. Give
        counts, or choose likelihood='normal'.
    """

    family: str
    event_shape: tuple[int | None, ...]
    _: KW_ONLY
    num_classes: int | None = None
    grey: bool = False
    levels: int | None = None

    def __post_init__(self) -> None:
        if self.family not in LIKELIHOODS:
            raise unknown("likelihood", self.family, LIKELIHOODS)
        if not isinstance(self.event_shape, Sequence):
            raise TypeError(f"event_shape must be a tuple of sizes; got {shown(self.event_shape)}. Write (8,) or ().")
        sizes = (None if n is None else whole("a size in event_shape", n) for n in self.event_shape)
        object.__setattr__(self, "event_shape", tuple(sizes))
        if self.grey and self.family != "bernoulli":
            raise ValueError(f"grey is only for likelihood='bernoulli'; got likelihood={self.family!r}. Leave it out.")
        if None in self.event_shape and not FAMILIES[self.family].sequences:
            raise ValueError(
                f"likelihood={self.family!r} is for rows of a fixed size. For sequences, choose from: "
                f"{', '.join(SEQUENCE_LIKELIHOODS)}."
            )
        self._check_levels()
        if self.family != "categorical":
            if self.num_classes is not None:
                raise ValueError(
                    f"num_classes is only for likelihood='categorical'; got likelihood={self.family!r}. Leave it out."
                )
            return
        try:
            object.__setattr__(self, "num_classes", whole("num_classes", self.num_classes, least=2))
        except ValueError:
            raise ValueError(
                "likelihood='categorical' needs num_classes, a whole number of at least 2; got "
                f"{self.num_classes!r}. Give the number of classes."
            ) from None

    def _check_levels(self) -> None:
        if self.family == "discretized_logistic":
            levels = 256 if self.levels is None else self.levels
            object.__setattr__(self, "levels", whole("the number of levels", levels, least=2))
        elif self.levels is not None:
            raise ValueError(
                f"levels is only for likelihood='discretized_logistic'; got likelihood={self.family!r}. Leave it out."
            )

    @property
    def size(self) -> int:
        """Number of outputs that a network needs.

        Raises:
            ValueError: If an axis of the event has no known size.
        """
        if None in self.event_shape:
            raise ValueError(f"event_shape {self.event_shape} leaves the size to the network. Give every axis a size.")
        return math.prod(self._sizes)

    @property
    def _sizes(self) -> tuple[int, ...]:
        """The event's known axes, followed by the outputs of a value if there are several, such as classes."""
        per_value = FAMILIES[self.family].per_value if self.num_classes is None else self.num_classes
        outputs = () if self.num_classes is None and per_value == 1 else (per_value,)
        return tuple(n for n in self.event_shape if n is not None) + outputs

    @property
    def dispersion(self) -> str | None:
        """Name of the dispersion, such as ``"noise"`` or ``"total_count"``; None for a family without one."""
        return FAMILIES[self.family].dispersion

    @property
    def picture(self) -> str:
        """The kind of picture that shows observations: ``"image"`` for two or three axes of known size, else
        ``"binary"``, ``"classes"``, ``"curve"`` or ``"counts"``.
        """
        is_image = len(self.event_shape) in (2, 3) and None not in self.event_shape
        return "image" if is_image else FAMILIES[self.family].picture

    # -- data ----------------------------------------------------------------------------------------------------

    def validate(self, name: str, x: Tensor) -> Tensor:
        """Check observations and convert them to the type that the distribution needs.

        Args:
            name: The user's name for the observations, for error messages.
            x: Observations, one per row. A single column may have shape ``(N,)``, and a scalar event ``(N, 1)``.

        Returns:
            The observations in torch's default dtype; classes in int64.

        Raises:
            ValueError: If a value is outside the likelihood's support, or a column has the wrong shape.
        """
        x = _columns(name, x, self.event_shape)
        if self.num_classes is not None:
            return _classes(name, x, self.num_classes)
        x = x.to(read_dtype())
        family = FAMILIES[self.family]
        if self.grey or family.unit_interval:
            _check_unit_interval(name, x, "a Bernoulli likelihood" if self.grey else f"likelihood={self.family!r}")
            return x
        if family.allows is not None and (wrong := _first(~family.allows(x))) is not None:
            raise ValueError(
                f"{name} must be {family.expected} for likelihood={self.family!r}; got {shown_number(x[wrong])} in row "
                f"{wrong[0]}. {family.remedy.format(name=name)}"
            )
        return x

    def prepare(self, x: Tensor) -> Tensor:
        """Draw binary observations from grey ones (dynamic binarization); binary values stay unchanged."""
        return (torch.rand_like(x) < x).to(x.dtype) if self.grey else x

    def features(self, x: Tensor) -> Tensor:
        """Observations as a network's input: counts as ``log(1 + x)``, because they span orders of magnitude."""
        return x.log1p() if FAMILIES[self.family].picture == "counts" else x

    def units(self, x: Tensor) -> Tensor:
        """Number of values in each row, shape ``(B,)``."""
        return torch.full((len(x),), float(math.prod(x.shape[1:])), device=x.device)

    # -- distributions -------------------------------------------------------------------------------------------

    def around(self, mean: Tensor, sd: Tensor | None = None) -> dict[str, Tensor]:
        """Location and scale for `distribution` at which an output of zero gives the mean of the data.

        Args:
            mean: Mean of the training data, in the shape of the event.
            sd: Standard deviation of the training data; None keeps a normal's outputs in the units of the data.

        Returns:
            For families with a location, the mean as ``loc`` and ``sd`` as ``scale``; for counts, a ``scale`` that
            gives this mean (or a mean of 1 where all training counts are zero); empty for others.
        """
        family = FAMILIES[self.family]
        if family.centred:
            return {"loc": mean} if sd is None else {"loc": mean, "scale": sd}
        if family.mean_at_zero is not None:
            return {"scale": torch.where(mean > 0, mean, 1.0) / family.mean_at_zero}
        return {}

    def raw_dispersion(self, shape: tuple[int, ...]) -> Tensor:
        """Initial value of an unbounded parameter, from which `bounded` computes the dispersion.

        A dispersion of several numbers has them on a last axis of its own.
        """
        start = torch.tensor(FAMILIES[self.family].raw_start)
        return start.expand((*shape, *start.shape)).clone()

    def bounded(self, raw: Tensor, scale: Tensor | None = None) -> Tensor:
        r"""Dispersion from an unbounded parameter.

        Noise is :math:`s\,(\epsilon + \mathrm{softplus}(r))`; a total count is
        :math:`1 / (\epsilon + \mathrm{softplus}(r))`, which is finite even for counts without overdispersion. The two
        numbers of ``"student_t"`` are noise and degrees of freedom, :math:`1 + \epsilon + \mathrm{softplus}(r)`.

        Args:
            raw: The parameter :math:`r`.
            scale: The scale :math:`s` of the data; None for 1.
        """
        return FAMILIES[self.family].bound(raw, scale)

    def distribution(
        self,
        out: Tensor,
        *,
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        dispersion: Tensor | None = None,
        inside: Tensor | None = None,
        present: Tensor | None = None,
    ) -> TorchDistributionMixin:
        """The distribution of an observation.

        Args:
            out: The network's output: flat, ``(*batch, size)``; if the event has an axis of open size,
                ``(*batch, *event)``, followed by an axis of classes for ``"categorical"``.
            loc: Offset of the outputs, for ``"normal"``, ``"bernoulli"`` and ``"categorical"``; None for 0.
            scale: Scale of the outputs, for ``"normal"`` and counts; None for 1.
            dispersion: Dispersion in the units of the data, for a family that has one.
            inside: Mask of the values before a sequence's end, broadcast to the event. Other values must be zero: they
                are drawn as zero and have no influence on the log-probability.
            present: Mask of the values that are not missing, broadcast to the event. Other values have no influence on
                the log-probability, whatever they are; they are drawn like all.

        Returns:
            A Pyro distribution whose event shape is that of the observation.

        Raises:
            ValueError: If the output has the wrong size, or a family with a dispersion has none.
        """
        if self.dispersion and dispersion is None:
            raise ValueError(f"likelihood={self.family!r} needs dispersion, its {self.dispersion}; got None.")
        if None not in self.event_shape:
            self._check_size(out.shape[-1] if out.dim() else 0)
            out = out.reshape(out.shape[:-1] + self._sizes)
        options = {} if self.levels is None else {"levels": self.levels}
        per_value = FAMILIES[self.family].make(out, loc, scale, dispersion, inside, **options)
        per_value = per_value if present is None else per_value.mask(present)
        events: TorchDistributionMixin = per_value.to_event(len(self.event_shape))
        return events

    def _check_size(self, found: int) -> None:
        if found != self.size:
            raise ValueError(
                f"likelihood={self.family!r} over rows of shape {self.event_shape} needs a network with {self.size} "
                f"outputs on its last axis; got {found}. Give its last layer {self.size} outputs."
            )


# Checks ------------------------------------------------------------------------------------------------------------


def _columns(name: str, x: Tensor, event_shape: tuple[int | None, ...]) -> Tensor:
    """Reshape rows of a scalar or of open columns from ``(N,)`` or ``(N, D)``; others stay unchanged."""
    if event_shape == ():
        if x.dim() == 2 and x.shape[1] == 1:
            return x[:, 0]
        if x.dim() != 1:
            raise ValueError(
                f"{name} must have shape (N,); got {tuple(x.shape)}. Convert one-hot rows with y.argmax(1)."
            )
    if event_shape == (None,):
        if x.dim() not in (1, 2):
            raise ValueError(f"{name} must have shape (N, outputs) or (N,); got {tuple(x.shape)}. Flatten its rows.")
        return x.unsqueeze(1) if x.dim() == 1 else x
    return x


def _classes(name: str, x: Tensor, num_classes: int) -> Tensor:
    numbers = x if x.is_floating_point() else x.long()  # torch cannot round bools
    labels = numbers.round()
    if (wrong := _first(numbers != labels)) is not None:
        raise ValueError(
            f"{name} must be whole numbers; got {shown_number(x[wrong])} in row {wrong[0]}. Number the classes from 0."
        )
    if (wrong := _first((labels < 0) | (labels >= num_classes))) is not None:
        raise ValueError(
            f"{name} must be in 0..{num_classes - 1} for num_classes={num_classes}; got {shown_number(x[wrong])} in "
            f"row {wrong[0]}. Number the classes from 0, or raise num_classes."
        )
    return labels.long()


def _check_unit_interval(name: str, x: Tensor, needed_by: str) -> None:
    if _first(~((x >= 0) & (x <= 1))) is None:
        return
    low, high = x.min().item(), x.max().item()
    remedy = f"Divide by {high:g}" if low >= 0 else f"Rescale with (x - {low:g}) / {high - low:g}"
    raise ValueError(
        f"{name} must be in [0, 1] for {needed_by}; got values from {low:g} to {high:g}. "
        f"{remedy}, or choose likelihood='normal'."
    )


def _first(wrong: Tensor) -> tuple[int, ...] | None:
    """Index of the first wrong value, row first; None if there is none."""
    return tuple(wrong.nonzero()[0].tolist()) if bool(wrong.any()) else None
