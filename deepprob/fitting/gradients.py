"""The loss and its gradients, by a run in Python or by a graph traced from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepprob.engine.deferred_errors import DeferredErrors
from deepprob.engine.noise import LiftedNoise, NoiseSize
from deepprob.engine.subject import unchanged_in_python
from deepprob.engine.trace import SkipValueChecks, restore, same_values, trace_graph
from deepprob.fitting.objectives import Objective, Terms
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch
from deepprob.programs.penalties import collecting_penalties
from deepprob.programs.run import Run
from deepprob.programs.tracing import TraceableSites, subject_of, tensors_of


@dataclass(frozen=True)
class GradientGraph:
    """Loss, terms, gradients and new buffers as a pure function of tensors.

    Called with ``(parameters, buffers, fixed, batch, rows, normal, uniform, kl_weight)`` it returns
    ``(loss, terms, gradients, new buffers)``, each a tensor or a list of tensors.

    Attributes:
        function: The function. It changes none of its inputs, though its graph may still work in place.
        names: Names of the terms.
        buffers: The program's tensors that a run changes.
        fixed: The program's tensors that a run only reads.
        noise: How much noise a call takes.
    """

    function: Callable[..., tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]]
    names: tuple[str, ...]
    buffers: list[Tensor]
    fixed: list[Tensor]
    noise: NoiseSize


def loss_and_gradients(
    instance: ProgramInstance,
    objective: Objective,
    params: Sequence[Tensor],
    batch: Batch,
    rows: Tensor,
    kl_weight: float | Tensor,
) -> tuple[Tensor, Terms, list[Tensor]]:
    """Run an objective and differentiate it, inside a running program.

    Returns:
        The loss and the terms, detached, and a gradient for each of ``params``.
    """
    batch = instance.program.prepare(*batch)
    plates, averages = instance.structure.plates, instance.averages
    program, stacks = instance.program, instance.stacks
    run = Run(program, batch, rows, instance.num_data, plates=plates, averages=averages, stacks=stacks)
    with collecting_penalties() as penalties:
        loss, terms = objective(run, kl_weight=kl_weight)
    for name, values in penalties.items():
        if name in terms:
            raise ValueError(f"the penalty {name!r} has the name of a term of the objective. Rename it.")
        mean = torch.stack(values).mean()  # over the runs of an objective
        loss, terms = loss + mean, {**terms, name: mean.detach()}
    if not loss.requires_grad:  # a program without anything to train
        return loss, terms, [torch.zeros_like(p) for p in params]
    gradients = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    return loss.detach(), terms, list(gradients)


class GradientProgram:
    """The loss and gradients of a program, run by Python.

    Args:
        instance: The program.
        objective: The objective to maximise.
        varied: Tensors of the program that count as changed by a run, because starts differ in them.
    """

    def __init__(self, instance: ProgramInstance, objective: Objective, varied: Sequence[Tensor] = ()) -> None:
        self.instance, self.objective, self.varied = instance, objective, {id(x) for x in varied}

    @property
    def params(self) -> list[Tensor]:
        """The trained parameters."""
        return list(self.instance.parameters().values())

    def __call__(self, batch: Batch, rows: Tensor, kl_weight: float | Tensor) -> tuple[Tensor, Terms, list[Tensor]]:
        """Loss, detached terms, and a gradient for every parameter.

        Args:
            batch: The rows of the batch.
            rows: Their indices in the data, shape ``(B,)``.
            kl_weight: Weight of the KL.
        """
        return loss_and_gradients(self.instance, self.objective, self.params, batch, rows, kl_weight)

    def measure(self, batch: Batch, rows: Tensor) -> tuple[NoiseSize, list[Tensor]]:
        """Measure one run; the program's tensors are restored.

        Returns:
            How much noise the run takes, and the tensors of the program that it changes or that starts differ in.
        """
        others = self._untrained()
        before = [x.clone() for x in others]
        with LiftedNoise() as noise:
            self(batch, rows, 1.0)
        pairs = zip(others, before, strict=True)
        changed = [x for x, was in pairs if id(x) in self.varied or not same_values(x, was)]
        restore(others, before)
        known = {id(x) for x in others}
        for average in (x for x in self.instance.averages.values() if id(x) not in known):
            changed.append(average.zero_())  # this run made it
        return noise.size, changed

    def _untrained(self) -> list[Tensor]:
        """The program's tensors that are not trained."""
        trained = {id(p) for p in self.params}
        return [x for x in tensors_of(self.instance) if id(x) not in trained]


def trace_gradients(program: GradientProgram, batch: Batch, rows: Tensor) -> GradientGraph:
    """Trace a run of an objective and its gradients, inside a running program.

    Every tensor that can change from step to step is an input of the graph: parameters, buffers, the batch, its row
    indices, the noise and the weight of the KL. A program that reads a tensor's value (``.item()``, ``if tensor:``)
    therefore raises an error; the value never becomes a constant.

    Args:
        program: The program and objective to trace.
        batch: An example of a batch.
        rows: The indices of its rows.

    Raises:
        Untraceable: If a run depends on tensor values, or draws random numbers that are not torch's.
    """
    whole = torch.equal(rows, torch.arange(program.instance.num_data, device=rows.device))
    settled = ["batch", "rows"] if whole else []  # every step has all rows, in their order
    batch, rows = tuple(x.clone() for x in batch), rows.clone()  # the same tensor twice would become one input
    size, buffers = program.measure(batch, rows)
    changed = {id(x) for x in buffers}
    others = program._untrained()
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
        with LiftedNoise(normal, uniform), DeferredErrors() as errors, TraceableSites(), SkipValueChecks(settled):
            loss, terms, gradients = program(batch, rows, kl_weight)
        names[:] = terms
        return errors.mark_nan(loss), list(terms.values()), gradients

    generators = [torch.Generator(rows.device).manual_seed(seed) for seed in (0, 1)]
    normal, uniform = size.draw_once(generators, rows.device)
    weight = torch.ones((), dtype=size.dtype, device=rows.device)
    inputs = (program.params, buffers, fixed, batch, rows, normal, uniform, weight)
    before = [x.clone() for x in buffers]
    changing_names = ["buffers"] if buffers else []
    subject = subject_of(program.instance)
    try:
        with unchanged_in_python(subject._replace(owner=program.objective, name="the objective")):
            graph = trace_graph(
                run, inputs, [*program.params, *others], subject=subject, changing=changing_names, settled=settled
            )  # fmt: skip
    finally:
        restore(buffers, before)

    def pure(
        params: list[Tensor], buffers: list[Tensor], *rest: Any
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        changing = [x.clone() for x in buffers]
        loss, terms, gradients = graph(params, changing, *rest)
        return loss, terms, gradients, changing

    return GradientGraph(pure, tuple(names), buffers, fixed, size)
