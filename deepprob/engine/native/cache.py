"""Find the C++ compiler, and keep compiled code in a folder of the user."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

if sys.platform != "win32":
    import fcntl

_KEPT = 64  # compiled files in the cache
_LONGEST_BUILD = 24 * 3600.0  # seconds

_T = TypeVar("_T")


class NoCompiler(RuntimeError):
    """No C++ compiler was found."""


def compiler() -> str:
    """The name of the C++ compiler: ``CXX``, or else the system's default, ``g++`` or ``clang++``.

    Raises:
        NoCompiler: If there is no such program.
    """
    chosen = os.environ.get("CXX")
    name = chosen or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        raise NoCompiler(
            f"CXX is {chosen!r}, but it must be the name of one program, without options or wrappers"
            if chosen
            else "no C++ compiler was found (on Debian: apt-get install g++)"
        )
    return name


def cache_folder() -> Path | None:
    """The user's folder of compiled code; None if it cannot be made or others can access it."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "deepprob" / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # the user may have no home folder
        return None
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    if mine and not stat.S_IMODE(found.st_mode) & 0o077:
        return folder
    _warn_unsafe(folder)
    return None


def writable_cache() -> Path | None:
    """The user's folder of compiled code; None if there is none, or if it is read-only."""
    folder = cache_folder()
    return folder if folder is not None and os.access(folder, os.W_OK | os.X_OK) else None


@cache
def _warn_unsafe(folder: Path) -> None:
    warnings.warn(
        f"compiled code is not cached: {folder} belongs to another user, or others can access it. Make it yours with "
        "mode 700, or set XDG_CACHE_HOME to another folder.",
        UserWarning,
        stacklevel=3,
    )


def built_once(name: str, build: Callable[[Path], None], load: Callable[[Path], _T]) -> _T:
    """Load a compiled file from the user's cache; build it first if it is missing or damaged.

    The cache (``~/.cache/deepprob``, or under ``XDG_CACHE_HOME``) holds code, so only the user may access it (mode
    700). If others can, or if the folder is not writable, the file is built in a temporary folder for this process
    only. Each file has its SHA-256 beside it: loading code that a full disk cut short can crash the process.

    Of several processes that need the same file, one builds it, and the others wait.

    Args:
        name: The file's name, which identifies its content.
        build: Writes the file.
        load: Reads the file; raises RuntimeError or OSError if it cannot.
    """
    with contextlib.ExitStack() as stack:
        folder = cache_folder()
        if folder is not None and (loaded := _loaded(folder / name, load)) is not None:
            return loaded
        path = (writable_cache() or Path(stack.enter_context(tempfile.TemporaryDirectory()))) / name
        stack.enter_context(_alone(path))
        if (loaded := _loaded(path, load)) is not None:  # another process built it meanwhile
            return loaded
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            built, digest = Path(work) / name, Path(work) / "digest"
            build(built)
            digest.write_text(_digest(built))
            os.replace(digest, _digest_of(path))
            os.replace(built, path)
        _prune(path.parent)
        return load(path)


def _loaded(path: Path, load: Callable[[Path], _T]) -> _T | None:
    """The content of a file; None if it is missing or damaged."""
    with contextlib.suppress(RuntimeError, OSError):
        if _is_whole(path):
            loaded = load(path)
            with contextlib.suppress(OSError):
                path.touch()
            return loaded
    return None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which the system takes from a process that ends."""
    with _lock_of(path).open("ab") as lock:
        if sys.platform != "win32":
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_being_built(name: str) -> bool:
    """Whether a process builds a file of the cache at this moment."""
    folder = writable_cache()
    if folder is None or sys.platform == "win32" or not _lock_of(folder / name).exists():
        return False
    with _lock_of(folder / name).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _is_whole(path: Path) -> bool:
    return path.exists() and _digest(path) == _digest_of(path).read_text()


def _prune(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process may prune at the same time
        files = sorted(folder.glob("*.pt2"), key=lambda f: f.stat().st_mtime, reverse=True)
        for old in files[_KEPT:]:
            old.unlink()
            _digest_of(old).unlink(missing_ok=True)
            _lock_of(old).unlink(missing_ok=True)
        for left in folder.glob("tmp*"):  # by a process that was killed
            if time.time() - left.stat().st_mtime > _LONGEST_BUILD:
                shutil.rmtree(left, ignore_errors=True)
