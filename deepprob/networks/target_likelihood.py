"""TargetLikelihood: the distribution of the target of a regression given a network's outputs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from deepprob.data.precision import read_dtype
from deepprob.errors import shown, shown_number, unknown, whole
from deepprob.networks.likelihood import SEQUENCE_LIKELIHOODS, Likelihood
from deepprob.networks.target_families import DISPERSION, NOISE, TARGET_FAMILIES, TOTAL_COUNT, Shared

TARGET_LIKELIHOODS = (*SEQUENCE_LIKELIHOODS, *TARGET_FAMILIES)

CLASSES = ("categorical", "ordinal")


@dataclass(frozen=True)
class TargetLikelihood:
    r"""Distribution of a target given a network's outputs and the numbers that all rows share.

    The families of `Likelihood`, and for a column of the target with outputs :math:`o`, location :math:`l` and scale
    :math:`s`:

    ============================ ===============================================================================
    family                       distribution
    ============================ ===============================================================================
    ``"student_t"``              Student's t around :math:`l + s\,o` with one noise and degrees of freedom > 1 a column
    ``"heteroscedastic_normal"`` :math:`N(l + s\,o_1, (s\,e^{o_2})^2)`; the outputs are all means, then all log-scales
    ``"censored_normal"``        :math:`N(l + s\,o, \text{noise}^2)`, recorded between two known limits (Tobit)
    ``"ordinal"``                :math:`P(y \le k) = \sigma(c_k - o)` with cutpoints :math:`c_1 < c_2 < \dots`
    a function                   the distribution that it makes from the outputs, in the units of the data
    ============================ ===============================================================================

    Args:
        family: A name in ``TARGET_LIKELIHOODS``; or a function from outputs ``(..., B, outputs)`` to a Pyro
            distribution of batch shape ``(..., B)``, or ``(..., B, columns)`` for independent columns. A function with
            a second argument also gets the dispersion, a learned positive number for every column, ``(..., columns)``.
        num_classes: Number of classes of ``"categorical"`` and ``"ordinal"``.
        limits: The limits ``(low, high)`` of ``"censored_normal"`` in the units of y, None for no limit on one side.

    Raises:
        TypeError: If ``family`` is neither a name nor a function, or ``limits`` is not a pair.
        ValueError: If the family is unknown, or an option is missing, out of range, or belongs to another family.

    References:
        McCullagh (1980), Regression Models for Ordinal Data.
        Tobin (1958), Estimation of Relationships for Limited Dependent Variables.

    Examples:
        A class between two close cutpoints is unlikely, whatever the output:

        >>> import torch
        >>> one = TargetLikelihood("ordinal", num_classes=3)
        >>> cutpoints = torch.tensor([0.0, 0.1])
        >>> one.distribution(torch.tensor([[0.0], [2.0]]), numbers={"cutpoints": cutpoints}).probs.round(decimals=2)
        tensor([[0.5000, 0.0200, 0.4800],
                [0.1200, 0.0100, 0.8700]])
    """

    family: str | Callable[..., Any]
    _: KW_ONLY
    num_classes: int | None = None
    limits: Sequence[float | None] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.family, str):
            if not callable(self.family):
                raise TypeError(
                    f"likelihood must be a name or a function of the network's outputs; got {shown(self.family)}. "
                    'Write for example "normal", or lambda out: dist.Laplace(out, 1.0).'
                )
            object.__setattr__(self, "_takes_dispersion", _takes_dispersion(self.family))
        elif self.family not in TARGET_LIKELIHOODS:
            raise unknown("likelihood", self.family, TARGET_LIKELIHOODS)
        self._check_classes()
        if self.family != "censored_normal":
            if self.limits is not None:
                raise ValueError(
                    f"limits is only for likelihood='censored_normal'; got likelihood={self.name!r}. Leave it out."
                )
        else:
            object.__setattr__(self, "limits", _limits(self.limits))

    @property
    def name(self) -> str:
        """The family's name; of a function its own."""
        return self.family if isinstance(self.family, str) else getattr(self.family, "__name__", "function")

    @property
    def shared(self) -> tuple[Shared, ...]:
        """The numbers that all rows share."""
        if not isinstance(self.family, str):
            return (DISPERSION,) if self._takes_dispersion else ()  # type: ignore[attr-defined]
        if self.family in TARGET_FAMILIES:
            return TARGET_FAMILIES[self.family].shared
        return {"normal": (NOISE,), "negative_binomial": (TOTAL_COUNT,)}.get(self.family, ())

    def size(self, columns: int) -> int:
        """Number of outputs that a network needs for some columns of y; a function of the user gets one for each."""
        if self.family == "ordinal":
            return 1
        if self.family == "categorical":
            return self.num_classes or 1
        return columns * (TARGET_FAMILIES[self.family].per_column if self.family in TARGET_FAMILIES else 1)

    @property
    def has_columns(self) -> bool:
        """Whether targets are numbers in columns, not classes."""
        return self.family not in (*CLASSES, "bernoulli")

    @property
    def picture(self) -> str:
        """The kind of picture that shows targets, see `Likelihood.picture`."""
        plain = self._plain
        return ("classes" if self.family == "ordinal" else "curve") if plain is None else plain.picture

    # -- data ----------------------------------------------------------------------------------------------------

    def validate(self, y: Tensor) -> Tensor:
        """Check targets and convert them to the type that the distribution needs.

        Args:
            y: Targets, one per row; a single column may have shape ``(N,)``. Those of a function of the user keep
                their shape and, if they are whole numbers, their type.

        Raises:
            ValueError: If a value is outside the support, or the shape is wrong.
        """
        if not isinstance(self.family, str):
            return y.to(read_dtype()) if y.is_floating_point() else y
        if self.family in CLASSES:
            return Likelihood("categorical", (), num_classes=self.num_classes).validate("labels y", y)
        y = Likelihood("normal" if self.family in TARGET_FAMILIES else self.family, (None,)).validate("y", y)
        if self.limits is not None and (wrong := (y < self._ends[0]) | (y > self._ends[1])).any():
            at = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"y must be between the limits {tuple(self.limits)} of likelihood='censored_normal'; got "
                f"{shown_number(y[at])} in row {at[0]}. Give wider limits, or y.clip(*limits)."
            )
        return y

    def around(self, mean: Tensor, sd: Tensor) -> dict[str, Tensor]:
        """Location and scale at which an output of zero gives the mean of the data, see `Likelihood.around`."""
        if isinstance(self.family, str) and self.family in TARGET_FAMILIES:
            return {} if self.family == "ordinal" else {"loc": mean, "scale": sd}
        return {} if self._plain is None else self._plain.around(mean, sd)

    # -- distributions -------------------------------------------------------------------------------------------

    def as_events(self, y: Tensor, fn: TorchDistributionMixin) -> Tensor:
        """Targets ``(N,)`` as columns ``(N, 1)`` if the distribution that a user's function makes has such events."""
        return y.unsqueeze(-1) if y.dim() == 1 and fn.event_shape == (1,) else y

    def columns(self, y: Tensor) -> int:
        """Number of columns of targets."""
        return y.shape[1] if y.dim() > 1 else 1

    def check_outputs(self, outputs: int, columns: int, *, exactly: bool) -> None:
        """Refuse a network with another number of outputs than the targets need.

        Args:
            outputs: The number of outputs.
            columns: The number of columns of y.
            exactly: Whether y is given; before a fit its columns are unknown.

        Raises:
            ValueError: If the numbers differ.
        """
        if not isinstance(self.family, str):
            return
        if self.family == "categorical":
            if outputs != self.num_classes:
                raise ValueError(
                    f"the network has {outputs} outputs, but num_classes={self.num_classes}. Make them equal."
                )
            return
        size = self.size(columns)
        open_ = not exactly and columns == 1 and self.family != "ordinal" and outputs % self.size(1) == 0
        if size != outputs and not open_:
            raise ValueError(f"the network has {outputs} outputs, but {self._needs(size, columns)}")

    def distribution(
        self,
        out: Tensor,
        *,
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        numbers: Mapping[str, Tensor] | None = None,
    ) -> TorchDistributionMixin:
        """The distribution of targets.

        Args:
            out: The network's outputs, ``(*K, B, outputs)``.
            loc: Location of the data; None for 0.
            scale: Scale of the data; None for 1.
            numbers: The shared numbers by name, noise in the units of the data.

        Returns:
            A Pyro distribution of batch shape ``(*K, B)``.

        Raises:
            ValueError: If a shared number is missing, or a function of the user does not keep the rows.
        """
        numbers = {} if numbers is None else numbers
        if missing := [one.name for one in self.shared if one.name not in numbers]:
            raise ValueError(f"likelihood={self.name!r} needs numbers with {missing[0]!r}; got {sorted(numbers)}.")
        if not isinstance(self.family, str):
            return self._of_function(out, numbers)
        if self.family not in TARGET_FAMILIES:
            plain = self._plain
            first = numbers[self.shared[0].name] if self.shared else None
            made: TorchDistributionMixin = plain.distribution(out, loc=loc, scale=scale, dispersion=first)  # type: ignore[union-attr]
            return made
        units = (out.new_zeros(()) if loc is None else loc, out.new_ones(()) if scale is None else scale)
        made = TARGET_FAMILIES[self.family].make(out, *units, numbers, self._ends)
        return made if self.family == "ordinal" else made.to_event(1)

    # -- internals -----------------------------------------------------------------------------------------------

    @property
    def _plain(self) -> Likelihood | None:
        """The likelihood of a family that is not only for targets."""
        if not isinstance(self.family, str) or self.family in TARGET_FAMILIES:
            return None
        shape = () if self.family == "categorical" else (None,)
        return Likelihood(self.family, shape, num_classes=self.num_classes)

    @property
    def _ends(self) -> tuple[float, float]:
        low, high = self.limits or (None, None)
        return -math.inf if low is None else low, math.inf if high is None else high

    def _of_function(self, out: Tensor, numbers: Mapping[str, Tensor]) -> TorchDistributionMixin:
        made = self.family(out, *numbers.values())  # type: ignore[operator]
        rows = out.shape[:-1]
        if not isinstance(made, TorchDistributionMixin) or made.batch_shape[: len(rows)] != rows:
            came = f"batch shape {tuple(made.batch_shape)}" if hasattr(made, "batch_shape") else type(made).__name__
            raise ValueError(
                f"likelihood {self.name!r} must return a distribution of pyro.distributions with a row for every row "
                f"of outputs {tuple(out.shape)}; got {came}. Write it for any number of axes before the last one."
            )
        events: TorchDistributionMixin = made.to_event(len(made.batch_shape) - len(rows))
        return events

    def _check_classes(self) -> None:
        if self.family not in CLASSES:
            if self.num_classes is not None:
                raise ValueError(
                    "num_classes is only for likelihood='categorical' and 'ordinal'; got "
                    f"likelihood={self.name!r}. Leave it out."
                )
            return
        try:
            object.__setattr__(self, "num_classes", whole("num_classes", self.num_classes, least=2))
        except ValueError:
            raise ValueError(
                f"likelihood={self.family!r} needs num_classes, a whole number of at least 2; got "
                f"{self.num_classes!r}. Give the number of classes."
            ) from None

    def _needs(self, size: int, columns: int) -> str:
        if self.family == "ordinal":
            return "likelihood='ordinal' needs one, whatever the number of classes. Give its last layer one output."
        if size == columns:
            return f"y has {columns} columns. Make them equal."
        needs = "a mean and a log-scale for every column of y"
        return f"likelihood={self.family!r} needs {needs}. Give its last layer {size} outputs."


def _takes_dispersion(family: Callable[..., Any]) -> bool:
    """Whether a function asks for a dispersion beside the outputs."""
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        arguments = inspect.signature(family).parameters.values()
    except (TypeError, ValueError) as error:
        raise _wrong_function(family) from error
    needed = [p for p in arguments if p.default is p.empty]
    if len(needed) not in (1, 2) or any(p.kind not in places for p in needed) or isinstance(family, type):
        raise _wrong_function(family)
    return len(needed) == 2


def _wrong_function(family: Any) -> TypeError:
    return TypeError(
        "likelihood must be a function of the network's outputs, or of outputs and dispersion; got "
        f"{getattr(family, '__name__', shown(family))}. Write e.g. lambda out, dispersion: dist.Laplace(out, "
        "dispersion)."
    )


def _limits(limits: Any) -> tuple[float | None, float | None]:
    if limits is None:
        raise ValueError(
            "likelihood='censored_normal' needs limits, the values at which y is censored; got None. Write "
            "limits=(0.0, None) for a lower limit of 0."
        )
    if not isinstance(limits, Sequence) or len(limits) != 2:
        raise TypeError(f"limits must be a pair (low, high); got {shown(limits)}. Write limits=(0.0, None).")
    low, high = (None if x is None or math.isinf(x) else float(x) for x in limits)
    if (low is None and high is None) or (low is not None and high is not None and not low < high):
        raise ValueError(
            f"limits must hold a number, and low < high; got {tuple(limits)}. Without limits use likelihood='normal'."
        )
    return low, high
