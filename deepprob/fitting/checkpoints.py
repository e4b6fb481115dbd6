"""Checkpoints of a running fit, from which it resumes bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepprob.fitting.snapshots import Snapshot, from_parts, parts
from deepprob.storage import read, write


def write_checkpoint(path: Path, found: Snapshot) -> None:
    """Write a snapshot to a folder, which always holds one complete checkpoint."""
    tensors, facts = parts(found)
    write(path, tensors, facts, kind="checkpoint")


def read_checkpoint(path: Path) -> Snapshot:
    """Read a snapshot that `write_checkpoint` wrote.

    Raises:
        StorageError: If the files cannot be trusted.
    """
    return from_parts(*read(path, kind="checkpoint"))


def check_same(now: Mapping[str, Any], was: Mapping[str, Any], path: Path) -> None:
    """Compare the settings of a fit with those of a checkpoint.

    Raises:
        ValueError: If the checkpoint belongs to another fit.
    """
    if was != now:
        changed = ", ".join(f"{k} (was {was.get(k)}, now {now.get(k)})" for k in now if was.get(k) != now.get(k))
        raise ValueError(
            f"the checkpoint in {path} belongs to another fit: {changed}. "
            "Give the same arguments, another folder, or Checkpoint(..., resume=False)."
        )


def read_plan(path: Path) -> dict[str, Any]:
    """How the fit of a checkpoint takes its steps, as JSON; empty if there is no checkpoint."""
    return read(path, kind="checkpoint")[1].get("plan", {}) if (path / "manifest.json").exists() else {}
