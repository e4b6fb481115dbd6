"""The pictures of a report."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from deepprob.diagnostics.case import REFUSALS, Case, given, num_optional
from deepprob.diagnostics.check import array
from deepprob.diagnostics.checks.calibration import class_probs, one_label
from deepprob.diagnostics.checks.collapse import active_dimensions, code_draws
from deepprob.diagnostics.plots import (
    image_rows,
    kl_bars,
    latent_scatter,
    predicted_against_observed,
    predictive_band,
    reliability,
    render,
    training_curve,
)
from deepprob.networks.likelihood import Likelihood
from deepprob.programs.arguments import rows_of


@dataclass(frozen=True)
class Picture:
    """An image with title, caption and alternative text.

    Args:
        name: A short name, usable as a file name.
        title: The title.
        caption: How to read the image, in one sentence.
        alt: The alternative text for readers who do not see the image.
        png: The image.
        wide: Whether the image spans the page.
    """

    name: str
    title: str
    caption: str
    alt: str
    png: bytes
    wide: bool = False

    @property
    def base64(self) -> str:
        """The image in base64, for a data URI."""
        return base64.b64encode(self.png).decode()


def pictures(case: Case) -> list[Picture]:
    """All pictures that apply to a posterior and its data."""
    makers = [(_training, case), (_latent_space, case)]
    cases = case.by_site()
    if len(cases) == 1 and cases[0].sites:  # the values of several sites have no common picture
        makers = [(_images, cases[0]), *makers, (_reliability, cases[0]), (_predictions, cases[0])]
    found: list[Picture] = []
    for make, subject in makers:
        with suppress(*REFUSALS):  # the check of the same name tells the reason
            found += make(subject)
    return found


def _training(case: Case) -> Iterator[Picture]:
    history = case.posterior.history
    if not len(history.steps.get("elbo", ())):
        return
    elbo, (name, held) = history.steps["elbo"], history.held_out
    figure = training_curve(elbo, held, steps_per_epoch=history.steps_per_epoch, held_out_name=name)
    last = f"{np.nanmean(array(elbo)[-history.steps_per_epoch :]):.4g}"
    yield Picture(
        "training",
        "ELBO during training",
        "The curve should level off. A held-out score that falls while the training ELBO rises means overfitting.",
        f"Line plot of the ELBO per datum over {len(elbo)} steps, ending near {last} nats.",
        render(figure),
    )


def image_shape(case: Case) -> tuple[int, ...] | None:
    """Shape of one image; None if the rows are not images."""
    if case.supervised or case.ragged or not case.batch:
        return None
    observation = getattr(case.program, "observation", None)
    if isinstance(observation, Likelihood) and observation.picture != "image":
        return None
    shape = tuple(case.batch[0].shape[1:])
    return shape if len(shape) in (2, 3) else None


def _images(case: Case, count: int = 10) -> Iterator[Picture]:
    shape = image_shape(case)
    if shape is None or not case.per_row:
        return
    batch = rows_of(case.batch, slice(0, count))
    means = array(case.posterior.predict(*given(batch), draws=50, seed=case.seed).mean)
    if means.size != array(batch[0]).size:
        return
    grid = {
        "data": array(batch[0]).reshape(-1, *shape),
        "reconstructions": means.reshape(-1, *shape),
    }
    title = "Data and reconstructions"
    caption = "A reconstruction is the mean image given the code of the row above; it should resemble the row."
    alt = "held-out data, their reconstructions below"
    if num_optional(case.program) >= len(batch):
        grid["prior samples"] = array(case.posterior.predict_prior(count, seed=case.seed).mean).reshape(-1, *shape)
        title = "Data, reconstructions and prior samples"
        caption += " A prior sample is the mean image given a code drawn from the prior; it should look like data."
        alt += ", and prior samples in the last row"
    yield Picture(
        "reconstructions",
        title,
        caption,
        f"Rows of {len(batch[0])} images: {alt}.",
        render(image_rows(grid, columns=count)),
        wide=True,
    )


def _latent_space(case: Case) -> Iterator[Picture]:
    if not active_dimensions.applies(case):
        return
    draws, kl = code_draws(case)
    name, labels = case.sample_labels or ("", None)
    yield Picture(
        "codes",
        "Latent space",
        "Each point is the posterior mean of one row's code" + (f", colored by {name}." if name else "."),
        f"Scatter plot of the codes of {draws.shape[1]} rows: {draws.shape[2]} latent dimensions, shown in two.",
        render(latent_scatter(draws.mean(0), labels)),
    )
    if kl is not None:
        yield Picture(
            "information",
            "KL of each latent dimension",
            "A dimension with a KL near zero is not used: its posterior is the prior.",
            f"Bar chart of the KL of {len(kl)} latent dimensions, {kl.sum():.3g} nats in total.",
            render(kl_bars(kl)),
        )


def _reliability(case: Case) -> Iterator[Picture]:
    if not one_label(case):
        return
    figure = reliability(class_probs(case), case.target.reshape(len(case.target)))
    yield Picture(
        "reliability",
        "Reliability diagram",
        "On the dashed line the accuracy equals the confidence; points below it are over-confident.",
        f"Reliability diagram of {len(case.target)} predictions.",
        render(figure),
    )


def _predictions(case: Case) -> Iterator[Picture]:
    if not case.supervised or case.prediction.kind != "real" or case.target.size != len(case.target):
        return
    mean, (low, high) = array(case.prediction.mean), case.prediction.interval(0.9)
    inputs = array(case.inputs[0])
    if inputs.size == len(inputs):
        half = case.prediction.interval(0.5)
        figure = predictive_band(inputs, case.target, mean, half, (low, high))
        caption = "Nine of ten points should lie in the 90% band, half of them in the 50% band."
    else:
        figure = predicted_against_observed(case.target, mean, low, high)
        caption = "Nine of ten intervals should cross the dashed line."
    yield Picture(
        "predictions",
        "Predictions and observations",
        caption,
        f"Predictions of {len(case.target)} rows with 90% intervals, against the observed values.",
        render(figure),
    )
