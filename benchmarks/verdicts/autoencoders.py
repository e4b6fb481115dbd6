"""Autoencoders: linear ones against exact PCA, digits, collapsed, half-trained and overfitted ones."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import deepprob as dp
from deepprob.models import VAE
from deepprob.posteriors.posterior import Posterior
from verdicts.registry import Fitted, Nats, good, wrong
from verdicts.truths import fit, noise

NOISE = 0.5


def loadings(columns: int, codes: int) -> Tensor:
    return torch.randn(columns, codes, generator=noise(columns, 80))


def linear_rows(count: int, columns: int, codes: int, seed: int, kind: int) -> Tensor:
    """Rows of probabilistic PCA."""
    g = noise(seed, kind)
    z = torch.randn(count, codes, generator=g)
    return z @ loadings(columns, codes).T + NOISE * torch.randn(count, columns, generator=g)


def pca_nats(posterior: Posterior, rows: Tensor, codes: int) -> Nats:
    """Against the process that made the rows, and against one normal with equal variances."""
    weight = loadings(rows.shape[1], codes).double()
    cov = weight @ weight.T + NOISE**2 * torch.eye(rows.shape[1]).double()
    x = rows.double()
    true = dist.MultivariateNormal(torch.zeros(len(cov)).double(), cov).log_prob(x).mean()
    plain = dist.Normal(x.mean(0), x.std()).log_prob(x).sum(1).mean()
    bound = posterior.elbo(rows, particles=50, seed=5).double().mean()
    return Nats(float(true - bound), float(true - plain))


def linear_vae(columns: int, codes: int, posterior: str = "multivariate_normal", **options: Any) -> VAE:
    return VAE((columns,), codes, (), "normal", posterior, **options)


@good("vae", "closed form", "probabilistic PCA: the encoder can be exact", columns=(5, 8, 10), codes=(2, 3, 2),
      rows=(1000, 3000, 300))  # fmt: skip
@wrong("vae", "closed form", "{steps} steps of training are far too few", columns=(5, 8, 8), codes=(2, 3, 3),
       rows=(1000, 1000, 2000), steps=(40, 150, 300), rate=(1e-2, 3e-3, 1e-3))  # fmt: skip
def linear_autoencoder(seed: int, columns: int, codes: int, rows: int, steps: int = 2500, rate: float = 1e-2) -> Fitted:
    x, fresh = linear_rows(rows, columns, codes, seed, 81), linear_rows(500, columns, codes, seed, 82)
    optimizer = dp.Optimizer(learning_rate=rate)
    posterior = fit(linear_vae(columns, codes), x, steps=steps, optimizer=optimizer, seed=seed)
    return Fitted(posterior, fresh, train=(x,), nats=lambda: pca_nats(posterior, fresh, codes))


@wrong("vae", "closed form", "{codes} codes for rows that have {true}", true=(3, 2, 4), codes=(2, 1, 3))
def too_few_codes(seed: int, true: int, codes: int) -> Fitted:
    x, fresh = linear_rows(1000, 8, true, seed, 83), linear_rows(500, 8, true, seed, 84)
    optimizer = dp.Optimizer(learning_rate=1e-2)
    posterior = fit(linear_vae(8, codes), x, steps=2000, optimizer=optimizer, seed=seed)
    return Fitted(posterior, fresh, train=(x,), nats=lambda: pca_nats(posterior, fresh, true))


@wrong("vae", "closed form", "the encoder's rectifiers are dead: no code is used", codes=(2, 3))
def dead_encoder(seed: int, codes: int) -> Fitted:
    first = nn.Linear(6, 32)
    with torch.no_grad():
        first.bias.fill_(-100.0)
    encoder = nn.Sequential(first, nn.ReLU(), nn.Linear(32, 2 * codes))
    x, fresh = linear_rows(1000, 6, codes, seed, 85), linear_rows(500, 6, codes, seed, 86)
    program = linear_vae(6, codes, "normal", encoder=encoder)
    posterior = fit(program, x, steps=1000, optimizer=dp.Optimizer(learning_rate=1e-2), seed=seed)
    return Fitted(posterior, fresh, train=(x,), nats=lambda: pca_nats(posterior, fresh, codes))


@wrong("vae", "constructed", "the KL weighs {weight} times: the codes collapse", weight=(30,))
def heavy_kl(seed: int, weight: float) -> Fitted:
    encoder, decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            with pyro.poutine.scale(scale=weight):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), NOISE).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, raw = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=weight):
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    x, fresh = linear_rows(1000, 6, 2, seed, 87), linear_rows(500, 6, 2, seed, 88)
    program = dp.Program.of(model, guide, data_plate="data")
    posterior = fit(program, x, steps=1500, optimizer=dp.Optimizer(learning_rate=1e-2), seed=seed)
    return Fitted(posterior, fresh, train=(x,))


@wrong("vae", "closed form", "the encoder's sd is fixed at {sd}", sd=(0.02, 3.0))
def fixed_encoder_sd(seed: int, sd: float) -> Fitted:
    encoder, decoder = nn.Linear(6, 2), nn.Linear(2, 6)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), NOISE).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), sd).to_event(1))

    x, fresh = linear_rows(1000, 6, 2, seed, 89), linear_rows(500, 6, 2, seed, 90)
    program = dp.Program.of(model, guide, data_plate="data")
    posterior = fit(program, x, steps=1500, optimizer=dp.Optimizer(learning_rate=1e-2), seed=seed)
    return Fitted(posterior, fresh, train=(x,), nats=lambda: pca_nats(posterior, fresh, 2))


@wrong("vae", "closed form", "{rows} rows, learned by heart", rows=(40, 80))
def learned_by_heart(seed: int, rows: int) -> Fitted:
    x, fresh = linear_rows(rows, 8, 2, seed, 91), linear_rows(500, 8, 2, seed, 92)
    program = VAE((8,), 4, (100,), "normal")
    posterior = fit(program, x, steps=2500, optimizer=dp.Optimizer(learning_rate=3e-3), seed=seed)
    return Fitted(posterior, fresh, train=(x,), nats=lambda: pca_nats(posterior, fresh, 2))


# -- binary rows and counts -----------------------------------------------------------------------------------------


def binary_rows(count: int, seed: int, kind: int) -> Tensor:
    g = noise(seed, kind)
    logits = 2.5 * torch.randn(count, 1, generator=g) * torch.ones(12)
    return (torch.rand(count, 12, generator=g) < torch.sigmoid(logits)).float()


def binary_nats(posterior: Posterior, rows: Tensor) -> Nats:
    """The exact evidence by quadrature over the one code."""
    z = torch.linspace(-6.0, 6.0, 601).double()
    ones = rows.double().sum(1)[:, None]
    fits = ones * nn.functional.logsigmoid(2.5 * z) + (12 - ones) * nn.functional.logsigmoid(-2.5 * z)
    true = torch.logsumexp(fits + dist.Normal(0.0, 1.0).log_prob(z), 1) + math.log(0.02)
    bound = posterior.elbo(rows, particles=50, seed=5).double().mean()
    return Nats(float(true.mean() - bound), float(true.mean() + 12 * math.log(2)))


@good("vae", "closed form", "binary rows with one code, trained to the end", rows=(3000,), steps=(4000,))
@wrong("vae", "closed form", "binary rows, trained for {steps} steps", rows=(2000,), steps=(60,))
def binary_autoencoder(seed: int, rows: int, steps: int) -> Fitted:
    x, fresh = binary_rows(rows, seed, 93), binary_rows(500, seed, 94)
    program = VAE((12,), 1, (16,), posterior="normal", activation="tanh")
    posterior = fit(program, x, steps=steps, optimizer=dp.Optimizer(learning_rate=5e-3), seed=seed)
    return Fitted(posterior, fresh, train=(x,), nats=lambda: binary_nats(posterior, fresh))


def count_rows(count: int, seed: int, kind: int, total: float) -> tuple[Tensor, Tensor]:
    g = noise(seed, kind)
    z = torch.randn(count, 1, generator=g)
    mean = 5 * nn.functional.softplus(z * torch.linspace(0.5, 1.5, 6)) + 1
    with torch.random.fork_rng():
        torch.manual_seed(1000 * kind + seed)
        rate = mean if math.isinf(total) else dist.Gamma(total, total / mean).sample()
        return dist.Poisson(rate).sample(), mean


@wrong("vae", "constructed", "Poisson counts for rows with a dispersion of {total}", total=(1.0, 3.0))
def poisson_autoencoder(seed: int, total: float) -> Fitted:
    (x, _), (fresh, _) = count_rows(1000, seed, 95, total), count_rows(500, seed, 96, total)
    program = VAE((6,), 1, (16,), "poisson")
    posterior = fit(program, x, steps=2000, optimizer=dp.Optimizer(learning_rate=5e-3), seed=seed)

    def nats() -> Nats:
        better = fit(VAE((6,), 1, (16,), "negative_binomial"), x, steps=2000,
                     optimizer=dp.Optimizer(learning_rate=5e-3), seed=seed)  # fmt: skip
        bounds = [float(p.elbo(fresh, particles=50, seed=5).double().mean()) for p in (posterior, better)]
        plain = dist.Poisson(x.mean(0)).log_prob(fresh).sum(1).mean()
        return Nats(bounds[1] - bounds[0], bounds[1] - float(plain))

    return Fitted(posterior, fresh, train=(x,), nats=nats)


# -- digits ---------------------------------------------------------------------------------------------------------


@cache
def best_digits() -> float:
    """The bound of a fit of 900 epochs on the test digits, in nats per image."""
    digits = dp.load_data("digits")
    posterior = fit(VAE(digits.shape, 8, (100,)), digits.train, epochs=900, held_out=digits.valid)
    return float(posterior.elbo(digits.test, particles=20, seed=5).double().mean())


@good("vae", "reference draws", "digits, trained to the end", epochs=(400,))
@wrong("vae", "reference draws", "digits, trained for {epochs} epochs", epochs=(5, 20, 40))
def digits_autoencoder(seed: int, epochs: int) -> Fitted:
    digits = dp.load_data("digits")
    posterior = fit(VAE(digits.shape, 8, (100,)), digits.train, epochs=epochs, held_out=digits.valid, seed=seed)

    def nats() -> Nats:
        x = digits.train.tensors[0].flatten(1)
        mean = x.mean(0).clamp(1e-3, 1 - 1e-3)
        test = digits.test.tensors[0].flatten(1)
        plain = float((test * mean.log() + (1 - test) * (1 - mean).log()).sum(1).mean())
        bound = float(posterior.elbo(digits.test, particles=20, seed=5).double().mean())
        return Nats(best_digits() - bound, best_digits() - plain)

    return Fitted(posterior, digits.test, nats=nats)


@wrong("vae", "constructed", "the test images are {kind}", kind=("inverted", "noise"))
def other_images(seed: int, kind: str) -> Fitted:
    digits = dp.load_data("digits")
    posterior = fit(VAE(digits.shape, 8, (100,)), digits.train, epochs=150, held_out=digits.valid, seed=seed)
    test = digits.test.tensors[0]
    other = 1 - test if kind == "inverted" else torch.rand(test.shape, generator=noise(seed, 97))

    def nats() -> Nats:
        bounds = [float(posterior.elbo(x, particles=20, seed=5).double().mean()) for x in (other, test)]
        return Nats(bounds[1] - bounds[0], 20.0)

    return Fitted(posterior, other, nats=nats)
