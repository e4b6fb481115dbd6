"""The files that commands write: reports, samples, pictures."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepprob.cli.work import Subject

if TYPE_CHECKING:
    from deepprob.diagnostics.compare import Comparison
    from deepprob.diagnostics.report import Report

_GRID_IMAGES = 100


def checked_ending(file: Path, endings: Collection[str]) -> Path:
    """A file to write, whose ending is one of some and whose folder can be written.

    Raises:
        ValueError: If it has another ending.
        OSError: If its folder cannot be written.
    """
    if file.suffix not in endings:
        raise ValueError(f"--out must end in {' or '.join(endings)}; got {str(file)!r}.")
    check_writable(file.parent)
    return file


def check_writable(folder: Path) -> None:
    """Check that files can be written to a folder, or that it can be made.

    Raises:
        NotADirectoryError: If a part of its path is a file.
        PermissionError: If it cannot be written.
    """
    parent = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"'{folder}' cannot be written: '{parent}' is a file. Choose another --out.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"'{folder}' cannot be written: permission denied in '{parent}'. Choose another --out.")


def write(report: Report | Comparison, page: Path) -> dict[str, str]:
    """Write a report or a comparison as an HTML page and as JSON next to it; returns the paths."""
    page.parent.mkdir(parents=True, exist_ok=True)
    report.save(page)
    report.save(page.with_suffix(".json"))
    return {"report": str(page), "json": str(page.with_suffix(".json"))}


def write_samples(subject: Subject, values: dict[str, Any], file: Path) -> dict[str, str]:
    """Write samples as arrays, as a table, or as a grid of images, which also comes with arrays; returns the paths.

    Raises:
        ValueError: If samples that are not images are to be a picture, or images a table.
    """
    import numpy as np

    image = _image_grid(subject, values)
    if file.suffix == ".png" and image is None:
        raise ValueError(f"--out {file} is for images, and samples of this model are none. Write a .csv or .npz file.")
    content = _sample_frame(subject, values) if file.suffix == ".csv" else None
    file.parent.mkdir(parents=True, exist_ok=True)
    paths = {"samples": str(file)}
    if content is not None:
        content.to_csv(file)
        return paths
    if file.suffix == ".npz":
        with file.open("wb") as stream:
            np.savez_compressed(stream, **values)
    if image is not None:
        file.with_suffix(".png").write_bytes(image)
        paths["picture"] = str(file.with_suffix(".png"))
    return paths if file.suffix == ".npz" else {"picture": str(file)}


def _sample_frame(subject: Subject, values: dict[str, Any]) -> Any:
    """Sampled rows with their columns, or draws of the targets, one line a row."""
    import numpy as np
    import pandas as pd

    from deepprob.data import decode_rows

    name, origin = next(iter(values)), subject.posterior.program.origin
    if subject.task == "images":
        raise ValueError(
            "--out FILE.csv is for tables, and samples of this model are images. Write a .png or .npz file."
        )
    draws = values[name]
    if "sd" not in values:
        name = next(n for n in values if values[n].shape == values["mean"].shape and n != "mean")
        table = values[name].reshape(len(values[name]), -1)
        encoding = origin.encoding
        if encoding is not None and len(encoding.names) == table.shape[1]:
            return decode_rows(encoding.columns, table).rename_axis("draw")
        return pd.DataFrame(table, columns=[f"{name}[{i}]" for i in range(table.shape[1])]).rename_axis("draw")
    if origin.class_names and draws.dtype.kind == "i":
        draws = np.array(origin.class_names, dtype=object)[draws]
    flat = draws.reshape(len(draws), draws.shape[1], -1)  # (draws, rows, values)
    places = [f"[{i}]" if flat.shape[2] > 1 else "" for i in range(flat.shape[2])]
    columns = {f"draw {k}{place}": flat[k, :, i] for k in range(len(flat)) for i, place in enumerate(places)}
    return pd.DataFrame(columns, index=getattr(subject.rows, "index", None)).rename_axis("row")


def _image_grid(subject: Subject, values: dict[str, Any]) -> bytes | None:
    """A PNG of the drawn images in a grid; None if the data are not images."""
    from deepprob.diagnostics.plots import image_rows, render

    images = values.get("mean")
    if subject.task != "images" or images is None or images.shape[1:] != tuple(subject.rows.shape):
        return None
    images = images[:_GRID_IMAGES]
    lines = [images[i : i + 10] for i in range(0, len(images), 10)]
    return render(image_rows({" " * i: line for i, line in enumerate(lines)}))
