"""`Document`, a result that is printed, shown in a notebook, and written as one page or as JSON."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any


class Document(ABC):
    """A result that is written as one page or as JSON."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The content as JSON types."""

    @abstractmethod
    def to_html(self) -> str:
        """The content as one self-contained HTML page without scripts."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a ``.html`` or ``.json`` file. A write that fails leaves an old file unchanged.

        Args:
            path: The file; missing folders are created.

        Returns:
            The path.

        Raises:
            ValueError: If the file name ends in neither ``.html`` nor ``.json``.
        """
        target = Path(path)
        kind = target.suffix.lower()
        if kind == ".html":
            text = self.to_html()
        elif kind == ".json":
            text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        else:
            raise ValueError(f"path must end in .html or .json; got {target.name!r}. Choose one of these endings.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, suffix=".part", delete=False) as part:
            try:
                part.write(text)
                part.flush()
                os.fsync(part.fileno())
            except BaseException:
                Path(part.name).unlink(missing_ok=True)
                raise
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(part.name, 0o666 & ~umask)  # temporary files are private; a document gets the usual permissions
        os.replace(part.name, target)
        return target
