"""The C++ compiler, and the user's folder of compiled code."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

_KEPT = 64  # compiled steps in the cache

_T = TypeVar("_T")


class NoCompiler(RuntimeError):
    """Nothing on this machine turns C++ into native code."""


def compiler() -> str:
    """The C++ compiler: ``CXX``, or what the system calls it.

    Raises:
        NoCompiler: If it is not there.
    """
    own = os.environ.get("CXX")
    name = own or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        raise NoCompiler(
            f"CXX is {own!r}, which is not the name of a program (options and wrappers have no place in it)"
            if own
            else "no C++ compiler was found (on Debian: apt-get install g++)"
        )
    return name


def cache_folder() -> Path | None:
    """The user's folder of compiled code; None if there is none that is the user's alone."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "deepprob" / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # there may be no home
        return None
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    if mine and not stat.S_IMODE(found.st_mode) & 0o077:
        return folder
    _say_unused(folder)
    return None


@cache
def _say_unused(folder: Path) -> None:
    warnings.warn(
        f"compiled steps are not kept for the next process: {folder} is not yours alone. Give it to yourself with mode "
        "700, or name another place in XDG_CACHE_HOME.",
        UserWarning,
        stacklevel=3,
    )


def built_once(name: str, build: Callable[[Path], None], load: Callable[[Path], _T]) -> _T:
    """A compiled file from the user's cache, which is built first if it is not there, or not whole.

    The cache (``~/.cache/deepprob``, or under ``XDG_CACHE_HOME``) holds code, so it is the user's alone (mode 700): a
    folder that others can read or write to is not used, and the file is built for this process, as where nothing can be
    written. Beside each file lies its SHA-256: code that a full disk cut short can end the process that loads it.

    Args:
        name: Of the file; it says all that decides what is in it.
        build: Writes the file.
        load: Reads it; raises RuntimeError or OSError if it cannot.
    """
    with contextlib.ExitStack() as stack:
        folder = cache_folder()
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with contextlib.suppress(RuntimeError, OSError):
            if _is_whole(folder / name):
                loaded = load(folder / name)
                with contextlib.suppress(OSError):
                    (folder / name).touch()
                return loaded
        if not os.access(folder, os.W_OK | os.X_OK):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = folder / name
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built, digest = Path(work) / name, Path(work) / "digest"
            build(built)
            digest.write_text(_digest(built))
            os.replace(digest, _digest_of(path))
            os.replace(built, path)
        _prune(folder)
        return load(path)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _is_whole(path: Path) -> bool:
    return path.exists() and _digest(path) == _digest_of(path).read_text()


def _prune(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process does the same
        files = sorted(folder.glob("*.pt2"), key=lambda f: f.stat().st_mtime, reverse=True)
        for old in files[_KEPT:]:
            old.unlink()
            _digest_of(old).unlink(missing_ok=True)
