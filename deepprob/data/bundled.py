"""The data sets of scikit-learn, in fixed stratified parts."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from deepprob.data.parsers import Parts, grey, image_split, labels
from deepprob.data.split import Split


def bundled(name: str) -> Callable[[Path | None, int], Parts]:
    """A reader of scikit-learn's ``load_<name>``."""

    def read(folder: Path | None, split: int) -> Parts:
        # Imported here because scikit-learn is slow to import, and by name because it has no type hints.
        raw = getattr(importlib.import_module("sklearn.datasets"), f"load_{name}")()
        regression = name == "diabetes"
        if name == "digits":
            data = image_split(grey(raw.images, 16.0), raw.target)
        elif regression:
            data = Split({"x": _table(raw.data), "y": _table(raw.target[:, None])})
        else:
            data = Split({"x": _table(raw.data), "y": labels(raw.target)})
        strata = np.zeros(len(data)) if regression else raw.target
        train, valid, test = (data.rows(rows) for rows in stratified(strata))
        extras = {} if regression else {"class_names": [str(c) for c in raw.target_names]}
        if name != "digits":
            extras["feature_names"] = [str(f) for f in raw.feature_names]
        return Parts(train, valid, test, extras)

    return read


def _table(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.float32)


def stratified(strata: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split the rows of each stratum into 60, 20 and 20 %; a seed always gives the same parts, their rows in order.

    Args:
        strata: The class of each row; all equal for a plain random split.
        seed: Random seed of the parts.

    Returns:
        The row numbers of train, valid and test.

    Examples:
        >>> [len(rows) for rows in stratified(np.repeat([0, 1], 50))]
        [60, 20, 20]
    """
    # NumPy guarantees the stream of RandomState; that of Generator may change between versions.
    random = np.random.RandomState(seed)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for stratum in np.unique(strata):
        rows = random.permutation(np.flatnonzero(strata == stratum))
        cuts = [round(0.6 * len(rows)), round(0.8 * len(rows))]
        for part, chosen in zip(parts, np.split(rows, cuts), strict=True):
            part.append(chosen)
    train, valid, test = (np.sort(np.concatenate(part)) for part in parts)
    return train, valid, test
