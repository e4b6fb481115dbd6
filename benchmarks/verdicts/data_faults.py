"""Held-out data that share rows with the training data, and held-out data of another process."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from verdicts.glm import logistic, patients
from verdicts.registry import Fitted, good, wrong
from verdicts.regressions import regression, rows_of, unknown_noise
from verdicts.truths import fit, gaussian_guide, linear_posterior, noise, plain_normal, predictive_loss


def mixed(train: tuple[Tensor, ...], fresh: tuple[Tensor, ...], share: float) -> tuple[Tensor, ...]:
    """Held-out rows, a share of which are training rows."""
    taken = int(share * len(fresh[0]))
    return tuple(torch.cat([old[:taken], new[taken:]]) for old, new in zip(train, fresh, strict=True))


@good("data", "closed form", "no row is shared", share=(0.0,), columns=(40,))
@wrong("data", "constructed", "{share:.0%} of the held-out rows are training rows", share=(0.3, 0.6, 0.9),
       columns=(40, 40, 5))  # fmt: skip
def leaked_rows(seed: int, share: float, columns: int) -> Fitted:
    train, fresh = rows_of(200, columns, seed, 210), rows_of(150, columns, seed, 211)
    exact = linear_posterior(*train)
    posterior = fit(regression, train, gaussian_guide("w", exact), plate="data", steps=800, seed=seed)
    truth = None if share else {"w": exact[:]}
    return Fitted(posterior, mixed(train, fresh, share), train=train, truth=truth)


@wrong("data", "constructed", "{share:.0%} of a classifier's held-out rows are training rows", share=(0.5,))
def leaked_patients(seed: int, share: float) -> Fitted:
    train, fresh = patients(200, 10, seed, 212), patients(150, 10, seed, 213)
    posterior = fit(logistic, train, "multivariate_normal", plate="data", steps=1500, seed=seed)
    return Fitted(posterior, mixed(train, fresh, share), train=train)


@wrong(
    "data", "constructed", "the held-out inputs lie {shift} sds away, where the line does not hold", shift=(3.0, 5.0)
)
def shifted_inputs(seed: int, shift: float) -> Fitted:
    def rows(kind: int, at: float) -> tuple[Tensor, Tensor, Tensor]:
        g = noise(seed, kind)
        x = torch.cat([at + torch.randn(300, 1, generator=g), torch.ones(300, 1)], 1)
        mean = 2 * torch.tanh(x[:, 0] / 2)
        return x, mean + 0.5 * torch.randn(300, generator=g), mean

    (x, y, _), (fx, fy, mean) = rows(214, 0.0), rows(215, shift)
    posterior = fit(unknown_noise, (x, y), "multivariate_normal", plate="data", steps=1500, seed=seed)
    true = dist.Normal(mean, 0.5).log_prob(fy)
    return Fitted(
        posterior, (fx, fy), train=(x, y), nats=lambda: predictive_loss(posterior, (fx, fy), true, plain_normal(y, fy))
    )


@wrong("data", "constructed", "the {kind} has changed since the fit", kind=("slope", "level", "noise"))
def changed_process(seed: int, kind: str) -> Fitted:
    x, y = rows_of(300, 2, seed, 216)
    fx, fy = rows_of(300, 2, seed, 217)
    true = dist.Normal(fx.sum(1), 1.0).log_prob(fy)
    if kind == "slope":
        fy = fy - 1.5 * fx[:, 0]
    elif kind == "level":
        fy = fy + 1.0
    else:
        fy = fx.sum(1) + 2.5 * (fy - fx.sum(1))
        true = dist.Normal(fx.sum(1), 2.5).log_prob(fy)
    posterior = fit(regression, (x, y), "multivariate_normal", plate="data", steps=1500, seed=seed)
    return Fitted(
        posterior, (fx, fy), train=(x, y), nats=lambda: predictive_loss(posterior, (fx, fy), true, plain_normal(y, fy))
    )


@good("data", "closed form", "checked on the training rows, in place of held-out ones", rows=(40, 400))
def training_rows(seed: int, rows: int) -> Fitted:
    train = rows_of(rows, 2, seed, 218)
    posterior = fit(regression, train, "multivariate_normal", plate="data", steps=2000, batch_size=None, seed=seed)
    return Fitted(posterior, train, train=train, truth={"w": linear_posterior(*train)[:]})


@good("data", "closed form", "inputs move within the range of the fit, and the line holds", rows=(200,))
def other_inputs_same_line(seed: int, rows: int) -> Fitted:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)

    train, fresh = rows_of(rows, 2, seed, 219), rows_of(40, 2, seed, 220)
    posterior = fit(model, train, "multivariate_normal", steps=2000, seed=seed)
    return Fitted(posterior, fresh, train=train, truth={"w": linear_posterior(*train)[:]})
