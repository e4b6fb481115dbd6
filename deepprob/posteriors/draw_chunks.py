"""Queries under many draws, in parts that fit in memory, and the arrays that their results make."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deepprob.posteriors.fitted import FittedProgram
from deepprob.posteriors.stored_draws import choose
from deepprob.programs.minibatch import Batch, num_rows

MOST_NUMBERS = 2**21  # of the values of all sites in one part of a query
IN_MEMORY = 2**27  # bytes; a larger array lies in a temporary file


def draw_chunks(fitted: FittedProgram, batch: Batch, draws: int, seed: int) -> Iterator[tuple[FittedProgram, int, int]]:
    """Split a query under K draws into parts with fewer draws.

    Every query that gets the same number of draws and the same seed sees the same draws of the latent sites.

    Args:
        fitted: The fitted program; if it stores draws, every part stores its share of them.
        batch: The program's arguments.
        draws: Number of draws, K.
        seed: Random seed of the draws; the first part has this one.

    Yields:
        The fitted program of a part, its number of draws and its seed.
    """
    rows = num_rows(batch) if batch else fitted.instance.num_data
    numbers = sum(site.numbers * (rows if site.local else 1) for site in fitted.structure.sites.values())
    numbers += max((x.numel() for x in batch if isinstance(x, Tensor)), default=0)
    size = max(1, MOST_NUMBERS // max(numbers, 1))
    stored = None if fitted.chains is None else choose(fitted.chains, draws)
    for i, start in enumerate(range(0, draws, size)):
        count, part = min(size, draws - start), fitted
        if stored is not None and count < draws:
            share = {name: value[start : start + count].unsqueeze(0) for name, value in stored.items()}
            part = FittedProgram(fitted.instance, share)
        yield part, count, seed_of_part(seed, i)


def seed_of_part(seed: int, part: int) -> int:
    """A seed for every part of a query; the first part has the query's own."""
    return seed + part * 2_654_435_761  # torch reads the lowest 32 bits, in which this prime spreads the parts


class DrawArray:
    """An array of draws that is filled part by part; a large one lies in a temporary file, not in memory.

    The file has no name and is gone as soon as nothing uses the array.

    Args:
        draws: Number of draws, K.
    """

    def __init__(self, draws: int) -> None:
        self.draws, self._done = draws, 0
        self._array: NDArray[Any] = np.empty(0)
        self._file: IO[bytes] | None = None

    def add(self, values: Tensor) -> None:
        """Append the values of the next draws, ``(k, ...)``.

        Raises:
            OSError: If the folder of temporary files has too little space.
        """
        part = np.ascontiguousarray(values.detach().cpu().numpy())
        if not self._done:
            size = self.draws * part[0].nbytes
            self._file = _reserved(size) if size > IN_MEMORY else None
            # All at once: parts kept between the values of later runs would split up the heap.
            rows = 0 if self._file else self.draws
            self._array = np.empty((rows, *part.shape[1:]), part.dtype)
        if self._file is not None:
            self._file.write(part.data)
        else:
            self._array[self._done : self._done + len(part)] = part
        self._done += len(part)

    def finish(self) -> NDArray[Any]:
        """All draws, ``(K, ...)``; nothing can be added afterwards."""
        if self._file is None:
            return self._array
        self._file.flush()
        mapped = np.memmap(self._file, self._array.dtype, mode="c", shape=(self.draws, *self._array.shape[1:]))
        self._file.close()
        return np.asarray(mapped)

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()


def _reserved(size: int) -> IO[bytes]:
    """A temporary file with room for a number of bytes."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the array keeps it open
    try:
        if hasattr(os, "posix_fallocate"):  # else a full disk shows while the file is written
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        file.close()
        raise OSError(
            error.errno or errno.ENOSPC,
            f"the draws need {size / 2**30:.1f} GiB in {tempfile.gettempdir()}, which has too little space "
            f"({error.strerror}). Ask for fewer draws or rows, or set TMPDIR to a larger folder.",
        ) from error
    return file
