"""VAE.from_data: rows of any kind, and the likelihood that their values ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import deepprob as dp
from deepprob.data import load_data
from deepprob.inference import svi
from deepprob.models import VAE
from deepprob.networks.values import first_field, likelihood_of

RANDOM = np.random.default_rng(0)
GREY = RANDOM.random((20, 4, 3)).astype(np.float32)
REAL = RANDOM.normal(size=(20, 3))
COUNTS = RANDOM.poisson(3.0, (20, 5))

DATA: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "grey images": (GREY, (4, 3), "bernoulli"),
    "a tensor": (torch.from_numpy(GREY), (4, 3), "bernoulli"),
    "binary rows": (GREY.reshape(20, 12) > 0.5, (12,), "bernoulli"),
    "a list": (REAL.tolist(), (3,), "normal"),
    "a tuple": ((REAL,), (3,), "normal"),
    "a dict": ({"x": COUNTS, "y": REAL}, (5,), "poisson"),
    "whole floats": (COUNTS.astype(float), (5,), "poisson"),
    "negative whole numbers": (COUNTS - 3, (5,), "normal"),
    "a frame": (pd.DataFrame(COUNTS, columns=list("abcde")), (5,), "poisson"),
    "a split": (dp.Split({"x": torch.from_numpy(REAL).float()}), (3,), "normal"),
    "a torch data set": (torch.utils.data.TensorDataset(torch.from_numpy(GREY)), (4, 3), "bernoulli"),
}


@pytest.mark.parametrize("kind", DATA)
def test_values_choose_shape_and_likelihood(kind: str) -> None:
    data, shape, likelihood = DATA[kind]
    program = VAE.from_data(data, latent_dim=2, hidden_dims=(4,))
    assert (program.shape, program.likelihood) == (shape, likelihood)


@pytest.mark.parametrize("kind", ["grey images", "a frame", "a list"])
def test_the_program_fits_the_data_that_made_it(kind: str) -> None:
    data, shape, _ = DATA[kind]
    program = VAE.from_data(data, latent_dim=2, hidden_dims=(4,))
    posterior = svi(program, data, steps=2, progress=False)
    assert posterior.predict(data, draws=3).mean.shape == (20, *shape)


def test_from_data_takes_data_sets_and_folders_of_images(tmp_path: Path) -> None:
    assert VAE.from_data(load_data("digits")).config["shape"] == [8, 8]
    assert VAE.from_data(load_data("wine")).likelihood == "normal"
    for i in range(5):
        Image.fromarray(np.uint8([[0, 9], [90, 255]])).save(tmp_path / f"{i}.png")
    folder = dp.images(tmp_path)
    program = VAE.from_data(folder, latent_dim=2)
    assert (program.shape, program.likelihood, program.latent_dim) == ((2, 2), "bernoulli", 2)
    posterior = svi(program, folder.train, steps=2, held_out=folder.valid, progress=False)
    assert posterior.predict(folder.test, draws=3).mean.shape == (1, 2, 2)


def test_an_option_goes_before_the_values() -> None:
    assert VAE.from_data(GREY, likelihood="normal").likelihood == "normal"
    assert VAE.from_data(COUNTS, likelihood="negative_binomial").likelihood == "negative_binomial"


def test_whole_numbers_of_images_are_pixels_or_counts() -> None:
    pixels = RANDOM.integers(0, 256, (20, 4, 3), np.uint8)
    pixels[0, 0, :2] = 0, 255
    message = (
        r"rows of shape \(4, 3\) hold whole numbers from 0 to 255, which may be pixels or counts\. Divide pixels by"
    )
    with pytest.raises(ValueError, match=message):
        VAE.from_data(pixels)
    with pytest.raises(ValueError, match=r"Divide pixels by 16, or name the likelihood: likelihood='poisson'"):
        VAE.from_data(pixels // 16 + 1)
    assert VAE.from_data(pixels / 255).likelihood == "bernoulli"


def test_from_data_refuses_what_is_no_numbers() -> None:
    with pytest.raises(TypeError, match=r"data must be numbers in a tensor, an array, .*; got NoneType"):
        VAE.from_data(None)
    with pytest.raises(ValueError, match=r"shape must have at least one axis; got \(\)"):
        VAE.from_data(REAL[:, 0])


def test_grey_values_are_real_where_no_pixels_are_drawn() -> None:
    assert likelihood_of(first_field(GREY), grey=False) == "normal"
    assert likelihood_of(first_field(GREY > 0.5), grey=False) == "bernoulli"
