"""Paths that a user names."""

from __future__ import annotations

import os
from pathlib import Path

from deepprob.storage import nearest


def existing(path: str | os.PathLike[str], *, folder: bool = False) -> Path:
    """A path that exists.

    Args:
        path: The user's path; ``~`` is the home folder.
        folder: Whether it must be a folder.

    Raises:
        FileNotFoundError: If there is no such file or folder; the message suggests the nearest name.
        NotADirectoryError: If it is a file and must be a folder.
        PermissionError: If it cannot be read.
    """
    found = Path(path).expanduser()
    if not found.exists():
        near = nearest(found)
        hint = f" Did you mean '{near}'?" if near else " Check the path."
        raise FileNotFoundError(f"there is no {'folder' if folder else 'file or folder'} '{path}'.{hint}")
    if folder and not found.is_dir():
        raise NotADirectoryError(f"'{path}' is a file; expected a folder. Pass the folder '{found.parent}'.")
    if not os.access(found, os.R_OK):
        raise PermissionError(f"'{path}' cannot be read: permission denied. Change its permissions.")
    return found
