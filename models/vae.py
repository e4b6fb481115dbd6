"""The variational autoencoder: a code for every row, an encoder and a decoder."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from deepprob.data import DataSet
from deepprob.errors import unknown, whole
from deepprob.networks.conditional import Conditional
from deepprob.networks.dense import MLP
from deepprob.networks.inputs import as_accepted, check_outputs, run_by_row
from deepprob.networks.likelihood import Likelihood
from deepprob.networks.network import whole_sizes
from deepprob.programs.example import Example
from deepprob.programs.minibatch import Batch
from deepprob.programs.program import Program

POSTERIORS = ("normal", "multivariate_normal", "low_rank")


class VAE(Program):
    r"""A variational autoencoder with one stochastic layer.

    .. code-block:: text

        z_i ~ N(0, I)                 code, (Z,)
        x_i ~ p(x | decoder(z_i))     row, of any shape          i = 1..N
        q(z_i | x_i) = posterior(encoder(x_i))

    With ``likelihood="bernoulli"``, values in [0, 1] are pixel probabilities. Every use draws binary pixels from them
    anew (dynamic binarization), so the ELBO bounds the evidence of binary data. With ``"normal"``, all columns share
    one learned noise; with ``hidden_dims=()`` as well, the model is probabilistic PCA. With ``"categorical"``, values
    are whole numbers below ``num_classes``. Counts are ``"poisson"`` or, if they are overdispersed,
    ``"negative_binomial"`` with one learned dispersion per column.

    Args:
        shape: Shape of one row, (28, 28) for an image.
        latent_dim: Size of the code, Z.
        hidden_dims: Sizes of the encoder's hidden layers, reversed in the decoder; ``()`` makes both affine.
        likelihood: ``"bernoulli"``, ``"normal"``, ``"categorical"``, ``"poisson"`` or ``"negative_binomial"``.
        posterior: ``"normal"`` (independent dimensions), ``"multivariate_normal"`` or ``"low_rank"``.
        num_classes: Number of values for ``"categorical"``.
        activation: Activation of the hidden layers.
        encoder: A custom network from rows ``(rows, *shape)`` to ``Conditional.size(posterior, (latent_dim,))``
            outputs. Whole numbers reach an encoder that can run on them; other rows are centered on the training mean.
        decoder: A custom network from codes ``(rows, latent_dim)``, whatever the number of draws, to
            ``Likelihood(likelihood, shape).size`` outputs per row, in any shape.

    Raises:
        ValueError: If a name is unknown or a size is out of range.

    References:
        Kingma, Welling (2014), Auto-Encoding Variational Bayes.
        Rezende, Mohamed, Wierstra (2014), Stochastic Backpropagation.
        Tipping, Bishop (1999), Probabilistic Principal Component Analysis.

    Examples:
        Every row has a code, and images keep their shape:

        >>> program = VAE((8, 8), latent_dim=2, hidden_dims=(16,))
        >>> with program.bound(torch.arange(5), 5):
        ...     program.guide(torch.rand(5, 8, 8)).shape, program.model(torch.rand(5, 8, 8)).shape
        (torch.Size([5, 2]), torch.Size([5, 8, 8]))
    """

    registry_name = "vae"
    tasks = ("images", "binary", "classification", "regression")
    learning_rate = 1e-3

    def __init__(
        self,
        shape: Sequence[int],
        latent_dim: int = 8,
        hidden_dims: Sequence[int] = (400,),
        likelihood: str = "bernoulli",
        posterior: str = "normal",
        num_classes: int | None = None,
        activation: str = "relu",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if posterior not in POSTERIORS:
            raise unknown("posterior", posterior, POSTERIORS)
        self.shape = tuple(whole_sizes("shape", shape))
        if not self.shape:
            raise ValueError("shape must have at least one axis; got (). Write shape=(1,) and give x.reshape(-1, 1).")
        hidden_dims = whole_sizes("hidden_dims", hidden_dims)
        self.latent_dim = whole("latent_dim", latent_dim)
        self.likelihood = likelihood
        self.observation = Likelihood(likelihood, self.shape, num_classes=num_classes, grey=likelihood == "bernoulli")
        self.num_classes = self.observation.num_classes
        code = (self.latent_dim,)
        given = [network for network in (encoder, decoder) if network is not None]
        encoder = encoder or nn.Sequential(
            nn.Flatten(-len(self.shape)),
            MLP(math.prod(self.shape), Conditional.size(posterior, code), hidden_dims, activation),
        )
        decoder = decoder or MLP(self.latent_dim, self.observation.size, tuple(reversed(hidden_dims)), activation)
        if isinstance(found := getattr(encoder, "out_features", None), int):
            check_outputs("encoder", found, Conditional.size(posterior, code), _needed_by_code(posterior, code))
        self.encoder = Conditional(encoder, posterior, code)
        self.encoder_takes_whole_numbers = False
        self.decoder = decoder
        self.built = [network for network in (encoder, decoder) if network not in given]
        self.register_buffer("prior_loc", torch.zeros(self.latent_dim))
        self.register_buffer("centre", torch.zeros(self.shape))
        if self.observation.dispersion:
            # All columns share one noise, as in probabilistic PCA; each column of counts has its own dispersion.
            columns = () if likelihood == "normal" else self.shape
            self.raw_noise = nn.Parameter(self.observation.raw_dispersion(columns))
        if not given:
            self.config = {
                "shape": list(self.shape),
                "latent_dim": self.latent_dim,
                "hidden_dims": hidden_dims,
                "likelihood": likelihood,
                "posterior": posterior,
                "num_classes": self.num_classes,
                "activation": activation,
            }

    @classmethod
    def from_data(cls, data: DataSet, **options: Any) -> VAE:
        """Create an autoencoder for a data set's rows, by default normal if a value lies outside [0, 1]."""
        x = data.train.tensors[0]
        if not 0 <= float(x.min()) <= float(x.max()) <= 1:
            options = {"likelihood": "normal"} | options
        return cls(data.shape, **options)

    @classmethod
    def example(cls) -> Example:
        """Grey images of 3 x 2 pixels."""
        generator = torch.Generator().manual_seed(0)
        return Example(cls((3, 2), latent_dim=2, hidden_dims=(8,)), (torch.rand(24, 3, 2, generator=generator),))

    def model(self, x: Tensor | None = None) -> Tensor:
        """Draw codes from the prior and rows from the decoder; returns the rows."""
        with self.data_plate(x):
            prior = dist.Normal(self.prior_loc, torch.ones_like(self.prior_loc)).to_event(1)
            z = pyro.sample("z", prior)  # (..., B, Z)
            value: Tensor = pyro.sample("x", self.decode(z), obs=x)
        return value

    def guide(self, x: Tensor) -> Tensor:
        """Draw codes given rows; returns the codes."""
        with self.data_plate(x):
            z: Tensor = pyro.sample("z", self.encode(x))
        return z

    def encode(self, x: Tensor) -> Any:
        """Distribution of the code given a row, event shape ``(latent_dim,)``."""
        if not self.encoder_takes_whole_numbers:
            x = self.observation.features(x) - self.observation.features(self.centre)
        plan = self.encoder.in_size, _needed_by_code(self.encoder.family, self.encoder.event_shape)
        return self.encoder.distribution(run_by_row("encoder", self.encoder.network, x, len(self.shape), *plan))

    def decode(self, z: Tensor) -> Any:
        """Distribution of a row given its code, event shape ``shape``."""
        needed_by = f"likelihood={self.likelihood!r} over rows of shape {self.shape}"
        out = run_by_row("decoder", self.decoder, z, 1, self.observation.size, needed_by)  # (*draws, B, outputs)
        dispersion = self.observation.bounded(self.raw_noise) if self.observation.dispersion else None
        return self.observation.distribution(out, dispersion=dispersion, **self.observation.around(self.centre))

    def adapt(self, *batch: Any) -> None:
        """Center the encoder's input, and the mean of a normal or of counts, on the training mean."""
        (x,) = batch
        self.centre.copy_(x.to(self.centre.dtype).mean(0))
        if not x.is_floating_point():  # a copy, because a run may change the statistics of a batch norm
            (tried,) = as_accepted(copy.deepcopy(self.encoder.network).eval(), [x])
            self.encoder_takes_whole_numbers = not tried.is_floating_point()

    def prepare(self, *batch: Any) -> Batch:
        """Draw binary pixels from grey ones; binary pixels stay unchanged."""
        return (self.observation.prepare(batch[0]),) if batch else batch

    def validate(self, *batch: Any) -> Batch:
        """Check shape and support.

        Raises:
            ValueError: If rows have the wrong shape or values outside the likelihood's support.
        """
        if not batch:
            return batch
        x = batch[0]
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"rows must have shape {self.shape}, as in VAE({self.shape}); got {tuple(x.shape[1:])}. "
                f"Reshape them: x.reshape(-1, {', '.join(map(str, self.shape))})."
            )
        return (self.observation.validate("images" if self.likelihood == "bernoulli" else "values", x),)

    def units(self, *batch: Any) -> Tensor:
        """Number of values in each row."""
        return self.observation.units(batch[0])


def _needed_by_code(posterior: str, code: Sequence[int]) -> str:
    return f"posterior={posterior!r} over codes of shape {tuple(code)}"
