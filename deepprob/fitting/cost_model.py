"""What compiling costs and gains, and how many steps go in one call."""

from __future__ import annotations

from pyro.infer.autoguide import AutoGuide

from deepprob.fitting.buckets import Views, sequence_lengths
from deepprob.fitting.state import State
from deepprob.programs.minibatch import Batch

# What a compiled fit costs and gains, in seconds; measured on two cores, see benchmarks/README.md.
COMPILING, COMPILING_AN_OPERATION = 8.0, 0.02
ANY_LENGTH = 1.3  # times as much where sequences may be of any length
_GAINED_AN_OPERATION = 1e-5
FEWEST_STEPS = 1000  # below which nothing is gained, whatever the program
_A_LENGTH = 2**38  # multiplications that take about as long as one more compilation

_CAPACITY = 1024
_NOISE_BYTES = 2**25
_CALL = 2**35  # multiplications in one call, so that it ends in about a second


def views_of(compile: bool | str, state: State, data: Batch, *, batch_size: int, steps: int) -> Views:
    """The rows of a fit, sequences cut to lengths that save more than they cost.

    Args:
        compile: True, False or ``"auto"``; where a fit compiles in any case or never, savings need no reason.
        state: What the first step starts from.
        data: All rows, on the device.
        batch_size: Rows of a step.
        steps: How many are planned.
    """
    instance = state.instance
    by_row = isinstance(instance.program.current_guide, AutoGuide) and bool(instance.structure.local)
    lengths = None if by_row else sequence_lengths(instance.program, data)  # a guide's parameters have one length
    compiled = compile is True or (compile == "auto" and steps >= FEWEST_STEPS)
    weighed = compiled and compile == "auto"
    worth = _A_LENGTH / (state.work(batch_size) * steps) if weighed else 0.0
    return Views(data, lengths, batch_size, worth, roomy=compiled and instance.device.type == "cpu")


def pays(steps: int, operations: int) -> bool:
    """Whether compiling gains more than it costs."""
    cost = COMPILING + COMPILING_AN_OPERATION * operations
    return steps * operations * _GAINED_AN_OPERATION > cost


def capacity_of(state: State, batch_size: int, numbers: int) -> int:
    """Steps in one call: few enough for its noise and its time to stay small."""
    return max(1, min(_CAPACITY, _NOISE_BYTES // (4 * numbers + 1), _CALL // (state.work(batch_size) + 1)))
