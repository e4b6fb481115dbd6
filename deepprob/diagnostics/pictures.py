"""The pictures of a report: those that suit a case."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deepprob.diagnostics.case import Case, num_optional
from deepprob.diagnostics.check import array
from deepprob.diagnostics.checks.calibration import class_probs, one_label
from deepprob.diagnostics.checks.collapse import codes, codes_are_used
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


@dataclass(frozen=True)
class Picture:
    """A drawing with its words.

    Args:
        name: A short name, for a file.
        title: What it shows.
        caption: How to read it, in one sentence.
        alt: The same in words, for those who do not see it.
        png: The image.
        wide: Whether it takes the whole width of a page.
    """

    name: str
    title: str
    caption: str
    alt: str
    png: bytes
    wide: bool = False

    @property
    def base64(self) -> str:
        """The image as text, for a data URI."""
        return base64.b64encode(self.png).decode()


def pictures(case: Case) -> list[Picture]:
    """The pictures that suit a posterior and its data."""
    found = (_images(case), _curve(case), _codes(case), _classes(case), _real(case))
    return [picture for some in found for picture in some]


def _curve(case: Case) -> Iterator[Picture]:
    history = case.posterior.history
    if not len(history.steps.get("elbo", ())):
        return
    elbo, held = history.steps["elbo"], history.epochs.get("held_out_elbo", ())
    figure = training_curve(elbo, held, steps_per_epoch=history.steps_per_epoch)
    last = f"{np.nanmean(array(elbo)[-history.steps_per_epoch :]):.4g}"
    yield Picture(
        "training",
        "How the ELBO rose",
        "It should have levelled off; a held-out curve that falls while the other rises means overfitting.",
        f"Line plot of the ELBO per datum over {len(elbo)} steps, ending near {last} nats.",
        render(figure),
    )


def image_shape(case: Case) -> tuple[int, ...] | None:
    """Shape of one image, if the rows are images."""
    declared = getattr(case.program, "image_shape", None)
    if case.supervised or case.ragged:
        return None
    shape = tuple(declared) if declared is not None else tuple(case.batch[0].shape[1:])
    return shape if len(shape) in (2, 3) and int(np.prod(shape)) == case.batch[0][0].numel() else None


def _images(case: Case, count: int = 10) -> Iterator[Picture]:
    shape = image_shape(case)
    if shape is None or not case.per_row:
        return
    rows = case.data.rows(slice(0, count))
    batch = case.program.accept(rows)
    rebuilt = array(case.posterior.predict(*batch, draws=50, seed=case.seed).mean)
    grid = {
        "data": array(batch[0]).reshape(-1, *shape),
        "rebuilt": rebuilt.reshape(-1, *shape),
    }
    words = "held-out data, their reconstructions below"
    if num_optional(case.program) >= len(batch):
        grid["invented"] = array(case.posterior.predict_prior(count, seed=case.seed).mean).reshape(-1, *shape)
        words += ", and images drawn from the prior in the last row"
    yield Picture(
        "reconstructions",
        "Data, reconstructions and inventions",
        "A reconstruction is the mean of what a row's code says: it should look like the row, if softer. "
        "Inventions start from the prior: they should look like data.",
        f"Rows of {len(rows)} images: {words}.",
        render(image_rows(grid, columns=count)),
        wide=True,
    )


def _codes(case: Case) -> Iterator[Picture]:
    if not codes_are_used.applies(case):
        return
    draws, nats = codes(case)
    unused = [n for n in case.data.names[len(case.batch) :] if case.data[n].dim() == 1]
    labels = array(case.sample[unused[0]]) if unused else None
    yield Picture(
        "codes",
        "Where the rows lie in the latent space",
        "Each point is a row's mean code" + (f", coloured by {unused[0]}." if unused else "."),
        f"Scatter plot of the codes of {draws.shape[1]} rows in {draws.shape[2]} dimensions, drawn in two.",
        render(latent_scatter(draws.mean(0), labels)),
    )
    if nats is not None:
        yield Picture(
            "information",
            "What each code coordinate knows",
            "Coordinates near zero carry nothing: the posterior there is the prior.",
            f"Bar chart of the KL of {len(nats)} code coordinates, {nats.sum():.3g} nats in all.",
            render(kl_bars(nats)),
        )


def _classes(case: Case) -> Iterator[Picture]:
    if not one_label(case):
        return
    figure = reliability(class_probs(case), case.target.reshape(len(case.target)))
    yield Picture(
        "reliability",
        "Do probabilities come true?",
        "On the dashed line predictions are right as often as they say; below it they promise too much.",
        f"Reliability diagram of {len(case.target)} predictions.",
        render(figure),
    )


def _real(case: Case) -> Iterator[Picture]:
    if not case.supervised or case.prediction.kind != "real" or case.target.size != len(case.target):
        return
    mean, (low, high) = array(case.prediction.mean), case.prediction.interval(0.9)
    inputs = array(case.inputs[0])
    words = f"Predictions of {len(case.target)} rows with 90 % intervals"
    if inputs.size == len(inputs):
        half = case.prediction.interval(0.5)
        figure = predictive_band(inputs, case.target, mean, half, (low, high))
        caption = "Nine of ten points should lie in the outer band, half of them in the inner one."
    else:
        figure = predicted_against_observed(case.target, mean, low, high)
        caption = "Nine of ten intervals should reach the dashed line."
    yield Picture(
        "predictions",
        "Predictions and what came true",
        caption,
        f"{words}, against the data.",
        render(figure),
    )
