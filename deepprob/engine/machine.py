"""The machine: one lock, devices, threads, memory and the garbage collector."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# All threads share Pyro's handler stack and the functions that torch's tracers and compiler replace: two programs that
# run or are traced at the same time corrupt each other.
ONE_AT_A_TIME = threading.RLock()

_WORTH_SHARING = 2**26  # multiplications of a step: from here on, more threads gain more than they risk


@contextmanager
def placed_on(device: torch.device | str) -> Iterator[None]:
    """Create tensors on this device if the call names none, as in ``dist.Normal(0.0, 1.0)`` or ``torch.zeros(3)``.

    On a GPU, cuDNN's convolutions and recurrences also compute in float32, as torch's matrix products do by default,
    and not in TF32: its three digits would hide differences between eager and compiled steps. The switch is global to
    the process and is restored afterwards. ``ELBO(layers="bfloat16")`` is the way to fast layers.

    Args:
        device: The device; on the CPU nothing changes.

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
    """Let torch use one thread within this context if a step's work is small.

    A small step is many short operations. Splitting each of them over threads gains little, and each waits for the
    slowest thread: on a machine with a busy core, a step of 4 ms took 120 ms.

    Args:
        work: The approximate number of multiplications of a step: parameters times rows.

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


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bfloat16, which take several times as long as float32 without.

    Args:
        device: The device.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not hasattr(torch.cpu, "get_capabilities"):  # older releases of torch
        return bool(torch.cpu._is_avx512_bf16_supported())
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def keep_freed_memory() -> None:
    """Let the C library keep memory that one step frees for the next step.

    glibc returns large freed blocks to the system until a block of that size has been freed once; before that, every
    step of a large model pays for new pages. This function frees one large block.

    Examples:
        >>> keep_freed_memory()
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)  # glibc adapts to blocks of up to 32 MiB


@contextmanager
def without_collector() -> Iterator[None]:
    """Turn off the garbage collector, which would scan a million objects, all in use, again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def pick_device(device: str | torch.device) -> torch.device:
    """The device of this name; ``"auto"`` is the GPU if there is one, else the CPU.

    Args:
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or a ``torch.device``.

    Raises:
        TypeError: If ``device`` is neither a name nor a ``torch.device``.
        ValueError: If the name is unknown, or it names a GPU and there is none.

    Examples:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except TypeError:
        raise TypeError(
            f"device must be a name or a torch.device; got {type(device).__name__}. "
            "Choose from: auto, cpu, cuda, cuda:<number>."
        ) from None
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}. Choose from: auto, cpu, cuda, cuda:<number>.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} needs a GPU, but torch finds none. Use device='cpu' or 'auto'.")
    return chosen
