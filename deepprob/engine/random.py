"""Random streams that leave the caller's random state unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from deepprob.engine.machine import ONE_AT_A_TIME


class RandomStream:
    """A stream of random numbers that belongs to one fit or one query.

    Inside `drawing`, torch's global generators continue this stream; afterwards they have the caller's state again.
    The stream's position is its `state`: a fit that resumes from a saved state gets the noise of an uninterrupted fit.

    Args:
        seed: The seed of the stream.
        device: A GPU whose global generator is swapped too; ``"cpu"`` swaps none.

    Attributes:
        generators: Generators of noise drawn ahead, on the device: one for normal and one for uniform numbers.

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
        # With one generator a kind, the noise of a step does not depend on how many steps are drawn ahead.
        self.generators = tuple(torch.Generator(self.device).manual_seed(_salted(seed, salt)) for salt in (1, 2))

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Let torch's global generators continue this stream; other threads' streams wait."""
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
        """The stream's position, as tensors to save."""
        found = {"cpu": self._cpu} | ({} if self._cuda is None else {"cuda": self._cuda})
        return found | {f"ahead_{i}": generator.get_state() for i, generator in enumerate(self.generators)}

    @state.setter
    def state(self, value: dict[str, Tensor]) -> None:
        self._cpu = value["cpu"].cpu()
        if self._cuda is not None and "cuda" in value:
            self._cuda = value["cuda"].cpu()
        for i, generator in enumerate(self.generators):
            generator.set_state(value[f"ahead_{i}"].cpu())


def _salted(seed: int, salt: int) -> int:
    return (seed + salt * 0x9E3779B97F4A7C15) % 2**63
