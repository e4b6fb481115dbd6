"""Answers to what a program is asked again and again: traced once, the same to the last bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from deepprob.owned import OwnedProgram
from deepprob.parts import parts_of, with_parts
from deepprob.prediction import Prediction
from deepprob.program import Batch, Program
from deepprob.runtime import RandomStream
from deepprob.shapes import Layout
from deepprob.traces import Site, is_deterministic, is_factor, sample_sites
from deepprob.tracing import QueryGraph, Untraceable, trace_query

# Tracing takes as long as many answers, and saves only Python's part of each.
_TRACED_AFTER = 300  # questions about rows of the same shapes


class Question(Protocol):
    """What a program is asked about some rows, whole and as tensors that can be traced."""

    def ask(self, batch: Batch) -> Any:
        """The answer."""

    def parts(self, batch: Batch) -> list[Tensor]:
        """The tensors that an answer is made of."""

    def finish(self, parts: list[Tensor]) -> Any:
        """The answer from its tensors, after `parts` was called."""


class Answers:
    """Answers a program's questions; of those that come often about rows of the same shapes, by a traced graph.

    The graph takes the noise that a run would draw: answers are the same whether traced or not.

    Args:
        owned: The program.
    """

    def __init__(self, owned: OwnedProgram) -> None:
        self.owned = owned
        self.graphs: dict[Any, tuple[QueryGraph, Callable[[list[Tensor]], Any]]] = {}
        self._asked: dict[Any, int] = {}

    def __call__(self, key: Any, batch: Batch, question: Question) -> Any:
        """The answer for some rows, inside a running program.

        Args:
            key: What tells the question from others.
            batch: The rows.
            question: The question.
        """
        key = key, tuple((tuple(x.shape), x.dtype) for x in batch)
        if key in self.graphs:
            graph, finish = self.graphs[key]
            go_back = _random_position(self.owned.device)
            parts = graph.answer(batch)
            if not any(bool(x.isnan().any()) for x in parts):
                return finish(parts)
            # What the graph cannot answer ends below in the error that says why, or is nan without it too.
            go_back()
            return question.ask(batch)
        self._asked[key] = self._asked.get(key, 0) + 1
        if self._asked[key] == _TRACED_AFTER:
            with RandomStream(0, self.owned.device).drawing(), contextlib.suppress(Untraceable):
                graph = trace_query(self.owned, question.parts, batch)
                if graph.noise.plain is not None:
                    self.graphs[key] = graph, question.finish
        return question.ask(batch)


def _random_position(device: torch.device) -> Callable[[], None]:
    """What takes torch's global generators back to where they are now."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def go_back() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

    return go_back


class TensorQuestion:
    """A question whose answer is one tensor.

    Args:
        ask: The question.
    """

    def __init__(self, ask: Callable[[Batch], Tensor]) -> None:
        self.ask = ask

    def parts(self, batch: Batch) -> list[Tensor]:
        """The answer itself."""
        return [self.ask(batch)]

    def finish(self, parts: list[Tensor]) -> Tensor:
        """The answer itself."""
        return parts[0]


class PredictionQuestion:
    """What will be observed at a site. Its distribution is traced; the draw from it, the last of a run, is not.

    Args:
        run: The model's trace under draws, for some rows, the observed sites drawn.
        node_of: The site in a trace.
        layout: Where draws and rows stand.
        program: Whose networks a distribution may hold.
        undrawn: The site's name, or those that it could be.
    """

    def __init__(
        self,
        run: Callable[[Batch], Trace],
        node_of: Callable[[Trace], Site],
        layout: Layout,
        program: Program,
        undrawn: Sequence[str],
    ) -> None:
        self.run, self.node_of, self.layout, self.undrawn = run, node_of, layout, undrawn
        self.modules = list(program.modules())

    def ask(self, batch: Batch) -> Prediction:
        """The prediction of a run."""
        return predicted(self.node_of(self.run(batch)), self.layout)

    def parts(self, batch: Batch) -> list[Tensor]:
        """The tensors of the distribution that a run draws from last.

        Raises:
            Untraceable: If more is drawn after it, or if it may hold tensors that are not seen.
        """
        with _Undrawn(self.undrawn):
            trace = self.run(batch)
        node = self.node_of(trace)
        *_, last = (
            site["name"] for _, site in sample_sites(trace) if not is_deterministic(site) and not is_factor(site)
        )
        if last != node["name"]:
            raise Untraceable(f"{last!r} is drawn after {node['name']!r}")
        try:
            parts = parts_of(node["fn"], self.modules)
        except TypeError as error:
            raise Untraceable(str(error)) from error
        form = with_parts(node["fn"], (torch.empty(0) for _ in parts), self.modules)
        self._node = {"name": node["name"], "fn": form, "cond_indep_stack": node["cond_indep_stack"]}
        return parts

    def finish(self, parts: list[Tensor]) -> Prediction:
        """The prediction, with a draw from the distribution of these parts."""
        distribution: Any = with_parts(self._node["fn"], parts, self.modules)
        return predicted(self._node | {"fn": distribution, "value": distribution()}, self.layout)


def predicted(node: Site, layout: Layout) -> Prediction:
    """The prediction that a site of a run is."""
    return Prediction(node["fn"], layout.draws_first(node), node["name"], unused=layout.unused(node))


class _Undrawn(Messenger):
    """Gives sites a value of the right shape without drawing it."""

    def __init__(self, sites: Sequence[str]) -> None:
        super().__init__()
        self.sites = sites

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.sites and msg["value"] is None:
            msg["value"] = torch.zeros(msg["fn"].shape())
