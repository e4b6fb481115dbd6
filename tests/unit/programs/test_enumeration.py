"""Summed-out discrete sites: the bound and its gradients equal Pyro's, and need no host sync."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor, nn
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx

from deepprob.engine.random import RandomStream
from deepprob.fitting.objectives import ELBO
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program
from deepprob.programs.run import Run

Case = tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...], str | None]

PARALLEL = {"enumerate": "parallel"}
SEQUENTIAL = {"enumerate": "sequential"}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    """Use float64, so that comparisons up to rounding are strict."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def nothing(*batch: Any) -> None:
    """A guide without sites."""


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def param(name: str, start: Tensor, constraint: Any = constraints.real) -> Tensor:
    found: Tensor = pyro.param(name, lambda: start.clone(), constraint=constraint)
    return found


def mixture() -> Case:
    """A Gaussian mixture whose assignments are summed out."""

    def model(x: Tensor) -> None:
        weights = param("weights", torch.tensor([0.2, 0.3, 0.5]), constraints.simplex)
        locs = param("locs", torch.tensor([-1.0, 0.5, 2.0]))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights), infer=PARALLEL)
            pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)

    return model, nothing, (values(7),), "data"


def hidden_markov(steps: int = 20) -> Case:
    """A hidden Markov model of some steps with a latent emission mean."""

    def model(x: Tensor) -> None:
        transition = param("transition", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraints.simplex)
        locs = param("locs", torch.tensor([-1.0, 1.0]))
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            state: Any = 0
            for t in pyro.markov(range(x.shape[1])):
                state = pyro.sample(f"state_{t}", dist.Categorical(transition[state]), infer=PARALLEL)
                pyro.sample(f"x_{t}", dist.Normal(locs[state] + shift, 1.0), obs=x[:, t])

    def guide(x: Tensor) -> None:
        scale = param("scale", torch.tensor(0.3), constraints.positive)
        pyro.sample("shift", dist.Normal(param("loc", torch.tensor(0.2)), scale))

    return model, guide, (values(3, steps),), "data"


class Labelled(nn.Module):
    """A semi-supervised autoencoder: codes given labels, of which some are observed."""

    def __init__(self, infer: dict[str, str]) -> None:
        super().__init__()
        self.decode, self.classify, self.encode = nn.Linear(2 + 3, 4), nn.Linear(4, 3), nn.Linear(4 + 3, 4)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(0.5 * values(*p.shape, seed=i))
        self.infer = infer

    def model(self, x: Tensor, y: Tensor, known: Tensor) -> None:
        pyro.module("labelled", self)
        with pyro.plate("data", len(x)):
            label = pyro.sample("y", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])), obs=y, obs_mask=known)
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(self.join(z, label)), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor, known: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=~known):
                guess = pyro.sample("y_unobserved", dist.Categorical(logits=self.classify(x)), infer=self.infer)
            loc, scale = self.encode(self.join(x, torch.where(known, y, guess))).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    @staticmethod
    def join(left: Tensor, label: Tensor) -> Tensor:
        hot = torch.eye(3)[label]
        shape = torch.broadcast_shapes(left.shape[:-1], hot.shape[:-1])
        return torch.cat([left.expand(*shape, left.shape[-1]), hot.expand(*shape, 3)], -1)


def labelled(infer: dict[str, str]) -> Case:
    parts = Labelled(infer)
    data = values(5, 4), torch.tensor([0, 2, 1, 1, 0]), torch.tensor([True, False, False, True, False])
    return parts.model, parts.guide, data, "data"


def nested() -> Case:
    """A class for every group, summed out around the rows' own switches; the guide draws the groups' means."""

    def model(x: Tensor) -> None:
        locs = param("locs", torch.tensor([-1.0, 1.0]))
        odds = param("odds", torch.tensor(0.3), constraints.unit_interval)
        with pyro.plate("groups", 3, dim=-1):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])), infer=PARALLEL)
            with pyro.plate("items", 4, dim=-2):
                flip = pyro.sample("flip", dist.Bernoulli(odds), infer=PARALLEL)
                pyro.sample("x", dist.Normal(locs[k] * (1 - 2 * flip) + mean, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("groups", 3, dim=-1):
            pyro.sample("mean", dist.Normal(param("loc", torch.zeros(3)), 0.5))

    return model, guide, (values(4, 3),), None


def masked() -> Case:
    """A mixture with masked rows and masked observations."""

    def model(x: Tensor) -> None:
        locs = param("locs", torch.tensor([-1.0, 2.0]))
        with pyro.plate("data", len(x)), poutine.mask(mask=x < 1):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer=PARALLEL)
            with poutine.mask(mask=x > -1):
                pyro.sample("x", dist.Normal(locs[k.long()], 1.0), obs=x)

    return model, nothing, (values(7),), "data"


def scaled() -> Case:
    """A mixture scaled by a number."""
    model, guide, data, plate = mixture()
    return poutine.scale(model, 0.5), guide, data, plate


def clusters_of_codes() -> Case:
    """Codes drawn by the guide whose prior is a mixture: the sum is over a prior and a likelihood."""

    def model(x: Tensor) -> None:
        locs = param("locs", torch.tensor([-1.0, 2.0]))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])), infer=PARALLEL)
            z = pyro.sample("z", dist.Normal(locs[k], 0.5))
            pyro.sample("x", dist.Normal(z + 0.1 * k, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(param("slope", torch.tensor(0.6)) * x, 0.5))

    return model, guide, (values(6),), "data"


def rough() -> Case:
    """A switch drawn by the guide without a reparameterised gradient, above assignments that are summed out."""

    def model(x: Tensor) -> None:
        locs = param("locs", torch.tensor([-1.0, 2.0]))
        on = pyro.sample("on", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            flip = pyro.sample("flip", dist.Bernoulli(0.4))
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])), infer=PARALLEL)
            pyro.sample("x", dist.Normal(locs[k] * (1 + on) + flip, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("on", dist.Bernoulli(param("odds_on", torch.tensor(0.6), constraints.unit_interval)))
        with pyro.plate("data", len(x)):
            pyro.sample("flip", dist.Bernoulli(logits=param("odds_flip", torch.tensor(0.3)) * x))

    return model, guide, (values(6),), "data"


def chain_in_the_guide(infer: dict[str, str]) -> Case:
    """A guide with one choice for all rows and one for every row."""

    def model(x: Tensor) -> None:
        on = pyro.sample("on", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            z = pyro.sample("z", dist.Normal(k + on, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        odds = param("odds", torch.tensor(0.6), constraints.unit_interval)
        on = pyro.sample("on", dist.Bernoulli(odds), infer=infer)
        with pyro.plate("data", len(x)):
            logits = torch.stack(torch.broadcast_tensors(x, 0 * x, on * param("slope", torch.tensor(0.4)) * x), -1)
            k = pyro.sample("k", dist.Categorical(logits=logits), infer=infer)
            pyro.sample("z", dist.Normal(0.5 * (k + x), 0.7))

    return model, guide, (values(5),), "data"


def sampled_locally() -> Case:
    """A latent that the guide draws four times, side by side."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z * param("slope", torch.tensor(0.7)), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            scale = param("scale", torch.tensor(0.6), constraints.positive)
            pyro.sample("z", dist.Normal(x / 2, scale), infer=PARALLEL | {"num_samples": 4})

    return model, guide, (values(5),), "data"


CASES: dict[str, Callable[[], Case]] = {
    "mixture": mixture,
    "hidden Markov": hidden_markov,
    "labels, parallel": lambda: labelled(PARALLEL),
    "labels, sequential": lambda: labelled(SEQUENTIAL),
    "nested plates": nested,
    "mask": masked,
    "scale": scaled,
    "mixture prior": clusters_of_codes,
    "score function": rough,
    "local samples": sampled_locally,
    "guide chain, parallel": lambda: chain_in_the_guide(PARALLEL),
    "guide chain, sequential": lambda: chain_in_the_guide(SEQUENTIAL),
}


def instance_of(case: Case) -> ProgramInstance:
    model, guide, data, plate = case
    with RandomStream(0).drawing():
        return ProgramInstance(Program.of(model, guide, data_plate=plate), data, len(data[0]))


def compare(
    instance: ProgramInstance, batch: tuple[Tensor, ...], rows: Tensor, particles: int = 1
) -> dict[str, Tensor]:
    """Compare loss and gradients with Pyro's at the same noise, and return our terms."""
    depth, num_data, params = instance.structure.plates, instance.num_data, list(instance.parameters().values())
    theirs = TraceEnum_ELBO(max_plate_nesting=depth, num_particles=particles, vectorize_particles=particles > 1)
    with instance.running():
        with RandomStream(1).drawing(), instance.program.bound(rows, num_data):
            expected = theirs.differentiable_loss(instance.program.model, instance.program.guide, *batch)
        with RandomStream(1).drawing():
            objective = ELBO(particles=particles, analytic_kl=False)
            loss, terms = objective(Run(instance.program, batch, rows, num_data, plates=depth))
        torch.testing.assert_close(loss * num_data, expected, rtol=1e-9, atol=1e-9)
        ours = torch.autograd.grad(loss * num_data, params, allow_unused=True)
        gradients = torch.autograd.grad(expected, params, allow_unused=True)
    assert any(g is not None for g in gradients)
    for got, want in zip(ours, gradients, strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(terms["elbo"], -loss.detach())
    torch.testing.assert_close(terms["elbo"], terms["likelihood"] - terms["kl_local"] - terms["kl_global"])
    return terms


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("particles", [1, 3])
def test_bound_and_gradient_equal_pyros(name: str, particles: int) -> None:
    case = CASES[name]()
    compare(instance_of(case), case[2], torch.arange(len(case[2][0])), particles)


@pytest.mark.parametrize("name", ["mixture", "hidden Markov", "labels, parallel", "labels, sequential", "mask"])
def test_minibatches_are_weighted(name: str) -> None:
    case = CASES[name]()
    rows = torch.tensor([2, 0])
    compare(instance_of(case), tuple(x[rows] for x in case[2]), rows)


def test_minibatches_of_a_mixture_are_unbiased() -> None:
    case = mixture()
    instance, (x,) = instance_of(case), case[2]
    whole = float(compare(instance, (x,), torch.arange(7))["elbo"])
    parts = [float(compare(instance, (x[i : i + 1],), torch.tensor([i]))["elbo"]) for i in range(7)]
    assert whole == pytest.approx(sum(parts) / 7)


def test_masked_distribution_equals_masked_site() -> None:
    def inside(x: Tensor) -> None:
        locs = param("locs", torch.tensor([-1.0, 2.0]))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.full((7,), 0.3)).mask(x < 1), infer=PARALLEL)
            pyro.sample("x", dist.Normal(locs[k.long()], 1.0).mask((x < 1) & (x > -1)), obs=x)

    x = masked()[2]
    wanted = compare(instance_of(masked()), x, torch.arange(7))["elbo"]
    instance = instance_of((inside, nothing, x, "data"))
    with instance.running():
        got = ELBO()(Run(instance.program, x, torch.arange(7), 7))[1]["elbo"]
    torch.testing.assert_close(got, wanted)


def clustered(x: Tensor, k: Tensor | None = None) -> None:
    locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(3)), infer=PARALLEL, obs=k)
        pyro.sample("x", dist.Normal(Vindex(locs)[..., k], 1.0), obs=x)


@pytest.mark.parametrize("guide", ["normal", "multivariate_normal", "map", AutoNormal, "hidden by hand"])
def test_named_guides_leave_enumerated_sites_out(guide: Any) -> None:
    x = values(6)
    if guide == "hidden by hand":
        guide = AutoNormal(poutine.block(clustered, hide=["k"]))
    instance = instance_of((clustered, guide, (x,), "data"))
    assert (instance.structure.global_, instance.structure.local, instance.structure.summed) == (("locs",), (), ("k",))
    compare(instance, (x,), torch.arange(6))


def test_config_enumerate_marks_sites() -> None:
    def plain(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(k + param("loc", torch.tensor(0.1)), 1.0), obs=x)

    instance = instance_of((config_enumerate(plain), "normal", (values(4),), "data"))
    assert instance.structure.summed == ("k",)
    compare(instance, (values(4),), torch.arange(4), particles=2)


def test_closed_forms_are_kept_if_the_prior_does_not_depend_on_the_sum() -> None:
    def terms_of(case: Case, analytic_kl: bool) -> dict[str, Tensor]:
        instance = instance_of(case)
        with instance.running(), RandomStream(1).drawing():
            objective = ELBO(particles=4000, analytic_kl=analytic_kl)
            return objective(Run(instance.program, case[2], torch.arange(len(case[2][0])), instance.num_data))[1]

    # The code's prior depends on the component: no closed form, so nothing changes.
    assert terms_of(clusters_of_codes(), True) == terms_of(clusters_of_codes(), False)
    # The emission's shift does not depend on the states.
    exact, drawn = terms_of(hidden_markov(), True)["kl_global"], terms_of(hidden_markov(), False)["kl_global"]
    kl = dist.kl.kl_divergence(dist.Normal(0.2, 0.3), dist.Normal(0.0, 1.0)) / 3
    torch.testing.assert_close(exact, kl)
    assert 0 < abs(float(drawn - exact)) < 0.02
    # Averaged over the guide's labels: E_q(y) KL(q(z | y) || p(z)).
    exact, drawn = terms_of(labelled(PARALLEL), True)["kl_local"], terms_of(labelled(PARALLEL), False)["kl_local"]
    assert 0 < abs(float(drawn - exact)) < 0.05


def test_summed_sites_give_a_likelihood_and_enumerated_ones_a_kl() -> None:
    """Summed in the model: a likelihood. Enumerated in the guide: its average, and a KL."""
    logits, x = torch.tensor([0.5, -0.2]), torch.tensor([0.3, 1.2, -0.4])
    prior, locs = torch.tensor([0.4, 0.6]), torch.tensor([-1.0, 1.0])
    joint = prior.log() + dist.Normal(locs, 1.0).log_prob(x[:, None])  # (B, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(prior), infer=PARALLEL)
            pyro.sample("x", dist.Normal(locs[k] + param("zero", torch.tensor(0.0)), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=logits), infer=PARALLEL)

    summed = compare(instance_of((model, nothing, (x,), "data")), (x,), torch.arange(3))
    torch.testing.assert_close(summed["likelihood"], joint.logsumexp(1).mean())
    assert float(summed["kl_local"]) == float(summed["kl_global"]) == 0.0
    q = dist.Categorical(logits=logits)
    chosen = compare(instance_of((model, guide, (x,), "data")), (x,), torch.arange(3))
    torch.testing.assert_close(chosen["likelihood"], ((joint - prior.log()) * q.probs).sum(1).mean())
    torch.testing.assert_close(chosen["kl_local"], dist.kl.kl_divergence(q, dist.Categorical(prior)))


def test_mixture_prior_belongs_to_the_kl() -> None:
    """log p(z) = log sum_k p(k) p(z | k) belongs to the KL, the rest to the likelihood."""
    instance = instance_of(clusters_of_codes())
    (x,) = clusters_of_codes()[2]
    with instance.running(), RandomStream(1).drawing():
        z = 0.6 * x + 0.5 * torch.randn(6)
        prior = torch.tensor([0.4, 0.6]).log() + dist.Normal(torch.tensor([-1.0, 2.0]), 0.5).log_prob(z[:, None])
        joint = prior + dist.Normal(z[:, None] + torch.tensor([0.0, 0.1]), 1.0).log_prob(x[:, None])
    terms = compare(instance, (x,), torch.arange(6))
    torch.testing.assert_close(terms["likelihood"], (joint.logsumexp(1) - prior.logsumexp(1)).mean())
    log_q = dist.Normal(0.6 * x, 0.5).log_prob(z)
    torch.testing.assert_close(terms["kl_local"], (log_q - prior.logsumexp(1)).mean())


def test_kl_weight_scales_the_kl_only() -> None:
    case = chain_in_the_guide(PARALLEL)
    instance = instance_of(case)
    with instance.running(), RandomStream(0).drawing():
        loss, terms = ELBO()(Run(instance.program, case[2], torch.arange(5), 5), kl_weight=torch.tensor(0.3))
    torch.testing.assert_close(
        loss.detach(), 0.3 * (terms["kl_local"] + terms["kl_global"]) - terms["likelihood"], rtol=1e-12, atol=0.0
    )


@pytest.mark.parametrize("name", CASES)
def test_bound_reads_no_values_on_the_host(name: str) -> None:
    """Traced with its inputs as proxies; any ``.item()`` or ``bool()`` of one would raise."""
    case = hidden_markov(5) if name == "hidden Markov" else CASES[name]()
    instance = instance_of(case)
    params, rows = list(instance.parameters().values()), torch.arange(len(case[2][0]))
    depth = instance.structure.plates

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        batch = inputs[len(params) :]
        with RandomStream(1).drawing():
            loss, terms = ELBO(particles=2)(Run(instance.program, batch, rows, instance.num_data, plates=depth))
        gradients = torch.autograd.grad(loss, inputs[: len(params)], allow_unused=True)
        return (loss, *terms.values(), *(g for g in gradients if g is not None))

    with instance.running():
        expected = step(*params, *case[2])
        graph = make_fx(step, tracing_mode="real", _allow_non_fake_inputs=True)(*params, *case[2])
        with RandomStream(1).drawing():
            again = graph(*params, *case[2])
    assert not [n for n in graph.graph.nodes if "_local_scalar_dense" in str(n.target)]
    assert len(expected) > 4
    torch.testing.assert_close(again, expected, rtol=1e-12, atol=1e-12)


def refused(model: Callable[..., Any], guide: Any = nothing, x: Tensor | None = None, plate: str | None = None) -> None:
    instance_of((model, guide, (values(4) if x is None else x,), plate))


def marked(distribution: Any, infer: dict[str, Any]) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        k = pyro.sample("k", distribution, infer=infer)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(1.0 * k, 1.0), obs=x)

    return model


@pytest.mark.parametrize(
    ("distribution", "infer", "message"),
    [
        (dist.Normal(0.0, 1.0), PARALLEL, r"site 'k' is marked for enumeration, but Normal has no finite support\."),
        (
            dist.Bernoulli(0.5),
            SEQUENTIAL,
            r"site 'k' is marked for sequential enumeration, which only sites of a guide",
        ),
        (dist.Bernoulli(0.5), PARALLEL | {"num_samples": 3}, r"site 'k' has num_samples=3, but .* would be biased"),
    ],
)
def test_refuses_invalid_marks(distribution: Any, infer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused(marked(distribution, infer))


def test_refuses_unmarked_sites_that_the_guide_lacks() -> None:
    with pytest.raises(ValueError, match=r"the guide has no site 'k' but the model samples it\."):
        refused(marked(dist.Bernoulli(0.5), {}))


def test_refuses_exponential_sums() -> None:
    def crossed(x: Tensor) -> None:
        rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 2, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Bernoulli(0.5), infer=PARALLEL)
        with columns:
            b = pyro.sample("b", dist.Bernoulli(0.5), infer=PARALLEL)
        with rows, columns:
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    with pytest.raises(
        ValueError, match=r"summing out 'a', 'b' is exponential in the size of a plate: .* Sample 'a', 'b' in"
    ):
        refused(crossed, x=values(2, 2))


@pytest.mark.parametrize("infer", [PARALLEL, SEQUENTIAL, {}])
def test_refuses_a_sum_outside_of_the_guides_choices(infer: dict[str, str]) -> None:
    """A sum over all rows cannot include an average over every row's choice, or its score function."""

    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5), infer=PARALLEL)
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k + on, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("on", dist.Bernoulli(0.5), infer=infer)

    with pytest.raises(
        ValueError, match=r"the model sums out 'k' outside of plate 'data', but the guide chooses 'on' inside"
    ):
        refused(model, guide)


def test_refuses_different_scales_in_one_sum() -> None:
    outer = marked(dist.Bernoulli(0.5), PARALLEL)
    instance = instance_of((outer, nothing, (values(4),), "data"))
    with (
        pytest.raises(ValueError, match=r"sites 'k' and 'x' belong to one sum .* have scales 1\.0 and 2\.0"),
        instance.running(),
    ):
        ELBO()(Run(instance.program, (values(2),), torch.arange(2), 4))

    def halves(x: Tensor, by: Any) -> None:
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=by[0]):
                k = pyro.sample("k", dist.Bernoulli(0.5), infer=PARALLEL)
            with poutine.scale(scale=by[1]):
                pyro.sample("x", dist.Normal(1.0 * k, 1.0), obs=x)

    numbers = torch.tensor(0.5), torch.tensor(0.5), torch.tensor(0.7)
    refused(lambda x: halves(x, numbers[:2]), plate="data")
    with pytest.raises(ValueError, match=r"have scales 0\.5.* and 0\.7"):
        refused(lambda x: halves(x, (numbers[0], numbers[2])), plate="data")
    with pytest.raises(ValueError, match=r"have scales 0\.5 and 0\.5"):
        refused(lambda x: halves(x, (0.5, numbers[0])), plate="data")
    with pytest.raises(ValueError, match=r"its scale must be one number; got one of shape \(4,\)\."):
        refused(lambda x: halves(x, (torch.ones(4), torch.ones(4))), plate="data")


def test_refuses_dimensions_outside_of_plates() -> None:
    def loose(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer=PARALLEL)
            pyro.sample("x", dist.Normal(k + torch.zeros(3, 1), 1.0), obs=x)

    with pytest.raises(
        ValueError, match=r"site 'x' has batch shape \(2, 3, 4\), with dimensions outside of its plates"
    ):
        refused(loose, plate="data")


def test_refuses_programs_that_do_not_broadcast() -> None:
    def shapes(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer=PARALLEL)
            pyro.sample("x", dist.Normal(torch.stack([k, x]).sum(0), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"the program fails when k takes all of its values in a leading dimension:"):
        refused(shapes, plate="data")


def test_laplace_guide_refuses_summed_sites() -> None:
    with pytest.raises(
        ValueError, match=r"guide='laplace' cannot sum out 'k': it needs the curvature with every site drawn"
    ):
        refused(clustered, "laplace")


def test_refuses_marks_that_the_first_run_did_not_have() -> None:
    def changing(x: Tensor) -> None:
        if len(x) < 4:
            pyro.sample("k", dist.Bernoulli(0.5), infer=PARALLEL)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(param("loc", torch.tensor(0.0)), 1.0), obs=x)

    instance = instance_of((changing, nothing, (values(4),), "data"))
    message = r"site 'k' is neither in the guide nor marked for enumeration in the first run"
    with pytest.raises(ValueError, match=message), instance.running():
        ELBO()(Run(instance.program, (values(2),), torch.arange(2), 4))
