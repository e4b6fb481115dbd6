"""The tiers of a fit: eager steps, its traced graph, and native code, each from the step on that the plan names."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.engine.subject import Untraceable
from deepprob.errors import shown
from deepprob.fitting.callbacks import Callback, Checkpoint
from deepprob.fitting.checkpoints import read_plan
from deepprob.fitting.compiling import CompileTask, failure_of
from deepprob.fitting.held_out import HeldOut
from deepprob.fitting.objectives import Terms
from deepprob.fitting.optimizers import FloatArray
from deepprob.fitting.plan import Plan, Work, pays_to_trace, pays_to_trace_score, planned
from deepprob.fitting.state import State
from deepprob.fitting.steppers import EagerStepper, Stepper
from deepprob.programs.parameters import warn_of_late

_EAGERLY = "the steps run eagerly, and more slowly"


class PlannedStepper:
    """Takes the steps of a fit by the tiers of its plan.

    A tier is compared with an eager step before it takes over. If a graph differs from it, the steps stay eager; if
    only the compiler fails, the faster tier without it goes on. In both cases a warning gives the reason. A batch of
    another size or shape than the others, such as the last one of a loader, is taken by an eager step.

    Args:
        plan: The plan.
        eager: The eager stepper.
        task: The traced steps, if the plan has any.
        noise: The fit's random numbers.
        warns: Whether to warn of a graph that differs from the eager step.
    """

    def __init__(
        self, plan: Plan, eager: EagerStepper, task: CompileTask, noise: RandomStream, *, warns: bool = True
    ) -> None:
        self.plan, self.eager, self.task, self.noise, self.warns = plan, eager, task, noise, warns
        self.now: Stepper = eager
        self.tier = "eager"

    @property
    def compiled_graphs(self) -> int:
        return self.now.compiled_graphs

    def capacity_from(self, step: int) -> int:
        tier = [name for name, first in self.plan.tiers if first <= step][-1]
        if tier != self.tier:
            self._take_over(tier)
        later = [first for _, first in self.plan.tiers if first > step]
        return min([self.now.capacity_from(step), *(first - step for first in later)])

    def run(self, state: State, rows: Tensor, knobs: FloatArray) -> Terms:
        usual = rows.shape[1] == self.task.batch_size and self.task.buckets.is_usual
        return (self.now if usual else self.eager).run(state, rows, knobs)

    def facts(self) -> dict[str, Any]:
        return {"compiled": self.compiled_graphs > 0, "plan": self.plan.to_json()}

    def _take_over(self, tier: str) -> None:
        failure, mismatch = self.task.check(compile=tier == "compiled") if tier != "eager" else ("", "")
        if failure:
            tier = self.task.work.uncompiled
            _warn(failure, "the traced graph runs uncompiled" if tier == "traced" else _EAGERLY)
            self.plan = self.plan.without_compiling(failure, tier)
        if mismatch:
            if self.warns:
                _warn(mismatch)
            self.plan, tier = self.plan.without_tracing(mismatch), "eager"
        self.now, self.tier = self.eager if tier == "eager" else self.task.stepper(self.noise), tier


def compile_choice(compile: Any) -> bool | str:
    """The choice whether to compile, checked."""
    # The shape comes first, because comparing a tensor of several elements has no truth value.
    if getattr(compile, "shape", ()) != () or compile not in (True, False, "auto"):
        raise ValueError(f"compile must be True, False or 'auto'; got {shown(compile)}.")
    return compile if isinstance(compile, str) else bool(compile)


def choose_stepper(
    compile: bool | str,
    eager: EagerStepper,
    task: CompileTask,
    *,
    steps: int,
    noise: RandomStream,
    plan: Plan | None = None,
) -> PlannedStepper:
    """Plan the tiers of a fit, and trace its step if the plan needs the graph.

    The plan depends on sizes and on the cache of native code, never on a clock. The buffers in the state's carry become
    all buffers that a step changes.

    Args:
        compile: True, False or ``"auto"``.
        eager: The eager stepper.
        task: The steps to trace.
        steps: Planned steps.
        noise: The fit's random numbers.
        plan: The plan of the checkpoint from which the fit resumes.
    """
    late = task.measure()
    eager.noise, eager.sizes = noise, task.sizes
    operations = task.starts * task.sizes[-1].operations
    stays = Plan((("eager", 0),), "tracing costs more than this fit gains", operations)
    if late:
        warn_of_late(late)
        return PlannedStepper(stays.without_tracing("a step registered parameters"), eager, task, noise)
    if plan is None and compile is not True and not pays_to_trace(steps, operations):
        plan = stays
    if plan is None or plan.tiers != stays.tiers:
        try:
            task.trace()
        except Untraceable as error:
            if compile is not False:
                _warn(str(error), stacklevel=4)
            plan = stays.without_tracing(str(error))
    if plan is None:
        cached, building, beside = task.is_cached(), task.is_building(), task.builds_beside()
        plan = planned(compile, steps, task.work, cached=cached, building=building, beside=beside)
    if plan.build:
        task.start_build()
    stepper = PlannedStepper(plan, eager, task, noise, warns=compile is not False)
    stepper.capacity_from(0)  # compares the first tier before the first step
    return stepper


def choose_score(score: HeldOut, stepper: PlannedStepper, compile: bool | str, *, times: int, resumed: bool) -> None:
    """Trace or compile the held-out score if that gains time; if it fails, warn and keep the eager score.

    Args:
        score: The score.
        stepper: The steps of the fit; its plan gets the tier of the score.
        compile: True, False or ``"auto"``.
        times: Planned number of scores.
        resumed: Whether the plan is that of a checkpoint.
    """
    if stepper.plan.tiers == (("eager", 0),):
        return
    tier = stepper.plan.score if resumed else ("traced" if pays_to_trace_score(times) else "eager")
    if compile is not True and tier == "eager":
        return
    failure, graphs = "", []
    try:
        graphs = score.trace()
        work = Work(sum(x.operations for x in graphs), sum(x.numbers for x in graphs))
        cached = all(x.is_cached() for x in graphs)
        tier = tier if resumed else planned(compile, times, work, cached=cached).tiers[-1][0]
        if tier == "compiled":
            failure = next(filter(None, [failure_of(x.compile) for x in graphs]), "")
    except Untraceable as error:
        failure, tier = str(error), "eager"
    if failure and compile is not False:
        _warn(failure, f"the held-out score is computed {'eagerly' if tier == 'eager' else 'by its traced graph'}", 4)
    stepper.plan = replace(stepper.plan, score=tier)


def saved_plan(callbacks: Sequence[Callback]) -> Plan | None:
    """The plan of the checkpoint from which a fit resumes; None if it starts."""
    found = next((c for c in callbacks if isinstance(c, Checkpoint) and c.resume), None)
    plan = None if found is None else read_plan(found.path)
    return Plan.from_json(plan) if plan else None


def _warn(reason: str, consequence: str = _EAGERLY, stacklevel: int = 6) -> None:
    warnings.warn(f"not compiled: {reason}; {consequence}.", UserWarning, stacklevel=stacklevel)
