"""The pictures of rows and what the model makes of them: images and sequences."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from deepprob.diagnostics import judging
from deepprob.diagnostics.case import Case, given, num_optional
from deepprob.diagnostics.check import array
from deepprob.diagnostics.picture import Picture, drawn
from deepprob.diagnostics.plots import image_rows
from deepprob.networks.likelihood import Likelihood
from deepprob.programs.arguments import Arguments, rows_of
from deepprob.programs.minibatch import Batch

_FEW = 4  # most features of a sequence that are drawn as lines


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
    grid = {"data": array(batch[0]).reshape(-1, *shape), "reconstructions": means.reshape(-1, *shape)}
    title = "Data and reconstructions"
    caption = "A reconstruction is the mean image given the code of the row above; it should resemble the row."
    alt = "held-out data, their reconstructions below"
    if num_optional(case.program) >= len(batch):
        grid["prior samples"] = array(case.posterior.predict_prior(count, seed=case.seed).mean).reshape(-1, *shape)
        title = "Data, reconstructions and prior samples"
        caption += " A prior sample is the mean image given a code drawn from the prior; it should look like data."
        alt += ", and prior samples in the last row"
    image = drawn(image_rows(grid, columns=count))
    yield Picture("reconstructions", title, caption, f"Rows of {len(batch[0])} images: {alt}.", image, photos=True)


def _sequences(case: Case) -> Iterator[Picture]:
    if not case.ragged or not case.has_latents("local") or case.target.ndim != 3:
        return
    lengths = array(case.program.lengths(*case.batch)) if case.program.variable_length else _lengths(case)
    row = int(np.argmax(lengths))
    steps, batch = int(lengths[row]), rows_of(case.batch, slice(row, row + 1))
    seen = case.target[row, :steps]
    again = case.posterior.reconstruct(*given(batch), seed=case.seed)
    mean = array(again.mean)[0, :steps]
    if seen.shape[1] > _FEW:
        figure = judging.rolls({"data": seen, "reconstruction": mean})
    else:
        low, high = (array(end)[0, :steps] for end in again.interval(0.9))
        figure = judging.fan(seen, mean, low, high)
    yield Picture(
        "sequence",
        "A sequence and its reconstruction",
        "The reconstruction is the mean given the latent path of the sequence; it should resemble the data.",
        f"The longest sequence, {steps} steps of {seen.shape[1]} features, and its reconstruction.",
        drawn(figure),
    )
    yield from _forecast(case, batch, steps)


def _forecast(case: Case, batch: Batch, steps: int, share: float = 0.25) -> Iterator[Picture]:
    """The end of a sequence, drawn given its beginning."""
    start = steps - max(1, int(share * steps))
    if isinstance(batch, Arguments) or start < 2:
        return
    x = batch[0].to(torch.get_default_dtype()).clone()
    x[:, start:steps] = torch.nan
    future = case.posterior.impute(x, *batch[1:], draws=50, sweeps=20, seed=case.seed)
    seen, mean = array(batch[0])[0, :steps], array(future.mean)[0, :steps]
    if seen.shape[1] > _FEW:
        figure = judging.rolls({"data": seen, f"forecast from step {start}": mean})
    else:
        low, high = (array(end)[0, :steps] for end in future.interval(0.9))
        figure = judging.fan(seen, mean, low, high, start=start)
    yield Picture(
        "forecast",
        "A forecast",
        f"The steps from {start} on are drawn given the earlier ones (by Gibbs sampling, which is approximate).",
        f"The longest sequence, and its last {steps - start} steps as forecast from the first {start}.",
        drawn(figure),
    )


def _lengths(case: Case) -> np.ndarray:
    return array(case.batch[[*case._names].index("lengths")])


MAKERS = (_images, _sequences)
