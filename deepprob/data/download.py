"""Fetching a data set from its public home into the user's cache: whole and checked, or not at all.

Files arrive in a folder that ends in ``.part``; only when every check has passed does one rename
make it the data set. A fetch that is interrupted leaves nothing that a later load would read.
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
TIMEOUT = 30.0  # seconds without a byte


def cache_folder() -> Path:
    """Where downloads are kept: ``$XDG_CACHE_HOME/deepprob/data`` or below ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "deepprob" / "data"


def fetch(source: Source) -> Path:
    """Download, check and convert a data set.

    Args:
        source: A set with a public home.

    Returns:
        The folder in the cache that holds its files.

    Raises:
        ConnectionError: If a file cannot be downloaded or is incomplete.
        StorageError: If what came is not what was published.
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
                f"data set {source.name!r} from {source.origin} is not what was published there: "
                "its sha256 differs. Nothing was kept; get it elsewhere and set DEEPPROB_DATA."
            )
        if not all((home / file).is_file() for file in source.files):  # no process was faster
            shutil.rmtree(home, ignore_errors=True)  # a set that lost a file
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
                raise ConnectionError(f"broke off after {file.tell()} of {size} bytes")
    except (OSError, HTTPException) as error:
        reason: object = getattr(error, "reason", error)
        if isinstance(error, urllib.error.HTTPError):
            reason = f"HTTP {error.code} {error.reason}"
            error.close()  # it still holds the connection
        raise ConnectionError(
            f"could not download {remote.url}: {reason}. Try again, or put the data set into a "
            "folder and set DEEPPROB_DATA to it."
        ) from error
    if expected and seen.hexdigest() != expected:
        raise StorageError(
            f"{remote.url} is not the published file: {kind} {expected} was expected, "
            f"{seen.hexdigest()} came. Nothing was kept; get it elsewhere and set DEEPPROB_DATA."
        )


def digest(folder: Path, files: Iterable[str]) -> str:
    """The sha256 of some files' contents, end to end; of an npz file, of the arrays in it.

    Compressed bytes depend on the library that wrote them, the arrays do not.
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
