"""`dp.plot` chooses the picture that fits its subject."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from pyro.infer import config_enumerate
from torch import Tensor

import deepprob as dp
from deepprob.diagnostics import plots
from deepprob.diagnostics.figures import legend_above
from deepprob.diagnostics.style import new_axes, new_figure
from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork, DeepMarkovModel
from deepprob.posteriors.history import History
from deepprob.posteriors.posterior import Posterior
from deepprob.posteriors.prediction import Prediction
from deepprob.programs.program import Program


def predicted(distribution: Any, site: str = "y") -> Prediction:
    return Prediction(distribution, distribution.sample(), site)


def labels_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def drawn(figure: Figure) -> Figure:
    """The figure, after it was drawn without a change of global settings."""
    before = dict(matplotlib.rcParams)
    assert plots.render(figure)[:4] == b"\x89PNG"
    assert dict(matplotlib.rcParams) == before
    return figure


@pytest.fixture(scope="module")
def regression() -> tuple[Posterior, Tensor, Tensor]:
    x = torch.linspace(-1, 1, 30)[:, None]
    return svi(BayesianNeuralNetwork(dp.MLP(1, 1, (4,))), (x, x**2), steps=20, progress=False), x, x**2


def model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(mu + w.sum(-1) + a + b.sum(-1), 1.0), obs=y)


@pytest.fixture(scope="module")
def mixed() -> Posterior:
    return svi(Program.of(model, "normal"), torch.randn(12), steps=20, progress=False)


def test_few_global_numbers_have_densities(mixed: Posterior) -> None:
    figure = drawn(dp.plot(mixed))
    assert [axes.get_title() for axes in figure.axes] == ["mu", "w[0]", "w[1]"]
    assert labels_of(figure) == ["90% of the probability", "mean"]
    assert [axes.get_title() for axes in dp.plot(mixed, site="mu").axes] == ["mu"]
    with pytest.raises(ValueError, match=r"unknown global latent site 'a'"):
        dp.plot(mixed, site="a")


def test_many_global_numbers_are_a_forest_of_the_largest() -> None:
    x = torch.randn(20, 3)
    network = svi(BayesianNeuralNetwork(dp.MLP(3, 1, (10,))), (x, x[:, :1]), steps=5, progress=False)
    (axes,) = drawn(dp.plot(network)).axes
    assert axes.get_xlabel() == "value of the 30 largest of 54 numbers" and len(axes.get_yticks()) == 30


def test_local_latents_are_shown_with_the_data(mixed: Posterior) -> None:
    y = torch.randn(12)
    with pytest.raises(ValueError, match=r"several latent sites are local \(a, b\)\. Choose one with site='\.\.\.'\."):
        dp.plot(mixed, y)
    with pytest.raises(ValueError, match="unknown local latent site 'mu'"):
        dp.plot(mixed, y, site="mu")
    assert drawn(dp.plot(mixed, y, site="a")).axes[0].get_ylabel() == "a"
    assert drawn(dp.plot(mixed, y, site="b")).axes[0].get_xlabel() == "first latent dimension"


def test_groups_that_are_summed_out_have_bars() -> None:
    @config_enumerate
    def groups(y: Tensor) -> None:
        centre = pyro.param("centre", torch.ones(()))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("y", dist.Normal(centre * (k - 1.0), 1.0), obs=y)

    posterior = svi(Program.of(groups, lambda y: None), torch.randn(12), steps=2, progress=False)
    figure = drawn(dp.plot(posterior, torch.randn(12)))
    assert figure.axes[0].get_ylabel() == "probability" and {*labels_of(figure)} == {"0", "1", "2"}


def test_a_program_that_holds_its_data_is_shown_without_data() -> None:
    y = torch.randn(12)

    def held() -> None:
        with pyro.plate("data", 12):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    posterior = svi(Program.of(held, "normal"), steps=2, progress=False)
    assert drawn(dp.plot(posterior)).axes[0].get_ylabel() == "z"


def test_a_program_without_latents_has_predictions_only() -> None:
    def noise(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.param("mean", torch.zeros(())), 1.0), obs=y)

    posterior = svi(Program.of(noise, lambda y: None), torch.randn(12), steps=2, progress=False)
    with pytest.raises(ValueError, match=r"draws of no latent site.*dp\.plot\(posterior\.predict\(\*data\)\)\."):
        dp.plot(posterior, torch.randn(12))
    assert dp.plot(posterior.predict(torch.zeros(12))).axes[0].get_ylabel() == "y"


def test_latent_space_takes_its_colors_from_the_data() -> None:
    digits = dp.load_data("digits")
    posterior = svi(VAE((8, 8), 2, (8,)), digits.train, steps=2, progress=False)
    assert labels_of(drawn(dp.plot(posterior, digits.test))) == [str(i) for i in range(10)]
    pixels = digits.test["images"][:20]
    assert labels_of(dp.plot(posterior, pixels)) == []
    assert labels_of(dp.plot(posterior.encode(pixels), labels=np.arange(20) % 2)) == ["0", "1"]
    with pytest.raises(ValueError, match=r"every latent site is local.*dp\.plot\(posterior, \*data\)"):
        dp.plot(posterior)


def test_a_posterior_with_targets_shows_their_prediction(regression: tuple[Posterior, Tensor, Tensor]) -> None:
    posterior, x, y = regression
    (axes,) = drawn(dp.plot(posterior, x, y)).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("input", "y")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["90% band", "50% band", "mean", "data"]
    assert dp.plot(posterior, (x, y)).axes[0].get_xlabel() == "input"


def test_predictions_of_real_values(regression: tuple[Posterior, Tensor, Tensor]) -> None:
    posterior, x, y = regression
    p = posterior.predict(x)
    assert dp.plot(p).axes[0].get_xlabel() == "row"
    assert dp.plot(p, observed=y).axes[0].get_xlabel() == "observed"
    assert dp.plot(p, inputs=x).axes[0].get_xlabel() == "input"
    assert dp.plot(p, observed=y, inputs=torch.zeros(30, 2)).axes[0].get_xlabel() == "observed"
    two = predicted(dist.Normal(torch.zeros(20, 50, 2), 1.0).to_event(1))
    assert [axes.get_title() for axes in drawn(dp.plot(two)).axes] == ["y[0]", "y[1]"]
    assert dp.plot(two).axes[0].get_xlabel() == "row, the first 40 of 50"
    assert [axes.get_xlabel() for axes in dp.plot(two, observed=torch.zeros(50, 2)).axes] == ["observed", "observed"]
    assert [axes.get_title() for axes in drawn(dp.plot(predicted(dist.Normal(torch.zeros(20), 1.0)))).axes] == ["y"]


def test_predictions_of_classes_are_bars_of_probabilities() -> None:
    probs = torch.softmax(torch.randn(1, 50, 3), -1).expand(20, 50, 3)
    figure = drawn(dp.plot(predicted(dist.Categorical(probs)), observed=torch.zeros(50, dtype=torch.long)))
    assert {*labels_of(figure)} == {"0", "1", "2", "observed"}
    assert figure.axes[0].get_xlabel() == "row, the first 40 of 50"
    many = predicted(dist.Categorical(torch.full((20, 5, 12), 1 / 12)))
    assert [axes.get_ylabel() for axes in drawn(dp.plot(many)).axes] == ["probability", "class"]
    binary = predicted(dist.Bernoulli(torch.full((20, 5), 0.3)))
    assert {*labels_of(drawn(dp.plot(binary)))} == {"0", "1"}


def test_grids_of_binary_values_and_classes() -> None:
    items = predicted(dist.Bernoulli(torch.rand(20, 5, 4)).to_event(1), "items")
    assert [axes.get_ylabel() for axes in drawn(dp.plot(items)).axes] == ["row", "probability that items is 1"]
    classes = predicted(dist.Categorical(torch.full((20, 50, 4, 3), 1 / 3)).to_event(1))
    labels = [axes.get_ylabel() for axes in drawn(dp.plot(classes)).axes]
    assert labels == ["row, the first 40 of 50", "most likely class of y"]


def test_images_and_sequences_are_shown_as_images() -> None:
    example = DeepMarkovModel.example()
    posterior = svi(example.program, example.data, steps=2, progress=False)
    figure = drawn(dp.plot(posterior.reconstruct(*example.data), observed=example.data[0]))
    assert len(figure.axes) == 20
    assert drawn(dp.plot(posterior, *example.data)).axes[0].get_xlabel().startswith("first principal axis")


def test_history_shows_the_bound(mixed: Posterior) -> None:
    assert drawn(dp.plot(mixed.history)).axes[0].get_ylabel() == "ELBO, nats per datum"
    with pytest.raises(ValueError, match=r"this history has no elbo.*Plot the posterior\."):
        dp.plot(History())


def test_point_estimates_and_whole_numbers_have_no_density() -> None:
    def guide(y: Tensor) -> None:
        pyro.sample("k", dist.Poisson(pyro.param("rate", torch.tensor(3.0))))
        pyro.sample("m", dist.Delta(pyro.param("point", torch.tensor(0.5))))

    def counted(y: Tensor) -> None:
        total = pyro.sample("k", dist.Poisson(3.0)) + pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(total, 1.0), obs=y)

    posterior = svi(Program.of(counted, guide), torch.randn(5), steps=1, progress=False)
    assert {*labels_of(drawn(dp.plot(posterior)))} == {"probability", "mean"}


def test_other_subjects_are_refused() -> None:
    with pytest.raises(TypeError, match=r"plot shows a posterior, a prediction, an encoding or a history; got ndarray"):
        dp.plot(np.zeros(3))  # type: ignore[arg-type]


def test_options_of_other_pictures_are_refused(mixed: Posterior) -> None:
    with pytest.raises(TypeError, match=r"a Posterior does not use observed\. It takes data, labels, site\."):
        dp.plot(mixed, observed=torch.zeros(12))
    with pytest.raises(TypeError, match=r"the picture of a History does not use labels\. It takes no options\."):
        dp.plot(mixed.history, labels=[1])


def test_codes_of_one_number_take_colors(mixed: Posterior) -> None:
    figure = drawn(dp.plot(mixed, torch.randn(12), site="a", labels=torch.arange(12) % 2))
    assert labels_of(figure) == ["0", "1"]
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("row", "a")
    assert labels_of(dp.plot(mixed, torch.randn(12), site="a")) == ["mean ± 2 sd", "mean ± sd", "mean"]


def test_old_names_of_array_plots_warn() -> None:
    with pytest.warns(DeprecationWarning, match=r"dp\.plot\.kl_bars is now dp\.plots\.kl_bars\."):
        assert isinstance(dp.plot.kl_bars([1.0, 0.5]), Figure)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "names", [("a", "b", "c"), ("held-out log-likelihood of all rows", "mean of 200 steps", "one step")]
)
def test_a_legend_fits_into_the_width_of_its_figure(names: tuple[str, ...]) -> None:
    figure = new_figure(3.6, 3.0)
    axes = new_axes(figure)
    for name in names:
        axes.plot([0, 1], label=name)
    legend_above(figure)
    (legend,) = figure.legends
    assert legend.get_window_extent().width <= figure.bbox.width
    assert [text.get_text() for text in legend.get_texts()] == [*names]
    assert (legend._ncols == len(names)) is (names[0] == "a")
