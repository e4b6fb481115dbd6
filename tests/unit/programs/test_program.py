"""Program: its data and rows, the copy that a fit trains, and existing Pyro programs."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn

from deepprob.data import Split
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import VAE
from deepprob.posteriors.posterior import Posterior
from deepprob.posteriors.prior import sample_prior
from deepprob.programs.minibatch import Minibatch, num_rows
from deepprob.programs.program import Program
from deepprob.programs.run import Run, run_program

torch.manual_seed(0)
X = torch.randn(40, 3)
Y = X @ torch.tensor([1.0, 2.0, -1.0]) + 0.1 * torch.randn(40)


def regression(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5), obs=y)


def fitted(program: Program, data: Any = (X, Y), **options: Any) -> Posterior:
    return svi(program, data, **{"epochs": 3, "batch_size": 10, "progress": False} | options)


class Codes(Program):
    """A code for every row, with parameters of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.head = PyroModule[nn.Linear](1, 1)
        self.scale = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        shift = pyro.param("shift", torch.tensor(0.3))
        with self.data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(self.head(self.net(x)).squeeze(-1) + shift + z, self.scale), obs=y)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.param("slope", torch.tensor(0.3))
        with self.data_plate(x):
            pyro.sample("z", dist.Normal(slope * x[..., 0], 1.0))


# -- of(): every way in which a Pyro program is written -----------------------------------------------------------


def test_of_refuses_values_that_are_not_callable() -> None:
    with pytest.raises(TypeError, match=r"model must be a callable Pyro program; got int\."):
        Program.of(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"guide must be a callable Pyro program; got float\."):
        Program.of(regression, 1.0)  # type: ignore[arg-type]


def test_closures_and_their_networks_are_copied() -> None:
    net = nn.Linear(3, 1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(net(x).squeeze(-1) + z, 1.0), obs=y)

    before = net.weight.clone()
    posterior = fitted(Program.of(model, "normal", data_plate="data"), batch_size=None)
    assert torch.equal(net.weight, before)
    trained = [v for n, v in posterior.parameters().items() if n.endswith("weight")]
    assert len(trained) == 1
    assert not torch.equal(trained[0], before)


def test_methods_partials_lambdas_and_handlers_are_copied() -> None:
    class Holder:
        def __init__(self) -> None:
            self.net = nn.Linear(3, 1)

        def model(self, noise: float, x: Tensor, y: Tensor | None = None) -> None:
            pyro.module("net", self.net)
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(self.net(x).squeeze(-1) + w, noise), obs=y)

    holder = Holder()
    before = holder.net.weight.clone()
    forms = {
        "partial of a method": functools.partial(holder.model, 0.5),
        "lambda": lambda x, y=None: holder.model(0.5, x, y),
        "handler": poutine.scale(functools.partial(holder.model, 0.5), scale=1.0),
    }
    for form in forms.values():
        program = Program.of(form, "normal", data_plate="data")
        assert program.argument_names == ["x", "y"]
        posterior = fitted(program)
        assert posterior.log_likelihood(X, Y, draws=3).shape == (3, 40)
        assert torch.equal(holder.net.weight, before)


def test_network_in_the_closure_of_a_method_is_copied() -> None:
    net = nn.Linear(3, 1)

    class Model:
        def __call__(self, x: Tensor, y: Tensor | None = None) -> None:
            self.run(x, y)

        def run(self, x: Tensor, y: Tensor | None = None) -> None:
            pyro.module("net", net)
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(net(x).squeeze(-1) + w, 1.0), obs=y)

    before = net.weight.clone()
    fitted(Program.of(Model().run, "normal", data_plate="data"))
    assert torch.equal(net.weight, before)
    with pytest.raises(ValueError, match=r"parameters that are not its own, one of shape \(1, 3\)\. Make their"):
        fitted(Program.of(Model(), "normal", data_plate="data"))


def guide_list() -> AutoGuideList:
    guide = AutoGuideList(two_sites)
    guide.append(AutoNormal(poutine.block(two_sites, expose=["a"])))
    guide.append(AutoDelta(poutine.block(two_sites, expose=["s"])))
    return guide


def two_sites(x: Tensor, y: Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x[..., 0] * a, s), obs=y)


def test_autoguide_objects_serve_many_fits_unchanged() -> None:
    for guide in (AutoNormal(two_sites), AutoMultivariateNormal(two_sites), guide_list()):
        program = Program.of(two_sites, guide, data_plate="data")
        first, second = fitted(program), fitted(program)
        assert guide.prototype_trace is None
        assert torch.equal(first.log_likelihood(X, Y), second.log_likelihood(X, Y))
        assert {n: tuple(v.shape) for n, v in first.sample(draws=5).items()} == {"a": (5,), "s": (5,)}


def test_bare_parameters_and_tensors_are_never_trained_in_place() -> None:
    tensor, parameter = torch.zeros(3), nn.Parameter(torch.zeros(3))
    for start in (tensor, parameter):

        def model(x: Tensor, y: Tensor | None = None, start: Tensor = start) -> None:
            w = pyro.param("w", start)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal((x * w).sum(-1) + z, 1.0), obs=y)

        posterior = fitted(Program.of(functools.partial(model, start=start), "normal", data_plate="data"))
        assert torch.equal(start, torch.zeros(3))
        assert bool((posterior.parameters()["w"] != 0).all())
    assert not tensor.requires_grad


def test_guide_given_to_the_routine_is_copied() -> None:
    decoder, encoder = nn.Linear(2, 3), nn.Linear(3, 2)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    before = decoder.weight.clone(), encoder.weight.clone()
    posterior = fitted(Program.of(model, data_plate="data"), X, guide=guide)
    assert torch.equal(decoder.weight, before[0])
    assert torch.equal(encoder.weight, before[1])
    assert len(posterior.parameters()) == 4

    automatic = AutoNormal(model)
    fitted(Program.of(model, data_plate="data"), X, guide=automatic, batch_size=None)
    assert automatic.prototype_trace is None


def with_features(net: nn.Module, register: Any = lambda net: None) -> Program:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        register(net)
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        s = pyro.param("s", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((net(x) * w).sum(-1), s), obs=y)

    return Program.of(model, "normal")


def blocked(net: nn.Module) -> None:
    with poutine.block(hide_types=["param"]):
        pyro.module("net", net)


@pytest.mark.parametrize("hide", [lambda net: None, blocked], ids=["not registered", "blocked"])
def test_network_that_pyro_does_not_see_stays(hide: Any) -> None:
    net = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match=r'the weights of net are used but not registered.*pyro\.module\("net", net\)'):
        posterior = fitted(with_features(net, hide), batch_size=None)
    weights = [v for n, v in posterior.parameters().items() if n.endswith("weight")]
    assert torch.equal(weights[0], net.weight)
    assert [n for n in posterior.instance.parameters() if not n.startswith("parts")] == ["store.s"]


def test_networks_keep_their_weights_and_train_where_pyro_sees_them() -> None:
    net = nn.Linear(3, 3)
    still = Optimizer(learning_rate=1e-12)
    program = with_features(net, lambda net: pyro.module("net", net))
    for weights, equal in (("auto", True), ("keep", True), ("fresh", False)):
        kept = fitted(program, batch_size=None, optimizer=still, weights=weights).parameters()["net.weight"]
        assert torch.allclose(kept, net.weight) == equal
    trained = fitted(program, batch_size=None).parameters()["net.weight"]
    assert not torch.allclose(trained, net.weight)


def reads_a_parameter(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    s = pyro.param("test_scale")
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), s), obs=y)


@pytest.mark.parametrize("batch_size", [None, 10])
def test_parameter_set_before_the_fit_is_read_and_trained(batch_size: int | None) -> None:
    store = pyro.get_param_store()
    program = Program.of(reads_a_parameter, "normal", data_plate="data")
    pyro.param("test_scale", torch.tensor(2.0), constraint=dist.constraints.positive)
    try:
        start = fitted(program, batch_size=batch_size, optimizer=Optimizer(learning_rate=1e-12))
        trained = fitted(program, batch_size=batch_size, epochs=20, optimizer=Optimizer(learning_rate=0.1))
        assert store["test_scale"].item() == pytest.approx(2.0)
        assert store._params["test_scale"].requires_grad
    finally:
        del store["test_scale"]
    assert float(start.parameters()["test_scale"]) == pytest.approx(2.0)
    assert 0 < float(trained.parameters()["test_scale"]) < 1.9
    assert trained.log_likelihood(X, Y, draws=3).shape == (3, 40)


def test_refuses_a_parameter_without_a_value() -> None:
    with pytest.raises(ValueError, match=r"reads parameter 'test_scale', which has no value yet\. Give it one"):
        fitted(Program.of(reads_a_parameter, "normal"), batch_size=None)
    with pytest.raises(KeyError, match="mine"):
        fitted(Program.of(lambda x, y: {}["mine"], "normal"), batch_size=None)


def test_frozen_weights_stay() -> None:
    class Net(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(((x * self.scale + self.shift) * w).sum(-1), 1.0), obs=y)

    net = Net()
    net.scale.requires_grad_(False)
    found = fitted(Program.of(net, "normal"), batch_size=None).parameters()
    assert torch.equal(found["scale"], torch.ones(3))
    assert not torch.equal(found["shift"], torch.zeros(3))
    assert not net.scale.requires_grad


def test_refuses_a_missing_plate() -> None:
    def elsewhere(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(w, 0.5), obs=y)

    class Mine(Program):
        def model(self, x: Tensor, y: Tensor | None = None) -> None:
            elsewhere(x, y)

    message = r"the program has no plate named 'data', so minibatches would be weighted wrongly; its plates are: rows"
    for program in (Program.of(elsewhere, data_plate="data"), Mine()):
        with pytest.raises(ValueError, match=message):
            fitted(program, guide="normal")
    fitted(Mine(), guide="normal", batch_size=None)


def test_refuses_rows_observed_outside_of_the_plate() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 0.5).expand([3]).to_event(1), obs=x)
        pyro.sample("y", dist.Normal(w, 0.5), obs=y)

    with pytest.raises(
        ValueError, match=r"site 'y' observes rows outside of plate 'data': minibatches would be weighted"
    ):
        fitted(Program.of(model, "normal", data_plate="data"))


def test_error_inside_a_program_is_explained_in_one_line() -> None:
    def fixed(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("other", 40):
            pyro.sample("y", dist.Normal(w * x[:, 0], 0.5), obs=y)

    with pytest.raises(
        ValueError, match=r"rows of x \(3,\) float32, y \(\) float32: Shape mismatch inside plate\('other'"
    ):
        fitted(Program.of(fixed, "normal", data_plate="data"))


def test_error_of_the_users_is_repeated_without_a_remedy() -> None:
    def broken(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        raise ValueError("the kernel is singular")

    with pytest.raises(ValueError, match=r"rows of x \(3,\) float32, y \(\) float32: the kernel is singular\.$"):
        fitted(Program.of(broken, "normal", data_plate="data"))


def test_sequential_plate_takes_no_minibatches() -> None:
    def loop(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"y_{i}", dist.Normal(w * x[i, 0], 0.5), obs=y[i])

    with pytest.raises(ValueError, match=r"plate 'data' is sequential, .* with pyro.plate\('data', ...\), or use"):
        fitted(Program.of(loop, "normal", data_plate="data"))


# -- subclasses of Program ----------------------------------------------------------------------------------------


def test_fit_trains_every_kind_of_parameter_of_a_copy() -> None:
    program = Codes()
    before = {n: v.clone() for n, v in program.state_dict().items()}
    posterior = fitted(program)
    assert all(torch.equal(v, before[n]) for n, v in program.state_dict().items())
    start: dict[str, Any] = before | dict.fromkeys(("shift", "slope"), 0.3)
    start["scale"] = start.pop("scale_unconstrained").exp()
    assert posterior.parameters().keys() == start.keys()
    assert all(bool((v != start[n]).any()) for n, v in posterior.parameters().items())


def test_pyro_sample_attributes_are_sites_in_model_and_guide() -> None:
    class Mean(Program):
        def __init__(self) -> None:
            super().__init__()
            self.w = PyroSample(dist.Normal(0.0, 1.0))

        def model(self, y: Tensor | None = None) -> None:
            w = self.w
            with self.data_plate(y):
                pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    y = torch.full((8,), 2.0)
    posterior = svi(Mean(), y, guide="normal", epochs=400, optimizer=Optimizer(learning_rate=0.05))
    assert posterior.latent_sites == {"w": "global"}
    assert float(posterior.sample(draws=2000)["w"].mean()) == pytest.approx(16 / 9, abs=0.05)


def test_pyro_sample_attributes_of_a_bound_method() -> None:
    class Mean(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.w = PyroSample(dist.Normal(0.0, 1.0))

        def model(self, y: Tensor) -> None:
            w = self.w
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    assert svi(Program.of(Mean().model, "normal"), Y, epochs=2).latent_sites == {"w": "global"}


def test_refuses_a_program_without_model_or_guide() -> None:
    with pytest.raises(TypeError, match=r"Program has no model\. Write model\(self, \*batch\)"):
        Program().model(X)
    with pytest.raises(TypeError, match=r"Program has no guide\. Write guide\(self, \*batch\), or fit it with"):
        Program().guide(X)


def test_units_default_to_one_per_row() -> None:
    assert Codes().units(X) is None
    assert Codes().prepare(X)[0] is X


# -- rows ---------------------------------------------------------------------------------------------------------


def test_data_plate_has_the_rows_of_the_batch() -> None:
    program = Codes()
    assert program.data_plate(X).size == 40
    with program.bound(torch.tensor([5, 2]), 40):
        plate = program.data_plate(X[:2])
        with plate as rows:
            assert rows.tolist() == [5, 2]
        assert plate.size == 40
    assert program.bound_rows.rows is None


@pytest.mark.parametrize("length", ["N", "len(x)"])
def test_minibatches_are_weighted_for_both_sizes_of_the_plate(length: str) -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", 40 if length == "N" else len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    program = Program.of(model, lambda y: None, data_plate="data")
    _, trace = run_program(Run(program, (Y[:10],), torch.arange(10), 40))
    assert float(torch.as_tensor(trace.nodes["y"]["scale"])) == 4.0


@pytest.mark.parametrize("batch_size", [4, 7, 30, None])
def test_per_row_parameters_follow_their_row(batch_size: int | None) -> None:
    truth = torch.arange(30.0)

    def model(y: Tensor) -> None:
        with pyro.plate("data", 30):
            z = pyro.sample("z", dist.Normal(0.0, 100.0))
            pyro.sample("y", dist.Normal(z, 0.1), obs=y)

    posterior = svi(
        Program.of(model, "normal", data_plate="data"),
        truth,
        epochs=400 if batch_size in (30, None) else 200,
        batch_size=batch_size,
        optimizer=Optimizer(learning_rate=0.5),
    )
    codes = posterior.sample(truth, draws=50)["z"]
    assert codes.shape == (50, 30)
    assert float((codes.mean(0) - truth).abs().max()) < 0.3
    assert posterior.log_evidence(truth, particles=5).shape == (30,)
    with pytest.raises(ValueError, match=r"plate 'data', 30 in the fit; got 29 rows"):
        posterior.sample(truth[:29])


def test_per_row_parameters_need_the_size_of_the_data() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.1), obs=y)

    with pytest.raises(ValueError, match=r"keeps parameters for every row of z, but plate 'data' has the length of"):
        fitted(Program.of(model, "normal", data_plate="data"), Y)
    assert fitted(Program.of(model, "normal", data_plate="data"), Y, batch_size=None).latent_sites == {"z": "local"}


def test_minibatch_leaves_other_plates_unchanged() -> None:
    with Minibatch("data", torch.tensor([3, 1]), 9), pyro.plate("other", 9, subsample_size=9) as rows:
        assert rows.tolist() == list(range(9))


def test_num_rows() -> None:
    assert num_rows((None, torch.zeros(3, 2))) == 3
    assert num_rows(()) == 1


# -- data ---------------------------------------------------------------------------------------------------------


def test_fields_match_arguments_by_name_and_tuples_by_position() -> None:
    program = Program.of(regression)
    for data in ({"x": X, "y": Y}, {"y": Y, "x": X}, Split({"y": Y, "x": X}), (X, Y)):
        x, y = program.accept(data)
        assert x.shape == (40, 3)
        assert y.shape == (40,)
    images, labels = program.accept(Split({"images": X, "labels": Y}))
    assert images.shape == (40, 3)
    assert labels.shape == (40,)


def test_refuses_fields_that_match_no_argument() -> None:
    program = Program.of(regression)
    with pytest.raises(ValueError, match=r"the model takes x, y; data has the fields y, images\. Name"):
        program.accept({"y": Y, "images": X})
    with pytest.raises(ValueError, match=r"the model takes 2 arguments \(x, y\); held_out has 3 parts"):
        program.accept((X, Y, Y), what="held_out")
    assert len(program.accept(Split({"x": X, "y": Y, "weight": Y}))) == 2


def test_missing_data_give_an_empty_batch() -> None:
    assert Program.of(regression).accept(None) == ()
    assert Program.of(lambda *batch: None).takes_any
    assert Program.of(regression).call_arguments(()) == ((), {"x": None})


def test_from_data_must_be_implemented() -> None:
    with pytest.raises(
        TypeError, match=r"Codes has no from_data\. Write it, or call the constructor: Codes\(\.\.\.\)\."
    ):
        Codes.from_data(None)  # type: ignore[arg-type]


def test_refuses_a_data_plate_that_is_not_a_name() -> None:
    with pytest.raises(TypeError, match=r"data_plate must be the name of a plate; got 3\. Write data_plate='data'"):
        Program.of(lambda y: None, data_plate=3)  # type: ignore[arg-type]


def test_networks_in_evaluation_mode_stay_in_it() -> None:
    pretrained, head = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5)).eval(), nn.Linear(2, 1)

    def model(x: Tensor) -> None:
        pyro.module("pretrained", pretrained)
        pyro.module("head", head)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(head(pretrained(x)).squeeze(-1), 1.0), obs=torch.zeros(len(x)))

    def modes(program: Program) -> list[bool]:
        return [m.training for m in program.parts.modules() if isinstance(m, nn.Dropout | nn.Linear)]

    program = Program.of(model, lambda x: None)
    assert modes(copy.deepcopy(program).train()) == [True, False]
    assert modes(program.eval()) == [False, False]
    assert modes(copy.deepcopy(program).train()) == [True, False]
    assert modes(program.train()) == [True, False]
    x = 5 + torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    posterior = svi(program, x, epochs=3, progress=False)
    assert float(posterior.program.parts[1][0].num_batches_tracked) == 0


def test_networks_that_pyro_does_not_register_have_the_users_names() -> None:
    frozen = nn.Linear(3, 1).requires_grad_(False).eval()

    class Own:
        def __init__(self) -> None:
            self.net, self.unused, self.more = nn.Linear(3, 1), nn.Linear(2, 2), [nn.Linear(1, 1, bias=False)]

        def model(self, x: Tensor, y: Tensor | None = None) -> None:
            pyro.module("net", self.net)
            pyro.module("frozen", frozen)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal((self.net(x) + frozen(x))[:, 0], 1.0), obs=y)

    found = fitted(Program.of(Own().model, lambda x, y=None: None), batch_size=None).parameters()
    names = ("net.weight", "net.bias", "unused.weight", "unused.bias", "more[0].weight", "frozen.weight", "frozen.bias")
    assert set(found) == set(names)
    assert torch.equal(found["frozen.weight"], frozen.weight)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_scripted_networks_are_named() -> None:
    net = torch.jit.script(nn.Linear(3, 1))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x)[:, 0], 1.0), obs=y)

    with pytest.raises(ValueError, match=r"the program has a scripted module \('net'\), whose weights can be neither"):
        fitted(Program.of(model, lambda x, y=None: None), batch_size=None)
    autoencoder = VAE((3,), latent_dim=2, likelihood="normal", encoder=torch.jit.script(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match=r"the program has a scripted module \('encoder.network'\)"):
        fitted(autoencoder, X)


def test_the_prior_runs_no_lazy_encoder() -> None:
    autoencoder = VAE((3,), latent_dim=2, likelihood="normal", encoder=nn.LazyLinear(4))
    assert sample_prior(autoencoder, X, draws=2)["x"].shape == (2, 40, 3)
