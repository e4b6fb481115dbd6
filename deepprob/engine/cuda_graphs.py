"""Record steps once as CUDA graphs, and replay them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepprob.engine.native.build import Run

_UNROLLED = 16  # steps in the larger of the two CUDA graphs


class Replay:
    """Record steps once in CUDA graphs, and launch many at a time without waiting for the GPU.

    Args:
        run: One step, from carried and captured tensors to carried tensors.
        carried: Example carried tensors.
        captured: Tensors whose values may change between calls, but not their place in memory.
        capacity: The largest number of steps in one call.
    """

    def __init__(self, run: Run, carried: Sequence[Tensor], captured: Sequence[Tensor], capacity: int) -> None:
        self.carried = [x.clone() for x in carried]
        self.captured = list(captured)  # keeps their memory alive: a graph reads it by address
        device = self.carried[0].device
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # The outer context restores the current stream if recording fails; torch does not.
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # CUDA libraries initialize themselves before the recording
                    run([*self.carried, *captured])
            torch.cuda.current_stream().wait_stream(side)
            pool = torch.cuda.graph_pool_handle()
            for steps in {1, min(_UNROLLED, capacity)}:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    now: Sequence[Tensor] = self.carried
                    for _ in range(steps):
                        now = run([*now, *captured])
                    for place, value in zip(self.carried, now, strict=True):
                        place.copy_(value)
                self.graphs[steps] = graph

    def reads(self, captured: Sequence[Tensor]) -> bool:
        """Whether the graphs read these captured tensors, by their place in memory."""
        return all(
            mine is x or mine.data_ptr() == x.data_ptr() for mine, x in zip(self.captured, captured, strict=True)
        )

    def __call__(self, count: int, carried: Sequence[Tensor]) -> Sequence[Tensor]:
        """Take ``count`` steps, and return the carried tensors in this object's own memory."""
        for place, value in zip(self.carried, carried, strict=True):
            place.copy_(value)
        for steps in sorted(self.graphs, reverse=True):
            for _ in range(count // steps):
                self.graphs[steps].replay()
            count %= steps
        return self.carried
