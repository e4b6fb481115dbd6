"""Where Pyro runs: a private parameter store, one lock, and random streams of our own.

Pyro keeps its parameters and its stack of handlers in globals. Whatever calls into Pyro here does so inside
`private_store`, so that two fits never meet, and inside `RandomStream.drawing`, so that the caller's random
state is as it was.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor

# Pyro's handler stack is shared by all threads, and so is what torch's tracers and compiler put in place of their own
# functions: two programs running or traced at once corrupt each other.
ONE_AT_A_TIME = threading.RLock()

_WORTH_SHARING = 2**26  # multiplications a step, from which on more threads gain more than they risk


StoreState = Any  # pyro.params.param_store.StateDict, which Pyro does not export


def empty_store() -> StoreState:
    """The state of a parameter store that holds nothing."""
    return {"params": {}, "constraints": {}}


@contextmanager
def private_store(state: StoreState, *, validate: bool = False, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run Pyro on parameters of one's own, one thread at a time.

    Args:
        state: The store's content; what is registered inside is found in it afterwards.
        validate: Whether Pyro and torch check arguments and supports (slow; once per fit is enough).
        device: Where tensors are made that are given no place; see `placed_on`.

    Examples:
        >>> mine = empty_store()
        >>> with private_store(mine):
        ...     _ = pyro.param("loc", torch.zeros(()))
        >>> "loc" in pyro.get_param_store(), "loc" in mine["params"]
        (False, True)
    """
    with ONE_AT_A_TIME, placed_on(device), pyro.validation_enabled(validate), pyro.get_param_store().scope(state):
        yield


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


class RandomStream:
    """A stream of random numbers that belongs to one fit or one query.

    Everything that draws from torch's global generators inside `drawing` draws from this stream; outside, the
    global generators are as the caller left them. The stream's position is its `state`, so that a fit that was
    stopped goes on with the noise it would have had.

    Args:
        seed: Where the stream starts.
        device: The device whose generator is also swapped, if it is not the CPU.

    Attributes:
        ahead: Generators on the device for noise that is drawn ahead, one for normal and one for uniform numbers.

    Examples:
        >>> before = torch.get_rng_state()
        >>> with RandomStream(0).drawing():
        ...     a = torch.randn(3)
        >>> with RandomStream(0).drawing():
        ...     b = torch.randn(3)
        >>> bool((a == b).all()), bool((torch.get_rng_state() == before).all())
        (True, True)
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._cpu = torch.Generator().manual_seed(seed).get_state()
        self._cuda: Tensor | None = None
        if self.device.type == "cuda":
            self._cuda = torch.Generator(self.device).manual_seed(seed).get_state()
        # One generator a kind, so that what a step gets does not depend on how many are drawn ahead.
        self.ahead = tuple(torch.Generator(self.device).manual_seed(_salted(seed, salt)) for salt in (1, 2))

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Let torch's global generators continue this stream; no other stream does so meanwhile."""
        with ONE_AT_A_TIME:
            yield from self._swapped()

    def _swapped(self) -> Iterator[None]:
        caller_cpu = torch.get_rng_state()
        caller_cuda = torch.cuda.get_rng_state(self.device) if self._cuda is not None else None
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self.device)
        try:
            yield
        finally:
            self._cpu = torch.get_rng_state()
            torch.set_rng_state(caller_cpu)
            if caller_cuda is not None:
                self._cuda = torch.cuda.get_rng_state(self.device)
                torch.cuda.set_rng_state(caller_cuda, self.device)

    @property
    def state(self) -> dict[str, Tensor]:
        """The position, as tensors to save."""
        found = {"cpu": self._cpu} | ({} if self._cuda is None else {"cuda": self._cuda})
        return found | {f"ahead_{i}": generator.get_state() for i, generator in enumerate(self.ahead)}

    @state.setter
    def state(self, value: dict[str, Tensor]) -> None:
        self._cpu = value["cpu"].cpu()
        if self._cuda is not None and "cuda" in value:
            self._cuda = value["cuda"].cpu()
        for i, generator in enumerate(self.ahead):
            generator.set_state(value[f"ahead_{i}"].cpu())


def _salted(seed: int, salt: int) -> int:
    return (seed + salt * 0x9E3779B97F4A7C15) % 2**63


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
