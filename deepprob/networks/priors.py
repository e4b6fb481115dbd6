"""Learned priors of codes: mixtures, mixtures of posteriors, flows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Generator, Tensor, nn

from deepprob.distributions import Mixture
from deepprob.errors import shown, unknown, whole
from deepprob.networks.conditional import positive_link
from deepprob.networks.flow import Flow

_FLOOR = 1e-4  # of standard deviations, as of Conditional
_SD_OF_ONE = math.log(math.expm1(1.0))
_JITTER = 0.01  # of pseudo-inputs around their rows, so that equal rows move apart
_LEARNED = ("mixture", "vamp", "flow")


class MixturePrior(nn.Module):
    r"""A mixture of normals with learned weights, means and standard deviations.

    .. math:: p(z) = \sum_{k=1}^K \pi_k \, N\big(z; \mu_k, \mathrm{diag}(\sigma_k^2)\big)

    Args:
        latent_dim: Size of a code.
        num_components: Number of components, K.

    Raises:
        ValueError: If a size is not a whole number of at least 1.

    Examples:
        >>> prior = MixturePrior(2, num_components=20)
        >>> prior().event_shape
        torch.Size([2])
    """

    def __init__(self, latent_dim: int, num_components: int = 10) -> None:
        super().__init__()
        size = whole("num_components", num_components), whole("latent_dim", latent_dim)
        self.config = {"prior": "mixture", "latent_dim": size[1], "num_components": size[0]}
        self.logits = nn.Parameter(torch.zeros(size[0]))
        self.loc, self.raw_scale = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))
        self.draw_weights()

    def forward(self) -> Mixture:
        """The mixture."""
        return Mixture(self.logits, torch.cat([self.loc, self.raw_scale], -1), _normal)

    @property
    def scale(self) -> Tensor:
        """Standard deviations, ``(K, Z)``."""
        return positive_link(self.raw_scale, _FLOOR)

    @torch.no_grad()
    def place(self, weights: Any, loc: Any, scale: Any) -> None:
        """Set weights ``(K,)``, means ``(K, Z)`` and standard deviations ``(K, Z)``, all as numbers of any kind."""
        self.logits.copy_(torch.as_tensor(weights).log())
        self.loc.copy_(torch.as_tensor(loc))
        self.raw_scale.copy_(torch.as_tensor(scale).sub(_FLOOR).clamp(min=_FLOOR).expm1().log())

    def draw_weights(self, generator: Generator | None = None) -> dict[str, str]:
        """Draw the means from a standard normal; the weights are equal, and the standard deviations one."""
        with torch.no_grad():
            self.loc.copy_(torch.randn(self.loc.shape, generator=generator))
            self.raw_scale.fill_(_SD_OF_ONE)
            self.logits.zero_()
        return {"logits": "zeros", "loc": "standard normal", "raw_scale": "one"}


class VampPrior(nn.Module):
    r"""The average of the posteriors of pseudo-inputs, which are learned: a prior that follows the encoder.

    .. math:: p(z) = \sum_{k=1}^K \pi_k \, q(z \mid u_k)

    The pseudo-inputs :math:`u_k` start at random rows of the first fit. They live in the space of the encoder's inputs,
    so that rows of counts, classes and tables have them too.

    Args:
        num_components: Number of pseudo-inputs, K.
        learned_weights: Whether the weights :math:`\pi` are learned; otherwise all are :math:`1 / K`.

    Raises:
        ValueError: If ``num_components`` is not a whole number of at least 1.

    References:
        Tomczak, Welling (2018), VAE with a VampPrior.
    """

    started: Tensor
    pseudo_inputs: Tensor

    def __init__(self, num_components: int = 500, learned_weights: bool = False) -> None:
        super().__init__()
        self.num_components = whole("num_components", num_components)
        self.config = {"prior": "vamp", "num_components": self.num_components, "learned_weights": bool(learned_weights)}
        logits = torch.zeros(self.num_components)
        self.logits: Tensor
        if learned_weights:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits, persistent=False)
        self.register_buffer("started", torch.tensor(False))

    def attach(self, shape: Sequence[int]) -> None:
        """Make the pseudo-inputs, in the shape of the encoder's inputs, unless there are some.

        Raises:
            ValueError: If those that there are have another shape.
        """
        size = (self.num_components, *shape)
        known = getattr(self, "pseudo_inputs", None)
        if known is None:
            self.pseudo_inputs = nn.Parameter(torch.zeros(size))
        elif tuple(known.shape) != size:
            raise ValueError(
                f"this VampPrior belongs to rows of shape {tuple(known.shape[1:])}; got rows of shape {tuple(shape)}. "
                "Make a new one."
            )

    @torch.no_grad()
    def adapt(self, rows: int, features: Callable[[Tensor], Tensor]) -> None:
        """Start the pseudo-inputs at random rows, unless they have started before.

        Args:
            rows: Number of rows.
            features: The encoder's inputs of the rows with some indices.
        """
        if bool(self.started):
            return
        chosen = torch.cat([torch.randperm(rows) for _ in range(-(-self.num_components // rows))])
        found = features(chosen[: self.num_components]).to(self.pseudo_inputs)
        self.pseudo_inputs.copy_(found + _JITTER * torch.randn_like(found))
        self.started.fill_(True)

    def forward(self, encode: Callable[[Tensor], Tensor], make: Callable[[Tensor], Any]) -> Mixture:
        """The mixture.

        Args:
            encode: The encoder's network, from inputs to the parameters of posteriors.
            make: Makes posteriors from parameters.
        """
        return Mixture(self.logits, encode(self.pseudo_inputs), make)

    def draw_weights(self, generator: Generator | None = None) -> dict[str, str]:
        """Forget the pseudo-inputs, so that the next fit starts them at its rows; the weights are equal."""
        with torch.no_grad():
            self.logits.zero_()
            self.started.fill_(False)
        return {"pseudo_inputs": "random rows"} | ({"logits": "zeros"} if self.config["learned_weights"] else {})


class FlowPrior(nn.Module):
    r"""A standard normal that a flow of affine couplings bends; see `ConditionalFlow` for the same with a context.

    Args:
        latent_dim: Size of a code, at least 2.
        layers: Number of couplings.
        hidden_dims: Sizes of the hidden layers of each coupling's network.

    Raises:
        TypeError: If ``hidden_dims`` is not a sequence.
        ValueError: If ``latent_dim`` is less than 2, or another size is not a whole number of at least 1.

    References:
        Chen, Kingma, Salimans et al. (2017), Variational Lossy Autoencoder.

    Examples:
        A new flow is the standard normal:

        >>> z = torch.randn(4, 3)
        >>> expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        >>> torch.allclose(FlowPrior(3, layers=2)().log_prob(z), expected)
        True
    """

    zeros: Tensor

    def __init__(self, latent_dim: int, layers: int = 4, hidden_dims: Sequence[int] = (64,)) -> None:
        super().__init__()
        self.flow = Flow(latent_dim, layers, hidden_dims)
        self.config = {"prior": "flow", "latent_dim": self.flow.dim, "layers": layers, "hidden_dims": [*hidden_dims]}
        self.register_buffer("zeros", torch.zeros(self.flow.dim), persistent=False)

    def forward(self) -> Any:
        """The distribution of a code."""
        return self.flow.distribution(self.zeros, torch.ones_like(self.zeros))


def prior_named(prior: Any, latent_dim: int) -> nn.Module | None:
    """The prior that a user chose: by name, as JSON, or as a module.

    Args:
        prior: ``"standard"``, ``"mixture"``, ``"vamp"``, ``"flow"``, the ``config`` of one of these modules, or a
            module that returns a Pyro distribution when it is called without arguments.
        latent_dim: Size of a code.

    Returns:
        The prior; None for the standard normal.

    Raises:
        TypeError: If it is neither a name nor such a module.
        ValueError: If the name is unknown, or the distribution has another event shape than a code.
    """
    if prior == "standard":
        return None
    if isinstance(prior, str):
        if prior not in _LEARNED:
            raise unknown("prior", prior, ("standard", *_LEARNED))
        prior = {"prior": prior} if prior == "vamp" else {"prior": prior, "latent_dim": latent_dim}
    if isinstance(prior, Mapping):
        kinds = {"mixture": MixturePrior, "vamp": VampPrior, "flow": FlowPrior}
        name, options = prior.get("prior"), {key: value for key, value in prior.items() if key != "prior"}
        if name not in kinds:
            raise unknown("prior", name, _LEARNED)
        prior = kinds[name](**options)
    if not isinstance(prior, nn.Module):
        raise TypeError(
            f"prior must be 'standard', 'mixture', 'vamp', 'flow' or a torch.nn.Module; got {shown(prior)}. Write a "
            "module whose forward(self) returns a pyro distribution over codes."
        )
    if not isinstance(prior, VampPrior):
        _check(prior, latent_dim)
    return prior


@torch.no_grad()
def _check(prior: nn.Module, latent_dim: int) -> None:
    try:
        found = prior()
    except TypeError as error:
        raise TypeError(
            f"prior must return its distribution when it is called without arguments, but {type(prior).__name__} "
            f"failed: {error}. Write forward(self), or Conditional(network, ...) with a network that takes no input."
        ) from error
    if not isinstance(found, TorchDistributionMixin):
        raise TypeError(
            f"prior must return a distribution of pyro.distributions; {type(prior).__name__} returned "
            f"{type(found).__name__}."
        )
    if found.event_shape != (latent_dim,) or found.batch_shape != ():
        raise ValueError(
            f"prior must have event shape ({latent_dim},) and no batch shape for latent_dim={latent_dim}; got event "
            f"shape {tuple(found.event_shape)} and batch shape {tuple(found.batch_shape)}. Numbers that are "
            "independent become one event by .to_event(1)."
        )


def _normal(parameters: Tensor) -> Any:
    loc, raw = parameters.chunk(2, -1)
    return dist.Normal(loc, positive_link(raw, _FLOOR), validate_args=False).to_event(1)
