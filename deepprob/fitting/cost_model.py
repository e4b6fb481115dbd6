"""The length buckets of a fit that may be compiled, and the number of steps in one call."""

from __future__ import annotations

from pyro.infer.autoguide import AutoGuide

from deepprob.fitting.buckets import LengthBuckets, sequence_lengths
from deepprob.fitting.state import State
from deepprob.programs.minibatch import Batch

FEWEST_STEPS = 1000  # shorter fits may not pay for code of several lengths, whatever the program
_MULTIPLICATIONS_PER_BUCKET = 2**38  # take about as long as compiling for one more bucket

_MOST_STEPS = 1024  # in one call
_MOST_NOISE_BYTES = 2**25  # in one call
_MOST_MULTIPLICATIONS = 2**35  # in one call, so that it ends in about a second


def length_buckets(compile: bool | str, state: State, data: Batch, *, batch_size: int, steps: int) -> LengthBuckets:
    """All rows of a fit, in length buckets that save more than they cost to compile.

    The cost counts only when ``"auto"`` may compile: with True or False every bucket that saves time steps is used.

    Args:
        compile: True, False or ``"auto"``.
        state: The state before the first step.
        data: All rows, on the device.
        batch_size: Rows of a step.
        steps: Planned steps.
    """
    instance = state.instance
    # The parameters that an automatic guide keeps for each row have one length.
    by_row = isinstance(instance.program.current_guide, AutoGuide) and bool(instance.structure.local)
    lengths = None if by_row else sequence_lengths(instance.program, data)
    may_compile = compile is True or (compile == "auto" and steps >= FEWEST_STEPS)
    weigh_cost = may_compile and compile == "auto"
    least_saving = _MULTIPLICATIONS_PER_BUCKET / (state.multiplications(batch_size) * steps) if weigh_cost else 0.0
    pad_one_step = may_compile and instance.device.type == "cpu"
    sequences, num_data = instance.program.sequences_in(data), instance.num_data
    return LengthBuckets(data, lengths, batch_size, least_saving, pad_one_step, num_data, sequences)


def capacity_of(state: State, batch_size: int, numbers: int) -> int:
    """Most steps in one call, such that its noise fits in memory and it ends in about a second.

    Args:
        state: The state before the first step.
        batch_size: Rows of a step.
        numbers: Random numbers of a step.
    """
    by_noise = _MOST_NOISE_BYTES // (4 * numbers + 1)
    by_time = _MOST_MULTIPLICATIONS // (state.multiplications(batch_size) + 1)
    return max(1, min(_MOST_STEPS, by_noise, by_time))
