"""Downloading data sets into the user's cache, complete and checked.

Files are downloaded to a folder whose name ends in ``.part``. It is renamed after every check has passed, so an
interrupted download leaves nothing that a later load would read.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path

import numpy as np

from deepprob.data.parsers import open_npz
from deepprob.data.sources import Remote, Source
from deepprob.errors import StorageError

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without receiving data


def cache_folder() -> Path:
    """The folder of downloads: ``$XDG_CACHE_HOME/deepprob/data``, or ``~/.cache/deepprob/data``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "deepprob" / "data"


def fetch(source: Source) -> Path:
    """Download, check and convert a data set.

    Args:
        source: A data set with ``remotes``.

    Returns:
        The folder in the cache that holds its files.

    Raises:
        ConnectionError: If a file cannot be downloaded or is incomplete.
        StorageError: If a checksum differs from that of the published file.
    """
    home = cache_folder() / source.name
    home.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{home.name}.", suffix=".part", dir=home.parent))
    try:
        print(f"Downloading {source.name} from {source.origin}", file=sys.stderr)
        for remote in source.remotes:
            _download(remote, part / remote.file)
        if source.convert is not None:
            source.convert(part)
            for remote in source.remotes:
                (part / remote.file).unlink()
        if source.digest and digest(part, source.files) != source.digest:
            raise StorageError(
                f"data set {source.name!r} from {source.origin} has changed: its sha256 differs from the known one. "
                f"Nothing was kept. Put the known files into {source.folder} in the folder that DEEPPROB_DATA names."
            )
        # Another process may have finished the same download first; keep its files.
        if not all((home / file).is_file() for file in source.files):
            shutil.rmtree(home, ignore_errors=True)  # an incomplete folder would block the rename
            part.rename(home)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return home


def _download(remote: Remote, path: Path) -> None:
    kind, _, expected = remote.checksum.partition(":")
    seen = hashlib.new(kind or "sha256")
    try:
        with urllib.request.urlopen(remote.url, timeout=TIMEOUT) as reply, path.open("wb") as file:
            size = reply.headers.get("Content-Length")
            while chunk := reply.read(CHUNK):
                seen.update(chunk)
                file.write(chunk)
            if size is not None and file.tell() != int(size):
                raise ConnectionError(f"the connection ended after {file.tell()} of {size} bytes")
    except (OSError, HTTPException) as error:
        reason: object = getattr(error, "reason", error)
        if isinstance(error, urllib.error.HTTPError):
            reason = f"HTTP {error.code} {error.reason}"
            error.close()  # the error holds the connection open
        raise ConnectionError(
            f"could not download {remote.url}: {reason}. Try again, or put the data set into the folder that "
            "DEEPPROB_DATA names."
        ) from error
    if expected and seen.hexdigest() != expected:
        raise StorageError(
            f"{remote.url} is not the published file: expected {kind} {expected}, got {seen.hexdigest()}. "
            "Nothing was kept. Put the data set into the folder that DEEPPROB_DATA names."
        )


def digest(folder: Path, files: Iterable[str]) -> str:
    """The sha256 of the concatenated contents of files.

    An npz file enters by its arrays, because its compressed bytes depend on the library that wrote them.
    """
    total = hashlib.sha256()
    for file in files:
        if not file.endswith(".npz"):
            total.update((folder / file).read_bytes())
            continue
        with open_npz(folder / file) as arrays:
            for name in sorted(arrays.files):
                array = np.ascontiguousarray(arrays[name])
                total.update(f"{name} {array.dtype.str} {array.shape}".encode())
                total.update(array.tobytes())
    return total.hexdigest()
