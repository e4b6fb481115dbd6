"""open_data: a data set by its name, or the rows of a file or a folder of images, in parts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from deepprob.data.bundled import stratified
from deepprob.data.datasets import DataSet, load_data
from deepprob.data.files import digest_of, read_file
from deepprob.data.frames import missing_column
from deepprob.data.image_folder import at_random, images, read_images
from deepprob.data.intake import as_split
from deepprob.data.parsers import Parts
from deepprob.data.paths import existing
from deepprob.data.sources import SOURCES, Task
from deepprob.data.split import Split
from deepprob.data.table import holds_classes, table
from deepprob.data.table_encoding import Table
from deepprob.errors import StorageError, counted, unknown

_TARGETS = ("y", "target", "targets", "label", "labels")  # arrays with these names are targets
_OPTIONS = ("split", "target", "drop", "weights", "size")


def open_data(
    name: str,
    *,
    split: int = 0,
    target: str | None = None,
    drop: Collection[str] = (),
    weights: str | None = None,
    size: int | None = None,
    needs_target: bool = False,
) -> DataSet:
    """Open a data set by name, a table or arrays in a file, or a folder of images.

    The rows of a file or a folder are split at random, 60, 20 and 20 % of each class. The encoding of a table is that
    of its training rows.

    Args:
        name: A name that `list_data` shows, or a path.
        split: Number of the standard split of a named data set; random seed of the parts of other data.
        target: The column to predict; in an ``.npz`` file, the array.
        drop: Columns or arrays to leave out.
        weights: A column of row weights.
        size: Size of images, see `images`.
        needs_target: Whether a table must have a target.

    Returns:
        The data set. Its ``recipe`` has these arguments, and the number of rows and the digest of a file or folder.

    Raises:
        ValueError: If a name is unknown, or an option does not belong to such data.
        FileNotFoundError: If there is no such file or folder.
        StorageError: If a file is damaged.
    """
    own: dict[str, Any] = {"target": target, "drop": list(drop), "weights": weights, "size": size}
    if name in SOURCES:
        _refuse_options(own, name, "is a data set with fixed columns", allowed=())
        return load_data(name, split=split)
    path = _path(name)
    if path.is_dir():
        _refuse_options(own, name, "is a folder", allowed=("size",))
        found = images(path, size=size, seed=split)
        task, parts, classes, origin = found.task, found.parts, found.num_classes, found.origin
        own["as"] = {"color": len(found.shape) == 3, "classes": parts.extras.get("class_names")}
    else:
        _refuse_options(own, name, "is not a folder of images", allowed=("target", "drop", "weights"))
        found = read_file(path)
        if needs_target and target is None and not isinstance(found, dict):
            raise ValueError(
                f"'{path}' needs a target, the column to predict. Name it by --target, one of: "
                f"{', '.join(repr(str(column)) for column in found.columns)}."
            )
        task, parts, classes = _parts(path, found, target, drop, weights, split)
        origin = at_random(path, split)
        if isinstance(parts.test, Table):
            own["columns"] = [column.name for column in parts.test.encoding.columns]
    rows = sum(map(len, filter(None, (parts.train, parts.valid, parts.test))))
    recipe = {"name": str(path.resolve()), "split": split, **own, "rows": rows, "digest": digest_of(path)}
    return DataSet(path.resolve().name, task, parts, classes, origin=origin, recipe=recipe)


def reopen_data(recipe: Mapping[str, Any]) -> DataSet:
    """Open the data set of a recipe again, in the same parts.

    Args:
        recipe: The ``recipe`` of a data set.

    Raises:
        FileNotFoundError: If the file or folder is not there any more.
        StorageError: If its contents have changed, so that its parts are unknown.
    """
    path = Path(recipe["name"])
    if recipe["name"] not in SOURCES:
        if not path.exists():
            raise FileNotFoundError(f"the data of the fit, '{path}', are not there any more. Restore or name them.")
        if digest_of(path) != recipe["digest"]:
            raise StorageError(
                f"'{path}' has changed since the fit, which had {counted(recipe['rows'], 'row')}, so its test rows are "
                "unknown. Restore it, or name the data to use; all of their rows are then used."
            )
    return open_data(recipe["name"], **{name: recipe[name] for name in _OPTIONS if name in recipe})


def same_data(name: str, recipe: Mapping[str, Any]) -> bool:
    """Whether a name or a path has the very data of a recipe.

    Args:
        name: The name or path.
        recipe: The ``recipe`` of a data set.
    """
    if name in SOURCES or recipe.get("name") in SOURCES:
        return name == recipe.get("name")
    return "digest" in recipe and digest_of(_path(name)) == recipe["digest"]


def open_rows(
    name: str, recipe: Mapping[str, Any] | None = None, *, with_target: bool = True
) -> tuple[Any, list[str] | None]:
    """All rows of a file or a folder, or the test rows of a named data set, for a posterior of other data.

    Args:
        name: A name that `list_data` shows, or a path.
        recipe: The ``recipe`` of the data of the fit, whose options are applied.
        with_target: Whether a table must have the target of the fit.

    Returns:
        A frame of pandas with all its columns, or a split; and the names of files of images.

    Raises:
        ValueError: If the name is unknown, or a table lacks a column of the fit.
        FileNotFoundError: If there is no such file or folder.
        StorageError: If a file is damaged.
    """
    recipe = recipe or {}
    if name in SOURCES:
        return load_data(name).test, None
    path = _path(name)
    if path.is_dir():
        rows, _, files = read_images(path, size=recipe.get("size"), **recipe.get("as", {}))
        return rows, files
    found = read_file(path)
    if isinstance(found, dict):
        target, drop = recipe.get("target"), {*recipe.get("drop", ())}
        if not with_target:
            target, drop = None, drop | {target}
        return _split_of(path, found, target, [name for name in found if name in drop]), None
    names, target = [str(column) for column in found.columns], recipe.get("target")
    wanted = [*recipe.get("columns", ()), *([target] if target and with_target else [])]
    if lacking := [column for column in wanted if column not in names]:
        raise missing_column(f"'{path}'", lacking, [column for column in names if column not in wanted])
    return found, None


def _path(name: str) -> Path:
    """The path of a name that no data set has."""
    path = Path(name).expanduser()
    is_path = path.suffix or name.startswith((".", "/", "~")) or name.endswith("/")  # no data set has such a name
    if not is_path and not path.exists():
        error = unknown("data set", name, SOURCES)
        raise ValueError(f"{error} There is no file or folder of this name either.")
    return existing(name)


def _refuse_options(given: Mapping[str, Any], name: str, reason: str, allowed: Collection[str]) -> None:
    for option, value in given.items():
        if value and option not in allowed:
            raise ValueError(f"{option} does not apply to {name!r}, which {reason}. Leave it out.")


def _parts(
    path: Path, rows: Any, target: str | None, drop: Collection[str], weights: str | None, seed: int
) -> tuple[Task, Parts, int | None]:
    if isinstance(rows, dict):
        if weights is not None:
            raise ValueError(f"weights is a column of a table, but '{path}' has arrays. Leave it out.")
        return _array_parts(path, _split_of(path, rows, target, drop), target, seed)
    is_class = target in rows and holds_classes(rows[target])
    _check_target(path, rows, target)
    strata = rows[target].astype(str).to_numpy() if is_class else np.zeros(len(rows))
    places = _stratified(path, strata, seed)
    train = table(rows.iloc[places[0]], target, drop=drop, weights=weights, classes=is_class)
    valid, test = (train.encoding.encode(rows.iloc[place]) for place in places[1:])
    classes = train.encoding.classes
    task: Task = "classification" if classes else "regression" if target else "table"
    extras: dict[str, Any] = {"columns": [str(name) for name in rows.columns]}
    if classes:
        extras["class_names"] = list(classes)
    return task, Parts(train, valid, test, extras), len(classes) or None


def _check_target(path: Path, frame: Any, target: str | None) -> None:
    """Refuse a target with gaps or one value; `table` would count those of one part."""
    if target is None or target not in frame:
        return  # `table` names the nearest column
    gaps, values = int(frame[target].isna().sum()), frame[target].dropna().unique()
    if gaps:
        raise ValueError(
            f"the target {target!r} is missing in {counted(gaps, 'row')} of {len(frame)} in '{path}'. Remove these "
            "rows, or fill the target in."
        )
    if len(values) < 2:
        raise ValueError(
            f"the target {target!r} is {values[0]!s} in every row of '{path}', so nothing is left to predict. Name "
            "another column."
        )


def _stratified(path: Path, strata: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts = stratified(strata, seed)
    if not all(map(len, parts)):
        raise ValueError(
            f"'{path}' has {counted(len(strata), 'row')}, too few for train, valid and test parts. Give at least 5."
        )
    return parts


def _split_of(path: Path, arrays: dict[str, np.ndarray], target: str | None, drop: Collection[str]) -> Split:
    """Arrays as fields, the target last."""
    for name in (*([target] if target else []), *drop):
        if name not in arrays:
            raise unknown(f"array of '{path}'", name, arrays)
    last = target or next((name for name in _TARGETS if name in arrays and len(arrays) > 1), None)
    names = [name for name in arrays if name not in drop and name != last] + ([last] if last else [])
    return as_split({name: arrays[name] for name in names}, what=f"'{path}'")


def _array_parts(path: Path, rows: Split, target: str | None, seed: int) -> tuple[Task, Parts, int | None]:
    """The parts of arrays; equal shares of each class if the target holds classes."""
    has_target = len(rows.names) > 1 and (target is not None or rows.names[-1] in _TARGETS)
    classes = class_count(rows.tensors[-1]) if has_target else None
    strata = rows.tensors[-1].numpy() if classes else np.zeros(len(rows))
    train, valid, test = map(rows.rows, _stratified(path, strata, seed))
    task: Task = "sequences" if "lengths" in rows else "images" if len(rows.shape) > 1 else "table"
    if has_target and task == "table":
        task = "classification" if classes else "regression"
    return task, Parts(train, valid, test), classes


def class_count(y: Tensor) -> int | None:
    """The number of classes of a target: of whole numbers 0, 1, ..., each of which is there; None for other targets.

    Args:
        y: The target.

    Examples:
        >>> import torch
        >>> class_count(torch.tensor([2, 0, 1, 1])), class_count(torch.tensor([7, 0, 1])), class_count(torch.rand(3))
        (3, None, None)
    """
    if y.dim() != 1 or y.is_floating_point():
        return None
    found = y.long().unique().tolist()
    return len(found) if len(found) > 1 and found == list(range(len(found))) else None
