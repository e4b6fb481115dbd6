"""Programs that observe several things of a row, or several tables."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal
from torch import Tensor, nn

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise


@kind("several observed sites")
def two_instruments(sizes: Sizes) -> UserProgram:
    truth = 2.0 + noise(sizes.rows)
    rough, fine = truth + noise(sizes.rows, seed=1), truth + 0.5 * noise(sizes.rows, seed=2)

    def model(rough: Tensor | None = None, fine: Tensor | None = None) -> None:
        with pyro.plate("objects", sizes.rows):
            length = pyro.sample("length", dist.Normal(0.0, 3.0))
            pyro.sample("rough", dist.Normal(length, 1.0), obs=rough)
            pyro.sample("fine", dist.Normal(length, 0.5), obs=fine)

    def answer(posterior: Posterior) -> None:
        precision = 1 / 9 + 1 + 4
        mean = (rough + 4 * fine) / precision
        length = posterior.sample(rough, fine, draws=3000)["length"]
        torch.testing.assert_close(length.mean(0), mean, atol=0.08, rtol=0)
        torch.testing.assert_close(length.std(0), torch.full_like(mean, precision**-0.5), atol=0.0, rtol=0.1)
        predicted = posterior.predict(rough, fine, draws=3000, site="rough")
        torch.testing.assert_close(predicted.mean, mean, atol=0.08, rtol=0)
        covariance = torch.full((2, 2), 9.0) + torch.diag(torch.tensor([1.0, 0.25]))
        marginal = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(torch.stack([rough, fine], 1))
        evidence = posterior.log_evidence(rough, fine, particles=1000)
        torch.testing.assert_close(evidence, marginal, atol=0.02, rtol=0)

    return UserProgram(
        model,
        "normal",
        (rough, fine),
        rows=sizes.rows,
        observed=("rough", "fine"),
        answer=answer,
        steps=2000,
        learning_rate=0.01,
    )


@kind("several observed sites")
def mixed_outcomes(sizes: Sizes) -> UserProgram:
    x = noise(sizes.rows)
    income, employed, visits = 2 * x + noise(sizes.rows, seed=1), (x > 0).float(), torch.arange(sizes.rows) % 4.0

    def model(
        x: Tensor, income: Tensor | None = None, employed: Tensor | None = None, visits: Tensor | None = None
    ) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        sigma = pyro.sample("sigma", dist.Exponential(1.0))
        with pyro.plate("people", len(x)):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            pyro.sample("income", dist.Normal(slope[0] * x + effect, sigma), obs=income)
            pyro.sample("employed", dist.Bernoulli(logits=slope[1] * x + effect), obs=employed)
            pyro.sample("visits", dist.Poisson((slope[2] * x + 0.3 * effect).exp()), obs=visits)

    return UserProgram(
        model, AutoDiagonalNormal, (x, income, employed, visits), rows=sizes.rows,
        observed=("income", "employed", "visits"),
    )  # fmt: skip


@kind("several observed sites")
def one_site_a_column(sizes: Sizes) -> UserProgram:
    table = noise(sizes.rows, sizes.groups)

    def model(table: Tensor) -> None:
        loadings = pyro.sample("loadings", dist.Normal(torch.zeros(table.shape[1]), 1.0).to_event(1))
        with pyro.plate("rows", len(table)):
            score = pyro.sample("score", dist.Normal(0.0, 1.0))
            for j in range(table.shape[1]):
                pyro.sample(f"item_{j}", dist.Normal(loadings[j] * score, 1.0), obs=table[:, j])

    observed = tuple(f"item_{j}" for j in range(sizes.groups))
    return UserProgram(model, "normal", (table,), rows=sizes.rows, observed=observed)


@kind("several observed sites")
def error_in_variables(sizes: Sizes) -> UserProgram:
    x = noise(sizes.rows)
    y = 1.0 + 2.0 * x + 0.5 * noise(sizes.rows, seed=1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(x)):
            true_x = pyro.sample("true_x", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(true_x, 0.3), obs=x)
            pyro.sample("y", dist.Normal(a + b * true_x, 0.5), obs=y)

    return UserProgram(model, AutoMultivariateNormal, (x, y), rows=sizes.rows, observed=("x", "y"))


@kind("several observed sites")
def two_arms_of_trials(sizes: Sizes) -> UserProgram:
    control = torch.arange(sizes.rows) % 9.0
    treated = (control + 2).clamp(max=10.0)

    def model(control: Tensor | None = None, treated: Tensor | None = None) -> None:
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        with pyro.plate("trials", sizes.rows):
            base = pyro.sample("base", dist.Normal(0.0, 1.5))
            delta = pyro.sample("delta", dist.Normal(effect, spread))
            pyro.sample("control", dist.Binomial(10, logits=base), obs=control)
            pyro.sample("treated", dist.Binomial(10, logits=base + delta), obs=treated)

    return UserProgram(model, "normal", (control, treated), rows=sizes.rows, observed=("control", "treated"))


@kind("several observed sites")
def image_and_label(sizes: Sizes) -> UserProgram:
    images, labels = noise(sizes.rows, 6), torch.arange(sizes.rows) % sizes.groups
    encoder, decoder, classifier = nn.Linear(6, 4), nn.Linear(2, 6), nn.Linear(2, sizes.groups)

    def model(images: Tensor, labels: Tensor | None = None) -> None:
        pyro.module("decoder", decoder)
        pyro.module("classifier", classifier)
        with pyro.plate("rows", images.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("image", dist.Normal(decoder(z), 1.0).to_event(1), obs=images)
            pyro.sample("label", dist.Categorical(logits=classifier(z)), obs=labels)

    def guide(images: Tensor, labels: Tensor | None = None) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("rows", images.shape[0]):
            loc, scale = encoder(images).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return UserProgram(model, guide, (images, labels), rows=sizes.rows, observed=("image", "label"))


@kind("several observed sites")
def two_surveys(sizes: Sizes) -> UserProgram:
    first, second = noise(sizes.rows), noise(sizes.rows + 2, seed=1)

    def model(first: Tensor, second: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("first survey", len(first)):
            pyro.sample("first", dist.Normal(mean, 1.0), obs=first)
        with pyro.plate("second survey", len(second)):
            pyro.sample("second", dist.Normal(mean + bias, 1.0), obs=second)

    return UserProgram(model, "normal", (first, second), observed=("first", "second"))
