"""The score of a running fit on held-out data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from deepprob.engine.noise import LiftedNoise
from deepprob.engine.random import RandomStream
from deepprob.engine.served_calls import replaced_calls, served
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch, num_rows
from deepprob.programs.tracing import FlatQuery, trace_query

_SEED = 20_140_410


class HeldOut:
    """Mean held-out score per row: the ELBO, or with global latents the expected log-likelihood, without their KL.

    Every call uses the same noise, so that the scores of two epochs differ by their parameters alone.

    Args:
        instance: The program that is being fitted.
        batch: The held-out rows, on the device.

    Raises:
        ValueError: If the program cannot score these rows.

    Attributes:
        batch: The held-out rows.
    """

    def __init__(self, instance: ProgramInstance, batch: Batch) -> None:
        self.instance, self.batch = instance, batch
        self._graphs: dict[int, FlatQuery] = {}
        self._pieces: list[tuple[Batch, tuple[Tensor, Tensor]]] = []
        generators = [torch.Generator(instance.device).manual_seed(_SEED + kind) for kind in range(2)]
        with self._scoring() as posterior:
            for piece in posterior.chunks(batch, 1):
                with LiftedNoise() as noise:
                    posterior.elbo_of(piece, 1)
                self._pieces.append((piece, noise.size.draw_once(generators, instance.device)))

    @property
    def is_bound(self) -> bool:
        """Whether the score is a bound on the evidence: there is no KL of global latents to leave out."""
        return not self.instance.structure.global_

    @property
    def name(self) -> str:
        """The name of the score in a fit's history."""
        return "held_out_elbo" if self.is_bound else "held_out_log_likelihood"

    @property
    def compiled_graphs(self) -> int:
        """Number of compiled graphs: one for each size of a piece of the rows, at most two."""
        return sum(graph.is_compiled for graph in self._graphs.values())

    def __call__(self) -> float:
        """The score at the present parameters."""
        if self._graphs:  # a graph has no modes to switch
            with torch.no_grad(), self._drawing():
                parts = [self._graphs[num_rows(piece)](piece, *noise) for piece, noise in self._pieces]
        else:
            with self._scoring() as posterior:
                parts = [self._eager(posterior, piece, noise) for piece, noise in self._pieces]
        return float(torch.cat(parts).mean())

    @staticmethod
    def _eager(posterior: Posterior, piece: Batch, noise: tuple[Tensor, Tensor]) -> Tensor:
        with replaced_calls(), served(LiftedNoise(*noise)):
            return posterior.elbo_of(piece, 1)

    def _drawing(self) -> AbstractContextManager[None]:
        """A context whose random numbers are the same in every score."""
        return RandomStream(_SEED, self.instance.device).drawing()

    @contextmanager
    def _scoring(self) -> Iterator[Posterior]:
        instance, training = self.instance, self.instance.program.training
        try:
            with torch.no_grad(), instance.running(), self._drawing():
                yield Posterior(instance)  # puts the program in evaluation mode
        finally:
            instance.program.train(training)

    def trace(self) -> list[FlatQuery]:
        """Trace the score; later calls run its graphs, one for each size of a piece of the rows.

        Raises:
            Untraceable: If the score depends on tensor values other than through tensor operations.
        """
        found: dict[int, FlatQuery] = {}
        with self._scoring() as posterior:
            for piece, _ in self._pieces:
                if num_rows(piece) not in found:
                    graph = trace_query(self.instance, lambda x: [posterior.elbo_of(x, 1)], piece)
                    found[num_rows(piece)] = FlatQuery(graph, piece)
        self._graphs = found
        return list(found.values())
