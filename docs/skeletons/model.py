"""Factor analysis: rows are noisy linear maps of a few factors. A skeleton to copy to ``models/<name>.py``."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from deepprob.data import DataSet
from deepprob.errors import whole
from deepprob.networks.conditional import Conditional
from deepprob.networks.dense import MLP
from deepprob.programs.example import Example
from deepprob.programs.program import Program

_FLOOR = 1e-4  # a smaller standard deviation would let the density of one feature grow without bound


class FactorAnalysis(Program):
    r"""Factor analysis, with an amortized posterior of the factors.

    .. code-block:: text

        z_i ~ N(0, I)                      factors, (Z,)
        x_i ~ N(W z_i + b, diag(s)^2)      row, (D,)                i = 1..N
        q(z_i | x_i) = N(encoder(x_i))     full covariance

    The encoder is linear, as the exact posterior is, so that the bound can reach the log evidence.

    Args:
        num_features: Number of features of a row, D.
        latent_dim: Number of factors, Z.

    Raises:
        ValueError: If a size is not a whole number of at least 1.

    References:
        Rubin, Thayer (1982), EM Algorithms for ML Factor Analysis.

    Examples:
        Factors belong to rows, and rows that are not observed are drawn:

        >>> program = FactorAnalysis(num_features=4, latent_dim=2)
        >>> with program.bound(torch.arange(5), num_data=5):
        ...     program.guide(torch.zeros(5, 4)).shape, program.model().shape
        (torch.Size([5, 2]), torch.Size([5, 4]))
    """

    registry_name = "factor_analysis"  # a saved posterior finds the class by this name
    tasks = ("regression", "classification")  # kinds of data set that `deepprob fit` offers it for

    def __init__(self, num_features: int, latent_dim: int = 2) -> None:
        super().__init__()
        self.num_features, self.latent_dim = whole("num_features", num_features), whole("latent_dim", latent_dim)
        factors = (self.latent_dim,)
        encoder = MLP(self.num_features, Conditional.size("multivariate_normal", factors), hidden_dims=())
        self.encoder = Conditional(encoder, "multivariate_normal", factors)
        self.loadings = nn.Linear(self.latent_dim, self.num_features)
        self.built = [self.encoder, self.loadings]  # a fit draws their weights anew
        self.raw_noise = nn.Parameter(torch.zeros(self.num_features))
        # A buffer, so that the prior moves to the program's device.
        self.register_buffer("prior_loc", torch.zeros(self.latent_dim))
        # The constructor's arguments as JSON; without them a saved posterior could not rebuild the program.
        self.config = {"num_features": self.num_features, "latent_dim": self.latent_dim}

    @classmethod
    def from_data(cls, data: DataSet, **options: Any) -> FactorAnalysis:
        """The model for a data set whose rows are vectors."""
        return cls(data.shape[0], **options)

    @classmethod
    def example(cls) -> Example:
        """Four features of two factors."""
        generator = torch.Generator().manual_seed(0)
        z, weights, noise = (torch.randn(*size, generator=generator) for size in ((24, 2), (2, 4), (24, 4)))
        return Example(cls(num_features=4, latent_dim=2), (z @ weights + 0.3 * noise,))

    def model(self, x: Tensor | None = None) -> Tensor:
        """Draw factors from the prior and rows given factors; returns the rows."""
        with self.data_plate(x):
            z = pyro.sample("z", dist.Normal(self.prior_loc, 1.0).to_event(1))  # (..., B, Z)
            value: Tensor = pyro.sample("x", dist.Normal(self.loadings(z), self.noise).to_event(1), obs=x)
        return value

    def guide(self, x: Tensor) -> Tensor:
        """Draw factors given rows; returns the factors."""
        with self.data_plate(x):
            z: Tensor = pyro.sample("z", self.encoder(x))
        return z

    @property
    def noise(self) -> Tensor:
        """Standard deviation of every feature given the factors, shape ``(D,)``."""
        return softplus(self.raw_noise) + _FLOOR
