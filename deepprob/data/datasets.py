"""load_data and list_data: the data sets by name."""

from __future__ import annotations

import html
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

from deepprob.data.download import cache_folder, fetch
from deepprob.data.parsers import Parts
from deepprob.data.sources import SOURCES, UNSTATED, Source, Task
from deepprob.data.split import Split
from deepprob.errors import StorageError, unknown, whole


@dataclass(frozen=True, repr=False)
class DataSet:
    """A data set in its parts: training, validation and test rows.

    Args:
        name: The name, for messages and reports.
        task: The task: images, classification, regression, sequences, binary, bags, or table for rows without a target.
        parts: The rows and extras.
        num_classes: Number of classes; None if there are no labels.
        licence: The license of the data; ``"not stated"`` if it is unknown.
        origin: The origin of the data.
        recipe: The arguments with which `open_data` gives the same parts again.

    Examples:
        >>> load_data("iris")
        DataSet 'iris' (classification, 3 classes): row (4,), 90 train / 30 valid / 30 test
    """

    name: str
    task: Task
    parts: Parts
    num_classes: int | None = None
    licence: str = UNSTATED
    origin: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def train(self) -> Split:
        """The training rows.

        Raises:
            ValueError: If the set has test rows only.
        """
        if self.parts.train is None:
            raise ValueError(
                f"data set {self.name!r} has test rows only, no training rows. "
                "Use .test, or fit on a part of it: .test.split(0.8)."
            )
        return self.parts.train

    @property
    def valid(self) -> Split | None:
        """The validation rows; None if the set has none."""
        return self.parts.valid

    @property
    def test(self) -> Split:
        """The test rows."""
        return self.parts.test

    @property
    def extras(self) -> dict[str, Any]:
        """Further contents by name, such as class names, a vocabulary or a fixed binarization."""
        return self.parts.extras

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one row of the first field; sequences have the length of the longest."""
        return tuple((self.parts.train or self.test).shape)

    def __repr__(self) -> str:
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        return f"DataSet {self.name!r} ({self.task}{classes}): row {self.shape}, {_rows(self.parts)}"


def _rows(parts: Parts) -> str:
    named = {"train": parts.train, "valid": parts.valid, "test": parts.test}
    return " / ".join(f"{len(part)} {name}" for name, part in named.items() if part is not None)


def load_data(name: str, *, split: int = 0, folder: str | os.PathLike[str] | None = None) -> DataSet:
    """Load a data set by name from scikit-learn, a local folder, the user's cache or the internet.

    Images are float32 in [0, 1]; tables are not standardized. Downloads are checked before they are used, and kept
    below ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Args:
        name: One of the names that :func:`list_data` shows.
        split: Number of the standard split, for the ``uci`` sets.
        folder: The folder of local data sets; by default that of ``DEEPPROB_DATA``.

    Returns:
        The data set with its train, valid and test rows.

    Raises:
        TypeError: If ``name`` is not text.
        ValueError: If the set or the split is unknown.
        StorageError: If a file is damaged.
        FileNotFoundError: If the set is not on this machine and cannot be downloaded.
        ConnectionError: If a download fails.

    Examples:
        The parts are the same in every session, with equal shares of each class:

        >>> digits = load_data("digits")
        >>> digits.train
        Split(1078 rows: images (8, 8) float32, labels () int64)
        >>> digits.train["labels"].bincount().tolist()
        [107, 109, 106, 110, 109, 109, 109, 107, 104, 108]
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be text, such as 'digits'; got {name!r}. See list_data().")
    if name not in SOURCES:
        raise unknown("data set", name, SOURCES)
    source = SOURCES[name]
    if whole("split", split, least=0) >= source.splits:
        raise ValueError(
            f"data set {name!r} has {source.splits} standard split"
            f"{'s' * (source.splits > 1)}, counted from 0; got split={split}. "
            f"Choose {f'0 to {source.splits - 1}' if source.splits > 1 else 'split=0'}."
        )
    place = _find(source, _local(folder)) or _fetch(source)
    try:
        parts = source.parse(place, split)
    except (OSError, EOFError, KeyError, IndexError, ValueError, zlib.error, BadZipFile) as error:
        raise StorageError(
            f"data set {name!r} in {place} cannot be read: {error}. A file is damaged or of another origin; "
            "replace it, or remove it to download the set again."
        ) from error
    recipe = {"name": name, "split": split}
    return DataSet(name, source.task, parts, source.num_classes, source.licence, source.origin, recipe)


def _local(folder: str | os.PathLike[str] | None) -> Path | None:
    named = folder if folder is not None else os.environ.get("DEEPPROB_DATA")
    if not named:
        return None
    path = Path(named).expanduser()
    if not path.is_dir():
        what = "folder" if folder is not None else "DEEPPROB_DATA"
        raise FileNotFoundError(
            f"{what} must name a folder of data sets; there is no folder {path}. Correct the path or leave it out."
        )
    return path


def _find(source: Source, local: Path | None) -> Path | None:
    """The folder that holds all files of the set, local or in the cache; None if there is none."""
    if not source.files:
        return Path()
    places = [local / source.folder] if local else []
    for place in [*places, cache_folder() / source.name]:
        if all((place / file).is_file() for file in source.files):
            return place
    return None


def _fetch(source: Source) -> Path:
    if source.remotes:
        return fetch(source)
    raise FileNotFoundError(
        f"data set {source.name!r} is not on this machine and cannot be downloaded. "
        f"Put {source.folder}/{source.files[0]} into the folder that DEEPPROB_DATA names (origin: {source.origin})."
    )


class DataRow(NamedTuple):
    """One line of :func:`list_data`."""

    name: str
    task: str
    shape: str
    rows: str
    licence: str
    where: str


class DataTable(list[DataRow]):
    """A list of `DataRow` that prints as a table."""

    def __repr__(self) -> str:
        lines = [DataRow._fields, *self]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    def _repr_html_(self) -> str:
        def line(cells: tuple[str, ...], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        head, body = line(DataRow._fields, "th"), "".join(line(row, "td") for row in self)
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def list_data(*, folder: str | os.PathLike[str] | None = None) -> DataTable:
    """List all data sets: name, task, shape of a row, rows of train / valid / test, license, location.

    The location, ``where``, is ``bundled``, ``local`` (in the folder or the cache), ``download`` or ``not here``.

    Args:
        folder: The folder of local data sets; by default that of ``DEEPPROB_DATA``.

    Examples:
        >>> list_data()[0]
        DataRow(name='digits', task='images', shape='(8, 8)', rows='1078 / 360 / 359',
                licence='CC BY 4.0', where='bundled')
    """
    local = _local(folder)
    return DataTable(
        DataRow(
            source.name,
            source.task,
            f"({', '.join('T' if n is None else str(n) for n in source.shape)})",
            " / ".join(str(count or "-") for count in source.rows),
            source.licence,
            _where(source, local),
        )
        for source in SOURCES.values()
    )


def _where(source: Source, local: Path | None) -> str:
    if not source.files:
        return "bundled"
    if _find(source, local):
        return "local"
    return "download" if source.remotes else "not here"
