"""Checkpoints of a running fit: all that is needed to go on, bit for bit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepprob.posteriors.history import History
from deepprob.programs.minibatch import Batch
from deepprob.storage import read, write

if TYPE_CHECKING:
    from deepprob.fitting.callbacks import Callback
    from deepprob.fitting.run import RunningFit


_OWNED = ("packed", "buffers")  # parts of the carry that are the program's own tensors


def write_checkpoint(fit: RunningFit, path: Path) -> None:
    """Write parameters, optimizer, averages, best state, history, and the positions of noise and shuffle.

    Args:
        fit: The fit.
        path: The folder; it always holds one complete checkpoint.
    """
    tensors = {f"state.{n}": t for n, t in fit.state.owned.tensors().items()}
    tensors |= {f"best.{n}": t for n, t in fit.best.items()}
    for name, group in fit.state.carry.items():
        if name not in _OWNED:
            tensors |= {f"carry.{name}.{i}": t for i, t in enumerate(group)}
    tensors |= {f"noise.{n}": t for n, t in fit.noise.state.items()}
    tensors |= {f"history.{n}": t for n, t in fit.history.to_tensors().items()}
    tensors["shuffle.state"] = fit.shuffle_state
    numbers: dict[str, Any] = {}
    for index, entries in (fit.state.optimizer.state_dict()["state"] if fit.state.optimizer else {}).items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                numbers[f"{index}.{name}"] = value
    manifest = {
        "fit": _fingerprint(fit),
        "optimizer": numbers,
        "step": fit.step,
        "epoch": fit.epoch,
        "stop": fit.stop,
        "bad_in_a_row": fit.bad_in_a_row,
        "best_value": fit.best_value,
        "history": fit.history.facts(),
        "callbacks": [c.state() for c in fit.callbacks if c.steers],
    }
    write(path, tensors, manifest, kind="checkpoint")


def restore_checkpoint(fit: RunningFit, path: Path) -> None:
    """Put a fit that has not begun where the checkpoint was.

    Args:
        fit: The fit, made with the same arguments.
        path: The folder.

    Raises:
        ValueError: If the checkpoint is of another fit.
        StorageError: If the files cannot be trusted.
    """
    tensors, manifest = read(path, kind="checkpoint")
    if (was := manifest["fit"]) != (now := _fingerprint(fit)):
        changed = ", ".join(f"{k} (was {was.get(k)}, now {now.get(k)})" for k in now if was.get(k) != now.get(k))
        raise ValueError(
            f"the checkpoint in {path} is of another fit: {changed}. "
            "Give the same arguments, another folder, or Checkpoint(..., resume=False)."
        )
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = value
    fit.state.owned.load(groups["state"])
    fit.best = {n: t.to(fit.device) for n, t in groups["best"].items()}
    carry = fit.state.carry
    fit.state.take(
        {
            name: [groups["carry"][f"{name}.{i}"] for i in range(len(carry[name]))]
            for name in carry
            if name not in _OWNED
        }
    )
    fit.noise.state = groups["noise"]
    fit.shuffle_state = groups["shuffle"]["state"]
    fit.shuffle_generator.set_state(fit.shuffle_state)
    if fit.state.optimizer is not None:
        _load_optimizer(fit.state.optimizer, groups.get("optimizer", {}), manifest["optimizer"])
    fit.step, fit.epoch, fit.stop = manifest["step"], manifest["epoch"], manifest["stop"]
    fit.state.step = fit.step
    if fit.step and fit.step % fit.steps_per_epoch == 0:
        fit.shuffle.epoch()  # that epoch is over: the next one draws the next permutation
    fit.bad_in_a_row, fit.best_value = manifest["bad_in_a_row"], manifest["best_value"]
    fit.history = History.restore(groups["history"], manifest["history"])
    for callback, state in zip((c for c in fit.callbacks if c.steers), manifest["callbacks"], strict=True):
        if state:
            callback.restore(state)


def _fingerprint(fit: RunningFit) -> dict[str, Any]:
    """What must be equal for a resumed fit to be the same fit."""
    shapes = {n: list(p.shape) for n, p in fit.state.params.items()}
    extra = {
        "callbacks": [_described(c) for c in fit.callbacks if c.steers],
        "data": _digest(fit.data),
        "held_out": None if fit.held_out is None else _digest(fit.held_out.batch),
    }
    return {**fit.config, "seed": fit.seed, "num_data": fit.state.owned.num_data, "parameters": shapes, **extra}


def _described(callback: Callback) -> str:
    settings = ", ".join(f"{name}={value!r}" for name, value in callback.course.items())
    return f"{type(callback).__name__}({settings})"


def _digest(batch: Batch) -> str:
    """A fingerprint of some tensors' content."""
    digest = hashlib.sha256()
    for x in batch:
        digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy() if x.numel() else b"")
    return digest.hexdigest()[:16]


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    entries: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *numbers.items()]:
        index, _, name = key.partition(".")
        entries.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
