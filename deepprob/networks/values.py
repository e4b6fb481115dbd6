"""The rows of any data, and the likelihood that their values ask for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deepprob.data import DataSet, Table, as_split, table
from deepprob.data.frames import frame_of, is_frame


def encoded(data: Any) -> Any:
    """A frame as a table, unless all of its values are binary or counts; of a data set of tables the training rows.

    Any other data are as they are.

    Args:
        data: Data of any kind.

    Examples:
        >>> import pandas as pd
        >>> encoded(pd.DataFrame({"size": [1.5, 2.5], "kind": ["a", "b"]})).feature_names
        ('size', 'kind=a', 'kind=b')
        >>> type(encoded(pd.DataFrame({"visits": [0, 3]}))).__name__
        'DataFrame'
    """
    if isinstance(data, DataSet) and isinstance(data.train, Table):
        return data.train
    if not is_frame(data):
        return data
    frame = frame_of(data)
    plain = all(getattr(kind, "kind", "O") in "biuf" for kind in frame.dtypes) and not frame.isna().any(axis=None)
    return data if plain and likelihood_of(first_field(frame), grey=False) != "normal" else table(frame)


def first_field(data: Any) -> Tensor:
    """The rows of the first field of any data; of a data set, its training rows.

    Args:
        data: A data set, a split, an array, a tensor, a frame of numbers, or a tuple or dict of these.

    Raises:
        TypeError: If the data are not numbers.
        ValueError: If they have no rows or not one shape.

    Examples:
        >>> tuple(first_field([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).shape)
        (3, 2)
    """
    return as_split(data.train if isinstance(data, DataSet) else data, missing=True).tensors[0]


def likelihood_of(x: Tensor, *, grey: bool = True) -> str:
    """The name of the likelihood that values ask for.

    Values 0 and 1 are binary, other values in [0, 1] are grey if that is allowed, whole numbers of at least 0 are
    counts, and all others are real.

    Args:
        x: The rows, ``(N, ...)``.
        grey: Whether values between 0 and 1 are probabilities of binary pixels.

    Raises:
        ValueError: If rows of two axes or more hold whole numbers, which may be counts or pixels.

    Examples:
        >>> import torch
        >>> [likelihood_of(torch.tensor([[0.0, top], [0.0, 0.0]])) for top in (1.0, 0.5, 3.0, 2.5)]
        ['bernoulli', 'bernoulli', 'poisson', 'normal']
    """
    whole = not x.is_floating_point() or bool((x == x.round()).all())
    low, high = float(x.min()), float(x.max())
    if 0 <= low <= high <= 1 and (whole or grey):
        return "bernoulli"
    if not whole or low < 0:
        return "normal"
    if x.dim() > 2:
        top = 255 if 16 < high <= 255 else int(high)
        raise ValueError(
            f"rows of shape {tuple(x.shape[1:])} hold whole numbers from {low:g} to {high:g}, which may be pixels or "
            f"counts. Divide pixels by {top}, or name the likelihood: likelihood='poisson'."
        )
    return "poisson"
