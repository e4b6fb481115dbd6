"""The conditional variational autoencoder: rows given a condition."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from deepprob.data import DataSet, Split, Table, as_split
from deepprob.data.opening import class_count
from deepprob.errors import unknown
from deepprob.models.vae import NORMAL_POSTERIORS, VAE
from deepprob.networks.conditional import Conditional
from deepprob.networks.dense import MLP
from deepprob.networks.inputs import check_outputs, moments, run_by_row
from deepprob.networks.likelihood import Likelihood
from deepprob.networks.network import whole_sizes
from deepprob.networks.values import likelihood_of
from deepprob.programs.example import Example
from deepprob.programs.fields import Fill
from deepprob.programs.minibatch import Batch
from deepprob.programs.missing import checked_missing, explaining_masks
from deepprob.programs.origin import Origin
from deepprob.programs.program import Program


class ConditionalVAE(VAE):
    r"""A variational autoencoder of rows that come with a condition: images of a class, the rest of an image.

    .. code-block:: text

        z_i ~ prior_network(c_i)            code, (Z,)
        x_i ~ p(x | decoder(z_i, c_i))      row, of any shape         i = 1..N
        q(z_i | x_i, c_i) = posterior(encoder(x_i, c_i))

    The condition ``c`` has no distribution: the bound is one of :math:`\log p(x \mid c)`. Where ``x`` is left out, the
    guide draws the code from the prior network. So ``posterior.predict(c)`` is the posterior predictive distribution
    of rows with this condition, and ``posterior.log_evidence(c, x)`` bounds the log-density that it gives to ``x``.

    With ``missing="allow"``, values of ``c`` and ``x`` may be missing (NaN). A missing value of ``x`` does not count in
    the likelihood. The networks read zeros and an indicator in the place of missing values. To complete an image,
    condition on the image with NaN where it is unknown, and predict it:

    .. code-block:: python

        c = torch.where(known, images, torch.nan)
        x = torch.where(known, torch.nan, images)    # known pixels are not predicted again

    Args:
        shape: Shape of one row, as of `VAE`.
        condition_shape: Shape of the condition of one row; () for one number or class.
        latent_dim: As of `VAE`.
        hidden_dims: Sizes of the hidden layers of the encoder and of the prior network, reversed in the decoder.
        likelihood: As of `VAE`.
        posterior: ``"normal"``, ``"multivariate_normal"`` or ``"low_rank"``, as of `VAE`.
        num_classes: As of `VAE`.
        activation: As of `VAE`.
        condition_classes: Number of classes of a condition of class numbers; the networks read one-hot vectors. None
            for a condition of numbers, which the networks read in units of its standard deviation.
        missing: ``"refuse"`` or ``"allow"``.
        encoder: A custom network from rows ``(rows, *shape)`` and conditions to
            ``Conditional.size(posterior, (latent_dim,))`` outputs. Conditions are ``(rows, *condition_shape)``,
            followed by an axis of classes if they are classes. With ``missing="allow"``, numbers and their indicators
            are stacked, ``(rows, 2, ...)``.
        decoder: A custom network from codes ``(rows, latent_dim)`` and conditions to ``Likelihood.size`` outputs.
        prior_network: A custom network from conditions to ``2 * latent_dim`` outputs.

    Raises:
        ValueError: If a name is unknown or a size is out of range.

    References:
        Sohn, Lee, Yan (2015), Learning Structured Output Representation using Deep Conditional Generative Models.

    Examples:
        Images of class 1, and a bound on their log-density:

        >>> from deepprob.inference import svi
        >>> c, x = torch.arange(2).repeat(12), torch.rand(24, 3, 2)
        >>> program = ConditionalVAE((3, 2), condition_classes=2, latent_dim=2, hidden_dims=(8,))
        >>> posterior = svi(program, (c, x), steps=3, progress=False)
        >>> posterior.predict([1, 1, 1, 1]).mean.shape, posterior.log_evidence(c, x).shape
        (torch.Size([4, 3, 2]), torch.Size([24]))
    """

    registry_name = "conditional_vae"
    tasks = ("images", "classification")

    prior_loc: Tensor
    condition_centre: Tensor
    condition_spread: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        condition_shape: Sequence[int] = (),
        latent_dim: int = 8,
        hidden_dims: Sequence[int] = (400,),
        likelihood: str | Sequence[Sequence[Any]] = "bernoulli",
        posterior: str = "normal",
        num_classes: int | None = None,
        activation: str = "relu",
        condition_classes: int | None = None,
        missing: str = "refuse",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        prior_network: nn.Module | None = None,
    ) -> None:
        if posterior not in NORMAL_POSTERIORS:
            raise unknown("posterior", posterior, NORMAL_POSTERIORS)
        super().__init__(shape, latent_dim, hidden_dims, likelihood, posterior, num_classes, activation)
        self.condition_shape = tuple(whole_sizes("condition_shape", condition_shape))
        family = "normal" if condition_classes is None else "categorical"
        self.condition = Likelihood(family, self.condition_shape, num_classes=condition_classes)
        self.gaps = checked_missing(missing) == "allow"
        self.missing = "allow" if self.gaps or self.table is not None else "refuse"
        hidden, code = whole_sizes("hidden_dims", hidden_dims), (self.latent_dim,)
        inputs = 2 * math.prod(self.shape) if self.gaps or self.table is not None else math.prod(self.shape)
        condition = self.condition.size * (2 if self.gaps and condition_classes is None else 1)
        needed = Conditional.size(posterior, code), Conditional.size("normal", code)
        given = [network for network in (encoder, decoder, prior_network) if network is not None]
        encoder = encoder or _Joined(MLP(inputs + condition, needed[0], hidden, activation))
        self.decoder = decoder or _Joined(
            MLP(self.latent_dim + condition, self.observation.size, tuple(reversed(hidden)), activation)
        )
        prior_network = prior_network or _Joined(MLP(condition, needed[1], hidden, activation))
        self.encoder = _conditional("encoder", encoder, posterior, code)
        self.prior_network = _conditional("prior_network", prior_network, "normal", code)
        networks = (encoder, self.decoder, prior_network)
        self.built = [network for network in networks if all(network is not own for own in given)]
        self.register_buffer("condition_centre", torch.zeros(self.condition_shape))
        self.register_buffer("condition_spread", torch.ones(self.condition_shape))
        self.config = None
        if not given:
            self.config = {
                "shape": list(self.shape),
                "condition_shape": list(self.condition_shape),
                "latent_dim": self.latent_dim,
                "hidden_dims": hidden,
                "likelihood": self.likelihood,
                "posterior": posterior,
                "num_classes": self.num_classes,
                "activation": activation,
                "condition_classes": self.condition.num_classes,
                "missing": missing,
            }

    @classmethod
    def from_data(cls, data: Any, **options: Any) -> ConditionalVAE:
        """Create an autoencoder for conditions and rows; their values choose shapes, classes and the likelihood.

        Of a data set, the rows are ``x`` and the condition is their target: the model draws images of a class.

        Args:
            data: A data set with targets; a tuple of conditions and rows; or a dict or a split with the fields ``c``
                and ``x``.
            options: Arguments of the constructor; they go before those that the data ask for.

        Raises:
            TypeError: If the data are not numbers, or a table.
            ValueError: If there is no condition.
        """
        classes = data.num_classes if isinstance(data, DataSet) else None
        data = data.train if isinstance(data, DataSet) else data
        if isinstance(data, Table):
            raise TypeError("ConditionalVAE takes arrays, not tables. Give a tuple of conditions and rows.")
        split = as_split(_named(data), missing=True)
        if len(split.names) < 2:
            raise ValueError("there are rows but no conditions. Give a tuple of conditions and rows, (c, x).")
        c, x = (split["c"], split["x"]) if "c" in split and "x" in split else split.tensors[:2]
        chosen: dict[str, Any] = {"condition_shape": tuple(c.shape[1:])}
        chosen["condition_classes"] = class_count(c) if classes is None else classes
        if bool(c.isnan().any() | x.isnan().any()):
            chosen["missing"] = "allow"
        if "likelihood" not in options:
            chosen["likelihood"] = likelihood_of(x[~x.isnan()] if x.dim() == 1 else torch.where(x.isnan(), 0, x))
        program = cls(x.shape[1:], **(chosen | options))
        program.__dict__["origin"] = Origin.of_source(data)
        return program

    @classmethod
    def example(cls) -> Example:
        """Grey images of 3 x 2 pixels, with a condition of two numbers."""
        generator = torch.Generator().manual_seed(0)
        c = torch.randn(24, 2, generator=generator)
        x = torch.rand(24, 3, 2, generator=generator)
        return Example(cls((3, 2), (2,), latent_dim=2, hidden_dims=(8,)), (c, x))

    def model(self, c: Tensor, x: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Draw codes from the prior network and rows from the decoder; returns the rows."""
        seen, present = x, None
        if x is not None and self.gaps and self.table is None:
            present = ~x.isnan()
            seen = torch.where(present, x, 0.0)
        with self.data_plate(c):
            z = pyro.sample("z", self.code_prior(c))  # (..., B, Z)
            value: Tensor = pyro.sample("x", self.decode(z, c, present), obs=seen)
        return value

    def guide(self, c: Tensor, x: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Draw codes given conditions and rows, or from the prior network without rows; returns the codes."""
        with self.data_plate(c):
            z: Tensor = pyro.sample("z", self.code_prior(c) if x is None else self.encode(x, c))
        return z

    def code_prior(self, c: Tensor) -> Any:  # type: ignore[override]
        """Distribution of the code given a condition, event shape ``(latent_dim,)``."""
        return _given("prior_network", self.prior_network, self._condition(c))

    def encode(self, x: Tensor, c: Tensor) -> Any:  # type: ignore[override]
        """Distribution of the code given a row and its condition, event shape ``(latent_dim,)``."""
        observation = self.observation
        if isinstance(observation, Likelihood):
            x = _filled(observation.features(x) - observation.features(self.centre), len(self.shape), self.gaps)
        else:
            x = observation.features(x)
        return _given("encoder", self.encoder, x, self._condition(c))

    def decode(self, z: Tensor, c: Tensor, present: Tensor | None = None) -> Any:  # type: ignore[override]
        """Distribution of a row given its code and its condition, event shape ``shape``.

        Args:
            z: Codes, ``(*draws, B, Z)``.
            c: Conditions, ``(B, *condition_shape)``.
            present: Mask of the values that count, ``(B, *shape)``; None for all.
        """
        plan = self.observation.size, self.needed_by
        return self.observed(run_by_row("decoder", self.decoder, z, 1, *plan, self._condition(c)), present)

    def _condition(self, c: Tensor) -> Tensor:
        """Conditions as inputs of the networks: one-hot vectors, or numbers in units of their standard deviation."""
        if self.condition.num_classes is not None:
            classes = torch.arange(self.condition.num_classes, device=c.device)
            return (c.unsqueeze(-1) == classes).to(self.prior_loc.dtype)  # zeros where missing
        values = (c - self.condition_centre) / self.condition_spread
        values = values if self.condition_shape else values.unsqueeze(-1)
        return _filled(values, max(1, len(self.condition_shape)), self.gaps)

    def adapt(self, *batch: Any) -> None:
        """Center the networks' inputs, and the mean of a normal or of counts, on the training mean."""
        c, x = batch
        if self.condition.num_classes is None:
            # One scale for all pixels: a pixel that is rarely set has almost no standard deviation of its own.
            loc, sd = _known_moments(c, 0 if c.dim() < 3 else None)
            self.condition_centre.copy_(loc.expand(self.condition_shape))
            self.condition_spread.copy_(sd.expand(self.condition_shape))
        if self.table is not None:
            self.table.adapt(x)
        else:
            self.centre.copy_(_known_moments(x, 0)[0])

    def prepare(self, *batch: Any) -> Batch:
        """Draw binary pixels from grey ones; missing and binary pixels stay unchanged."""
        if len(batch) < 2 or not isinstance(self.observation, Likelihood):
            return batch
        c, x = batch
        return c, torch.where(x.isnan(), x, self.observation.prepare(x)) if self.gaps else self.observation.prepare(x)

    def accept(self, data: Any, *, what: str = "data", fill: Fill | None = None) -> Batch:
        """Read conditions and rows; of a part of a data set, the condition of a row is its target.

        Raises:
            ValueError: If values are missing, but all rows of the fit were complete.
        """
        with explaining_masks(f"{type(self).__name__}(..., missing='allow') takes them."):
            batch = Program.accept(self, _named(data), what=what, fill=fill)
        if fill is None and self.table is not None and self.table.complete and len(batch) > 1:
            self.table.check_complete(batch[1])
        return batch

    def validate(self, *batch: Any) -> Batch:
        """Check shapes and supports.

        Raises:
            ValueError: If conditions or rows have the wrong shape, or values outside their support.
        """
        if not batch:
            return batch
        c, *rows = batch
        if self.condition_shape and tuple(c.shape[1:]) != self.condition_shape:
            raise ValueError(
                f"c must be conditions of shape {self.condition_shape}; got {tuple(c.shape[1:])}. Reshape it, or write "
                f"ConditionalVAE(..., condition_shape={tuple(c.shape[1:])})."
            )
        if not self.gaps and bool(c.isnan().any()):
            raise ValueError("c has missing values (NaN). Write ConditionalVAE(..., missing='allow').")
        c = _checked(c, lambda known: (self.condition.validate("c", known),))
        check = super().validate
        return c, *(check(x)[0] if self.table is not None else _checked(x, check) for x in rows)

    def units(self, *batch: Any) -> Tensor:
        """Number of known values in each row, at least 1."""
        x = batch[1]
        if self.gaps and self.table is None:
            known: Tensor = ~x.isnan()
            return known.flatten(1).sum(1).clamp(min=1).to(torch.get_default_dtype())
        return self.observation.units(x)

    @property
    def reads_missing(self) -> bool:  # type: ignore[override]
        """Whether the networks have learned to read missing values."""
        return self.gaps or super().reads_missing


class _Joined(nn.Module):
    """A network of one flat input, applied to several inputs side by side.

    Args:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([x.flatten(1) for x in inputs], 1))
        return out


def _conditional(name: str, network: nn.Module, family: str, code: tuple[int, ...]) -> Conditional:
    """The distribution of codes given a network's outputs, whose number is checked if it is known."""
    if isinstance(found := getattr(network, "out_features", None), int):
        check_outputs(name, found, Conditional.size(family, code), _needed_by(family, code))
    return Conditional(network, family, code)


def _given(name: str, conditional: Any, x: Tensor, *others: Tensor) -> Any:
    """The distribution of codes given rows of inputs, (B, ...) each."""
    needed = conditional.in_size, _needed_by(conditional.family, conditional.event_shape)
    return conditional.distribution(run_by_row(name, conditional.network, x, x.dim() - 1, *needed, *others))


def _needed_by(family: str, code: Sequence[int]) -> str:
    return f"{family!r} over codes of shape {tuple(code)}"


def _named(data: Any) -> Any:
    """A part of a data set, where rows stand before targets, as conditions and rows; any other data as they are."""
    if not isinstance(data, Split) or isinstance(data, Table) or "c" in data or len(data.names) < 2:
        return data
    x, c = data.tensors[:2]
    return Split({"c": c, "x": x})


def _filled(values: Tensor, axes: int, gaps: bool) -> Tensor:
    """Values with zeros where they are missing, and an indicator, stacked before the last axes if there may be gaps."""
    if not gaps:
        return values
    missing = values.isnan()
    return torch.stack([torch.where(missing, 0.0, values), missing.to(values.dtype)], values.dim() - axes)


def _checked(values: Tensor, validate: Callable[[Tensor], Sequence[Tensor]]) -> Tensor:
    """Values that are valid where they are not missing; missing ones stay."""
    missing = values.isnan()
    if not bool(missing.any()):
        return validate(values)[0]
    return torch.where(missing, torch.nan, validate(torch.where(missing, 0.0, values))[0])


def _known_moments(values: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the values that are not missing, as of `moments`; 0 and 1 if there are none."""
    missing = values.isnan()
    if not bool(missing.any()):
        return moments(values, axis)
    rows = values.flatten() if axis is None else values
    loc = rows.nanmean(0)
    sd = (rows - loc).square().nanmean(0).sqrt()
    return loc.nan_to_num(), torch.where(sd > 1e-6 * loc.abs(), sd, 1.0)
