"""The mixture VAE: clusters of rows, found in the space of the codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from deepprob.errors import counted, whole
from deepprob.models.vae import VAE
from deepprob.networks.priors import MixturePrior
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.example import Example


class MixtureVAE(VAE):
    r"""A variational autoencoder whose codes form clusters.

    .. code-block:: text

        k_i ~ Categorical(weights)              cluster              "k", i = 1..N
        z_i ~ N(mean[k_i], diag(sd[k_i]^2))     code, (Z,)           "z"
        x_i ~ p(x | decoder(z_i))               row, of any shape    "x"
        q(z_i | x_i) = posterior(encoder(x_i))

    The cluster is summed out exactly,

    .. math:: \log p(x, z) = \log p(x \mid z) + \log \sum_{k=1}^K \pi_k\, N(z; \mu_k, \mathrm{diag}(\sigma_k^2)),

    so that the guide draws the code alone, and the probabilities of the clusters given a code are those of Bayes' rule.
    ``posterior.encode(x).mean["k"]`` has the probabilities of the clusters of a row, averaged over its code;
    ``posterior.sample(x)`` draws them.

    A fit from new weights finds clusters if they are far apart. For others, such as digits, start at a fitted `VAE`:
    `from_vae`. Clusters have no order; a fit with another seed numbers them in another way.

    Args:
        shape: As of `VAE`.
        num_clusters: Number of clusters, K.
        latent_dim: As of `VAE`.
        hidden_dims: As of `VAE`.
        likelihood: As of `VAE`.
        posterior: As of `VAE`.
        num_classes: As of `VAE`.
        activation: As of `VAE`.
        encoder: As of `VAE`.
        decoder: As of `VAE`.
        network: As of `VAE`.

    Raises:
        ValueError: If a name is unknown or a size is out of range.

    References:
        Jiang, Zheng, Tan, Tang, Zhou (2017), Variational Deep Embedding: An Unsupervised and Generative Approach to
        Clustering.

    Examples:
        The probabilities of the clusters given a code are those of Bayes' rule:

        >>> program = MixtureVAE((4,), num_clusters=3, latent_dim=2)
        >>> z = program.clusters.loc.detach()
        >>> program.responsibilities(z).argmax(-1).tolist()
        [0, 1, 2]
    """

    registry_name = "mixture_vae"

    def __init__(
        self,
        shape: Sequence[int],
        num_clusters: int = 10,
        latent_dim: int = 8,
        hidden_dims: Sequence[int] | None = None,
        likelihood: str | Sequence[Sequence[Any]] = "bernoulli",
        posterior: str = "normal",
        num_classes: int | None = None,
        activation: str = "relu",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        network: str = "dense",
    ) -> None:
        own = (shape, latent_dim, hidden_dims, likelihood, posterior, num_classes, activation, encoder, decoder)
        super().__init__(*own, network=network)
        self.num_clusters = whole("num_clusters", num_clusters, least=2)
        self.clusters = MixturePrior(self.latent_dim, self.num_clusters)
        self.built = [*self.built, self.clusters]
        if self.config is not None:
            self.config["num_clusters"] = self.num_clusters

    @classmethod
    def example(cls) -> Example:
        """Grey images of 3 x 2 pixels."""
        generator = torch.Generator().manual_seed(0)
        program = cls((3, 2), num_clusters=3, latent_dim=2, hidden_dims=(8,))
        return Example(program, (torch.rand(24, 3, 2, generator=generator),))

    @classmethod
    def from_vae(cls, posterior: Posterior, data: Any, num_clusters: int = 10, seed: int = 0) -> MixtureVAE:
        """A program with the networks of a fitted `VAE`, and clusters at a Gaussian mixture of its codes.

        Fit it with ``svi(program, data, weights="keep")``.

        Args:
            posterior: The posterior of a `VAE`; its networks are copied.
            data: Rows, as of its fit.
            num_clusters: Number of clusters, K.
            seed: Random seed of the mixture's start.

        Raises:
            TypeError: If the posterior is not that of a `VAE` that its name and settings can rebuild.
            ValueError: If there are fewer rows than clusters.

        Examples:
            Two clusters of rows:

            >>> from deepprob.inference import svi
            >>> x = torch.cat([torch.randn(50, 3) - 5, torch.randn(50, 3) + 5])
            >>> first = svi(VAE((3,), 2, (16,), likelihood="normal"), x, epochs=50, progress=False)
            >>> program = MixtureVAE.from_vae(first, x, num_clusters=2)
            >>> again = svi(program, x, epochs=20, weights="keep", progress=False)
            >>> found = again.encode(x).mean["k"].argmax(-1)
            >>> len(found[:50].unique()), len(found[50:].unique()), bool(found[0] != found[-1])
            (1, 1, True)
        """
        from sklearn.mixture import GaussianMixture

        known = posterior.program
        if type(known) is not VAE or known.config is None or known.prior is not None:
            raise TypeError(
                f"from_vae needs the posterior of a VAE with its own networks and the standard prior; got one of "
                f"{type(known).__name__}. Fit VAE(...) first."
            )
        codes = posterior.encode(data)
        mean, sd = (x.double().cpu() for x in (codes.mean, codes.sd))  # type: ignore[union-attr]
        if len(mean) < num_clusters:
            raise ValueError(
                f"{counted(num_clusters, 'cluster')} need at least as many rows; got {len(mean)}. Give more rows."
            )
        program = cls(num_clusters=num_clusters, **known.config)
        program.load_state_dict(known.state_dict(), strict=False)
        program.__dict__["origin"] = known.origin
        # The mixture is that of draws from the posteriors, the codes that the bound is about.
        noise = torch.randn(mean.shape, dtype=mean.dtype, generator=torch.Generator().manual_seed(seed))
        mixture = GaussianMixture(num_clusters, covariance_type="diag", n_init=5, reg_covar=1e-4, random_state=seed)
        mixture.fit((mean + sd * noise).numpy())
        program.clusters.place(mixture.weights_, mixture.means_, mixture.covariances_**0.5)
        return program

    def model(self, x: Tensor | None = None) -> Tensor:
        """Draw clusters, codes of these clusters, and rows from the decoder; returns the rows."""
        with self.data_plate(x):
            weights = dist.Categorical(logits=self.clusters.logits)
            k = pyro.sample("k", weights, infer={"enumerate": "parallel"})
            code = dist.Normal(self.clusters.loc[k], self.clusters.scale[k]).to_event(1)
            z = pyro.sample("z", code)  # (..., B, Z)
            value: Tensor = pyro.sample("x", self.decode(z), obs=x)
        return value

    def code_prior(self) -> Any:
        """Distribution of a code, whatever its cluster."""
        return self.clusters()

    def responsibilities(self, z: Tensor) -> Tensor:
        """Probabilities of the clusters given codes, ``(*batch, K)``."""
        parts = dist.Normal(self.clusters.loc, self.clusters.scale).to_event(1)
        joint: Tensor = self.clusters.logits + parts.log_prob(z.unsqueeze(-2))
        return joint.softmax(-1)
