"""Encode, decode and reconstruct, against closed forms of linear Gaussian programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from torch import Tensor, nn

from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork, DeepMarkovModel
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import num_rows
from deepprob.programs.program import Program

X = torch.linspace(-2.0, 2.0, 6)


def exact(model: Callable[..., Any], guide: Callable[..., Any], *data: Tensor, **options: Any) -> Posterior:
    """The posterior of a program that has nothing to learn."""
    program = Program.of(model, guide, **options)
    batch = program.accept(data)
    return Posterior(ProgramInstance(program, batch, num_rows(batch)))


def two_layers(x: Tensor) -> None:
    """u ~ N(0, 1), z ~ N(u, 1), x ~ N(z, 1)."""
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(u, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def exact_two_layers(x: Tensor) -> None:
    """q(z | x) and q(u | z): p(z) = N(0, 2), so z | x ~ N(2 x / 3, 2 / 3) and u | z ~ N(z / 2, 1 / 2)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(2 * x / 3, (2 / 3) ** 0.5))
        pyro.sample("u", dist.Normal(z / 2, 0.5**0.5))


def shared_shift(x: Tensor) -> None:
    """A global latent beside a local one: shift ~ N(0, 1), z ~ N(0, 1), x ~ N(shift + z, 1)."""
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(shift + z, 1.0), obs=x)


def guide_of_shift(x: Tensor) -> None:
    """shift ~ N(1, 0.5^2), z | x, shift ~ N((x - shift) / 2, 1 / 2)."""
    shift = pyro.sample("shift", dist.Normal(1.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x - shift) / 2, 0.5**0.5))


def test_codes_of_an_encoder_are_in_closed_form() -> None:
    posterior = svi(VAE((3,), 2, (4,), "normal"), torch.randn(20, 3), steps=5, progress=False)
    x = torch.randn(7, 3)
    codes, expected = posterior.encode(x), posterior.program.encode(x)
    assert codes.estimated == ()
    assert torch.allclose(codes.mean, expected.mean) and torch.allclose(codes.sd, expected.variance.sqrt())
    assert repr(codes) == "Encoding(mean and sd (7, 2); in closed form)"
    assert torch.equal(posterior.encode(x, draws=2, seed=5).mean, codes.mean)


def test_grey_pixels_are_averaged_over_their_binary_draws() -> None:
    posterior = svi(VAE((3,), 2, (4,)), torch.rand(20, 3), steps=5, progress=False)
    codes = posterior.encode(torch.tensor([[0.5, 1.0, 0.0]]))
    ends = [posterior.program.encode(torch.tensor([[pixel, 1.0, 0.0]])).mean for pixel in (0.0, 1.0)]
    between = (codes.mean - ends[0]) / (ends[1] - ends[0])  # the share of ones among twenty draws
    assert codes.estimated == ("z",)
    assert bool(((between > 0.1) & (between < 0.9)).all())
    assert posterior.encode(torch.tensor([[1.0, 1.0, 0.0]])).estimated == ()


def test_a_site_that_depends_on_another_is_averaged_over_draws() -> None:
    codes = exact(two_layers, exact_two_layers, X).encode(X, draws=20_000)
    assert codes.estimated == ("u",)
    assert torch.allclose(codes.mean["z"], 2 * X / 3) and torch.allclose(codes.sd["z"], torch.tensor((2 / 3) ** 0.5))
    assert torch.allclose(codes.mean["u"], X / 3, atol=0.02)
    assert torch.allclose(codes.sd["u"], torch.tensor((2 / 3) ** 0.5), atol=0.02)  # 1/2 + 2/3 / 4 = 2/3
    assert repr(codes) == "Encoding(u (6,), z (6,); estimated from draws)"


def test_global_latents_widen_the_codes() -> None:
    codes = exact(shared_shift, guide_of_shift, X).encode(X, draws=20_000)
    assert codes.estimated == ("z",)
    assert torch.allclose(codes.mean, (X - 1) / 2, atol=0.02)
    assert torch.allclose(codes.sd, torch.tensor((0.5 + 0.25**2) ** 0.5), atol=0.02)


def test_codes_of_named_guides() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, s), obs=x)

    codes = svi(Program.of(model, "normal"), X, steps=5, progress=False).encode(X)
    assert codes.estimated == ("s",)  # a positive site is drawn as the exponential of a normal
    assert svi(Program.of(model, "map"), X, steps=5, progress=False).encode(X).sd["z"].tolist() == [0.0] * 6


@config_enumerate
def two_groups(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[k], 1.0), obs=x)


def test_classes_that_are_summed_out_have_probabilities() -> None:
    posterior = exact(two_groups, lambda x: None, X)
    codes = posterior.encode(X, draws=5000)
    assert codes.estimated == posterior.encode(torch.tensor([50.0])).estimated == ("k",)
    assert codes.classes == ("k",)
    assert torch.allclose(codes.mean[:, 1], torch.sigmoid(2 * X), atol=0.03)
    assert torch.allclose(posterior.reconstruct(X, draws=5000).mean, torch.tanh(X), atol=0.06)
    assert posterior.decode(torch.tensor([0, 1])).mean.tolist() == [-1.0, 1.0]


def test_rows_decode_under_the_model() -> None:
    posterior = exact(two_layers, exact_two_layers, X)
    both = posterior.decode({"u": X, "z": 2 * X}, X)
    assert torch.allclose(both.mean, 2 * X) and torch.allclose(both.sd, torch.ones(6))
    one = posterior.decode({"u": X.tolist()}, X, draws=20_000)  # z is drawn from the model: z ~ N(u, 1)
    assert torch.allclose(one.mean, X, atol=0.04) and torch.allclose(one.sd, torch.tensor(2**0.5), atol=0.04)


def test_decoding_draws_global_latents_from_the_posterior() -> None:
    posterior = exact(shared_shift, guide_of_shift, X)
    found = posterior.decode(torch.zeros(6), X, draws=20_000)
    assert torch.allclose(found.mean, torch.ones(6), atol=0.02)
    assert torch.allclose(found.epistemic, torch.tensor(0.5), atol=0.02)
    fixed = posterior.decode({"z": torch.zeros(6), "shift": 3.0}, X)
    assert fixed.mean.tolist() == [3.0] * 6


def test_reconstructions_come_from_the_codes_of_the_rows() -> None:
    posterior = exact(two_layers, exact_two_layers, X)
    found = posterior.reconstruct(X, draws=20_000)
    assert torch.allclose(found.mean, 2 * X / 3, atol=0.03)
    assert torch.allclose(found.sd, torch.tensor((1 + 2 / 3) ** 0.5), atol=0.03)


def test_conditional_autoencoder_decodes_with_its_inputs() -> None:
    class Conditional(Program):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(1, 1)

        def model(self, c: Tensor, x: Tensor | None = None) -> None:
            with self.data_plate(c):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(10 * c + self.net(z), 0.1).to_event(1), obs=x)

        def guide(self, c: Tensor, x: Tensor | None = None) -> None:
            with self.data_plate(c):
                pyro.sample("z", dist.Normal((x - 10 * c) / 2, 0.5).to_event(1))

    c, x = torch.arange(4.0)[:, None], torch.randn(4, 1)
    posterior = svi(Conditional(), (c, x), steps=1, progress=False)
    assert torch.allclose(posterior.encode(c, x).mean, (x - 10 * c) / 2)
    z = torch.ones(4, 1)
    assert torch.allclose(posterior.decode(z, c).mean, 10 * c + posterior.program.net(z).detach())
    assert posterior.reconstruct(c, x).mean.shape == (4, 1)


def test_paths_of_sequences() -> None:
    example = DeepMarkovModel.example()
    posterior = svi(example.program, example.data, steps=3, progress=False)
    codes = posterior.encode(*example.data)
    assert codes.mean.shape == codes.sd.shape == (24, 6, 2) and codes.estimated == ("z",)
    short = int(example.data[1].argmin())
    assert float(codes.mean[short, int(example.data[1][short]) :].abs().sum()) == 0.0
    assert posterior.decode(codes.mean, *example.data).mean.shape == (24, 6, 5)
    assert posterior.decode(codes.mean[:3]).mean.shape == (3, 6, 5)


def test_columns_may_lie_outside_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("columns", 2, dim=-2), pyro.plate("rows", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x: Tensor) -> None:
        with pyro.plate("columns", 2, dim=-2), pyro.plate("rows", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.T / 2, 0.5**0.5))

    x = torch.randn(5, 2)
    posterior = exact(model, guide, x, data_plate="rows")
    monkeypatch.setattr("deepprob.posteriors.fitted._CHUNK", 300)  # some rows at a time
    assert len([*posterior.chunks(posterior._fitted.accept((x,)), 100)]) > 1
    assert torch.allclose(posterior.encode(x).mean, x.T / 2)


def bnn() -> Posterior:
    example = BayesianNeuralNetwork.example()
    return svi(example.program, example.data, steps=2, progress=False)


@pytest.mark.parametrize(
    ("ask", "instead"),
    [
        (lambda p, x: p.encode(x), r"Ask for posterior\.sample\(\) or posterior\.summary\(\)\."),
        (lambda p, x: p.decode(x), r"Ask for posterior\.predict\(\*data\)\."),
        (lambda p, x: p.reconstruct(x), r"Ask for posterior\.predict\(\*data\)\."),
    ],
)
def test_a_network_of_weights_has_no_codes(ask: Callable[[Posterior, Tensor], Any], instead: str) -> None:
    expected = r"is about the latent sites of rows, but in this program all rows share the latent sites \(layers.*"
    with pytest.raises(ValueError, match=expected + instead):
        ask(bnn(), torch.randn(4, 3))


def test_a_program_without_latents_has_no_codes() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("m", torch.zeros(())), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"in this program there are none\. Ask for posterior\.predict"):
        svi(Program.of(model, lambda x: None), X, steps=1, progress=False).reconstruct(X)


def test_wrong_values_of_latents() -> None:
    posterior = exact(two_layers, exact_two_layers, X)
    with pytest.raises(ValueError, match=r"several local latent sites \(z, u\)|several local latent sites \(u, z\)"):
        posterior.decode(X, X)
    with pytest.raises(ValueError, match=r"unknown latent site of z 'w'"):
        posterior.decode({"w": X}, X)
    with pytest.raises(TypeError, match=r"z\['z'\] must be numbers; got 'a'\. Give an array or a tensor\."):
        posterior.decode({"z": "a"}, X)
    with pytest.raises(ValueError, match=r"z\['z'\] must have an axis of rows.*got shape \(\)\. Write z\[None\]"):
        posterior.decode({"z": 1.0}, X)
    with pytest.raises(
        ValueError, match=r"z\['z'\] must have shape \(6,\), as its site has; got \(5,\)\. Give every row"
    ):
        posterior.decode({"z": X[:5]}, X)
    with pytest.raises(
        TypeError, match=r"z\['z'\] must be numbers; got an Encoding\. Give its means: encoding\.mean\."
    ):
        posterior.decode({"z": posterior.encode(X)}, X)


def test_a_shared_site_that_is_summed_out_needs_a_value() -> None:
    @config_enumerate
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(3 * k + z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    posterior = exact(model, guide, X)
    with pytest.raises(
        ValueError, match=r"site 'k' is summed out of all rows at once.*Give its value: posterior\.decode"
    ):
        posterior.decode({"z": X}, X)
    assert posterior.decode({"z": X, "k": 1.0}, X).mean.tolist() == pytest.approx((3 + X).tolist())


def test_a_model_with_inputs_needs_them() -> None:
    def model(c: Tensor, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(c + z, 1.0), obs=x)

    def guide(c: Tensor, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x - c, 1.0))

    posterior = exact(model, guide, X, X)
    with pytest.raises(ValueError, match=r"the rows depend on inputs too.*Call posterior\.decode\(z, \*data\)"):
        posterior.decode(X)
    assert posterior.decode(X, X, torch.zeros(6)).mean.tolist() == pytest.approx((2 * X).tolist())


def test_whole_numbers_have_moments() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Binomial(4, torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(k.to(x.dtype), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Delta(torch.full((len(x),), 2)))

    codes = exact(model, guide, X).encode(X)
    assert codes.mean.tolist() == [2.0] * 6 and codes.sd.tolist() == [0.0] * 6
