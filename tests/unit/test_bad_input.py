"""Mistaken input to the public API raises a helpful message before the first step.

Every message states the expected value in the user's names, the given one, and a remedy.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from deepprob import Posterior, Program, load_data
from deepprob.errors import StorageError
from deepprob.fitting.callbacks import Callback, Fit
from deepprob.fitting.kl_schedules import KLWarmUp
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork, DeepMarkovModel

torch.manual_seed(0)
X = torch.randn(300, 3)
Y = X.sum(1)


class NeverTrains(Callback):
    def step_end(self, fit: Fit) -> None:
        pytest.fail("a step was taken")


def regression(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5), obs=y)


def classes(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=w.expand(*w.shape[:-2], len(x), 3)), obs=y)


def counts(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson(w.exp()), obs=y)


def binary(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=w), obs=y)


def of(model: Callable[..., Any]) -> Program:
    return Program.of(model, "normal", data_plate="data")


def vae(**options: Any) -> VAE:
    return VAE((3,), latent_dim=2, hidden_dims=(4,), **options)


def bnn(**options: Any) -> BayesianNeuralNetwork:
    outputs = options.get("num_classes", 1)
    return BayesianNeuralNetwork(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)), **options)


PROGRAMS: dict[str, Callable[[], Program]] = {"of": lambda: of(regression), "bnn": bnn}


def refuse(message: str, program: Program, data: Any, error: type[Exception] = ValueError, **options: Any) -> None:
    with pytest.raises(error, match=message):
        svi(program, data, **{"epochs": 1, "callbacks": [NeverTrains()]} | options)


def with_value(data: Tensor, value: float, row: int = 200) -> Tensor:
    spoilt = data.clone()
    spoilt[row] = value
    return spoilt


# -- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("size", [None, 20])
def test_nan_infinite_and_empty_data(program: Callable[[], Program], size: int | None) -> None:
    refuse(
        r"'x' of data has 3 NaN values, the first in row 200\. Drop these rows or fill them in\.",
        program(),
        (with_value(X, np.nan), Y),
        batch_size=size,
    )
    refuse(
        r"'y' of data has 1 infinite value, the first in row 7\. Drop",
        program(),
        (X, with_value(Y, np.inf, 7)),
        batch_size=size,
    )
    refuse(r"'x' of data is empty: shape \(0, 3\)\. Pass at least one row of numbers\.", program(), (X[:0], Y[:0]))
    refuse(r"'x' of held_out has 3 NaN values", program(), (X, Y), held_out=(with_value(X, np.nan), Y))
    refuse(
        r"all fields must have the same number of rows; 'x' has 300, 'y' has 299\.",
        program(),
        (X, Y[:-1]),
    )
    # A Pyro program may take a number; this one takes its length.
    refuse(r"'x' of data is one number, not rows\. Give|len\(\) of a 0-d tensor", program(), (torch.tensor(1.0), Y))


def test_data_that_are_not_numbers() -> None:
    refuse(r"'x' of data must be numbers; got dtype <U1\. Encode text", of(regression), (np.array(["a"]), Y), TypeError)
    refuse(
        r"'iris' of data must be numbers in a tensor.*got DataSet\. Pass one of its parts",
        of(regression),
        load_data("iris"),
        TypeError,
    )
    refuse(r"'x' of data is complex; expected real numbers", of(regression), (X.to(torch.complex64), Y), TypeError)


@pytest.mark.parametrize("rows", [1, 2])
def test_data_of_one_row(rows: int) -> None:
    for program, data in (
        (of(regression), (X[:rows], Y[:rows])),
        (bnn(), (X[:rows], Y[:rows])),
        (vae(), torch.rand(rows, 3)),
        (DeepMarkovModel(4, 2, 3, 3), torch.ones(rows, 5, 4)),
    ):
        posterior = svi(program, data, epochs=2, held_out=data)
        assert bool(torch.isfinite(posterior.elbo(*(data if isinstance(data, tuple) else (data,)))).all())


@pytest.mark.parametrize(
    "kind",
    [
        lambda x: (x * 10).round().int(),
        lambda x: x > 0,
        lambda x: x.double(),
        lambda x: x.half(),
        lambda x: x.T.contiguous().T,
        lambda x: x.numpy()[::-1],
        lambda x: np.asfortranarray(x.numpy()),
        lambda x: x.numpy().astype(">f4"),
        lambda x: x.tolist(),
    ],
    ids=["int32", "bool", "float64", "float16", "transposed", "negative strides", "fortran", "big endian", "lists"],
)
def test_every_kind_of_array_is_accepted_at_fit_and_prediction(kind: Callable[[Tensor], Any]) -> None:
    x = kind(X[:20])
    for program in (of(regression), bnn()):
        posterior = svi(program, (x, Y[:20]), epochs=2)
        assert bool(torch.isfinite(posterior.predict(x, draws=3).mean).all())
    fitted = svi(of(regression), (X, Y), epochs=1)
    assert fitted.predict(x, draws=3).mean.shape == (20,)


def test_integers_where_a_network_expects_floats() -> None:
    net = nn.Linear(3, 1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1) + w, 1.0), obs=y)

    refuse(
        r"the program cannot run on rows of x \(3,\) int64, y \(\) float32: .*dtype.*Check the shapes and types of the",
        of(model),
        ((X * 10).long(), Y),
    )


# -- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 20])
def test_missing_dimensions(size: int | None) -> None:
    refuse(
        r"rows must have shape \(3,\), as in VAE\(\(3,\)\); got \(\)\. Reshape them: x\.reshape\(-1, 3\)\.",
        vae(),
        torch.rand(300),
        batch_size=size,
    )
    refuse(
        r"x must be rows of features, shape \(N, D\); got shape \(300,\)\. Reshape one feature to x\.reshape",
        bnn(),
        (X[:, 0], Y),
        batch_size=size,
    )
    refuse(
        r"x must be sequences of shape \(rows, steps, 4\); got \(5, 4\)\. Write x\[None\] for one sequence\.",
        DeepMarkovModel(4, 2, 3, 3),
        torch.ones(5, 4),
    )
    refuse(
        r"every row of y must have shape \(\), as the model's Normal distribution has; got \(1,\)\.",
        of(regression),
        (X, Y[:, None]),
        batch_size=size,
    )


def test_missing_and_surplus_arguments() -> None:
    def needs_both(x: Tensor, y: Tensor) -> None:
        regression(x, y)

    refuse(r"the model takes x, y; data lacks y\. Pass a tuple in this order, observed values", of(needs_both), X)
    refuse(r"the model takes x, y; data lacks x\. Pass a tuple in this order", of(regression), None)
    refuse(
        r"nothing is observed, so there is nothing to learn from\. Give the observed arguments too", of(regression), X
    )
    refuse(r"nothing is observed, so there is nothing to learn from", bnn(), X)
    refuse(r"the model takes 2 arguments \(x, y\); data has 3 parts", of(regression), (X, Y, Y))
    refuse(
        r"held_out must have the 2 parts of data \(x, y\); got 1\. Include the observed values",
        of(regression),
        (X, Y),
        held_out=X,
    )


@pytest.fixture(scope="module")
def fits() -> dict[str, Posterior]:
    return {
        "of": svi(of(regression), (X, Y), epochs=1),
        "bnn": svi(bnn(), (X, Y), epochs=1),
        "vae": svi(vae(), torch.rand(20, 3), epochs=1),
        "classes": svi(bnn(likelihood="categorical", num_classes=3), (X, (Y > 0).long()), epochs=1),
        "of classes": svi(of(classes), (X, (Y > 0).long()), epochs=1),
    }


@pytest.mark.parametrize("name", ["of", "bnn"])
def test_features_at_prediction(fits: dict[str, Posterior], name: str) -> None:
    posterior = fits[name]
    for query in (posterior.predict, posterior.log_likelihood, posterior.sample):
        with pytest.raises(
            ValueError, match=r"x must have 3 features per row as in the fit; got 2\. Give the same col"
        ):
            query(X[:, :2])
    with pytest.raises(ValueError, match=r"'x' of data has 3 NaN values, the first in row 200\."):
        posterior.predict(with_value(X, np.nan))
    with pytest.raises(ValueError, match=r"same number of rows; 'x' has 300, 'y' has 10"):
        posterior.log_likelihood(X, Y[:10])
    with pytest.raises(ValueError, match=r"x must have 3 features per row as in the fit; got 2\."):
        svi(of(regression), (X, Y), held_out=(X[:, :2], Y), callbacks=[NeverTrains()])


def test_single_row_at_prediction_needs_a_row_axis(fits: dict[str, Posterior]) -> None:
    with pytest.raises(
        ValueError, match=r"x must have rows of shape \(3,\) as in the fit; got \(\)\. Reshape one row to"
    ):
        fits["of"].predict(X[0])
    with pytest.raises(ValueError, match=r"x must be rows of features.*or one row to x\.reshape\(1, -1\)\."):
        fits["bnn"].predict(X[0])
    with pytest.raises(ValueError, match=r"rows must have shape \(3,\), as in VAE"):
        fits["vae"].predict(X[0])


# -- supports -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 20])
@pytest.mark.parametrize(
    ("model", "y", "message"),
    [
        (binary, with_value((Y > 0).float(), 2.0), r"y must be 0 or 1 for a Bernoulli likelihood; got values from"),
        (
            counts,
            with_value((Y > 0).float(), -1.0),
            r"y must be whole numbers of at least 0 for a Poisson.*from -1 to 1",
        ),
        (counts, with_value((Y > 0).float(), 0.5), r"y must be whole numbers of at least 0 for a Poisson likelihood"),
        (classes, with_value((Y > 0).long(), 3), r"y must be whole numbers from 0 to 2 for a Categorical.*from 0 to 3"),
        (
            classes,
            with_value((Y > 0).long(), -1),
            r"y must be whole numbers from 0 to 2 for a Categorical.*from -1 to 1",
        ),
        (
            classes,
            with_value((Y > 0).float(), 0.5),
            r"y must be whole numbers from 0 to 2 for a Categorical likelihood",
        ),
    ],
)
def test_values_outside_a_support(model: Any, y: Tensor, message: str, size: int | None) -> None:
    """The wrong value is in row 200: it must be found although the first minibatch is valid."""
    refuse(message, of(model), (X, y), batch_size=size)
    refuse(message, of(model), (X, y.round().clamp(0, 1)), held_out=(X, y), batch_size=size)


def test_values_outside_the_likelihood_of_a_model() -> None:
    grey = 255 * torch.rand(20, 3).round()
    refuse(r"images must be in \[0, 1\] for a Bernoulli likelihood; got values from 0 to 255\. Divide", vae(), grey)
    refuse(
        r"values must be whole numbers; got 0\.\d+ in row 0\. Number the classes from 0\.",
        vae(likelihood="categorical", num_classes=4),
        torch.rand(9, 3),
    )
    refuse(
        r"values must be in 0\.\.3 for num_classes=4; got 255 in row \d+\. .*, or raise num_classes\.",
        vae(likelihood="categorical", num_classes=4),
        grey,
    )
    refuse(
        r"x must be 0 or 1 for likelihood='bernoulli'; got 2 in row 1\. Write \(x > threshold\)\.float\(\)",
        DeepMarkovModel(4, 2, 3, 3),
        torch.ones(2, 5, 4).cumsum(0) * torch.eye(5)[:, :4],
    )
    labels = (Y > 0).long()
    many = bnn(likelihood="categorical", num_classes=3)
    refuse(r"labels y must be in 0\.\.2 for num_classes=3; got 3 in row 200\.", many, (X, with_value(labels, 3)))
    refuse(r"labels y must be whole numbers; got 0\.5 in row 200\.", many, (X, with_value(labels.float(), 0.5)))
    refuse(
        r"y must be 0 or 1 for likelihood='bernoulli'; got 2 in row 200\.",
        bnn(likelihood="bernoulli"),
        (X, with_value(labels, 2)),
    )


def test_values_outside_a_support_at_scoring(fits: dict[str, Posterior]) -> None:
    labels = (Y > 0).long()
    with pytest.raises(ValueError, match=r"labels y must be in 0\.\.2 for num_classes=3; got 7 in row 200\."):
        fits["classes"].log_likelihood(X, with_value(labels, 7))
    for query in (fits["of classes"].log_likelihood, fits["of classes"].log_evidence, fits["of classes"].elbo):
        with pytest.raises(ValueError, match=r"y must be whole numbers from 0 to 2 for a Categorical.*from 0 to 7\."):
            query(X, with_value(labels, 7))
    with pytest.raises(ValueError, match=r"y must be whole numbers as in the fit; got 0\.5\."):
        fits["of classes"].log_likelihood(X, with_value(labels.float(), 0.5))
    with pytest.raises(ValueError, match=r"images must be in \[0, 1\] for a Bernoulli likelihood; got values from"):
        fits["vae"].log_evidence(255 * torch.rand(4, 3))


def test_masked_rows_may_hold_any_value() -> None:
    seen = torch.arange(300) < 250

    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 300) as rows, pyro.poutine.mask(mask=seen[rows]):
            pyro.sample("y", dist.Bernoulli(logits=w), obs=y)

    svi(of(model), with_value((Y > 0).float(), -1.0, 280), epochs=1, batch_size=20)
    refuse(r"y must be 0 or 1 for a Bernoulli", of(model), with_value((Y > 0).float(), -1.0, 2), batch_size=20)


# -- names and options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, r"epochs must be a whole number of at least 1; got 0\."),
        ({"epochs": 2.5}, r"epochs must be a whole number of at least 1; got 2\.5\."),
        ({"epochs": True}, r"epochs must be a whole number of at least 1; got True\."),
        ({"seed": -1}, r"seed must be a whole number of at least 0; got -1\."),
        ({"batch_size": 0}, r"batch_size must be a whole number of at least 1; got 0\."),
        ({"batch_size": "all"}, r"batch_size must be a whole number of at least 1; got 'all'\."),
        ({"weights": "frsh"}, r"weights must be 'auto', 'fresh' or 'keep'; got 'frsh'\."),
        ({"steps": 0, "epochs": None}, r"steps must be a whole number of at least 1; got 0\."),
        ({"steps": 5, "epochs": 2}, r"give epochs or steps, not both; got epochs=2 and steps=5\. Leave one out\."),
        ({"guide": "normall"}, r"unknown guide 'normall'\. Did you mean 'normal'\?"),
        ({"objective": "elbow"}, r"unknown objective 'elbow'\. Did you mean 'elbo'\?"),
        ({"optimizer": "adm"}, r"unknown optimizer 'adm'\. Did you mean 'adam'\?"),
        ({"device": "gpu"}, r"unknown device 'gpu'\. Choose from: auto, cpu, cuda, cuda:<number>\."),
        ({"compile": "yes"}, r"compile must be True, False or 'auto'; got 'yes'\."),
        ({"compile": X}, r"compile must be True, False or 'auto'; got a Tensor of shape \(300, 3\)\."),
        ({"compile": np.zeros(2)}, r"compile must be True, False or 'auto'; got array\(\[0\., 0\.\]\)\."),
        ({"progress": "maybe"}, r"progress must be True, False or 'auto'; got 'maybe'\."),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    refuse(message, of(regression), (X, Y), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"callbacks": KLWarmUp(2)},
            r"callbacks must be a list of Callback objects; got KLWarmUp\. Write callbacks=\[",
        ),
        ({"callbacks": [KLWarmUp(2), KLWarmUp]}, r"callbacks must be a list of Callback objects; got type\."),
        (
            {"callbacks": [lambda fit: None, 3]},
            r"callbacks must be a list .*; got int\. .*, or put a function of the fit",
        ),
        ({"callbacks": len}, r"callbacks must be a list of Callback objects; got builtin_function_or_method\."),
        ({"callbacks": [print]}, r"callbacks must be a list of Callback objects; got builtin_function_or_method\."),
        ({"optimizer": 0.1}, r"optimizer must be a name, a class of torch\.optim, or .*got float\."),
        ({"objective": 1}, r"objective must be a name \(elbo, stl, iwae, .*\) or a callable .*; got int\."),
        ({"guide": 1}, r"guide must be a name, an AutoGuide class or a callable; got int\."),
        ({"device": X}, r"device must be a name or a torch\.device; got Tensor\. Choose from: auto, cpu, cuda"),
        ({"device": None}, r"device must be a name or a torch\.device; got NoneType\. Choose from: auto, cpu, cuda"),
    ],
)
def test_options_of_wrong_type(options: dict[str, Any], message: str) -> None:
    refuse(message, of(regression), (X, Y), TypeError, **options)


def test_refuses_functions_and_minibatches_without_a_plate() -> None:
    refuse(
        r"svi expects a Program; got function\. Wrap a Pyro model: Program\.of\(model, guide\)\.",
        regression,
        (X, Y),
        TypeError,
    )  # type: ignore[arg-type]
    refuse(
        r"batch_size=20 is smaller than the data \(300 rows\), but the program names no data plate",
        Program.of(regression, "normal"),
        (X, Y),
        batch_size=20,
    )


def test_nothing_to_train() -> None:
    def model(y: Tensor) -> None:
        pyro.sample("y", dist.Normal(0.0, 1.0).expand([300]).to_event(1), obs=y)

    refuse(
        r"nothing to train: neither the model nor the guide has a parameter\. Add one",
        Program.of(model, lambda y: None),
        Y,
    )


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'digit'\. Did you mean 'digits'\?"):
        load_data("digit")
    with pytest.raises(
        ValueError, match=r"unknown likelihood 'bernouli'\. Did you mean 'bernoulli'\? Choose from: ber"
    ):
        vae(likelihood="bernouli")
    with pytest.raises(ValueError, match=r"unknown posterior 'norml'\. Did you mean 'normal'\?"):
        vae(posterior="norml")
    with pytest.raises(ValueError, match=r"unknown activation 'rely'\. Did you mean 'relu'\?"):
        vae(activation="rely")
    with pytest.raises(
        ValueError,
        match=r"unknown likelihood 'gaussian'\. Choose from: bernoulli, categorical, .* normal, .*, student_t\.",
    ):
        bnn(likelihood="gaussian")
    with pytest.raises(ValueError, match=r"unknown schedule 'cos'\. Did you mean 'cosine'\?"):
        Optimizer(schedule="cos")
    with pytest.raises(ValueError, match=r"latent_dim must be a whole number of at least 1; got 0\."):
        VAE((3,), latent_dim=0)
    with pytest.raises(ValueError, match=r"every size in shape must be a whole number of at least 1; got 2\.5\."):
        VAE((2.5,))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"shape must have at least one axis; got \(\)\. Write shape=\(1,\) and give x"
    ):
        VAE(())
    with pytest.raises(
        ValueError, match=r"num_classes is only for likelihood='categorical'; got likelihood='poisson'\."
    ):
        vae(likelihood="poisson", num_classes=3)
    with pytest.raises(ValueError, match=r"likelihood='categorical' needs num_classes, a whole.* 2; got None\."):
        vae(likelihood="categorical")


# -- files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, fits: dict[str, Posterior]) -> Path:
    fits["vae"].save(tmp_path / "fit")
    return tmp_path / "fit"


def tensor_file(folder: Path) -> Path:
    (file,) = folder.glob("tensors-*")
    return file


def truncate(folder: Path) -> None:
    file = tensor_file(folder)
    file.write_bytes(file.read_bytes()[:-8])


def alter(folder: Path) -> None:
    file = tensor_file(folder)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def edit(folder: Path, **entries: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, r"truncated"),
        (alter, r"sha256"),
        (lambda folder: tensor_file(folder).unlink(), r"cannot be trusted: it cannot be read: No such file"),
        (lambda folder: edit(folder, schema=99), r"newer|schema"),
        (lambda folder: edit(folder, format="pickle"), r"not .*deepprob"),
        (lambda folder: edit(folder, kind="checkpoint"), r"sha256"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest"),
        (lambda folder: (folder / "manifest.json").unlink(), r"manifest|nothing"),
    ],
    ids=["truncated", "altered", "missing", "newer", "not ours", "checkpoint", "half a manifest", "no manifest"],
)
def test_files_that_cannot_be_trusted(
    spoil: Callable[[Path], Any], message: str, saved: Path, tmp_path: Path, fits: dict[str, Posterior]
) -> None:
    fits["vae"].save(tmp_path / "good")
    spoil(saved)
    with pytest.raises(StorageError, match=message) as caught:
        Posterior.load(saved)
    assert "fit" in str(caught.value)
    assert Posterior.load(tmp_path / "good").latent_sites == {"z": "local"}


def test_failed_save_keeps_the_last_one(saved: Path, fits: dict[str, Posterior]) -> None:
    with pytest.raises(TypeError):
        broken = svi(vae(), torch.rand(20, 3), epochs=1)
        broken.config["bad"] = object()
        broken.save(saved)
    assert Posterior.load(saved).history == fits["vae"].history


def test_messages_end_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"\. [A-Z][^.]+.*\.$") as caught:
        svi(vae(), 255 * torch.ones(4, 3))
    assert "\n" not in str(caught.value)
