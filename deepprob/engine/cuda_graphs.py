"""Steps recorded once as CUDA graphs and replayed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepprob.engine.native.build import Run

_UNROLLED = 16  # steps in one CUDA graph


class Replay:
    """Steps recorded once in CUDA graphs and launched many at a time, without a host sync.

    Args:
        run: One step, from all that is carried and captured to all that is carried.
        carried: An example.
        captured: Tensors whose content may change, but not their place.
        capacity: Most steps in one call.
    """

    def __init__(self, run: Run, carried: Sequence[Tensor], captured: Sequence[Tensor], capacity: int) -> None:
        self.carried = [x.clone() for x in carried]
        self.captured = list(captured)  # a graph reads memory, whoever it belongs to by then
        device = self.carried[0].device
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # The outer stream is the one to return to where recording fails, as torch itself does not then.
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # libraries set themselves up outside of the recording
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

    def __call__(self, count: int, carried: Sequence[Tensor]) -> Sequence[Tensor]:
        """Take some steps from a carry."""
        for place, value in zip(self.carried, carried, strict=True):
            place.copy_(value)
        for steps in sorted(self.graphs, reverse=True):
            for _ in range(count // steps):
                self.graphs[steps].replay()
            count %= steps
        return self.carried
