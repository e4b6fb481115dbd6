"""Checkpoints of a running fit, from which it resumes bit for bit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepprob.posteriors.history import History
from deepprob.programs.minibatch import Batch
from deepprob.storage import read, write

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """Everything that the next steps of a fit depend on.

    Attributes:
        fit: The settings and digests that identify the fit, as JSON; a resumed fit must have the same.
        plan: How the steps are taken, as JSON; a resumed fit follows it.
        step: Steps done.
        epoch: Epochs done.
        stop: Whether a callback ended the fit.
        bad_in_a_row: Number of skipped steps in a row up to now.
        program: The program's parameters and buffers.
        late: The parameters that a later run registered, with their constraints as JSON.
        carry: The optimizer's memory, by name.
        optimizer: State of torch's optimizer, by ``<parameter>.<name>``; tensors and numbers.
        noise: Position of the noise.
        shuffle: State of the shuffle's generator before the current epoch.
        best: The best state so far.
        best_value: Its score.
        history: The history so far.
        callbacks: The state of each callback that steers the fit, as JSON.
    """

    fit: dict[str, Any]
    plan: dict[str, Any]
    step: int
    epoch: int
    stop: bool
    bad_in_a_row: int
    program: Tensors
    late: dict[str, Any]
    carry: dict[str, list[Tensor]]
    optimizer: dict[str, Any]
    noise: Tensors
    shuffle: Tensor
    best: Tensors
    best_value: float
    history: History
    callbacks: list[dict[str, Any]]


def write_checkpoint(path: Path, snapshot: Snapshot) -> None:
    """Write a snapshot to a folder, which always holds one complete checkpoint."""
    tensors = {f"state.{n}": t for n, t in snapshot.program.items()}
    tensors |= {f"best.{n}": t for n, t in snapshot.best.items()}
    for name, group in snapshot.carry.items():
        tensors |= {f"carry.{name}.{i}": t for i, t in enumerate(group)}
    tensors |= {f"noise.{n}": t for n, t in snapshot.noise.items()}
    tensors |= {f"history.{n}": t for n, t in snapshot.history.to_tensors().items()}
    tensors |= {f"optimizer.{n}": t for n, t in snapshot.optimizer.items() if isinstance(t, Tensor)}
    tensors["shuffle.state"] = snapshot.shuffle
    manifest = {
        "fit": snapshot.fit,
        "plan": snapshot.plan,
        "optimizer": {n: x for n, x in snapshot.optimizer.items() if not isinstance(x, Tensor)},
        "late": snapshot.late,
        "step": snapshot.step,
        "epoch": snapshot.epoch,
        "stop": snapshot.stop,
        "bad_in_a_row": snapshot.bad_in_a_row,
        "best_value": snapshot.best_value,
        "history": snapshot.history.facts(),
        "callbacks": snapshot.callbacks,
    }
    write(path, tensors, manifest, kind="checkpoint")


def read_checkpoint(path: Path, fit: dict[str, Any]) -> Snapshot:
    """Read a snapshot that `write_checkpoint` wrote.

    Args:
        path: The folder.
        fit: The settings and digests of the fit to resume, see `Snapshot`.

    Raises:
        ValueError: If the checkpoint belongs to another fit.
        StorageError: If the files cannot be trusted.
    """
    tensors, manifest = read(path, kind="checkpoint")
    if (was := manifest["fit"]) != fit:
        changed = ", ".join(f"{k} (was {was.get(k)}, now {fit.get(k)})" for k in fit if was.get(k) != fit.get(k))
        raise ValueError(
            f"the checkpoint in {path} belongs to another fit: {changed}. "
            "Give the same arguments, another folder, or Checkpoint(..., resume=False)."
        )
    groups: dict[str, Tensors] = {}
    for key, value in tensors.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = value
    carry: dict[str, list[Tensor]] = {}
    for key in sorted(groups.get("carry", {}), key=lambda key: int(key.rpartition(".")[2])):
        carry.setdefault(key.rpartition(".")[0], []).append(groups["carry"][key])
    return Snapshot(
        fit=fit,
        plan=manifest.get("plan", {}),
        step=manifest["step"],
        epoch=manifest["epoch"],
        stop=manifest["stop"],
        bad_in_a_row=manifest["bad_in_a_row"],
        program=groups["state"],
        late=manifest.get("late", {}),
        carry=carry,
        optimizer=groups.get("optimizer", {}) | manifest["optimizer"],
        noise=groups["noise"],
        shuffle=groups["shuffle"]["state"],
        best=groups["best"],
        best_value=manifest["best_value"],
        history=History.restore(groups["history"], manifest["history"]),
        callbacks=manifest["callbacks"],
    )


def read_plan(path: Path) -> dict[str, Any]:
    """How the fit of a checkpoint takes its steps, as JSON; empty if there is no checkpoint."""
    return read(path, kind="checkpoint")[1].get("plan", {}) if (path / "manifest.json").exists() else {}


def digest(batch: Batch) -> str:
    """A hash of the content of some tensors."""
    found = hashlib.sha256()
    for x in batch:
        found.update(x.detach().cpu().contiguous().view(torch.uint8).numpy() if x.numel() else b"")
    return found.hexdigest()[:16]


def optimizer_state(optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """The state of torch's optimizer, by ``<parameter>.<name>``."""
    entries = {} if optimizer is None else optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, named in entries.items() for name, value in named.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state that `optimizer_state` returned."""
    entries: dict[int, dict[str, Any]] = {}
    for key, value in state.items():
        index, _, name = key.partition(".")
        entries.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
