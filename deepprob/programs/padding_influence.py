"""A warning for programs of sequences that depend on the steps beyond a row's length."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.programs.explaining import FAILURES
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch
from deepprob.programs.run import Run, run_program
from deepprob.programs.sites import log_prob, sample_sites

_ROWS, _STEPS = 8, 8  # that are looked at, and that are added
_TOLERANCE = 1e-3  # relative, of a log-probability: far above rounding


def warn_of_padding(instance: ProgramInstance, batch: Batch, *, known: bool = False) -> None:
    """Warn if a log-probability changes when every sequence is padded by more steps.

    A fit cuts batches where their sequences end, and a later query may be padded to another length, so that such a
    program would mean something else there.

    Args:
        instance: The program.
        batch: The rows of the fit, or a sample of them.
        known: Whether the program is that of a finished fit, which has given the warning.
    """
    if known:
        return
    program = instance.program
    lengths = program.lengths(*batch) if program.variable_length and batch else None
    if lengths is None or not any(found := program.sequences_in(batch)):
        return
    pairs = [*zip(batch, found, strict=True)]
    steps = next(x.shape[1] for x, is_sequence in pairs if is_sequence)
    if int(lengths.min()) >= steps:
        return
    chosen = lengths.argsort()[:_ROWS] if program.data_name else torch.arange(len(lengths))
    end, is_cut = (
        int(lengths[chosen].max()),
        [x.shape[1] == steps if is_sequence else False for x, is_sequence in pairs],
    )
    own = tuple(x[chosen.to(x.device)].to(instance.device) for x in batch)
    own = tuple(x[:, :end] if cut else x for x, cut in zip(own, is_cut, strict=True))
    longer = tuple(
        torch.cat([x, x.new_zeros(len(x), _STEPS, *x.shape[2:])], 1) if cut else x
        for x, cut in zip(own, is_cut, strict=True)
    )
    rows = chosen.to(instance.device)
    try:
        with torch.no_grad(), RandomStream(0, instance.device).drawing(), instance.evaluating():
            site = _changed_site(*(Run(program, program.prepare(*x), rows, instance.num_data) for x in (own, longer)))
    except FAILURES:  # a program for one length, such as one with an embedding of every step, cannot be asked
        return
    if site is not None:
        name = getattr(getattr(program, "sequences", None), "lengths", "lengths")
        warnings.warn(
            f"site {site!r} depends on the padding: its log-probability changes if every sequence is padded by more "
            f"steps. Steps beyond a row's {name} must have no influence, because batches are cut where "
            "their sequences end. Mask these steps, and read a recurrent network at the last step of each row, "
            f"out[torch.arange(len(out)), {name} - 1], not at out[:, -1].",
            UserWarning,
            stacklevel=4,
        )


def _changed_site(run: Run, longer: Run) -> str | None:
    """The first site whose log-probability differs between two paddings, given the same latents."""
    before = run_program(run)
    values = {name: site["value"] for name, site in sample_sites(before[0])}
    automatic = isinstance(run.program.current_guide, AutoGuide)
    for trace, program in zip(before, (run.program.guide, run.program.model), strict=True):
        if automatic and trace is before[0]:
            continue
        with longer.bound(), TraceMessenger() as found, _Given(values):
            program(*longer.batch)
        expected, sums = _sums(trace), _sums(found.trace)
        for name, value in sums.items():
            known = expected.get(name, 0.0)  # a step of its own, which must be masked
            if abs(value - known) > _TOLERANCE * (1.0 + abs(known)):
                return name
    return None


def _sums(trace: Trace) -> dict[str, float]:
    return {name: float(log_prob(site).sum()) for name, site in sample_sites(trace)}


class _Given(Messenger):
    """Gives latent sites known values, with zeros at steps that these do not have."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["name"] not in self.values:
            return
        value, shape = self.values[msg["name"]], msg["fn"].shape()
        if value.dim() == len(shape) and value.shape != shape:
            own = value.new_zeros(shape)
            own[tuple(slice(n) for n in value.shape)] = value
            value = own
        msg["value"], msg["done"] = value, True
