"""The loss and its gradients: one run in Python, or one graph traced from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from deepprob.engine.deferred_errors import DeferredErrors
from deepprob.engine.noise import LiftedNoise, NoiseSize
from deepprob.engine.trace import SkipValueChecks, restore, same_values, trace_graph
from deepprob.fitting.objectives import Objective, Terms
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch
from deepprob.programs.run import Run
from deepprob.programs.tracing import TraceableSites, tensors_of


@dataclass(frozen=True)
class GradientGraph:
    """Loss, terms, gradients and new buffers as a pure function of tensors.

    Called with (parameters, buffers, fixed, batch, rows, normal, uniform, kl_weight), lists where they are several,
    it returns (loss, terms, gradients, new buffers).

    Attributes:
        function: The function; in-place operations of the program are still among its own.
        names: Names of the terms.
        buffers: The program's tensors that a run changes.
        fixed: Those that it only reads.
        noise: How much noise a call takes.
        layers: Precision in which layers multiply.
    """

    function: Callable[..., tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]]
    names: tuple[str, ...]
    buffers: list[Tensor]
    fixed: list[Tensor]
    noise: NoiseSize
    layers: str = "float32"


def loss_and_gradients(
    instance: ProgramInstance,
    objective: Objective,
    params: Sequence[Tensor],
    batch: Batch,
    rows: Tensor,
    kl_weight: float | Tensor,
) -> tuple[Tensor, Terms, list[Tensor]]:
    """Run an objective, inside a running program: loss and terms, detached, and a gradient for every parameter."""
    batch = instance.program.prepare(*batch)
    run = Run(instance.program, batch, rows, instance.num_data, plates=instance.structure.plates)
    loss, terms = objective(run, kl_weight=kl_weight)
    gradients = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    return loss.detach(), terms, list(gradients)


class GradientProgram:
    """One run of an objective and of its gradients, as Python runs it.

    Args:
        instance: The program.
        objective: What is maximised.
    """

    def __init__(self, instance: ProgramInstance, objective: Objective) -> None:
        self.instance, self.objective = instance, objective
        self.params = list(instance.parameters().values())

    def __call__(self, batch: Batch, rows: Tensor, kl_weight: float | Tensor) -> tuple[Tensor, Terms, list[Tensor]]:
        """Loss, detached terms, and a gradient for every parameter.

        Args:
            batch: The batch's rows of the data.
            rows: Which they are, shape ``(B,)``.
            kl_weight: Weight of the KL.
        """
        return loss_and_gradients(self.instance, self.objective, self.params, batch, rows, kl_weight)

    def measure(self, batch: Batch, rows: Tensor) -> tuple[NoiseSize, list[Tensor]]:
        """Run once: how much noise that takes, and which of the program's tensors it changes; they are put back."""
        others = self._others()
        before = [x.clone() for x in others]
        with LiftedNoise() as noise:
            self(batch, rows, 1.0)
        changed = [x for x, was in zip(others, before, strict=True) if not same_values(x, was)]
        restore(others, before)
        return noise.size, changed

    def _others(self) -> list[Tensor]:
        """The program's tensors that are not trained."""
        trained = {id(p) for p in self.params}
        return [x for x in tensors_of(self.instance) if id(x) not in trained]


def trace_gradients(program: GradientProgram, batch: Batch, rows: Tensor) -> GradientGraph:
    """Trace a run of an objective and its gradients; inside a running program.

    Every tensor that can change from step to step is an input of the graph: parameters, buffers, the batch, its rows,
    the noise and the weight of the KL. So a value that is asked for while tracing (``.item()``, ``if tensor:``) is an
    error and not a constant.

    Args:
        program: What to trace.
        batch: A batch like those to come.
        rows: Its rows.

    Raises:
        Untraceable: If a run depends on values, or on random numbers that are not torch's.
    """
    batch, rows = tuple(x.clone() for x in batch), rows.clone()  # one tensor given twice would become one input
    size, buffers = program.measure(batch, rows)
    changed = {id(x) for x in buffers}
    others = program._others()
    fixed = [x for x in others if id(x) not in changed]
    names: list[str] = []

    def run(
        params: list[Tensor],
        buffers: list[Tensor],
        fixed: list[Tensor],
        batch: Batch,
        rows: Tensor,
        normal: Tensor,
        uniform: Tensor,
        kl_weight: Tensor,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        with LiftedNoise(normal, uniform), DeferredErrors() as errors, TraceableSites(), SkipValueChecks():
            loss, terms, gradients = program(batch, rows, kl_weight)
        names[:] = terms
        return errors.mark_nan(loss), list(terms.values()), gradients

    generators = [torch.Generator(rows.device).manual_seed(seed) for seed in (0, 1)]
    normal, uniform = size.draw_once(generators, rows.device)
    weight = torch.ones((), dtype=size.dtype, device=rows.device)
    inputs = (program.params, buffers, fixed, batch, rows, normal, uniform, weight)
    before = [x.clone() for x in buffers]
    changing_names = ["buffers"] if buffers else []
    settled = ["batch", "rows"] if len(rows) == program.instance.num_data else []
    try:
        graph = trace_graph(
            run,
            inputs,
            [*program.params, *others],
            owner=program.instance.program,
            changing=changing_names,
            settled=settled,
            libraries=[pyro],
        )
    finally:
        restore(buffers, before)

    def pure(
        params: list[Tensor], buffers: list[Tensor], *rest: Any
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        changing = [x.clone() for x in buffers]
        loss, terms, gradients = graph(params, changing, *rest)
        return loss, terms, gradients, changing

    return GradientGraph(pure, tuple(names), buffers, fixed, size, getattr(program.objective, "layers", "float32"))
