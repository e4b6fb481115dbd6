"""The noun `Prediction`: a posterior predictive distribution, with its uncertainty split in two."""

from __future__ import annotations

import math
from typing import Any, SupportsFloat

import numpy as np
import torch
from torch import Tensor

from deepprob.distributions.per_draw import PerDraw, unwrapped
from deepprob.errors import shown
from deepprob.posteriors.averages import as_real, average, binary_entropy, entropy, like
from deepprob.posteriors.prediction_frame import frame_of_prediction, frame_of_rows
from deepprob.posteriors.prediction_names import PredictionNames, values_of

_DISCRETE = {"Categorical": "classes", "OneHotCategorical": "classes", "Bernoulli": "binary"}
_CIRCULAR = ("VonMises",)  # their variance is that of a direction, at most 1


class Prediction:
    r"""The posterior predictive distribution of some rows, a mixture over draws from the posterior.

    .. math:: p(y \mid x) = \sum_{k=1}^K w_k \, p(y \mid x, \theta_k)

    The weights are :math:`1 / K`, unless `reweighted` gives each row its own.

    Args:
        distribution: The observed site's distribution, batch shape ``(K, B, ...)``.
        draws: One value from it for every draw, shape ``(K, B, ..., *event)``.
        site: The site's name.
        unused: Dimensions of the batch shape, counted from the right, that ``draws`` does not have.
        log_weights: Log-weights of the components by row, ``(K, B)``; None if all are equal.
        names: The names of classes, targets and rows.

    Attributes:
        kind: ``"classes"``, ``"binary"``, ``"count"`` or ``"real"``.

    Examples:
        If each component is certain and they disagree, all uncertainty is epistemic:

        >>> import pyro.distributions as dist
        >>> d = dist.Normal(torch.tensor([[-1.0], [1.0]]), torch.tensor(1e-6))
        >>> p = Prediction(d, d.sample(), "y")
        >>> round(float(p.epistemic), 3), round(float(p.aleatoric), 3)
        (1.0, 0.0)
    """

    def __init__(
        self,
        distribution: Any,
        draws: Tensor,
        site: str = "y",
        *,
        unused: tuple[int, ...] = (),
        log_weights: Tensor | None = None,
        names: PredictionNames | None = None,
    ) -> None:
        self.names = names or PredictionNames()
        self.distribution, self.draws, self.site = distribution, draws, site
        self._log_weights = log_weights
        # Counted from the left, because events and classes add dimensions on the right.
        self._unused = tuple(len(distribution.batch_shape) + dim for dim in unused)
        base = unwrapped(distribution.first if isinstance(distribution, PerDraw) else distribution)
        known = [_DISCRETE[parent.__name__] for parent in type(base).__mro__ if parent.__name__ in _DISCRETE]
        if known:
            self.kind = known[0]
        elif getattr(base.support, "is_discrete", False):
            self.kind = "count"
        else:
            self.kind = "real"
        self._base = base

    @property
    @torch.no_grad()
    def mean(self) -> Tensor:
        """Mean of the mixture, shape ``(B, ..., *event)``; for classes, their probabilities."""
        if self.kind == "classes":
            return self.probs
        # Without closed-form moments of the components, the mixture's moments are estimated from draws.
        return self._averaged(self._moment("mean")) if self._known else average(as_real(self.draws))

    @property
    @torch.no_grad()
    def sd(self) -> Tensor:
        """Standard deviation of the mixture, with the shape of `mean`."""
        if self.kind == "classes":
            return (self.probs * (1 - self.probs)).sqrt()
        if not self._known:
            return as_real(self.draws).std(0, unbiased=False)
        return (self._averaged(self._moment("variance")) + self._between()).sqrt()

    @property
    @torch.no_grad()
    def probs(self) -> Tensor:
        """Class probabilities, shape ``(B, C)``, or the probability of a one, shape as `mean`.

        Raises:
            ValueError: If the predicted site is neither categorical nor binary.
        """
        if self.kind not in ("classes", "binary"):
            raise ValueError(
                f"probs needs a categorical or binary site, but {self.site!r} is {self.kind}. Use mean, sd or interval."
            )
        return self._averaged(self.probs_by_draw)

    @property
    @torch.no_grad()
    def aleatoric(self) -> Tensor:
        """Uncertainty that more data would not remove.

        For classes and binary sites it is the mean entropy of the components, in nats. Otherwise it is the square root
        of the mean conditional variance, in the target's units. Shape ``(B,)`` for classes, else that of `mean`.

        Raises:
            ValueError: If the family's mean and variance have no closed form.
        """
        if self.kind == "classes":
            return self._averaged(entropy(self.probs_by_draw))
        if self.kind == "binary":
            return self._averaged(binary_entropy(self.probs_by_draw))
        return self._averaged(self._moment("variance")).sqrt()

    @property
    @torch.no_grad()
    def epistemic(self) -> Tensor:
        """Uncertainty about the parameters and latents.

        For classes and binary sites it is the mutual information, in nats. Otherwise it is the standard deviation over
        draws of the conditional mean, in the target's units.

        Raises:
            ValueError: If the family's mean and variance have no closed form.
        """
        if self.kind == "classes":
            return (entropy(self.probs) - self.aleatoric).clamp_min(0.0)
        if self.kind == "binary":
            return (binary_entropy(self.probs) - self.aleatoric).clamp_min(0.0)
        return self._between().sqrt()

    @property
    def same_for_all_draws(self) -> bool:
        """Whether the components are one and the same distribution, so that `mean` and `sd` have no sampling error."""
        if self.kind in ("classes", "binary"):
            parts = [self.probs_by_draw]
        elif self._known:
            parts = [self._moment("mean"), self._moment("variance")]
        else:
            return False
        return all(bool((part == part[:1]).all()) for part in parts)

    def interval(self, mass: float = 0.9) -> tuple[Tensor, Tensor]:
        """The central interval of a given probability mass, from quantiles of the draws.

        Args:
            mass: Probability inside the interval, between 0 and 1.

        Returns:
            Lower and upper ends, each of shape ``(B, ..., *event)``.

        Raises:
            ValueError: If ``mass`` is out of range, or the site is categorical.
        """
        _check_mass("interval", mass)
        if self.kind == "classes":
            raise ValueError(f"interval needs ordered values, but {self.site!r} is categorical. Use probs.")
        tail = (1 - mass) / 2
        at = torch.tensor([tail, 1 - tail], dtype=torch.get_default_dtype(), device=self.draws.device)
        low, high = torch.quantile(self.draws.to(at.dtype), at, dim=0)
        return low, high

    @property
    def classes(self) -> Any:
        """The most likely class of every row, shape ``(B,)``; of a binary site 0 or 1, shape as `mean`.

        It is an array of names if the classes have names (`class_names`), as those of a `deepprob.table`.

        Raises:
            ValueError: If the predicted site is neither categorical nor binary.
        """
        if self.kind not in ("classes", "binary"):
            raise ValueError(f"classes needs a categorical or binary site, but {self.site!r} is {self.kind}. Use mean.")
        numbers = self.probs.argmax(-1) if self.kind == "classes" else (self.probs > 0.5).long()
        return np.array(self.names.classes)[numbers.cpu().numpy()] if self.names.classes else numbers

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, by number; empty if they have none."""
        return self.names.classes

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the targets; empty if they have none."""
        return self.names.columns

    def to_frame(self, mass: float = 0.9) -> Any:
        """The prediction as a pandas frame, one line a row.

        For real values and counts the columns are ``mean``, ``sd`` and the ends of the central interval, named after
        their quantiles (``5%``, ``95%``). For classes they are ``class``, the most likely one, and ``prob[c]`` for
        every class c; for a binary site ``class`` and ``prob``, the probability of a one. If a row has several values,
        each name has the place of the value as suffix: ``mean[0]``, ``mean[1]``, or ``mean[2, 3]``.
        Classes and targets of a `deepprob.table` have names, ``prob[cat]`` and ``mean[height]``; rows have the index of
        the given frame. Columns of different kinds have the columns of their kind, by name: ``mean[age]``,
        ``class[island]``, ``prob[island=Dream]``; those of a `deepprob.table` are in its units.

        Args:
            mass: Probability inside the interval, between 0 and 1.

        Raises:
            ValueError: If ``mass`` is out of range.

        Examples:
            >>> import pyro.distributions as dist
            >>> d = dist.Categorical(torch.tensor([[[0.25, 0.75], [1.0, 0.0]]]))
            >>> Prediction(d, d.sample(), "y").to_frame()
                 class  prob[0]  prob[1]
            row
            0        1     0.25     0.75
            1        0     1.00     0.00
        """
        _check_mass("to_frame", mass)
        return frame_of_prediction(self, mass)

    def to_rows(self, draw: int = 0) -> Any:
        """One draw of the rows as a pandas frame in the columns, units and class names of a `deepprob.table`.

        Args:
            draw: Number of the draw.

        Raises:
            ValueError: If the model does not predict all columns of such a table.
        """
        return frame_of_rows(self, draw)

    def summary(self, rows: int = 10) -> str:
        """The first rows of `to_frame` as text.

        Args:
            rows: Number of rows.
        """
        frame = self.to_frame()
        more = f"\n{len(frame) - rows} more rows" if len(frame) > rows else ""
        return f"{self!r}\n{frame.head(rows).to_string(float_format='{:.4g}'.format)}{more}"

    @torch.no_grad()
    def log_prob(self, y: Any) -> Tensor:
        r"""Log predictive density of observed values, ``log sum_k w_k p(y | x, theta_k)``, in nats.

        Args:
            y: The observed values, shape ``(B, ..., *event)``, in a tensor, an array, a list, a pandas series or frame.
                Labels are numbers of classes, or their names if they have some.

        Returns:
            One value per row, shape ``(B, ...)``.

        Raises:
            ValueError: If the shape is not that of the predicted rows, or a label is not one of the fitted classes.
        """
        terms = self.log_prob_by_draw(y)
        if self._log_weights is None:
            return terms.logsumexp(0) - math.log(terms.shape[0])
        return (terms + like(self._log_weights, terms)).logsumexp(0)

    @torch.no_grad()
    def log_prob_by_draw(self, y: Any) -> Tensor:
        """Log density of observed values under every component, in nats.

        Args:
            y: The observed values, shape ``(B, ..., *event)``.

        Returns:
            Shape ``(K, B, ...)``.

        Raises:
            ValueError: As for `log_prob`.
        """
        value = values_of(y, self.names, tuple(self.draws.shape[1:])).to(self.draws.device)
        if self.kind != "classes":  # labels stay whole numbers; other values take the dtype of the draws
            value = value.to(self.draws.dtype)
        if self.kind == "classes" and value.is_floating_point():
            if bool((value != value.round()).any()):
                raise ValueError("labels must be whole numbers; got fractions. Give the class number of every row.")
            value = value.long()
        if value.shape != self.draws.shape[1:]:
            raise ValueError(
                f"y must have the shape of the prediction, {tuple(self.draws.shape[1:])}; "
                f"got {tuple(value.shape)}. Reshape y."
            )
        if self.kind == "classes" and not self._base.event_dim:
            count = self._base.probs.shape[-1]
            if bool(((value < 0) | (value >= count)).any()):
                raise ValueError(
                    f"labels must be in 0..{count - 1}; got {int(value.min())} to {int(value.max())}. "
                    "Give labels of the fitted classes."
                )
        for place in self._unused:
            value = value.unsqueeze(place - 1)  # y has no dimension of draws
        return self._squeeze(self.distribution.log_prob(value))

    def reweighted(self, log_weights: Tensor, draws: int | None = None, seed: int = 0) -> Prediction:
        """The mixture with other weights, and draws from it.

        Args:
            log_weights: Log-weights of the components by row, normalized over the components, shape ``(K, B)``.
            draws: Number of draws; None for as many as there are components.
            seed: Random seed of the draws.

        Examples:
            All weight on the second component:

            >>> import pyro.distributions as dist
            >>> d = dist.Normal(torch.tensor([[0.0], [5.0]]), torch.tensor(1.0))
            >>> p = Prediction(d, d.sample()).reweighted(torch.tensor([[0.0], [1.0]]).log())
            >>> p.mean.tolist(), p.draws.shape
            ([5.0], torch.Size([2, 1]))
        """
        weights, count = log_weights.to(self.draws.device), len(log_weights) if draws is None else draws
        generator = torch.Generator(self.draws.device).manual_seed(seed)
        chosen = torch.multinomial(weights.exp().T, count, replacement=True, generator=generator).T  # (draws, B)
        index = chosen.reshape(*chosen.shape, *[1] * (self.draws.dim() - 2)).expand(-1, -1, *self.draws.shape[2:])
        unused = tuple(place - len(self.distribution.batch_shape) for place in self._unused)
        drawn = self.draws.gather(0, index)
        return Prediction(self.distribution, drawn, self.site, unused=unused, log_weights=weights, names=self.names)

    def __len__(self) -> int:
        if self.draws.dim() < 2:
            raise TypeError(f"site {self.site!r} has no rows: it is one value. Use mean, sd or draws.")
        return int(self.draws.shape[1])

    def __repr__(self) -> str:
        rows = f"{len(self)} rows" if self.draws.dim() > 1 else "one value"
        return f"Prediction({self.site!r}: {self.kind}, {rows}, {self.draws.shape[0]} draws)"

    def _moment(self, name: str) -> Tensor:
        if not self._known:
            raise ValueError(
                f"the mean and variance of {type(self._base).__name__} have no closed form, so {self.site!r} "
                "cannot be split into aleatoric and epistemic parts. Use mean, sd or interval."
            )
        value: Tensor = getattr(self.distribution, name)
        shape = (*self.distribution.batch_shape, *self.distribution.event_shape)
        components = len(self.draws if self._log_weights is None else self._log_weights)
        return as_real(self._squeeze(value.expand(shape)).expand(components, *self.draws.shape[1:]))

    @property
    def _known(self) -> bool:
        """Whether the family's mean and variance have closed forms."""
        if type(self._base).__name__ in _CIRCULAR:
            return False
        try:
            self.distribution.mean, self.distribution.variance  # noqa: B018
        except NotImplementedError:
            return False
        return True

    @property
    def probs_by_draw(self) -> Tensor:
        """Probabilities under every component, ``(K, *shape)`` with the shape of `probs`."""
        owner = self.distribution if isinstance(self.distribution, PerDraw) else self._base
        return self._squeeze(torch.as_tensor(owner.probs))

    def _squeeze(self, value: Tensor) -> Tensor:
        for place in reversed(self._unused):
            value = value.squeeze(place)
        return value

    def _between(self) -> Tensor:
        means = self._moment("mean")
        return self._averaged((means - self._averaged(means)).square())

    def _averaged(self, values: Tensor) -> Tensor:
        """The mean over the components, weighted."""
        if self._log_weights is None:
            return average(values)
        return (like(self._log_weights, values).exp() * values).sum(0)


def _check_mass(method: str, mass: Any) -> None:
    if not isinstance(mass, SupportsFloat) or not 0 < float(mass) < 1:
        raise ValueError(f"mass must lie between 0 and 1; got {shown(mass)}. Write {method}(0.9) for 90 %.")
