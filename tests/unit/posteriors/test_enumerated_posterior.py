"""Queries of programs with summed-out discrete sites, compared with explicit sums over their values."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.fitting.objectives import ELBO
from deepprob.inference import svi
from deepprob.posteriors.from_draws import draws_posterior
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program
from deepprob.programs.run import Run

PARALLEL = {"enumerate": "parallel"}
PRIOR, LOCS, TRANSITION = torch.tensor([0.4, 0.6]), torch.tensor([-1.0, 2.0]), torch.tensor([[0.9, 0.1], [0.3, 0.7]])
X = torch.tensor([0.3, 1.2, -0.4, 0.9])


def mixture(x: Tensor | None = None) -> None:
    """A mixture whose only latent site is summed out."""
    with pyro.plate("data", 4 if x is None else len(x)):
        k = pyro.sample("k", dist.Categorical(PRIOR), infer=PARALLEL)
        pyro.sample("x", dist.Normal(LOCS[k], 1.0), obs=x)


def shifted(x: Tensor | None = None) -> None:
    """A mixture with a global latent site."""
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4 if x is None else len(x)):
        k = pyro.sample("k", dist.Categorical(PRIOR), infer=PARALLEL)
        pyro.sample("x", dist.Normal(Vindex(LOCS)[..., k] + shift, 1.0), obs=x)


def coded(x: Tensor | None = None) -> None:
    """A local latent site whose prior is a mixture."""
    with pyro.plate("data", 4 if x is None else len(x)):
        k = pyro.sample("k", dist.Categorical(PRIOR), infer=PARALLEL)
        z = pyro.sample("z", dist.Normal(LOCS[k], 0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def switched(x: Tensor | None = None) -> None:
    """A discrete site that all rows share."""
    k = pyro.sample("k", dist.Categorical(PRIOR), infer=PARALLEL)
    with pyro.plate("data", 4 if x is None else len(x)):
        pyro.sample("x", dist.Normal(LOCS[k], 1.0), obs=x)


def markov(x: Tensor | None = None) -> None:
    """A Markov chain of three hidden states in every row."""
    with pyro.plate("data", 2 if x is None else len(x)):
        state: Any = 0
        for t in pyro.markov(range(3)):
            state = pyro.sample(f"s_{t}", dist.Categorical(TRANSITION[state]), infer=PARALLEL)
            pyro.sample(f"x_{t}", dist.Normal(LOCS[state], 1.0), obs=None if x is None else x[:, t])


def posterior_of(model: Callable[..., Any], guide: Any = lambda x=None: None, x: Tensor = X) -> Posterior:
    with RandomStream(0).drawing():
        return Posterior(ProgramInstance(Program.of(model, guide, data_plate="data"), (x,), len(x)))


def joint(shift: Tensor | float = 0.0) -> Tensor:
    """``log p(k, x)``, shape ``(B, 2)``."""
    return PRIOR.log() + dist.Normal(LOCS + shift, 1.0).log_prob(X[:, None])


def test_evidence_of_a_mixture_is_exact() -> None:
    posterior = posterior_of(mixture)
    assert posterior.exact
    assert repr(posterior) == "Posterior of FunctionProgram (guide): k (summed out)"
    for value in (posterior.log_evidence(X), posterior.elbo(X), posterior.log_likelihood(X, draws=2)[1]):
        torch.testing.assert_close(value, joint().logsumexp(1))
    assert posterior.log_weights(X, particles=3).shape == (3, 4)


def test_global_latent_is_drawn_and_the_rest_summed_out() -> None:
    posterior = posterior_of(shifted, "normal")
    assert not posterior.exact
    draws = posterior.sample(X, draws=5)
    assert (draws["shift"].shape, draws["k"].shape) == ((5,), (5, 4))
    expected = torch.stack([joint(s).logsumexp(1) for s in posterior.sample(draws=5)["shift"]])
    torch.testing.assert_close(posterior.log_likelihood(X, draws=5), expected)
    guide_trace, _ = posterior.trace(X, draws=5)
    site, shift = guide_trace.nodes["shift_unconstrained"], posterior.sample(draws=5)["shift"]
    log_q = site["fn"].log_prob(site["value"]).flatten()
    weights = expected.sum(1) + dist.Normal(0.0, 1.0).log_prob(shift) - log_q
    torch.testing.assert_close(posterior.log_weights(X, particles=5), weights)
    torch.testing.assert_close(posterior.elbo(X, particles=5), expected.mean(0))


def test_summed_sites_are_drawn_from_their_posterior() -> None:
    draws = posterior_of(mixture).sample(X, draws=20_000)["k"].double().mean(0)
    exact = joint().softmax(1)[:, 1].double()
    assert ((draws - exact).abs() < 4 * (exact * (1 - exact) / 20_000).sqrt()).all()  # four standard errors, four rows


def test_a_mask_that_depends_on_a_summed_site_counts_in_its_draws() -> None:
    def masked(x: Tensor | None = None) -> None:
        with pyro.plate("data", 4 if x is None else len(x)):
            k = pyro.sample("k", dist.Categorical(PRIOR), infer=PARALLEL)
            with pyro.poutine.mask(mask=k == 1):
                pyro.sample("x", dist.Normal(0.0, 0.5), obs=x)

    draws = posterior_of(masked).sample(X, draws=20_000)["k"].double().mean(0)
    density = 0.6 * dist.Normal(0.0, 0.5).log_prob(X).exp().double()
    exact = density / (density + 0.4)
    assert ((draws - exact).abs() < 4.5 * (exact * (1 - exact) / 20_000).sqrt()).all()


def test_a_density_without_influence_on_a_summed_site_is_not_evaluated() -> None:
    """The row of a code is as likely under every cluster; the densities of many pixels would be most of the work."""
    evaluated = []

    class Recorded(dist.Normal):
        def log_prob(self, value: Tensor) -> Tensor:
            evaluated.append(value.shape)
            found: Tensor = super().log_prob(value)
            return found

    def model(x: Tensor | None = None) -> None:
        with pyro.plate("data", 4 if x is None else len(x)):
            k = pyro.sample("k", dist.Categorical(PRIOR), infer=PARALLEL)
            z = pyro.sample("z", dist.Normal(LOCS[k], 0.5))
            pyro.sample("x", Recorded(z, 1.0), obs=x)

    def guide(x: Tensor | None = None) -> None:
        with pyro.plate("data", 4 if x is None else len(x)):
            pyro.sample("z", dist.Normal(0.0 if x is None else x / 2, 0.7))

    posterior = posterior_of(model, guide)
    first = posterior.sample(X, draws=20_000)  # decides how draws are stacked
    evaluated.clear()
    draws = posterior.sample(X, draws=20_000)
    assert not evaluated
    assert all(torch.equal(first[name], draws[name]) for name in first)
    exact = (PRIOR.log() + dist.Normal(LOCS, 0.5).log_prob(draws["z"][..., None])).softmax(-1)[..., 1].double()
    error = (draws["k"].double() - exact).mean(0) / ((exact * (1 - exact)).mean(0) / 20_000).sqrt()
    assert (error.abs() < 4.5).all()


def test_states_of_a_chain_are_drawn_jointly() -> None:
    x = torch.tensor([[0.3, 1.2, -0.4], [0.9, 0.5, 0.1]])
    posterior = posterior_of(markov, x=x)
    draws = posterior.sample(x, draws=20_000)
    paths = torch.tensor(list(product((0, 1), repeat=3)))
    before = torch.cat([torch.zeros(8, 1, dtype=torch.long), paths[:, :-1]], 1)
    joint = TRANSITION[before, paths].log().sum(1) + dist.Normal(LOCS[paths], 1.0).log_prob(x[:, None]).sum(
        -1
    )  # (B, 8)
    torch.testing.assert_close(posterior.log_evidence(x), joint.logsumexp(1))
    code = sum(draws[f"s_{t}"] * 2 ** (2 - t) for t in range(3))
    found = torch.stack([(code == i).double().mean(0) for i in range(8)], 1)  # (B, 8)
    exact = joint.softmax(1).double()
    assert ((found - exact).abs() < 4.5 * (exact * (1 - exact) / 20_000).sqrt()).all()


def test_mixture_prior_stays_out_of_the_likelihood() -> None:
    def guide(x: Tensor | None = None) -> None:
        with pyro.plate("data", 4 if x is None else len(x)):
            pyro.sample("z", dist.Normal(0.0 if x is None else x / 2, 0.7))

    posterior = posterior_of(coded, guide)
    z = posterior.sample(X, draws=6)["z"]
    likelihood = dist.Normal(z, 1.0).log_prob(X)
    prior = (PRIOR.log() + dist.Normal(LOCS, 0.5).log_prob(z[..., None])).logsumexp(-1)
    weights = likelihood + prior - dist.Normal(X / 2, 0.7).log_prob(z)
    torch.testing.assert_close(posterior.log_likelihood(X, draws=6), likelihood)
    torch.testing.assert_close(posterior.log_weights(X, particles=6), weights)
    torch.testing.assert_close(posterior.elbo(X, particles=6), weights.mean(0))


def test_shared_discrete_site_has_no_likelihood_per_row() -> None:
    posterior = posterior_of(switched)
    both = PRIOR.log() + dist.Normal(LOCS, 1.0).log_prob(X[:, None]).sum(0)
    torch.testing.assert_close(posterior.log_evidence(X), both.logsumexp(0))
    with pytest.raises(ValueError, match=r"site 'k' is summed out of all rows at once, so the likelihood does not"):
        posterior.log_likelihood(X)
    assert posterior.sample(X, draws=3)["k"].shape == (3,)
    exported = posterior.to_arviz(X, draws=3)
    assert exported.posterior["k"].shape == (1, 3)
    assert "log_likelihood" not in exported


def test_data_without_a_plate_are_one_row() -> None:
    def single(x: Tensor | None = None) -> None:
        k = pyro.sample("k", dist.Categorical(PRIOR), infer=PARALLEL)
        pyro.sample("x", dist.Normal(LOCS[k].unsqueeze(-1), torch.ones(4)).to_event(1), obs=x)

    with RandomStream(0).drawing():
        posterior = Posterior(ProgramInstance(Program.of(single, lambda x=None: None), (X,), 4))
    both = PRIOR.log() + dist.Normal(LOCS, 1.0).log_prob(X[:, None]).sum(0)
    torch.testing.assert_close(posterior.log_likelihood(X, draws=2), both.logsumexp(0).expand(2, 1))


def test_enumerated_guide_site_is_averaged_in_the_bound_and_drawn_elsewhere() -> None:
    logits = torch.tensor([0.5, -0.2])

    def guide(x: Tensor | None = None) -> None:
        with pyro.plate("data", 4 if x is None else len(x)):
            pyro.sample("k", dist.Categorical(logits=logits), infer=PARALLEL)

    posterior = posterior_of(mixture, guide)
    q = logits.softmax(0)
    torch.testing.assert_close(posterior.elbo(X), ((joint() - q.log()) * q).sum(1))
    k = posterior.sample(X, draws=5)["k"]
    torch.testing.assert_close(posterior.log_likelihood(X, draws=5), dist.Normal(LOCS[k], 1.0).log_prob(X))


def test_predictions_draw_from_the_model() -> None:
    prediction = posterior_of(mixture).predict(X, draws=4000, seed=1)
    assert float((prediction.draws.mean() - PRIOR @ LOCS).abs()) < 0.05
    assert float((prediction.log_prob(X) - joint().logsumexp(1)).abs().max()) < 0.1


def test_arviz_likelihood_sums_out_discrete_sites() -> None:
    posterior = posterior_of(shifted, "normal")
    found = posterior.to_arviz(X, draws=5)
    assert found["log_likelihood"]["x"].shape == (1, 5, 4)
    torch.testing.assert_close(
        torch.tensor(found["log_likelihood"]["x"].values[0]), posterior.log_likelihood(X, draws=5)
    )
    assert set(found["posterior"].data_vars) == {"shift", "k"}
    lp = torch.tensor(found["sample_stats"]["lp"].values[0] - found["sample_stats"]["log_q"].values[0])
    torch.testing.assert_close(lp, posterior.log_weights(X, particles=5))
    chain = posterior_of(markov, x=torch.zeros(2, 3)).to_arviz(torch.zeros(2, 3), draws=2)
    assert list(chain["log_likelihood"].data_vars) == ["x_0+x_1+x_2"]


def test_sampling_local_sites_needs_rows() -> None:
    with pytest.raises(ValueError, match=r"every latent site \(k\) is local\. Give the rows: posterior\.sample"):
        posterior_of(mixture).sample()


def test_likelihood_of_stored_draws_sums_out_discrete_sites() -> None:
    shift = torch.tensor([[0.1, -0.3, 0.5]])
    posterior = draws_posterior(Program.of(shifted, data_plate="data"), X, {"shift": shift})
    expected = torch.stack([joint(s).logsumexp(1) for s in shift[0]])
    torch.testing.assert_close(posterior.log_likelihood(X, draws=3), expected)
    assert posterior.sample(X, draws=3)["k"].shape == (3, 4)


def test_fit_finds_the_maximum_and_is_saved_and_loaded(tmp_path: Path) -> None:
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer=PARALLEL)
            pyro.sample("x", dist.Normal(loc * (2 * k - 1), 0.5), obs=x)

    x = torch.tensor([-2.0, 2.1, 1.9, -2.0])
    program = Program.of(model, lambda x: None, data_plate="data")
    posterior = svi(program, x, epochs=500, batch_size=2, held_out=x, seed=0)
    assert posterior.parameters()["loc"].item() == pytest.approx(2.0, abs=0.05)
    posterior.save(tmp_path / "fit")
    again = Posterior.load(tmp_path / "fit", program=program)
    assert again.exact
    assert torch.equal(again.log_evidence(x), posterior.log_evidence(x))


def test_objective_runs_without_a_first_run() -> None:
    """Called without a first run, the objective finds the enumeration marks itself."""
    program = Program.of(mixture, lambda x=None: None, data_plate="data")
    assert program.enumerates is None
    _, terms = ELBO()(Run(program, (X,), torch.arange(4), 4))
    torch.testing.assert_close(terms["elbo"], joint().logsumexp(1).mean())


def test_a_vector_whose_prior_is_a_mixture_has_classes_by_bayes_rule() -> None:
    """The vector has as many entries as there are classes, draws and rows: no axis may be taken for another."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(PRIOR), infer=PARALLEL)
            z = pyro.sample("z", dist.Normal(LOCS[k].unsqueeze(-1), 0.5).expand([*k.shape, 2]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("weight", torch.tensor(1.0)) * x, 0.7).to_event(1))

    x = torch.tensor([[0.3, 0.9], [1.2, -0.4]])
    posterior = svi(Program.of(model, guide, data_plate="data"), x, steps=1, progress=False)
    assert {name: value.shape for name, value in posterior.sample(x, draws=2).items()} == {"z": (2, 2, 2), "k": (2, 2)}
    found = posterior.sample(x, draws=4000)
    by_class = dist.Normal(LOCS, 0.5).log_prob(found["z"].unsqueeze(-1)).sum(-2) + PRIOR.log()  # (K, B, classes)
    expected = by_class.softmax(-1)[..., 1]
    error = (found["k"] - expected).std(0) / 4000**0.5
    assert ((found["k"] - expected).mean(0).abs() < 4.5 * error).all()
    ours = posterior.encode(x, draws=4000).mean
    assert isinstance(ours, dict) and ((ours["k"][:, 1] - expected.mean(0)).abs() < 4.5 * 0.008).all()
