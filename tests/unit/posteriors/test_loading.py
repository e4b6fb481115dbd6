"""Loading a posterior runs nothing, and changes no answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuideList,
    AutoIAFNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import deepprob as dp
from deepprob.errors import StorageError
from deepprob.inference import svi
from deepprob.models import BayesianNeuralNetwork
from deepprob.posteriors import Posterior, draws_posterior
from deepprob.programs import Program
from deepprob.programs.supports import NotStored, constraint_from_json, constraint_to_json

X = torch.tensor([[0.5, 1.0], [-1.0, 0.3], [2.0, -0.4], [0.1, 0.9], [1.5, -1.2]])
Y = torch.tensor([0.4, -0.3, 1.9, 0.6, 0.2])


class Runs:
    """Counts the runs of a model, so that a test can tell that loading has none."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model, self.count = model, [0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count[0] += 1
        return self.model(*args, **kwargs)


def loaded(path: Path, posterior: Posterior, program: Program | None, model: Runs | None = None) -> Posterior:
    posterior.save(path)
    before = 0 if model is None else model.count[0]
    again = Posterior.load(path, program)
    assert model is None or model.count[0] == before
    return again


def equal(a: Any, b: Any) -> None:
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def same_answers(first: Posterior, again: Posterior, *data: Any, inputs: tuple[Any, ...] | None = None) -> None:
    """The same numbers, first without data, then with them, where the first posterior answers."""
    assert again.latent_sites == first.latent_sites
    assert repr(again) == repr(first)
    ours, theirs = first.parameters(), again.parameters()
    equal(dict(sorted(ours.items())), dict(sorted(theirs.items())))
    if first.structure.global_ and not first.structure.summed:
        equal(first.sample(draws=3, seed=5), again.sample(draws=3, seed=5))
        assert again.summary(draws=50) == first.summary(draws=50)
    equal(first.sample(*data, draws=3, seed=1), again.sample(*data, draws=3, seed=1))
    inputs = data if inputs is None else inputs
    if first.structure.observed:
        one, two = first.predict(*inputs, draws=3, seed=2), again.predict(*inputs, draws=3, seed=2)
        assert torch.equal(one.draws, two.draws)
        ours_, theirs_ = (p.log_likelihood(*data, draws=3, seed=3) for p in (first, again))
        assert torch.equal(ours_, theirs_)


# Every guide ---------------------------------------------------------------------------------------------------------


def hierarchical(x: Tensor, y: Tensor | None = None) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    low = pyro.sample("low", dist.Uniform(-2.0 * torch.ones(2), torch.tensor([1.0, 3.0])).to_event(1))
    with pyro.plate("features", 2):
        w = pyro.sample("w", dist.Normal(low.mean(), scale))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, scale), obs=y)


def codes(x: Tensor, y: Tensor | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def discrete(x: Tensor, y: Tensor | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    b = pyro.sample("b", dist.Bernoulli(0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(loc + k + b, 1.0), obs=y)


def parts(model: Any) -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["scale", "low"])))
    guide.append(autoguide.AutoMultivariateNormal(poutine.block(model, expose=["w"])))
    return guide


def mixed(model: Any) -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(autoguide.AutoDelta(poutine.block(model, expose=["loc"])))
    guide.append(autoguide.AutoDiscreteParallel(poutine.block(model, expose=["k", "b"])))
    return guide


def structured(model: Any) -> Any:
    kinds = {"scale": "normal", "low": "delta", "w": "mvn"}
    return autoguide.AutoStructured(model, conditionals=kinds, dependencies={"w": {"scale": "linear"}})


GUIDES: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    **{name: (hierarchical, lambda model, name=name: name) for name in ("normal", "low_rank", "flow", "map")},
    **{name: (hierarchical, lambda model, name=name: name) for name in ("multivariate_normal", "laplace")},
    "rows": (codes, lambda model: "normal"),
    "rows together": (codes, lambda model: "multivariate_normal"),
    "AutoNormal": (
        hierarchical,
        lambda m: AutoNormal(m, init_loc_fn=init_to_value(values={"scale": torch.tensor(2.0)})),
    ),
    "AutoDiagonalNormal": (hierarchical, autoguide.AutoDiagonalNormal),
    "AutoMultivariateNormal": (hierarchical, autoguide.AutoMultivariateNormal),
    "AutoLowRank": (hierarchical, autoguide.AutoLowRankMultivariateNormal),
    "AutoIAFNormal": (hierarchical, lambda model: autoguide.AutoIAFNormal(model, num_transforms=2)),
    "AutoDelta": (hierarchical, autoguide.AutoDelta),
    "AutoGuideList": (hierarchical, parts),
    "AutoDiscreteParallel": (discrete, mixed),
    "AutoStructured": (hierarchical, structured),
    "AutoStructured, automatic": (hierarchical, autoguide.AutoStructured),
    "AutoNormalMessenger": (hierarchical, autoguide.AutoNormalMessenger),
    "AutoHierarchicalNormalMessenger": (hierarchical, autoguide.AutoHierarchicalNormalMessenger),
    "AutoRegressiveMessenger": (hierarchical, autoguide.AutoRegressiveMessenger),
    "messenger of rows": (codes, autoguide.AutoNormalMessenger),
}


@pytest.mark.filterwarnings("ignore:draws run one by one")
@pytest.mark.parametrize("kind", GUIDES)
def test_a_guide_is_loaded_without_a_run_of_the_model(tmp_path: Path, kind: str) -> None:
    model, guide = GUIDES[kind]
    runs = Runs(model)

    def make() -> Program:
        counted = lambda x, y=None: runs(x, y)  # noqa: E731
        return Program.of(counted, guide(counted), data_plate="data")

    steps = 400 if kind == "laplace" else 4
    posterior = svi(make(), (X, Y), steps=steps, compile=False, progress=False)
    inputs = (X, Y) if "essenger" in kind else (X,)  # a messenger runs the model on its arguments
    again = loaded(tmp_path, posterior, make(), runs)
    same_answers(posterior, again, X, Y, inputs=inputs)
    twice = loaded(tmp_path / "again", again, make(), runs)
    same_answers(posterior, twice, X, Y, inputs=inputs)


def test_minibatch_guides_find_their_rows_after_a_load(tmp_path: Path) -> None:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5, subsample_size=len(y)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    posterior = svi(Program.of(model, "normal", data_plate="data"), Y, epochs=2, batch_size=2, progress=False)
    again = loaded(tmp_path, posterior, Program.of(model, "normal", data_plate="data"))
    same_answers(posterior, again, Y)
    with pytest.raises(ValueError, match="the guide keeps parameters for every row of plate 'data', 5 in the fit"):
        again.predict(Y[:3])


# Arguments that cannot be made up -------------------------------------------------------------------------------------


def matrix(cov: Tensor, y: Tensor | None = None) -> None:
    root = torch.linalg.cholesky(cov)  # (N, 2, 2); fails on a matrix of equal entries
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(cov)):
        pyro.sample("y", dist.MultivariateNormal(loc, scale_tril=root), obs=y)


def interval(ends: Tensor, y: Tensor | None = None) -> None:
    low, high = ends.min(), ends.max()
    assert low < high
    loc = pyro.sample("loc", dist.Uniform(low, high))
    with pyro.plate("data", len(ends)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def table(index: Tensor, y: Tensor | None = None) -> None:
    assert index.max() == 2
    with pyro.plate("groups", int(index.max()) + 1):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(index)):
        pyro.sample("y", dist.Normal(loc[..., index], 1.0), obs=y)


CASES: dict[str, tuple[Any, tuple[Tensor, Tensor]]] = {
    "matrix": (matrix, (torch.tensor([[2.0, 0.3], [0.3, 1.0]]).expand(5, 2, 2).clone(), X)),
    "interval": (interval, (torch.tensor([[0.0, 4.0]]).expand(5, 2).clone(), Y)),
    "table": (table, (torch.tensor([0, 1, 2, 0, 1]), Y)),
}


@pytest.mark.parametrize("guide", ["normal", "multivariate_normal"])
@pytest.mark.parametrize("case", CASES)
def test_arguments_that_only_the_user_has_are_not_made_up(tmp_path: Path, case: str, guide: str) -> None:
    model, data = CASES[case]
    runs = Runs(model)
    program = Program.of(lambda a, y=None: runs(a, y), guide)
    posterior = svi(program, data, steps=4, compile=False, progress=False)
    same_answers(posterior, loaded(tmp_path, posterior, program, runs), *data, inputs=data[:1])


def test_bounds_of_rows_are_not_stored(tmp_path: Path) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(x - 1.0, x + 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    x = torch.tensor([12.5, 13.25, 17.125, 19.5, 11.75])
    posterior = svi(Program.of(model, "normal"), (x, x), steps=4, compile=False, progress=False)
    posterior.save(tmp_path)
    setup = json.loads((tmp_path / "manifest.json").read_text())["manifest"]["setup"]
    assert not setup["guides"]
    assert "13.25" not in json.dumps(setup)
    assert "12.25" not in json.dumps(setup)
    again = Posterior.load(tmp_path, Program.of(model, "normal"))
    with pytest.raises(
        ValueError, match=r"so a loaded posterior needs them\. Give the data of the fit once, posterior"
    ):
        again.sample()
    with pytest.raises(ValueError, match="when it first meets data, so a loaded posterior needs them"):
        again.predict(x)  # without y, Pyro would take y for a latent site
    with pytest.raises(ValueError, match="when it first meets data, so a loaded posterior needs them"):
        again.parameters()
    again.save(tmp_path / "again")  # nothing is lost before the first query
    for other in (again, Posterior.load(tmp_path / "again", Program.of(model, "normal"))):
        equal(posterior.sample(x, x, draws=3), other.sample(x, x, draws=3))
        assert torch.equal(posterior.predict(x, draws=3).draws, other.predict(x, draws=3).draws)
        equal(posterior.parameters(), other.parameters())


# Modules that a run makes ---------------------------------------------------------------------------------------------


class Lazy(PyroModule):
    """A network and parameters of the first run."""

    @PyroParam(constraint=dist.constraints.positive)
    def noise(self) -> Tensor:
        return torch.tensor(0.5)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        if not hasattr(self, "second"):
            self.second = PyroModule[nn.Linear](2, 1)
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        rate = pyro.param("rate", torch.tensor(0.3), constraint=dist.constraints.interval(0.0, 1.0))
        with pyro.plate("data", len(x)):
            loc = self.second(x).squeeze(-1) + shift * rate
            pyro.sample("y", dist.Normal(loc, self.noise), obs=y)


def test_modules_of_the_first_run_are_loaded_with_the_first_query(tmp_path: Path) -> None:
    posterior = svi(Program.of(Lazy(), "normal"), (X, Y), steps=20, compile=False, progress=False)
    again = loaded(tmp_path, posterior, Program.of(Lazy(), "normal"))
    assert torch.equal(posterior.predict(X, draws=3).draws, again.predict(X, draws=3).draws)
    same_answers(posterior, again, X, Y, inputs=(X,))


def test_a_program_that_makes_its_parameters_again_keeps_the_saved_ones(tmp_path: Path) -> None:
    class Remade(PyroModule):
        ready = False

        def forward(self, y: Tensor) -> None:
            if not self.ready:
                self.loc = PyroParam(torch.zeros(()))
                self.ready = True
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(self.loc, 1.0), obs=y)

    def none(y: Tensor) -> None:
        pass

    posterior = svi(Program.of(Remade(), none), Y, steps=50, compile=False, progress=False)
    again = loaded(tmp_path, posterior, Program.of(Remade(), none))
    assert torch.equal(posterior.log_likelihood(Y, draws=1), again.log_likelihood(Y, draws=1))
    assert posterior.parameters()["loc"] != 0.0


@pytest.mark.parametrize("lazy", [False, True])
def test_lifted_networks_are_loaded(tmp_path: Path, lazy: bool) -> None:
    def make() -> Program:
        first = nn.LazyLinear(4) if lazy else nn.Linear(2, 4)
        return BayesianNeuralNetwork(nn.Sequential(first, nn.Tanh(), nn.Linear(4, 2)))

    y = torch.stack([Y, -Y], 1)
    posterior = svi(make(), (X, y), epochs=2, compile=False, progress=False)
    again = loaded(tmp_path, posterior, make())
    same_answers(posterior, again, X, y, inputs=(X,))


@pytest.mark.parametrize("guide", ["normal", "map", "low_rank"])
def test_lifted_networks_with_named_guides_are_loaded(tmp_path: Path, guide: str) -> None:
    def make() -> Program:
        return BayesianNeuralNetwork(dp.MLP(2, 1, (3,), "tanh"))

    posterior = svi(make(), (X, Y.unsqueeze(1)), epochs=2, guide=guide, compile=False, progress=False)
    same_answers(posterior, loaded(tmp_path, posterior, None), X, Y.unsqueeze(1), inputs=(X,))


def test_facts_that_a_program_takes_from_its_data_are_loaded(tmp_path: Path) -> None:
    class Adapted(Program):
        def adapt(self, *batch: Any) -> None:
            self.register_buffer("means", batch[0].mean(0))
            self.columns = batch[0].shape[1]

        def model(self, x: Tensor) -> None:
            loc = pyro.sample("loc", dist.Normal(torch.zeros(self.columns), 1.0).to_event(1))
            with self.data_plate(x):
                pyro.sample("x", dist.Normal(loc + self.means, 1.0).to_event(1), obs=x)

    posterior = svi(Adapted(), X, epochs=2, guide="normal", compile=False, progress=False)
    same_answers(posterior, loaded(tmp_path, posterior, Adapted()), X)


def test_posteriors_of_draws_are_loaded_without_a_run(tmp_path: Path) -> None:
    runs = Runs(interval)
    program, data = Program.of(lambda a, y=None: runs(a, y)), CASES["interval"][1]
    posterior = draws_posterior(program, data, {"loc": torch.linspace(0.5, 3.5, 8).reshape(2, 4)})
    same_answers(posterior, loaded(tmp_path, posterior, program, runs), *data, inputs=data[:1])


def test_a_program_that_lacks_a_saved_site_is_refused_at_its_first_query(tmp_path: Path) -> None:
    def own(x: Tensor, y: Tensor) -> None:
        pyro.sample("scale", dist.LogNormal(0.0, 0.3))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        own(x, y)
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    def other(x: Tensor, y: Tensor | None = None) -> None:
        own(x, y)
        pyro.sample("v", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    def less(x: Tensor, y: Tensor | None = None) -> None:
        own(x, y)
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    def trained(x: Tensor, y: Tensor | None = None) -> None:
        own(x, y)
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

    def short(x: Tensor, y: Tensor | None = None) -> None:
        pyro.param("loc", torch.zeros(()))
        own(x, y)

    posterior = svi(Program.of(model, trained), (X, Y[0]), steps=1, progress=False)
    posterior.save(tmp_path)
    with pytest.raises(StorageError, match="the program draws site 'v', which the saved one did not have"):
        Posterior.load(tmp_path, Program.of(other, trained)).predict(X, Y[0])
    with pytest.raises(StorageError, match=r"the program has no site 'w'\. Give the program that was saved"):
        Posterior.load(tmp_path, Program.of(less, short)).predict(X, Y[0])


# The call -------------------------------------------------------------------------------------------------------------


def by_dict(batch: Any, *, offset: float = 0.0) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(batch["x"])):
        pyro.sample("y", dist.Normal(loc + batch["x"] + offset, 1.0), obs=batch.get("y"))


def test_a_saved_posterior_keeps_the_call_of_its_fit(tmp_path: Path) -> None:
    data = {"batch": {"x": X[:, 0], "y": Y}, "offset": 2.0}
    posterior = svi(Program.of(by_dict, "normal"), data, steps=4, progress=False)
    again = loaded(tmp_path, posterior, Program.of(by_dict, "normal"))
    assert again.program.call == posterior.program.call
    same_answers(posterior, again, data)


def whole(y: Tensor, weights: Any, settings: Any = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, settings.scale).expand([2]).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((loc * weights.sum(-2)).sum(-1), 1.0), obs=y)


def test_arguments_that_are_passed_whole_are_known_by_name(tmp_path: Path) -> None:
    weights, settings = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]), SimpleNamespace(scale=1.0)
    posterior = svi(Program.of(whole, "normal"), (Y, weights, settings), steps=4, progress=False)
    again = loaded(tmp_path, posterior, Program.of(whole, "normal"))
    assert "0.3" not in json.dumps(json.loads((tmp_path / "manifest.json").read_text())["manifest"]["call"])
    same_answers(posterior, again, Y, weights, settings)
    # As many rows as the table has: only the name tells which is which.
    same_answers(posterior, again, Y[:3], weights, settings)
    same_answers(posterior, again, {"weights": weights, "settings": settings, "y": Y[:3]})


# Constraints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "constraint",
    [
        dist.constraints.real,
        dist.constraints.simplex,
        dist.constraints.positive_ordered_vector,
        dist.constraints.softplus_positive,
        dist.constraints.nonnegative_integer,
        dist.constraints.interval(torch.tensor([0.0, -1.0]), torch.tensor([1.0, 1.0])),
        dist.constraints.independent(dist.constraints.greater_than(torch.zeros(3)), 1),
    ],
    ids=str,
)
def test_constraints_are_stored_by_name(constraint: Any) -> None:
    again = constraint_from_json(json.loads(json.dumps(constraint_to_json(constraint))))
    assert type(again) is type(constraint)
    assert repr(again) == repr(constraint)


def test_what_is_no_constraint_of_pyro_is_not_stored() -> None:
    class Own(dist.constraints.Constraint):
        pass

    with pytest.raises(NotStored, match="cannot be stored"):
        constraint_to_json(Own())
    with pytest.raises(NotStored, match="a bound of type str cannot be stored"):
        constraint_to_json(dist.constraints.greater_than("low"))
    with pytest.raises(NotStored, match="bounds that differ from row to row are not stored"):
        constraint_to_json(dist.constraints.greater_than(torch.arange(3.0)), per_row=True)
    with pytest.raises(ValueError, match=r"the file holds an unknown constraint 'os\.system'"):
        constraint_from_json({"os.system": []})


def _pair(y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(w, s), obs=y)


def _list_of_guides() -> AutoGuideList:
    found = AutoGuideList(_pair)
    found.append(AutoNormal(poutine.block(_pair, expose=["w"])))
    found.append(AutoDelta(poutine.block(_pair, expose=["s"])))
    return found


def _answers(posterior: Posterior, *data: Tensor) -> Tensor:
    return posterior.predict(*data, draws=4, seed=1).draws


@pytest.mark.parametrize(
    "guide",
    [AutoDiagonalNormal, AutoIAFNormal, AutoGaussian, AutoStructured, AutoNormalMessenger],
    ids=lambda x: x.__name__,
)
def test_a_class_of_pyros_guides_is_in_the_save(guide: Any, tmp_path: Path) -> None:
    y = torch.zeros(3)
    posterior = svi(Program.of(_pair), y, guide=guide, steps=2, progress=False, compile=False)
    posterior.save(tmp_path / "it")
    assert torch.equal(_answers(Posterior.load(tmp_path / "it", Program.of(_pair)), y), _answers(posterior, y))


@pytest.mark.parametrize("guide", [_list_of_guides(), partial(AutoStructured, conditionals="normal")])
def test_a_guide_of_the_user_is_given_to_load(guide: Any, tmp_path: Path) -> None:
    y = torch.zeros(3)
    posterior = svi(Program.of(_pair), y, guide=guide, steps=2, progress=False, compile=False)
    posterior.save(tmp_path / "it")
    with pytest.raises(StorageError, match=r"fitted with a guide of the user.*Posterior\.load\(path, program, guide="):
        Posterior.load(tmp_path / "it", Program.of(_pair))
    for loaded in (
        Posterior.load(tmp_path / "it", Program.of(_pair), guide=guide),
        Posterior.load(tmp_path / "it", Program.of(_pair, guide)),
    ):
        assert torch.equal(_answers(loaded, y), _answers(posterior, y))
    network, rows = BayesianNeuralNetwork(nn.Linear(1, 1)), (torch.zeros(4, 1), torch.zeros(4))
    posterior = svi(network, rows, guide=partial(AutoDiagonalNormal, init_scale=0.2), steps=2, progress=False)
    posterior.save(tmp_path / "network")
    with pytest.raises(StorageError, match="fitted with a guide of the user"):
        Posterior.load(tmp_path / "network", network)
    loaded = Posterior.load(tmp_path / "network", network, guide=AutoDiagonalNormal)
    assert torch.equal(_answers(loaded, rows[0]), _answers(posterior, rows[0]))
