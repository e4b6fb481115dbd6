"""The programs of the SVI benchmark in NumPyro, each a model and a guide; networks start where torch's do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import scale
from numpyro.infer import init_to_feasible
from numpyro.infer.autoguide import AutoNormal
from torch import nn

Pair = tuple[Callable[..., Any], Callable[..., Any]]


def _with_normal(model: Callable[..., Any]) -> Pair:
    return model, AutoNormal(model, init_loc_fn=init_to_feasible)


def eight_schools() -> Pair:
    def model(y: jax.Array, sd: jax.Array) -> None:
        mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
        spread = numpyro.sample("spread", dist.HalfCauchy(5.0))
        with numpyro.plate("schools", len(y)):
            effect = numpyro.sample("effect", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(mean + spread * effect, sd), obs=y)

    return _with_normal(model)


def bayesian_network(num_data: int, hidden: int = 50) -> Pair:
    def model(x: jax.Array, y: jax.Array) -> None:
        shapes = {"w1": (x.shape[1], hidden), "b1": (hidden,), "w2": (hidden, 1), "b2": (1,)}
        w = {
            name: numpyro.sample(name, dist.Normal(jnp.zeros(shape), 1.0).to_event(len(shape)))
            for name, shape in shapes.items()
        }
        noise = numpyro.sample("noise", dist.LogNormal(-1.0, 1.0))
        f = (jnp.tanh(x @ w["w1"] + w["b1"]) @ w["w2"] + w["b2"]).squeeze(-1)
        with numpyro.plate("data", len(y)), scale(scale=num_data / len(y)):
            numpyro.sample("y", dist.Normal(f, noise), obs=y)

    return _with_normal(model)


def logistic_regression(num_data: int) -> Pair:
    def model(x: jax.Array, y: jax.Array) -> None:
        w = numpyro.sample("w", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(y)), scale(scale=num_data / len(y)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ w + b), obs=y)

    return _with_normal(model)


def _weights(net: nn.Sequential) -> Callable[[Any], list[jax.Array]]:
    """Start values of a network: weight (transposed) and bias of its two layers."""
    values = [p.detach().cpu().numpy() for p in net.parameters()]
    return lambda key: [jnp.asarray(v.T if v.ndim == 2 else v) for v in values]


def _mlp(p: list[jax.Array], x: jax.Array) -> jax.Array:
    return jax.nn.softplus(x @ p[0] + p[1]) @ p[2] + p[3]


def vae(net: Any) -> Pair:
    """The autoencoder whose torch networks are given."""
    num_data, latent = net.num_data, net.latent
    encoder_start, decoder_start = _weights(net.encoder), _weights(net.decoder)

    def model(x: jax.Array) -> None:
        decoder = numpyro.param("decoder", decoder_start)
        with numpyro.plate("data", len(x)), scale(scale=num_data / len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros((len(x), latent)), 1.0).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=_mlp(decoder, z)).to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        encoder = numpyro.param("encoder", encoder_start)
        with numpyro.plate("data", len(x)), scale(scale=num_data / len(x)):
            loc, log_sd = jnp.split(_mlp(encoder, x), 2, -1)
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_sd)).to_event(1))

    return model, guide
