"""The variational autoencoder whose decoder has random weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from deepprob.errors import positive
from deepprob.models.vae import VAE
from deepprob.networks.inputs import check_outputs
from deepprob.programs.example import Example
from deepprob.programs.lifted import LiftedNetwork, lift


class BayesianVAE(VAE):
    r"""A variational autoencoder with a distribution over the weights of its decoder.

    .. code-block:: text

        W ~ prior                      weights of the decoder, global       "decoder.<name>"
        z_i ~ code_prior               code, (Z,)                           "z", i = 1..N
        x_i ~ p(x | decoder(z_i; W))   row, of any shape                    "x", i = 1..N
        q(W) mean field, relative to the prior
        q(z_i | x_i) = posterior(encoder(x_i))

    With few rows, the decoder of a `VAE` fits them too closely, and its predictions are too certain. Here all draws of
    the weights that explain the rows predict together.

    The encoder and the noise of ``likelihood="normal"`` are trained as numbers.

    Args:
        shape: As of `VAE`.
        latent_dim: As of `VAE`.
        hidden_dims: As of `VAE`.
        likelihood: As of `VAE`.
        posterior: As of `VAE`.
        num_classes: As of `VAE`.
        activation: As of `VAE`.
        encoder: As of `VAE`.
        decoder: As of `VAE`. It is copied; a fit starts at its weights.
        prior: Prior of the decoder's weights, as of `lift`.
        prior_scale: Scale of the prior.
        layers: The random layers of the decoder, as of `lift`; None for all.
        code_prior: Prior of the codes, the argument ``prior`` of `VAE`.
        network: As of `VAE`.

    Raises:
        TypeError: If ``decoder`` is not a network, or ``code_prior`` no prior.
        ValueError: If a name is unknown or a size is out of range.

    References:
        Kingma, Welling (2014), Auto-Encoding Variational Bayes, appendix F: Full VB.
        Daxberger, Hernández-Lobato (2019), Bayesian Variational Autoencoders for Unsupervised Out-of-Distribution
        Detection.

    Examples:
        The weights belong to no row, the codes do:

        >>> program = BayesianVAE((4,), latent_dim=2, hidden_dims=())
        >>> with program.bound(torch.arange(5), 5):
        ...     trace = pyro.poutine.trace(program.model).get_trace(torch.rand(5, 4))
        >>> {n: tuple(s["value"].shape) for n, s in trace.nodes.items() if n == "z" or n.endswith("weight")}
        {'decoder.layers.0.weight': (4, 2), 'z': (5, 2)}
    """

    registry_name = "bayesian_vae"
    learning_rate = 3e-3

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
        prior: str | Mapping[Any, Any] = "hierarchical",
        prior_scale: float = 1.0,
        layers: Any = None,
        code_prior: str | Mapping[str, Any] | nn.Module = "standard",
        network: str = "dense",
    ) -> None:
        own = (shape, latent_dim, hidden_dims, likelihood, posterior, num_classes, activation, encoder, decoder)
        super().__init__(*own, prior=code_prior, network=network)
        if (found := getattr(self.decoder, "out_features", None)) is not None:
            check_outputs("decoder", found, self.observation.size, self.needed_by)
        plain = self.decoder
        prior_scale = positive("prior_scale", prior_scale)
        self.decoder: LiftedNetwork = lift(plain, prior, prior_scale, layers=layers, name="decoder")
        built = [network for network in self.built if network is not plain]
        centered = bool(self.decoder.weights.centered)
        self.built = built if decoder is not None or centered else [*built, self.decoder]
        if self.config is not None:
            chosen = self.decoder.weights.described, None if layers is None else self.decoder.weights.names
            if "prior" in self.config:
                self.config["code_prior"] = self.config["prior"]
            self.config |= {"prior": chosen[0], "prior_scale": prior_scale, "layers": chosen[1]}

    @classmethod
    def example(cls) -> Example:
        """Grey images of 3 x 2 pixels."""
        generator = torch.Generator().manual_seed(0)
        program = cls((3, 2), latent_dim=2, hidden_dims=(8,))
        return Example(program, (torch.rand(24, 3, 2, generator=generator),))

    def model(self, x: Tensor | None = None) -> Tensor:
        """Draw the decoder's weights and the codes from the prior, and rows from the decoder; returns the rows."""
        weights = self.decoder.sample_prior()
        with self.data_plate(x):
            z = pyro.sample("z", self.code_prior())  # (..., B, Z)
            value: Tensor = pyro.sample("x", self.observed(self._outputs(weights, z)), obs=x)
        return value

    def guide(self, x: Tensor) -> Tensor:
        """Draw the decoder's weights, and codes given rows; returns the codes."""
        self.decoder.sample_guide()
        with self.data_plate(x):
            z: Tensor = pyro.sample("z", self.encode(x))
        return z

    def decode(self, z: Tensor) -> Any:
        """Distribution of a row given its code, for the weights of this run, or for a draw from their prior."""
        return self.observed(self._outputs(self.decoder.draw(), z))

    def _outputs(self, weights: Mapping[str, Tensor], z: Tensor) -> Tensor:
        out = self.decoder.run(weights, z)
        leading = torch.broadcast_shapes(z.shape[:-1], out.shape[: z.dim() - 1])
        size = math.prod(out.shape[len(leading) :])
        check_outputs("decoder", size, self.observation.size, self.needed_by)
        return out.reshape(*leading, size)
