"""Converters from published files to the local layout, for data sets that are published in another form.

Each converter reads the downloaded files in a folder and writes the layout's file to the same folder.
"""

from __future__ import annotations

import bz2
import importlib
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np


def omniglot_zips(folder: Path) -> None:
    """Convert 105 x 105 drawings, two archives of PNG files, to 28 x 28 by area averages, with bright ink."""
    from PIL import Image  # comes with matplotlib

    images: list[np.ndarray] = []
    rows: list[list[int]] = []
    alphabets: list[str] = []
    character = -1
    for background in (1, 0):
        stem = "images_background" if background else "images_evaluation"
        with zipfile.ZipFile(folder / f"{stem}.zip") as archive:
            paths = sorted(p for p in archive.namelist() if p.startswith(stem) and p[-4:] == ".png")
            for path in paths:
                _, alphabet, letter, file = path.split("/")
                if alphabets[-1:] != [alphabet]:
                    alphabets.append(alphabet)
                number, (source, drawer) = int(letter[-2:]), map(int, file[:-4].split("_"))
                character += drawer == 1
                ink = np.asarray(Image.open(io.BytesIO(archive.read(path))).convert("1"))
                drawing = Image.fromarray(np.where(ink, 0, 255).astype(np.uint8))
                images.append(np.asarray(drawing.resize((28, 28), Image.Resampling.BOX)))
                rows.append([len(alphabets) - 1, character, number, drawer, source, background])
    columns = np.array(rows).T
    names = ["alphabet", "character", "character_in_alphabet", "drawer", "source_id", "background"]
    kinds = [np.uint8, np.uint16, np.uint8, np.uint8, np.uint16, np.uint8]
    table = {n: c.astype(k) for n, c, k in zip(names, columns, kinds, strict=True)}
    np.savez_compressed(
        folder / "omniglot28.npz",
        images=np.stack(images),
        alphabet_names=np.array(alphabets),
        test=(table["drawer"] > 15).astype(np.uint8),
        **table,
    )


def usps_libsvm(folder: Path) -> None:
    """Convert lines ``label 1:value ... 256:value`` with labels from 1 and values from -1 to 1."""
    arrays: dict[str, Any] = {}
    for part, file in (("train", "usps.bz2"), ("test", "usps.t.bz2")):
        with bz2.open(folder / file, "rt", encoding="ascii") as lines:
            rows = [line.split() for line in lines if line.strip()]
        values = np.array([[float(v.partition(":")[2]) for v in row[1:]] for row in rows])
        arrays[f"x_{part}"] = np.round(values.reshape(-1, 16, 16) * 1000).astype(np.int16)
        arrays[f"y_{part}"] = np.array([int(float(row[0])) - 1 for row in rows], np.uint8)
    np.savez_compressed(folder / "usps.npz", **arrays)


def piano_roll_mat(folder: Path) -> None:
    """Convert MATLAB cells ``traindata``, ``validdata``, ``testdata`` of ``(T, 88)`` matrices."""
    loadmat = importlib.import_module("scipy.io").loadmat
    (path,) = folder.glob("*.mat")
    cells = loadmat(path)
    arrays: dict[str, Any] = {}
    for part in ("train", "valid", "test"):
        songs = [np.asarray(song) > 0 for song in cells[f"{part}data"][0]]
        arrays[part] = np.packbits(np.concatenate(songs), axis=1)
        arrays[f"{part}_len"] = np.array([len(song) for song in songs], np.int32)
    np.savez_compressed(path.with_suffix(".npz"), **arrays)


def debd_text(folder: Path) -> None:
    """Convert three files of lines ``0,1,...``."""
    arrays: dict[str, Any] = {}
    paths = sorted(folder.glob("*.data"))
    for path in paths:
        rows = np.loadtxt(path, dtype=np.uint8, delimiter=",", ndmin=2)
        arrays[path.name.split(".")[1]] = np.packbits(rows, axis=1)
        arrays["n_vars"] = np.array(rows.shape[1])
    np.savez_compressed(folder / f"{paths[0].name.split('.')[0]}.npz", **arrays)
