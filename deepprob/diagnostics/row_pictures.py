"""The pictures of rows and what the model makes of them: images and sequences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from deepprob.diagnostics import judging
from deepprob.diagnostics.case import Case, given, num_optional
from deepprob.diagnostics.check import Array, array
from deepprob.diagnostics.image_grid import image_rows
from deepprob.diagnostics.latent_walks import plane, traversed
from deepprob.diagnostics.picture import Picture, drawn
from deepprob.networks.likelihood import Likelihood
from deepprob.posteriors.prediction import Prediction
from deepprob.programs.arguments import Arguments, rows_of
from deepprob.programs.minibatch import Batch

_FEW = 4  # most features of a sequence that are drawn as lines
_CODES = 100  # rows that choose latent dimensions
_STEPS = 60  # most steps of a sequence that are drawn


def image_shape(case: Case) -> tuple[int, ...] | None:
    """Shape of one image; None if the rows are not images."""
    if case.supervised or case.ragged or not case.batch:
        return None
    observation = getattr(case.program, "observation", None)
    if isinstance(observation, Likelihood) and observation.picture != "image":
        return None
    shape = tuple(case.batch[0].shape[1:])
    return shape if len(shape) in (2, 3) else None


def _images(case: Case, count: int = 8) -> Iterator[Picture]:
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
    # A row of images is as high as one of them is wide, and has a label.
    image = drawn(image_rows(grid, columns=count), height=len(grid) * (4.2 / count + 0.22))
    yield Picture("reconstructions", title, caption, f"Rows of {len(batch[0])} images: {alt}.", image, photos=True)


def _traversal(case: Case, columns: int = 8, most: int = 4) -> Iterator[Picture]:
    if image_shape(case) is None or not case.per_row or len(case.posterior.structure.local) != 1:
        return
    rows = traversed(case.posterior, given(rows_of(case.batch, slice(0, _CODES))), None, most, columns)
    image = drawn(image_rows(rows, columns=columns), height=len(rows) * (4.2 / columns + 0.22))
    yield Picture(
        "traversal",
        "Traversal of latent dimensions",
        "One dimension of the first row's code moves from -2 to 2 sds of its prior, and the others stay. A dimension "
        "of few nats per row should change little.",
        f"Rows of {columns} images, one for each of {len(rows)} latent dimensions: {', '.join(rows)}.",
        image,
        photos=True,
    )


def _manifold(case: Case, columns: int = 12) -> Iterator[Picture]:
    structure = case.posterior.structure
    if image_shape(case) is None or not case.per_row or [structure.sites[n].numbers for n in structure.local] != [2]:
        return
    image = plane(case.posterior, columns)[None]
    yield Picture(
        "manifold",
        "Plane of codes",
        "Each image is the mean given a code; from left to right the first latent dimension grows, from bottom to top "
        "the second, in steps of equal probability under the prior. All of them should look like data.",
        f"Grid of {columns} times {columns} images, one for each of as many codes of two dimensions.",
        drawn(image_rows({"": image}, columns=1)),
        photos=True,
    )


def _sequences(case: Case) -> Iterator[Picture]:
    if not case.ragged or not case.has_latents("local") or case.target.ndim != 3:
        return
    row, steps = _typical(case)
    batch = _start_of(case, rows_of(case.batch, slice(row, row + 1)), steps)
    again = case.posterior.reconstruct(*given(batch), seed=case.seed)
    known = np.True_ if case.mask is None else case.mask[row, :steps]
    seen = np.where(known, case.target[row, :steps], np.nan)
    yield Picture(
        "sequence",
        "A sequence and its reconstruction",
        f"The reconstruction is the {_middle(again)} given the sequence's latent path; it should resemble the data.",
        f"{steps} steps of a sequence of {seen.shape[1]} features, and their reconstruction.",
        drawn(_sequence(seen, again, "reconstruction")),
    )
    yield from _forecast(case, batch, seen)


def _forecast(case: Case, batch: Batch, seen: Array, share: float = 0.25) -> Iterator[Picture]:
    """The end of a sequence, drawn given its beginning."""
    start = len(seen) - max(1, int(share * len(seen)))
    if not case.program.has_forecast or start < 2:
        return
    begun, ahead = _start_of(case, batch, start), len(seen) - start
    future = case.posterior.forecast(*given(begun), steps=ahead, draws=200, seed=case.seed)
    band = "" if future.kind == "classes" or seen.shape[1] > _FEW else "; nine of ten values should lie in the band"
    yield Picture(
        "forecast",
        "A forecast",
        f"The steps from {start} on are drawn given the earlier ones alone{band}.",
        f"The last {ahead} of {len(seen)} steps of a sequence as forecast from the first {start}.",
        drawn(_sequence(seen, future, f"forecast from step {start} on", start)),
    )


def _sequence(seen: Array, predicted: Prediction, name: str, start: int = 0) -> Figure:
    """A sequence and its prediction from a step on: as two grids for classes and many features, else as lines."""

    def with_start(values: Any) -> Array:
        found = array(values)[0]
        return found if not start else np.concatenate([seen[:start].astype(found.dtype), found])

    if predicted.kind == "classes":
        return judging.rolls({"data": seen, name: with_start(predicted.classes)})
    mean = with_start(predicted.mean)
    if seen.shape[1] > _FEW:
        return judging.rolls({"data": seen, name: mean})
    low, high = (with_start(end) for end in predicted.interval(0.9))
    return judging.fan(seen, mean, low, high, start=start)


def _middle(predicted: Prediction) -> str:
    return "most likely class" if predicted.kind == "classes" else "mean"


def _typical(case: Case) -> tuple[int, int]:
    """The row of median length, and how many of its steps to show."""
    lengths = case.lengths
    if lengths is None:
        return 0, min(case.target.shape[1], _STEPS)
    row = int(np.argsort(lengths, kind="stable")[len(lengths) // 2])
    return row, min(int(lengths[row]), _STEPS)


def _start_of(case: Case, batch: Batch, steps: int) -> Batch:
    """The first steps of the sequences of a batch."""
    lengths, parts = case.program.lengths(*batch), zip(batch, case.program.sequences_in(batch), strict=True)
    cut = [x[:, :steps] if found else x.clamp(max=steps) if id(x) == id(lengths) else x for x, found in parts]
    return Arguments(cut, batch.call) if isinstance(batch, Arguments) else tuple(cut)


MAKERS = (_images, _traversal, _manifold, _sequences)
