"""The variational autoencoder: a code for every row, an encoder and a decoder."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from deepprob.data import Table, column_kinds
from deepprob.errors import counted, unknown, whole
from deepprob.networks.coders import Coders
from deepprob.networks.conditional import Conditional
from deepprob.networks.flow import ConditionalFlow
from deepprob.networks.inputs import as_accepted, check_outputs, moments, run_by_row
from deepprob.networks.likelihood import Likelihood
from deepprob.networks.mixed import MixedLikelihood
from deepprob.networks.network import whole_sizes
from deepprob.networks.priors import VampPrior, prior_named
from deepprob.networks.values import encoded, first_field, likelihood_of
from deepprob.programs.example import Example
from deepprob.programs.fields import Fill
from deepprob.programs.minibatch import Batch
from deepprob.programs.origin import Origin
from deepprob.programs.program import Program

NORMAL_POSTERIORS = ("normal", "multivariate_normal", "low_rank")
POSTERIORS = (*NORMAL_POSTERIORS, "flow")


class VAE(Program):
    r"""A variational autoencoder with one stochastic layer.

    .. code-block:: text

        z_i ~ prior                   code, (Z,)
        x_i ~ p(x | decoder(z_i))     row, of any shape          i = 1..N
        q(z_i | x_i) = posterior(encoder(x_i))

    The prior is the standard normal, or it is learned with the rest: a mixture of normals, of the posteriors of
    pseudo-inputs (VampPrior), or a flow. The posterior is a normal, or a normal that a flow bends: its shape is then
    free, and its density exact.

    With ``likelihood="bernoulli"``, values in [0, 1] are pixel probabilities. Every use draws binary pixels from them
    anew (dynamic binarization), so the ELBO bounds the evidence of binary data. With ``"normal"``, all columns share
    one learned noise; with ``hidden_dims=()`` as well, the model is probabilistic PCA. With ``"categorical"``, values
    are whole numbers below ``num_classes``. Counts are ``"poisson"`` or, if they are overdispersed,
    ``"negative_binomial"`` with one learned dispersion per column; with more zeros than these have, they are
    ``"zero_inflated_poisson"`` or ``"zero_inflated_negative_binomial"``. Grey values as such are
    ``"continuous_bernoulli"``, a density on [0, 1], or ``"discretized_logistic"``: the probabilities of ``num_classes``
    levels, whose bits per dimension are comparable between models. Real numbers with outliers are ``"student_t"``.

    A table whose columns are of different kinds has a list of them as likelihood; see `MixedLikelihood`. Its values may
    be missing (NaN): they do not count in the likelihood, and the encoder reads zeros and an indicator in their place.
    `Posterior.impute` draws them. If the rows of the fit are complete, later ones must be, except for `impute`.

    Args:
        shape: Shape of one row, (28, 28) for an image.
        latent_dim: Size of the code, Z.
        hidden_dims: Sizes of the encoder's hidden layers, reversed in the decoder; ``()`` makes both affine. Of
            convolutional networks, the channels: each convolution halves the image. None for (400,), (32, 64) of
            convolutional networks, (256, 256) of residual ones of rows.
        likelihood: A name in ``LIKELIHOODS``, such as ``"bernoulli"`` or ``"normal"``; or the kinds of the columns:
            ``[("real", "age"), ("binary", "smoker"), ("categories", "island", 3)]``.
        posterior: ``"normal"`` (independent dimensions), ``"multivariate_normal"``, ``"low_rank"`` or ``"flow"``
            (affine couplings, at least two dimensions).
        num_classes: Number of values for ``"categorical"``, of levels for ``"discretized_logistic"`` (None for 256).
        activation: Activation of the hidden layers.
        encoder: A custom network from rows ``(rows, *shape)`` to ``Conditional.size(posterior, (latent_dim,))``
            outputs, or ``ConditionalFlow.size(latent_dim)`` for ``"flow"``. Whole numbers reach an encoder that can run
            on them; other rows are centered on the training mean. Of a table it reads ``MixedLikelihood.features``, two
            numbers for every column.
        decoder: A custom network from codes ``(rows, latent_dim)``, whatever the number of draws, to
            ``Likelihood(likelihood, shape).size`` outputs per row, in any shape.
        prior: ``"standard"``, ``"mixture"``, ``"vamp"`` or ``"flow"``; with settings, ``MixturePrior(latent_dim, 20)``,
            ``VampPrior(100)`` or ``FlowPrior(latent_dim, layers=6)``; or any module that returns a Pyro distribution of
            event shape ``(latent_dim,)`` when it is called without arguments. A fit keeps the weights of a module.
        network: ``"dense"``; ``"conv"``, for images (height, width) or (channels, height, width); or ``"residual"``,
            with a residual block at every hidden layer, convolutional for images and dense for rows of one axis.

    Raises:
        TypeError: If ``prior`` is neither a name nor such a module.
        ValueError: If a name is unknown or a size is out of range.

    References:
        Kingma, Welling (2014), Auto-Encoding Variational Bayes.
        Rezende, Mohamed, Wierstra (2014), Stochastic Backpropagation.
        Tipping, Bishop (1999), Probabilistic Principal Component Analysis.
        Tomczak, Welling (2018), VAE with a VampPrior.
        Rezende, Mohamed (2015), Variational Inference with Normalizing Flows.

    Examples:
        Every row has a code, and images keep their shape:

        >>> program = VAE((8, 8), latent_dim=2, hidden_dims=(16,))
        >>> with program.bound(torch.arange(5), 5):
        ...     program.guide(torch.rand(5, 8, 8)).shape, program.model(torch.rand(5, 8, 8)).shape
        (torch.Size([5, 2]), torch.Size([5, 8, 8]))

        A prior is any module that returns a distribution; this one learns its mean and standard deviation:

        >>> class Prior(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.loc, self.log_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        ...     def forward(self):
        ...         return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
        >>> VAE((8, 8), latent_dim=2, prior=Prior()).code_prior()
        Independent(Normal(loc: torch.Size([2]), scale: torch.Size([2])), 1)
    """

    registry_name = "vae"
    tasks: tuple[str, ...] = ("images", "binary", "classification", "regression", "table")
    learning_rate = 1e-3

    def __init__(
        self,
        shape: Sequence[int],
        latent_dim: int = 8,
        hidden_dims: Sequence[int] | None = None,
        likelihood: str | Sequence[Sequence[Any]] = "bernoulli",
        posterior: str = "normal",
        num_classes: int | None = None,
        activation: str = "relu",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        prior: str | Mapping[str, Any] | nn.Module = "standard",
        network: str = "dense",
    ) -> None:
        super().__init__()
        if posterior not in POSTERIORS:
            raise unknown("posterior", posterior, POSTERIORS)
        self.shape = tuple(whole_sizes("shape", shape))
        if not self.shape:
            raise ValueError("shape must have at least one axis; got (). Write shape=(1,) and give x.reshape(-1, 1).")
        coders = Coders(network, self.shape, hidden_dims, activation)
        self.latent_dim = whole("latent_dim", latent_dim)
        self.observation = _observation(likelihood, self.shape, num_classes)
        table = self.table
        self.likelihood = likelihood if table is None else table.kinds
        self.missing = "refuse" if table is None else "allow"
        self.num_classes = getattr(self.observation, "levels", None) or getattr(self.observation, "num_classes", None)
        given = [network for network in (encoder, decoder) if network is not None]
        if len(given) == 2 and network != "dense":
            raise ValueError(f"network={network!r} has no effect beside an encoder and a decoder. Leave it out.")
        encoder = encoder or coders.encoder(self._in_size, _code_size(posterior, self.latent_dim))
        decoder = decoder or coders.decoder(self.latent_dim, self.observation.size)
        self.encoder = self._conditional(encoder, posterior)
        self.encoder_takes_whole_numbers = False
        self.decoder = decoder
        self.prior = self._prior_of(prior)
        made = (encoder, decoder, getattr(self.encoder, "flow", None), None if self.prior is prior else self.prior)
        self.built = [network for network in made if network is not None and network not in given]
        self.register_buffer("prior_loc", torch.zeros(self.latent_dim))
        self.register_buffer("centre", torch.zeros(self.shape))
        if isinstance(self.observation, Likelihood) and self.observation.dispersion:
            # All columns share one noise, as in probabilistic PCA; each column of counts has its own dispersion.
            columns = self.shape if self.observation.dispersion == "total_count" else ()
            self.raw_noise = nn.Parameter(self.observation.raw_dispersion(columns))
        described = {} if self.prior is None else {"prior": getattr(self.prior, "config", None)}
        if not given and None not in described.values():
            self.config = {
                "shape": list(self.shape),
                "latent_dim": self.latent_dim,
                "hidden_dims": [*coders.sizes],
                "likelihood": self.likelihood,
                "posterior": posterior,
                "num_classes": self.num_classes,
                "activation": activation,
                **described,
                **({} if network == "dense" else {"network": network}),
            }

    @classmethod
    def from_data(cls, data: Any, **options: Any) -> VAE:
        """Create an autoencoder for rows of any kind; their values choose the likelihood.

        Values in [0, 1] are ``"bernoulli"`` (binary, or grey pixels), whole numbers of at least 0 are ``"poisson"``,
        other numbers are ``"normal"``. A frame is encoded as by `deepprob.table`, unless all of its values are binary
        or counts; the likelihood of a table has the kinds of its columns, see `deepprob.data.column_kinds`. The program
        keeps the encoding, so that fits and queries take frames with the same columns.

        Args:
            data: A data set, a split, a table, an array, a tensor, a frame, or a tuple or dict of arrays, whose first
                field holds the rows.
            options: Arguments of the constructor; they go before those that the data ask for.

        Raises:
            TypeError: If the data are not numbers.
            ValueError: If whole numbers may be pixels or counts.
        """
        data = encoded(data)
        x = first_field(data)
        encoding = data.encoding if isinstance(data, Table) else None
        if "likelihood" not in options:
            options["likelihood"] = likelihood_of(x) if encoding is None else column_kinds(encoding.columns)
        program = cls(x.shape[1:], **options)
        program.__dict__["origin"] = Origin.of_source(data)
        return program

    @classmethod
    def example(cls) -> Example:
        """Grey images of 3 x 2 pixels."""
        generator = torch.Generator().manual_seed(0)
        return Example(cls((3, 2), latent_dim=2, hidden_dims=(8,)), (torch.rand(24, 3, 2, generator=generator),))

    def model(self, x: Tensor | None = None) -> Tensor:
        """Draw codes from the prior and rows from the decoder; returns the rows."""
        with self.data_plate(x):
            z = pyro.sample("z", self.code_prior())  # (..., B, Z)
            value: Tensor = pyro.sample("x", self.decode(z), obs=x)
        return value

    def guide(self, x: Tensor) -> Tensor:
        """Draw codes given rows; returns the codes."""
        with self.data_plate(x):
            z: Tensor = pyro.sample("z", self.encode(x))
        return z

    @property
    def table(self) -> MixedLikelihood | None:
        """The likelihood of a table whose columns are of different kinds; None for another one."""
        return self.observation if isinstance(self.observation, MixedLikelihood) else None

    @property
    def reads_missing(self) -> bool:  # type: ignore[override]
        """Whether the encoder has learned to read rows with missing values."""
        return self.table is not None and not self.table.complete

    @property
    def _in_size(self) -> int:
        """How many numbers of a row the encoder reads."""
        return math.prod(self.shape) if self.table is None else self.table.in_size

    def _prior_of(self, prior: Any) -> nn.Module | None:
        """The prior that the user chose; None for the standard normal."""
        found = prior_named(prior, self.latent_dim)
        if isinstance(found, VampPrior):
            found.attach(self.shape if self.table is None else (self._in_size,))
        return found

    def _conditional(self, network: nn.Module, posterior: str) -> Conditional | ConditionalFlow:
        """The posterior of a code, of which the network computes the parameters."""
        size = _code_size(posterior, self.latent_dim)
        if isinstance(found := getattr(network, "out_features", None), int):
            check_outputs("encoder", found, size, self._needed_by_code(posterior))
        if posterior == "flow":
            return ConditionalFlow(network, self.latent_dim)
        return Conditional(network, posterior, (self.latent_dim,))

    def code_prior(self) -> Any:
        """Distribution of a code, event shape ``(latent_dim,)``."""
        if self.prior is None:
            return dist.Normal(self.prior_loc, torch.ones_like(self.prior_loc)).to_event(1)
        if isinstance(self.prior, VampPrior):
            return self.prior(self._run_encoder, self.encoder.distribution)
        return self.prior()

    def encode(self, x: Tensor) -> Any:
        """Distribution of the code given a row, event shape ``(latent_dim,)``."""
        return self.encoder.distribution(self._run_encoder(self._features(x)))

    def _features(self, x: Tensor) -> Tensor:
        """Rows as the encoder's network reads them."""
        observation = self.observation
        if isinstance(observation, MixedLikelihood):
            return observation.features(x)
        if self.encoder_takes_whole_numbers:
            return x
        return observation.features(x) - observation.features(self.centre)

    def _run_encoder(self, features: Tensor) -> Tensor:
        needed_by = self._needed_by_code(self.encoder.family)
        return run_by_row("encoder", self.encoder.network, features, len(self.shape), self.encoder.in_size, needed_by)

    def _needed_by_code(self, posterior: str) -> str:
        return f"posterior={posterior!r} over codes of shape {(self.latent_dim,)}"

    def decode(self, z: Tensor) -> Any:
        """Distribution of a row given its code, event shape ``shape``."""
        out = run_by_row("decoder", self.decoder, z, 1, self.observation.size, self.needed_by)
        return self.observed(out)

    @property
    def needed_by(self) -> str:
        """What needs the decoder's outputs, for error messages."""
        return f"likelihood={self.likelihood!r} over rows of shape {self.shape}"

    def observed(self, out: Tensor, present: Tensor | None = None) -> Any:
        """Distribution of a row given the decoder's outputs, ``(*draws, B, outputs)``.

        Args:
            out: The outputs.
            present: Mask of the values that count, ``(B, *shape)``; None for all, or those that a table has.
        """
        observation = self.observation
        if isinstance(observation, MixedLikelihood):
            return observation(out)
        dispersion = observation.bounded(self.raw_noise) if observation.dispersion else None
        around = observation.around(self.centre)
        return observation.distribution(out, dispersion=dispersion, present=present, **around)

    def adapt(self, *batch: Any) -> None:
        """Center the encoder's input, and the mean of a normal or of counts, on the training mean.

        The pseudo-inputs of a `VampPrior` start at random rows.
        """
        (x,) = batch
        if self.table is not None:
            self.table.adapt(x)
        else:
            self.centre.copy_(moments(x, 0)[0])
            if not x.is_floating_point():  # a copy, because a run may change the statistics of a batch norm
                (tried,) = as_accepted(copy.deepcopy(self.encoder.network).eval(), [x])
                self.encoder_takes_whole_numbers = not tried.is_floating_point()
        if isinstance(self.prior, VampPrior):
            if self.encoder_takes_whole_numbers:
                raise ValueError(
                    "prior='vamp' learns inputs of the encoder, which cannot be whole numbers; this encoder reads "
                    "them. Use prior='mixture' or prior='flow', or an encoder of real numbers."
                )
            self.prior.adapt(len(x), lambda rows: self._features(x[rows.to(x.device)].to(self.centre.device)))

    def prepare(self, *batch: Any) -> Batch:
        """Draw binary pixels from grey ones; binary pixels stay unchanged."""
        if not batch or not isinstance(self.observation, Likelihood):
            return batch
        return (self.observation.prepare(batch[0]),)

    def accept(self, data: Any, *, what: str = "data", fill: Fill | None = None) -> Batch:
        """Read rows; see `Program.accept`.

        Raises:
            ValueError: If values are missing, but all rows of the fit were complete.
        """
        batch = super().accept(data, what=what, fill=fill)
        if fill is None and self.table is not None and self.table.complete and batch:
            self.table.check_complete(*batch)
        return batch

    def validate(self, *batch: Any) -> Batch:
        """Check shape and support.

        Raises:
            ValueError: If rows have the wrong shape or values outside the likelihood's support.
        """
        if not batch:
            return batch
        x = batch[0]
        if isinstance(self.observation, MixedLikelihood):
            return (self.observation.validate("x", x),)
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"rows must have shape {self.shape}, as in {type(self).__name__}({self.shape}); got "
                f"{tuple(x.shape[1:])}. Reshape them: x.reshape(-1, {', '.join(map(str, self.shape))})."
            )
        return (self.observation.validate("images" if self.likelihood == "bernoulli" else "values", x),)

    def units(self, *batch: Any) -> Tensor:
        """Number of values in each row."""
        return self.observation.units(batch[0])


def _observation(likelihood: Any, shape: tuple[int, ...], num_classes: int | None) -> Likelihood | MixedLikelihood:
    """The likelihood of a name, or of the kinds of columns."""
    if likelihood == "discretized_logistic":
        return Likelihood(likelihood, shape, levels=num_classes)
    if isinstance(likelihood, str):
        return Likelihood(likelihood, shape, num_classes=num_classes, grey=likelihood == "bernoulli")
    found = MixedLikelihood(likelihood)
    if num_classes is not None:
        raise ValueError("num_classes is not for columns of different kinds. Write ('categories', name, 3) among them.")
    if found.event_shape != shape:
        raise ValueError(
            f"likelihood has {counted(found.size, 'column')} ({', '.join(found.names)}); got shape={shape}. "
            f"Write shape=({found.size},)."
        )
    return found


def _code_size(posterior: str, latent_dim: int) -> int:
    """Number of outputs of an encoder."""
    return ConditionalFlow.size(latent_dim) if posterior == "flow" else Conditional.size(posterior, (latent_dim,))
