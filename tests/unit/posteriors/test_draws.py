"""Draws: every query equals one run of the program per draw, whichever way computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.distributions.per_draw import PerDraw, put_together, take_apart
from deepprob.engine.random import RandomStream
from deepprob.posteriors.from_draws import draws_posterior
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program

WAYS = ("stacked", "traced", "one by one")
JOBS = ("traces", "predicted traces", "guide", "prior", "terms", "terms of the bound")
X = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
Y = X.sum(1)
GROUP = torch.arange(12) % 4
PARALLEL = {"enumerate": "parallel"}


def broadcasting(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, torch.ones(2)).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 0.2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), noise), obs=y)


def product(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, torch.ones(2)).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def table(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("groups", 4):
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a[GROUP[: len(x)]], 0.5), obs=y)


def walk(x: Tensor, y: Tensor | None = None) -> None:
    state = pyro.sample("start", dist.Normal(0.0, 1.0))
    path = []
    for t in range(3):
        state = pyro.sample(f"z_{t}", dist.Normal(0.9 * state, 0.3))
        path.append(state)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(torch.stack(path)[torch.arange(len(x)) % 3], 0.5), obs=y)


def kernel(x: Tensor, y: Tensor | None = None) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    gram = torch.exp(-0.5 * torch.cdist(x, x).square() / scale**2) + 0.1 * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), gram), obs=y)


def jittered(x: Tensor, y: Tensor | None = None) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    gram = torch.exp(-0.5 * torch.cdist(x, x).square() / scale**2)
    gram.view(-1)[:: len(x) + 1] += 0.1
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), gram), obs=y)


def mixture(x: Tensor, y: Tensor | None = None) -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("parts", 2):
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-3.0, 3.0]), 2.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(p), infer=PARALLEL)
        pyro.sample("y", dist.Normal(loc[k], 1.0), obs=y)


def flowing(x: Tensor, y: Tensor | None = None) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        base = dist.Normal((x @ torch.ones(2)) * rate, 1.0)
        moved = dist.TransformedDistribution(base, [dist.transforms.AffineTransform(rate, 2.0)])
        pyro.sample("y", moved, obs=y)


MODELS: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (broadcasting, product, table, walk, kernel, jittered, mixture, flowing)
}


def posterior_of(model: Callable[..., Any], guide: Any = "normal") -> Posterior:
    with RandomStream(0).drawing():
        plate = None if model in (kernel, jittered) else "data"
        instance = ProgramInstance(Program.of(model, guide, data_plate=plate), (X, Y), 12)
    return Posterior(instance)


def forced(posterior: Posterior, way: str) -> Posterior:
    posterior.instance.ways.update(dict.fromkeys(JOBS, way))
    return posterior


def by_hand(model: Callable[..., None], latents: dict[str, Tensor], k: int) -> Tensor:
    """Log-likelihood of the rows at one draw, from a run of the model by Pyro alone."""
    values = {name: value[k] for name, value in latents.items()}
    traced = pyro.poutine.trace(pyro.poutine.condition(model, data=values)).get_trace(X, Y)
    site = traced.nodes["y"]
    return torch.as_tensor(site["fn"].log_prob(Y))


@pytest.mark.parametrize("name", [n for n in MODELS if n != "mixture"])
@pytest.mark.parametrize("draws", [5, 4, 12])  # 4 groups, 12 rows
def test_log_likelihood_is_that_of_one_run_per_draw(name: str, draws: int) -> None:
    posterior = posterior_of(MODELS[name])
    latents = posterior.sample(draws=draws, seed=3)
    found = posterior.log_likelihood(X, Y, draws=draws, seed=3)
    for k in range(draws):
        torch.testing.assert_close(found[k], by_hand(MODELS[name], latents, k).reshape(found[k].shape))


@pytest.mark.parametrize("draws", [5, 2, 12])
def test_summed_out_sites_are_those_of_one_run_per_draw(draws: int) -> None:
    posterior = posterior_of(mixture)
    latents = posterior.sample(draws=draws, seed=3)
    log_p = dist.Normal(latents["loc"].unsqueeze(-1), 1.0).log_prob(Y) + latents["p"].log().unsqueeze(-1)  # (K, 2, B)
    torch.testing.assert_close(posterior.log_likelihood(X, Y, draws=draws, seed=3), log_p.logsumexp(1))
    k = posterior.sample(X, Y, draws=2000, seed=3)["k"]
    assert k.shape == (2000, 12)


@pytest.mark.parametrize("name", ["broadcasting", "walk", "kernel"])
def test_every_way_draws_the_same_numbers(name: str) -> None:
    found = {}
    for way in WAYS if name == "broadcasting" else WAYS[1:]:
        posterior = forced(posterior_of(MODELS[name]), way)
        prediction = posterior.predict(X, draws=6, seed=1)
        found[way] = [
            prediction.draws,
            prediction.mean,
            prediction.sd,
            posterior.log_likelihood(X, Y, draws=6, seed=1),
            *posterior.sample(X, Y, draws=6, seed=1).values(),
        ]
    first, *others = found.values()
    for other in others:
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("broadcasting", "stacked"),
        ("product", "traced"),
        ("table", "traced"),
        ("walk", "traced"),
        ("kernel", "traced"),
        ("jittered", "traced"),
    ],
)
def test_the_fastest_way_that_is_right_is_chosen(name: str, way: str) -> None:
    posterior = posterior_of(MODELS[name])
    posterior.log_likelihood(X, Y, draws=4)
    assert posterior.instance.ways["traces"] == way


def test_a_table_as_long_as_the_draws_and_the_rows_is_right() -> None:
    """With equal sizes a table by index takes a leading dimension without an error, and reads the wrong axis."""
    values = torch.randn(1, 4, 4)
    group = torch.tensor([2, 0, 1, 3])

    def model(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("groups", 4):
            a = pyro.sample("a", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(a[x], 0.5), obs=y)

    posterior = draws_posterior(Program.of(model, data_plate="data"), (group, torch.zeros(4)), {"a": values})
    torch.testing.assert_close(posterior.predict(group, draws=4).mean, values[0][:, group].mean(0))


def test_a_branch_on_a_latent_value_runs_one_by_one() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        slope = w if w > 0 else 0.5 * w
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x[:, 0], 0.5), obs=y)

    posterior = posterior_of(model)
    with pytest.warns(UserWarning, match=r"draws run one by one, which is slow: the computation depends on a value"):
        found = posterior.log_likelihood(X, Y, draws=5, seed=2)
    w = posterior.sample(draws=5, seed=2)["w"]
    slope = torch.where(w > 0, w, 0.5 * w)
    torch.testing.assert_close(found, dist.Normal(slope.unsqueeze(1) * X[:, 0], 0.5).log_prob(Y))


def test_sites_that_differ_from_draw_to_draw_are_named() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        mean = pyro.deterministic("few", x[: 1 + int(w > 0), 0]).sum() * w
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    with pytest.raises(ValueError, match=r"the program's sites or their shapes differ from draw to draw"):
        posterior_of(model).predict(X, draws=20)


def test_an_error_of_the_program_is_its_own() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * (x - torch.zeros(12, 2)).sum(1), 0.5), obs=y)

    with pytest.raises(RuntimeError, match=r"size of tensor a \(5\) must match the size of tensor b \(12\)") as found:
        posterior_of(model).predict(X[:5])
    assert "Trace Shapes" not in str(found.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda t: dist.Normal(t, 1.0),
        lambda t: dist.Categorical(logits=torch.stack([t, 2 * t, -t], -1)),
        lambda t: dist.MultivariateNormal(torch.stack([t, -t], -1), torch.eye(2)),
        lambda t: dist.LowRankMultivariateNormal(torch.stack([t, -t], -1), torch.ones(2, 1), torch.ones(2)),
        lambda t: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(3, 2)), dist.Normal(torch.stack([t, -t], -1), 1.0)
        ),
        lambda t: dist.StudentT(3.0, t, 2.0),
        lambda t: dist.NegativeBinomial(t.exp(), logits=t),
        lambda t: dist.Beta(t.exp(), 2.0),
        lambda t: dist.Dirichlet(torch.stack([t, -t], -1).exp()),
        lambda t: dist.Uniform(-t.abs() - 1.0, 1.0),
        lambda t: dist.LogNormal(t, 0.5),
        lambda t: dist.TransformedDistribution(dist.Normal(t, 1.0), [dist.transforms.AffineTransform(t, 2.0)]),
        lambda t: dist.Normal(t, 1.0).mask(torch.tensor([True, False, True])),
        lambda t: dist.VonMises(t, 2.0),
        lambda t: dist.Delta(t, log_density=t),
    ],
)
def test_per_draw_is_each_draws_distribution(make: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    values = torch.randn(4, 3)
    fns = [make(t) for t in values]
    template, _ = take_apart(fns[0])
    stacked = PerDraw(
        template, [torch.stack(x) for x in zip(*(take_apart(f)[1] for f in fns), strict=True)], draws=4, plates=2
    )
    assert stacked.batch_shape == (4, 1, 3) and stacked.event_shape == fns[0].event_shape
    drawn = torch.stack([f.sample() for f in fns]).unsqueeze(1)
    torch.testing.assert_close(
        stacked.log_prob(drawn)[:, 0], torch.stack([f.log_prob(d[0]) for f, d in zip(fns, drawn, strict=True)])
    )
    assert bool(stacked.support.check(drawn).all())
    assert stacked.sample().shape == drawn.shape
    for name in ("mean", "variance"):
        try:
            expected = torch.stack([getattr(f, name) for f in fns]).unsqueeze(1)
        except NotImplementedError:
            with pytest.raises(NotImplementedError):
                getattr(stacked, name)
            continue
        torch.testing.assert_close(getattr(stacked, name), expected, equal_nan=True)


def test_kl_per_draw_is_each_draws_kl() -> None:
    def stack(fns: list[Any]) -> PerDraw:
        parts = [take_apart(f)[1] for f in fns]
        return PerDraw(take_apart(fns[0])[0], [torch.stack(x) for x in zip(*parts, strict=True)], draws=2, plates=1)

    q, p = [dist.Normal(torch.tensor([k, 1.0]), 2.0) for k in (0.0, 3.0)], [dist.Normal(0.0, k) for k in (1.0, 5.0)]
    expected = torch.stack([torch.distributions.kl_divergence(a, b) for a, b in zip(q, p, strict=True)])
    torch.testing.assert_close(torch.distributions.kl_divergence(stack(q), stack(p).expand((2, 2))), expected)


def test_a_distribution_is_put_together_again() -> None:
    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [dist.transforms.Planar(2)])
    template, tensors = take_apart(flow)
    x = torch.randn(3, 2)
    twin = put_together(template, tensors)
    assert twin is not flow
    torch.testing.assert_close(twin.transforms[0](x), flow.transforms[0](x))


@pytest.mark.parametrize("way", ["traced", "stacked"])
def test_values_that_are_passed_whole_are_those_of_each_query(way: str) -> None:
    def model(x: Tensor, scale: float, shift: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = x @ w if way == "traced" else (x * w).sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean + shift[0], scale), obs=y)

    program = Program.of(model, "normal", data_plate="data")
    with RandomStream(0).drawing():
        batch = program.accept((X, 1.0, torch.zeros(3), Y))
        posterior = Posterior(ProgramInstance(program, batch, 12))
    means = {}
    for scale, shift in ((1.0, 0.0), (0.5, 0.0), (1.0, 7.0)):
        prediction = posterior.predict(X, scale, torch.full((3,), shift), draws=4, seed=1)
        assert posterior.instance.ways[next(k for k in posterior.instance.ways if k.startswith("predicted"))] == way
        torch.testing.assert_close(prediction.aleatoric, torch.full((12,), scale))
        means[scale, shift] = prediction.mean
    torch.testing.assert_close(means[1.0, 7.0], means[1.0, 0.0] + 7.0)


def test_a_traced_prior_has_as_many_rows_as_asked_for() -> None:
    class Own(Program):
        def model(self, y: Tensor | None = None) -> None:
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with self.data_plate(y):
                pyro.sample("y", dist.Normal(torch.ones(2) @ w, 0.5), obs=y)

    with RandomStream(0).drawing():
        posterior = Posterior(ProgramInstance(Own(), (Y,), 12, guide="normal"))
    for rows in (5, 9):
        assert posterior.sample_prior(rows, draws=3)["y"].shape == (3, rows)


SHIFTS, OFFSET = [0.0], torch.zeros(())


@pytest.mark.parametrize("way", ["traced", "stacked"])
def test_a_query_follows_the_globals_that_the_program_reads(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = x @ w if way == "traced" else (x * w).sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean + SHIFTS[0] + OFFSET, 0.5), obs=y)

    with RandomStream(0).drawing():
        posterior = Posterior(ProgramInstance(Program.of(model, "normal", data_plate="data"), (X, Y), 12))
    first = posterior.predict(X, draws=4).mean
    assert set(posterior.instance.ways.values()) == {way}
    monkeypatch.setattr(f"{__name__}.SHIFTS", [3.0])
    torch.testing.assert_close(posterior.predict(X, draws=4).mean, first + 3.0)
    monkeypatch.setattr(f"{__name__}.OFFSET", torch.tensor(2.0))
    torch.testing.assert_close(posterior.predict(X, draws=4).mean, first + 5.0)


def test_values_of_the_data_may_steer_a_traced_query() -> None:
    def model(lengths: Tensor, y: Tensor | None = None) -> None:
        assert lengths.max() <= 5
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = torch.ones(3, 2) @ w
        for _ in range(int(lengths.max())):
            mean = mean + 1.0
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(mean + lengths, 0.5), obs=y)

    lengths = torch.tensor([1, 3, 2])
    with RandomStream(0).drawing():
        posterior = Posterior(ProgramInstance(Program.of(model, "normal"), (lengths, torch.zeros(3)), 3))
    first = posterior.predict(lengths, draws=4).mean
    assert set(posterior.instance.ways.values()) == {"traced"}
    for steps in (5, 3, 5):
        others = torch.tensor([steps, 1, 1])
        torch.testing.assert_close(posterior.predict(others, draws=4).mean, first - lengths + others + (steps - 3.0))
    assert len(posterior.instance.graphs) == 3  # one for each set of values


def test_a_gaussian_chain_is_traced() -> None:
    def model(y: Tensor | None = None) -> None:
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2), 0.1).to_event(1))
        noise, eye = dist.MultivariateNormal(torch.zeros(2), torch.diag(scale)), torch.eye(2)
        pyro.sample("y", dist.GaussianHMM(noise, 0.9 * eye, noise, eye, noise, duration=5), obs=y)

    with RandomStream(0).drawing():
        posterior = Posterior(ProgramInstance(Program.of(model, "normal"), (torch.zeros(5, 2),), 5))
    assert posterior.predict(draws=3).draws.shape == (3, 5, 2)
    assert set(posterior.instance.ways.values()) == {"traced"}
