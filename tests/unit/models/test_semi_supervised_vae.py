"""The semi-supervised autoencoder: labels that are missing, custom networks, codes of a fitted VAE."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepprob.inference import svi
from deepprob.models import VAE, DeepMarkovModel, SemiSupervisedVAE
from deepprob.posteriors.posterior import Posterior

X = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.where(torch.arange(30) < 9, torch.arange(30) % 3, -1)


def made(**options: object) -> SemiSupervisedVAE:
    return SemiSupervisedVAE((4,), 3, latent_dim=2, hidden_dims=(8,), **options)  # type: ignore[arg-type]


def fitted(y: object, **options: object) -> Posterior:
    return svi(made(**options), (X, y), epochs=2, batch_size=10, compile=False, progress=False)


@pytest.mark.parametrize(
    "y",
    [LABELS.numpy(), LABELS.float().numpy(), LABELS.reshape(-1, 1).numpy()],
    ids=["whole", "float", "column"],
)
def test_labels_of_all_kinds_are_one(y: np.ndarray) -> None:  # type: ignore[type-arg]
    posterior, wanted = fitted(y), fitted(LABELS)
    assert posterior.history.steps == wanted.history.steps
    assert len(posterior.program.labels) == 9


def test_known_labels_are_certain_and_others_come_from_the_classifier() -> None:
    posterior = fitted(LABELS)
    known = posterior.encode(X, LABELS).mean["y"]  # type: ignore[index]
    free = posterior.encode(X).mean["y"]  # type: ignore[index]
    assert torch.equal(known[:9].argmax(1), LABELS[:9]) and bool((known[:9].max(1).values == 1).all())
    assert bool((free.max(1).values < 1).all()) and torch.allclose(free.sum(1), torch.ones(30))


def test_a_fit_without_labels_records_no_penalty() -> None:
    assert "label_loss" in fitted(LABELS).history.steps
    posterior = svi(made(), X, epochs=1, batch_size=10, compile=False, progress=False)
    assert "label_loss" not in posterior.history.steps


def test_wrong_labels_and_rows_are_named() -> None:
    with pytest.raises(ValueError, match=r"y must be in 0\.\.2 for num_classes=3; got 7 in row 0"):
        fitted(torch.full((30,), 7))
    with pytest.raises(ValueError, match=r"'y' of data has 21 NaN values, .*A missing label is -1: np\.nan_to_num"):
        fitted(np.where(LABELS >= 0, LABELS, np.nan))
    with pytest.raises(ValueError, match=r"rows must have shape \(4,\); got \(5,\)"):
        svi(made(), (torch.rand(30, 5), LABELS), epochs=1)
    with pytest.raises(ValueError, match=r"hidden_dims must have at least one size"):
        SemiSupervisedVAE((4,), 3, hidden_dims=())
    with pytest.raises(ValueError, match=r"unknown posterior 'nomal'"):
        made(posterior="nomal")
    with pytest.raises(ValueError, match=r"needs rows and labels; got one field"):
        SemiSupervisedVAE.from_data(X)
    with pytest.raises(ValueError, match=r"label_weight must be a positive number or 0; got -1"):
        made(label_weight=-1.0)


def test_from_data_reads_shape_classes_and_likelihood() -> None:
    program = SemiSupervisedVAE.from_data((X, LABELS), latent_dim=2)
    assert program.shape == (4,) and program.num_classes == 3 and program.observation.family == "bernoulli"


class Joined(nn.Module):
    """A recurrent network over a row, whose last state is joined with the class."""

    def __init__(self, size: int, outputs: int) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(1, 6, batch_first=True), nn.Linear(6 + 3, outputs)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        found: Tensor = self.last(torch.cat([self.lstm(x.unsqueeze(-1))[0][:, -1], classes], 1))
        return found


def test_custom_networks_read_rows_and_classes() -> None:
    posterior = fitted(
        LABELS,
        classifier=nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
        encoder=Joined(4, 4),
        decoder=Joined(2, 4),
    )
    assert posterior.log_evidence(X, LABELS, particles=3).shape == (30,)
    with pytest.raises(ValueError, match=r"decoder returns 5 outputs per row, but likelihood='bernoulli' over rows"):
        fitted(LABELS, decoder=Joined(2, 5))


def test_codes_of_a_fitted_vae_are_the_rows_of_the_second(tmp_path: Path) -> None:
    base = svi(VAE((4,), 3, (8,)), X, epochs=2, batch_size=10, compile=False, progress=False)
    program = SemiSupervisedVAE.on_codes(base, 3, latent_dim=2, hidden_dims=(8,))
    posterior = svi(program, (X, LABELS), epochs=2, batch_size=10, compile=False, progress=False)
    before, after = base.program.state_dict(), posterior.program.base.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert posterior.encode(X).mean["y"].shape == (30, 3)  # type: ignore[index]
    posterior.save(tmp_path / "codes")
    again = Posterior.load(tmp_path / "codes", program=program)
    assert torch.equal(again.encode(X).mean["y"], posterior.encode(X).mean["y"])  # type: ignore[index]
    with pytest.raises(TypeError, match=r"needs the posterior of a VAE; got that of DeepMarkovModel"):
        example = DeepMarkovModel.example()
        other = svi(example.program, example.data, epochs=1, compile=False)
        SemiSupervisedVAE.on_codes(other, 3)
