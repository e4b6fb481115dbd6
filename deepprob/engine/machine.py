"""The machine: one lock, devices, threads, memory and the garbage collector."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Pyro's handler stack is shared by all threads, and so is what torch's tracers and compiler put in place of their own
# functions: two programs running or traced at once corrupt each other.
ONE_AT_A_TIME = threading.RLock()

_WORTH_SHARING = 2**26  # multiplications a step, from which on more threads gain more than they risk


@contextmanager
def placed_on(device: torch.device | str) -> Iterator[None]:
    """Make tensors on a device where none is named, as ``dist.Normal(0.0, 1.0)`` and ``torch.zeros(3)`` name none.

    On a GPU, cuDNN's convolutions and recurrences also compute in float32 as torch's matrix products do by default, not
    in TF32, whose three digits would hide what a comparison of eager and compiled steps is to show (the switch is the
    whole process's, and is put back). The fast way, for those who ask for it, is ``ELBO(layers="bfloat16")``.

    Args:
        device: The device; nothing changes on the CPU.

    Examples:
        >>> with placed_on("meta"):
        ...     torch.zeros(3).device
        device(type='meta')
    """
    device = torch.device(device)
    if device.type == "cpu":
        yield
        return
    tf32 = torch._C._get_cudnn_allow_tf32()
    torch._C._set_cudnn_allow_tf32(False)
    try:
        with device:
            yield
    finally:
        torch._C._set_cudnn_allow_tf32(tf32)


@contextmanager
def threads_for(work: int) -> Iterator[None]:
    """Within this context torch uses one thread if a step's work is small.

    A small step is many short operations. Sharing each of them out gains little, and when the other core is busy every
    one waits for it: a step of 4 ms was seen to take 120.

    Args:
        work: Multiplications of a step, roughly: parameters times rows.

    Examples:
        >>> before = torch.get_num_threads()
        >>> with threads_for(1000):
        ...     inside = torch.get_num_threads()
        >>> inside, torch.get_num_threads() == before
        (1, True)
    """
    before = torch.get_num_threads()
    if work >= _WORTH_SHARING or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Let the C library keep the memory that a step frees for the next one.

    glibc hands freed blocks back to the system at once until a block of their size was freed before; every step of a
    large model then pays for the same pages again. So we free a large one.

    Examples:
        >>> keep_freed_memory()
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)  # 32 MiB is the most that glibc learns from


@contextmanager
def without_collector() -> Iterator[None]:
    """Keep Python from looking through a million objects that are all in use, again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def pick_device(device: str | torch.device) -> torch.device:
    """The device that a name stands for; ``"auto"`` is the GPU where there is one.

    Args:
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or a ``torch.device``.

    Raises:
        ValueError: If a GPU is asked for and there is none.

    Examples:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}. Choose from: auto, cpu, cuda, cuda:<number>.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, but torch sees no GPU. Use device='cpu' or 'auto'.")
    return chosen
