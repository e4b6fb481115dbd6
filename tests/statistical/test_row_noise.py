"""Local reparameterization and Flipout: unbiased gradients with less variance, and the exact optimum.

A z-score above 4.5 occurs by chance once in 150 000 comparisons. Seeds are fixed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepprob.fitting.importance_weighted import IWAE
from deepprob.fitting.objectives import ELBO
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import BayesianNeuralNetwork
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.run import Run

KINDS = ("shared", "local", "flipout")
DRAWS = 800


class Twice(nn.Module):
    """A network that uses one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.inner(torch.tanh(self.inner(x)))))
        return out


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "dense": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), (4,)),
    "convolutional": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1)),
        (2, 4, 4),
    ),
    "steps": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 1)), (4, 3)),
    "twice": (Twice, (4,)),
}


def program(name: str, kind: str, **options: Any) -> BayesianNeuralNetwork:
    torch.manual_seed(0)
    one = BayesianNeuralNetwork(NETWORKS[name][0](), noise=0.3, gradients=kind, standardize=False, **options)
    with torch.no_grad():
        for raw in one.raw_sd:
            raw.fill_(-1.0)  # wide, so that the noise of the weights matters
    return one


def gradients(name: str, kind: str, rows: int = 16) -> tuple[Tensor, Tensor]:
    """Draws of the loss, ``(DRAWS,)``, and of its gradient in the means, ``(DRAWS, parameters)``."""
    one, generator = program(name, kind), torch.Generator().manual_seed(1)
    x, y = torch.randn(rows, *NETWORKS[name][1], generator=generator), torch.randn(rows, 1, generator=generator)
    run, losses, found = Run(one, (x, y), torch.arange(rows), rows), [], []
    torch.manual_seed(2)
    for _ in range(DRAWS):
        loss, _ = ELBO()(run)
        losses.append(loss.detach())
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(one.raw_loc))]))
    return torch.stack(losses), torch.stack(found)


@pytest.mark.parametrize("name", [*NETWORKS])
def test_gradients_have_the_same_expectation_and_less_variance(name: str) -> None:
    kinds = [kind for kind in KINDS if (name, kind) != ("twice", "local")]
    found = {kind: gradients(name, kind) for kind in kinds}
    for kind in kinds[1:]:
        for shared, other in zip(found["shared"], found[kind], strict=True):
            error = ((shared.var(0) + other.var(0)) / DRAWS).sqrt()
            assert ((shared.mean(0) - other.mean(0)).abs() < 4.5 * error + 1e-7).all(), kind
        ratio = found[kind][1].var(0).sum() / found["shared"][1].var(0).sum()
        assert ratio < 0.7, (kind, ratio)


def test_a_weight_used_twice_has_no_local_noise() -> None:
    with pytest.raises(ValueError, match=r"uses weight 'inner\.weight' twice for one row.*Use gradients='flipout'"):
        gradients("twice", "local")


def linear_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator)
    weights = torch.randn(5, 1, generator=generator)
    return x, x @ weights + 0.5 * torch.randn(200, 1, generator=generator)


def fit(kind: str, batch_size: int | None, **options: Any) -> Posterior:
    net = nn.Linear(5, 1, bias=False)
    one = BayesianNeuralNetwork(net, prior="normal", noise=0.5, standardize=False, gradients=kind)
    settings: dict[str, Any] = {
        "objective": ELBO(particles=20),
        "optimizer": Optimizer(learning_rate=2e-2, schedule="cosine"),
    } | options
    settings = {"epochs": 150 if batch_size == 20 else 1500} | settings
    return svi(one, linear_data(), batch_size=batch_size, seed=1, progress=False, **settings)


@pytest.mark.parametrize("batch_size", [20, None])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_mean_field_sd_is_the_optimum(kind: str, batch_size: int | None) -> None:
    x, _ = linear_data()
    fitted = torch.nn.functional.softplus(fit(kind, batch_size).parameters()["raw_sd.0"]).flatten()
    optimum = (1 + (x**2).sum(0) / 0.5**2).rsqrt()
    assert ((fitted / optimum - 1).abs() < 0.03).all(), fitted / optimum


def test_queries_use_the_weights_themselves() -> None:
    posterior = fit("local", None, epochs=20)
    x, _ = linear_data()
    draws = posterior.sample(draws=5)["weight"]
    means = posterior.predict(x, draws=5).distribution.mean[..., 0]
    torch.testing.assert_close(means, draws[:, 0] @ x.T)
    assert posterior.program.config is None and posterior.program.gradients == "local"


def test_importance_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"draws 'weight' anew for every row.*Use gradients='shared'"):
        fit("flipout", None, objective=IWAE(4), epochs=2)


def test_another_guide_shares_its_draws() -> None:
    posterior = fit("flipout", None, guide="normal", epochs=2)
    assert posterior.predict(linear_data()[0], draws=3).mean.isfinite().all()


def test_an_unknown_name_raises() -> None:
    with pytest.raises(ValueError, match=r"unknown gradients 'locl'\. Did you mean 'local'"):
        BayesianNeuralNetwork(nn.Linear(2, 1), gradients="locl")
