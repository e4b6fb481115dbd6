"""Readers of the local layout: from a folder of files to the parts of a data set.

Every reader takes the folder and the number of the split. No reader unpickles or runs the contents of a file.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

from deepprob.data.split import Split


@dataclass(frozen=True)
class Parts:
    """The parts of a data set; ``train`` and ``valid`` may be missing."""

    train: Split | None
    valid: Split | None
    test: Split
    extras: dict[str, Any] = field(default_factory=dict)


@contextmanager
def open_npz(path: Path) -> Iterator[NpzFile]:
    """Open the arrays of an archive and refuse pickled ones; the file is closed even if it is damaged."""
    with path.open("rb") as file, NpzFile(file) as arrays:
        yield arrays


def grey(values: np.ndarray, top: float = 255.0) -> Tensor:
    """Scale whole numbers from 0 to ``top`` to float32 in [0, 1]."""
    return torch.from_numpy(values).to(torch.float32).div_(top)


def labels(values: np.ndarray) -> Tensor:
    """Class numbers as int64."""
    return torch.from_numpy(values.astype(np.int64))


def image_split(images: Tensor, classes: np.ndarray) -> Split:
    """Images and their labels."""
    return Split({"images": images, "labels": labels(classes)})


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of bytes: a big-endian header, then the values."""
    with gzip.open(path, "rb") as file:
        content = bytearray(file.read())  # torch warns of read-only memory
    if content[:3] != b"\0\0\x08":
        raise ValueError("not an idx file of unsigned bytes")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def idx_pair(folder: Path, prefix: str) -> Split:
    """An image file and its label file."""
    images, classes = (read_idx(folder / f"{prefix}-{kind}-ubyte.gz") for kind in _IDX_KINDS)
    return image_split(grey(images), classes)


_IDX_KINDS = ("images-idx3", "labels-idx1")


def idx_set(folder: Path, split: int) -> Parts:
    """Four idx files; the last 10,000 training images are for validation."""
    return Parts(*_idx_parts(folder))


def _idx_parts(folder: Path) -> tuple[Split, Split, Split]:
    train, test = idx_pair(folder, "train"), idx_pair(folder, "t10k")
    cut = len(train) - 10_000
    return train.rows(slice(cut)), train.rows(slice(cut, None)), test


def mnist(folder: Path, split: int) -> Parts:
    """MNIST, with a fixed binarization of the test and validation images as extras."""
    train, valid, test = _idx_parts(folder)
    # The binarization depends on this seed and on the order: test images first.
    generator = np.random.Generator(np.random.PCG64(20150901))
    bits = {
        "test_bits": _bits(test["images"], generator),
        "valid_bits": _bits(valid["images"], generator),
    }
    return Parts(train, valid, test, bits)


def _bits(images: Tensor, generator: np.random.Generator) -> Tensor:
    probability = images.mul(255).round_().to(torch.float64).div_(255).flatten(1).numpy()
    draws = generator.random(probability.shape) < probability
    return torch.from_numpy(draws).to(torch.float32).view_as(images)


def notmnist(folder: Path, split: int) -> Parts:
    """Letters A to J; test images only."""
    return Parts(None, None, idx_pair(folder, "t10k"))


def fashion_sprite(folder: Path, split: int) -> Parts:
    """900 Fashion-MNIST images; test images only."""
    with open_npz(folder / "fashion_sprite.npz") as z:
        return Parts(None, None, image_split(grey(z["images"]), z["label"]))


def omniglot(folder: Path, split: int) -> Parts:
    """Omniglot: test images by drawers 16 to 20; 1,345 random drawings of the others for validation."""
    with open_npz(folder / "omniglot28.npz") as z:
        images, test = z["images"], z["test"].astype(bool)
        character, alphabet, names = z["character"], z["alphabet"], z["alphabet_names"]
    order = np.random.RandomState(0).permutation(np.flatnonzero(~test))
    index = {
        "train": np.sort(order[:-1345]),
        "valid": np.sort(order[-1345:]),
        "test": np.flatnonzero(test),
    }
    parts = {name: image_split(grey(images[rows]), character[rows]) for name, rows in index.items()}
    extras: dict[str, Any] = {f"{k}_alphabet": labels(alphabet[i]) for k, i in index.items()}
    return Parts(**parts, extras=extras | {"alphabet_names": names.tolist()})


def usps(folder: Path, split: int) -> Parts:
    """USPS digits, stored as thousandths of values from -1 to 1."""
    with open_npz(folder / "usps.npz") as z:
        train, test = (
            image_split(grey(z[f"x_{part}"] + np.int16(1000), 2000.0), z[f"y_{part}"]) for part in ("train", "test")
        )
    return Parts(train, None, test)


def freyfaces(folder: Path, split: int) -> Parts:
    """Frey faces in the usual random parts. Neighboring frames of the video are similar, so the parts are too."""
    with open_npz(folder / "freyfaces.npz") as z:
        images = grey(z["images"])
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(images)))
    train, valid, test = (Split({"images": images[i]}) for i in order.split([1565, 200, 200]))
    return Parts(train, valid, test)


def cifar10_small(folder: Path, split: int) -> Parts:
    """Color images from JPEG bytes, shape ``(3, 32, 32)``."""
    from PIL import Image  # comes with matplotlib; no other set needs it

    with open_npz(folder / "cifar10_small_jpeg.npz") as z:
        jpeg, ends, classes = z["jpeg"].tobytes(), z["offset"], z["label"]
        is_train, names = z["train"], z["class_names"].tolist()
    pixels = np.stack(
        [np.asarray(Image.open(io.BytesIO(jpeg[start:stop])).convert("RGB")) for start, stop in pairwise(ends)]
    )
    images = grey(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))  # (N, 3, 32, 32)
    data = image_split(images, classes)
    train, test = data.rows(np.flatnonzero(is_train)), data.rows(np.flatnonzero(~is_train))
    return Parts(train, None, test, {"class_names": names})


def uci(folder: Path, split: int) -> Parts:
    """A table, its input and target columns, and the rows of one standard split."""
    table = np.loadtxt(folder / "data.txt", dtype=np.float64, ndmin=2)

    def numbers(name: str) -> np.ndarray:
        return np.loadtxt(folder / f"index_{name}.txt", ndmin=1).astype(np.int64)

    inputs, target = table[:, numbers("features")], table[:, numbers("target")]
    data = Split({"x": _float(inputs), "y": _float(target)})
    return Parts(data.rows(numbers(f"train_{split}")), None, data.rows(numbers(f"test_{split}")))


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(torch.float32)


def debd(name: str, folder: Path, split: int) -> Parts:
    """Rows of zeros and ones."""
    with open_npz(folder / f"{name}.npz") as z:
        width = int(z["n_vars"])
        train, valid, test = (Split({"x": _unpack(z[part], width)}) for part in ("train", "valid", "test"))
    return Parts(train, valid, test)


def _unpack(packed: np.ndarray, width: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(packed, axis=1, count=width)).to(torch.float32)


def piano_roll(name: str, folder: Path, split: int) -> Parts:
    """Songs of unequal length: notes padded with zeros, and the length of each song."""
    with open_npz(folder / f"{name}.npz") as z:
        train, valid, test = (
            padded("notes", _unpack(z[part], 88), z[f"{part}_len"]) for part in ("train", "valid", "test")
        )
    return Parts(train, valid, test)


def padded(name: str, frames: Tensor, lengths: np.ndarray, **more: Tensor) -> Split:
    """Cut concatenated frames, ``(sum T_i, D)``, into padded sequences ``(N, T_max, D)``; keep their lengths."""
    songs = frames.split(lengths.tolist())
    notes = torch.nn.utils.rnn.pad_sequence(list(songs), batch_first=True)
    return Split({name: notes, "lengths": labels(lengths), **more})


def fsdd(folder: Path, split: int) -> Parts:
    """Log-mel frames of spoken digits; test rows are takes 0 to 4 of every speaker."""
    with open_npz(folder / "fsdd_logmel40.npz") as z:
        low, high = float(z["lo"]), float(z["hi"])
        frames = grey(z["logmel_u8"]).mul_(high - low).add_(low)  # (sum T_i, 40)
        offset, length, take = z["offset"], z["length"].astype(np.int64), z["take"]
        digit, speaker, names = z["digit"], z["speaker"], z["speaker_names"].tolist()

    def part(rows: np.ndarray) -> Split:
        pieces = torch.cat([frames[offset[i] : offset[i] + length[i]] for i in rows])
        return padded("frames", pieces, length[rows], labels=labels(digit[rows]))

    train, test = np.flatnonzero(take > 4), np.flatnonzero(take <= 4)
    extras: dict[str, Any] = {
        "train_speaker": labels(speaker[train]),
        "test_speaker": labels(speaker[test]),
        "speaker_names": names,
    }
    return Parts(part(train), None, part(test), extras)


def bags(name: str, folder: Path, split: int) -> Parts:
    """Word counts as dense rows, one column per word of the vocabulary."""
    with open_npz(folder / f"{name}.npz") as z:
        words = bytes(z["vocab"]).decode().split("\n")

        def counts(part: str) -> Tensor:
            start, word = z[f"{part}_indptr"], z[f"{part}_indices"]
            dense = np.zeros((len(start) - 1, len(words)), np.float32)
            dense[np.repeat(np.arange(len(dense)), np.diff(start)), word] = z[f"{part}_counts"]
            return torch.from_numpy(dense)

        def bag(part: str) -> Split:
            fields = {"counts": counts(part)}
            if f"{part}_labels" in z:
                fields["labels"] = labels(z[f"{part}_labels"])
            return Split(fields)

        extras: dict[str, Any] = {"vocabulary": words}
        if "label_names" in z:
            extras["class_names"] = bytes(z["label_names"]).decode().split("\n")
        # Document completion: topics are inferred from one half of a document, words scored on the other.
        for half, role in (("test_h1", "test_infer"), ("test_h2", "test_score")):
            if f"{half}_counts" in z:
                extras[role] = counts(half)
        return Parts(bag("train"), bag("valid"), bag("test"), extras)
