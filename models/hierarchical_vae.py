"""The hierarchical variational autoencoder: two and more layers of codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from deepprob.errors import counted, unknown
from deepprob.models.vae import VAE
from deepprob.networks.conditional import Conditional
from deepprob.networks.dense import MLP
from deepprob.networks.network import whole_sizes
from deepprob.programs.example import Example

INFERENCE = ("bottom_up", "top_down")


class HierarchicalVAE(VAE):
    r"""A variational autoencoder with several stochastic layers; the upper ones explain how the lower ones depend.

    .. code-block:: text

        z_L ~ N(0, I)                        top code                           "z2" of two layers
        z_l ~ N(downward_l(z_{l+1}))         code of layer l = L-1..1           "z1"
        x   ~ p(x | decoder(z_1))            row, of any shape                  "x"

    With ``inference="bottom_up"``, the guide climbs: each layer reads a draw of the one below.

    .. math:: q(z \mid x) = q(z_1 \mid x) \prod_{l=1}^{L-1} q(z_{l+1} \mid z_l)

    With ``"top_down"`` (a ladder), it descends: a layer's estimate from the row, with mean :math:`\hat\mu_l(x)` and
    standard deviation :math:`\hat\sigma_l(x)`, is combined with the model's own :math:`\mu_l(z_{l+1})` and
    :math:`\sigma_l(z_{l+1})` by their precisions. The estimates of a layer are those of the layer below, read by its
    network. Upper layers are then used more, and every layer's KL has its closed form.

    .. math:: q(z_l \mid z_{l+1}, x) = \mathcal N\Big(\frac{\hat\mu_l \hat\sigma_l^{-2} + \mu_l \sigma_l^{-2}}
              {\hat\sigma_l^{-2} + \sigma_l^{-2}}, \frac{1}{\hat\sigma_l^{-2} + \sigma_l^{-2}}\Big)

    A fit may leave codes unused for thousands of steps, in upper layers and in a ladder above all:
    ``callbacks=[KLWarmUp(epochs)]`` lets the likelihood choose them first.

    ``HierarchicalVAE((28, 28), (100, 50), ((200, 200), (100, 100)), activation="tanh")`` has the two layers of Burda
    et al., fitted with ``objective="iwae"``.

    Args:
        shape: Shape of one row, as of `VAE`.
        latent_dims: Sizes of the codes, from the one next to the rows to the top; at least two.
        hidden_dims: Sizes of the hidden layers of the encoders of every layer, reversed in the decoders:
            ``((200, 200), (100, 100))``; one sequence of numbers is for all layers.
        likelihood: As of `VAE`.
        num_classes: As of `VAE`.
        activation: Activation of the hidden layers.
        inference: ``"bottom_up"`` or ``"top_down"``.
        encoder: A custom network of the lowest layer, as of `VAE`: from rows to ``2 * latent_dims[0]`` outputs.
        decoder: A custom network of the lowest layer, as of `VAE`: from codes of ``latent_dims[0]`` numbers.

    Raises:
        TypeError: If sizes are not sequences of whole numbers.
        ValueError: If a name is unknown, a size is out of range, or the numbers of layers differ.

    References:
        Burda, Grosse, Salakhutdinov (2016), Importance Weighted Autoencoders.
        Sønderby, Raiko, Maaløe, Sønderby, Winther (2016), Ladder Variational Autoencoders.

    Examples:
        A code for every layer, and rows from the top one:

        >>> from deepprob.inference import svi
        >>> program = HierarchicalVAE((3, 2), latent_dims=(4, 2), hidden_dims=(8,))
        >>> posterior = svi(program, torch.rand(24, 3, 2), steps=3, progress=False)
        >>> {site: mean.shape for site, mean in posterior.encode(torch.rand(5, 3, 2)).mean.items()}
        {'z2': torch.Size([5, 2]), 'z1': torch.Size([5, 4])}
        >>> posterior.decode({"z2": torch.zeros(7, 2)}).mean.shape
        torch.Size([7, 3, 2])
    """

    registry_name = "hierarchical_vae"

    def __init__(
        self,
        shape: Sequence[int],
        latent_dims: Sequence[int] = (32, 16),
        hidden_dims: Sequence[int] | Sequence[Sequence[int]] = ((400,), (100,)),
        likelihood: str | Sequence[Sequence[Any]] = "bernoulli",
        num_classes: int | None = None,
        activation: str = "relu",
        inference: str = "bottom_up",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        sizes = whole_sizes("latent_dims", latent_dims)
        hidden = _by_layer(hidden_dims, sizes)
        if inference not in INFERENCE:
            raise unknown("inference", inference, INFERENCE)
        own = (shape, sizes[0], hidden[0], likelihood)
        super().__init__(*own, num_classes=num_classes, activation=activation, encoder=encoder, decoder=decoder)
        self.latent_dims, self.inference = tuple(sizes), inference
        self.register_buffer("prior_loc", torch.zeros(sizes[-1]))
        reads = 2 if inference == "top_down" else 1  # mean and standard deviation, or a draw
        self.upward, self.downward = nn.ModuleList(), nn.ModuleList()
        for below, above, widths in zip(sizes, sizes[1:], hidden[1:], strict=False):
            up = MLP(reads * below, 2 * above, widths, activation)
            down = MLP(above, 2 * below, tuple(reversed(widths)), activation)
            self.upward.append(Conditional(up, "normal", (above,)))
            self.downward.append(Conditional(down, "normal", (below,)))
        self.built = [*self.built, self.upward, self.downward]
        self.config = None
        if encoder is None and decoder is None:
            self.config = {
                "shape": list(self.shape),
                "latent_dims": sizes,
                "hidden_dims": hidden,
                "likelihood": self.likelihood,
                "num_classes": self.num_classes,
                "activation": activation,
                "inference": inference,
            }

    @classmethod
    def example(cls) -> Example:
        """Grey images of 3 x 2 pixels."""
        generator = torch.Generator().manual_seed(0)
        program = cls((3, 2), latent_dims=(3, 2), hidden_dims=(8,))
        return Example(program, (torch.rand(24, 3, 2, generator=generator),))

    def model(self, x: Tensor | None = None) -> Tensor:
        """Draw codes from the top to the lowest layer, and rows from the decoder; returns the rows."""
        with self.data_plate(x):
            prior = dist.Normal(self.prior_loc, torch.ones_like(self.prior_loc)).to_event(1)
            z = pyro.sample(f"z{len(self.latent_dims)}", prior)  # (..., B, Z_L)
            for layer in reversed(range(1, len(self.latent_dims))):
                z = pyro.sample(f"z{layer}", self.downward[layer - 1](z))  # (..., B, Z_l)
            value: Tensor = pyro.sample("x", self.decode(z), obs=x)
        return value

    def guide(self, x: Tensor) -> Tensor:
        """Draw the codes of all layers given rows; returns the last that it draws."""
        with self.data_plate(x):
            return self._descend(x) if self.inference == "top_down" else self._climb(x)

    def _climb(self, x: Tensor) -> Tensor:
        z: Tensor = pyro.sample("z1", self.encode(x))
        for layer, network in enumerate(self.upward, 2):
            z = pyro.sample(f"z{layer}", network(z))
        return z

    def _descend(self, x: Tensor) -> Tensor:
        estimates = [self.encode(x).base_dist]  # normals, (B, Z_l)
        for network in self.upward:
            below = estimates[-1]
            estimates.append(network(torch.cat([below.loc, below.scale], -1)).base_dist)
        z: Tensor = pyro.sample(f"z{len(estimates)}", estimates[-1].to_event(1))
        for layer in reversed(range(1, len(estimates))):
            found = _product(estimates[layer - 1], self.downward[layer - 1](z).base_dist)
            z = pyro.sample(f"z{layer}", found.to_event(1))
        return z


def _product(one: Any, other: Any) -> Any:
    """The normal whose density is proportional to the product of two."""
    first, second = one.scale.square().reciprocal(), other.scale.square().reciprocal()
    variance = (first + second).reciprocal()
    return dist.Normal(variance * (first * one.loc + second * other.loc), variance.sqrt())


def _by_layer(hidden_dims: Any, latent_dims: Sequence[int]) -> list[list[int]]:
    """Hidden sizes of every layer, of which there are at least two."""
    if len(latent_dims) < 2:
        raise ValueError(f"latent_dims must have at least two layers; got {list(latent_dims)}. For one, choose VAE.")
    if isinstance(hidden_dims, str) or not isinstance(hidden_dims, Sequence):
        raise TypeError(f"hidden_dims must be a sequence for every layer; got {hidden_dims!r}. Write ((200,), (100,)).")
    if not any(isinstance(sizes, Sequence) for sizes in hidden_dims):
        return [whole_sizes("hidden_dims", hidden_dims) for _ in latent_dims]
    if len(hidden_dims) != len(latent_dims):
        raise ValueError(
            f"hidden_dims has sizes for {counted(len(hidden_dims), 'layer')}, but latent_dims has "
            f"{len(latent_dims)}. Give one sequence for every layer, or one for all."
        )
    return [whole_sizes("hidden_dims of a layer", sizes) for sizes in hidden_dims]
