"""Runs of a fitted program's model under given latent values, or under those that explain the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from deepprob.errors import unknown
from deepprob.posteriors.conditioning import known_value, one_run
from deepprob.posteriors.encoding import Encoding, local_summed
from deepprob.posteriors.fitted import FittedProgram
from deepprob.programs.arguments import Arguments
from deepprob.programs.explaining import explaining_left_out
from deepprob.programs.minibatch import Batch, num_rows
from deepprob.programs.program import FunctionProgram
from deepprob.programs.run import Run


def no_sites(*batch: Any) -> None:
    """A guide that draws nothing, so that the model draws every latent site from its prior."""


def decoded(fitted: FittedProgram, z: Any, batch: Batch, drawn: Mapping[str, Tensor], draws: int) -> Trace:
    """The model's trace with its observed sites drawn, under given values of local latent sites.

    Args:
        fitted: The posterior's program.
        z: The user's values: of the one local site, or by site.
        batch: The program's arguments; may be empty.
        drawn: Draws of global latent sites, ``(K, *site)``.
        draws: The number of draws, K.

    Raises:
        TypeError: If a value is not numbers.
        ValueError: If a site is unknown, a summed-out site that all rows share has no value, or a value has a wrong
            shape.
    """
    structure = fitted.structure
    local = structure.local + local_summed(structure)
    values = dict(z) if isinstance(z, Mapping) else {local[0]: z}
    if not isinstance(z, Mapping) and len(structure.local or local) > 1:  # a summed-out site follows from the drawn one
        raise ValueError(
            f"the program has several local latent sites ({', '.join(local)}). Give the values by site: "
            f"posterior.decode({{{local[0]!r}: ..., {local[1]!r}: ...}})."
        )
    for name in values:
        if name not in structure.latent + structure.summed:
            raise unknown("latent site of z", name, structure.latent + structure.summed)
    for name in structure.summed:
        if name not in (*values, *local):
            raise ValueError(
                f"site {name!r} is summed out of all rows at once, so that decode has no draws of it. Give its value: "
                f"posterior.decode({{{name!r}: ..., ...}})."
            )
    values = {name: _with_rows(fitted, name, value) for name, value in values.items()}
    rows = next((len(values[name]) for name in local if name in values), 1)
    run = replace(_without_guide(fitted, batch, rows), draws=draws, predict=True)
    with explaining_left_out(run):
        sites = one_run(fitted, run)
        known = {
            n: known_value(fitted, run, sites[n], f"z[{n!r}]", value, by_row=n in local) for n, value in values.items()
        }
    given = {name: x.value.expand(draws, *x.value.shape) for name, x in known.items()}
    return fitted.predicted(run, {**drawn, **given})[1]


def _with_rows(fitted: FittedProgram, name: str, value: Any) -> Any:
    """A value as a tensor, with an axis of rows if its site is local."""
    if isinstance(value, Encoding):
        raise TypeError(f"z[{name!r}] must be numbers; got an Encoding. Give its means: encoding.mean.")
    try:
        found = torch.as_tensor(value, device=fitted.instance.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"z[{name!r}] must be numbers; got {value!r}. Give an array or a tensor.") from None
    site = fitted.structure.sites[name]
    if site.local and found.dim() <= site.event_dim:
        raise ValueError(
            f"z[{name!r}] must have an axis of rows, (rows, *site); got shape {tuple(found.shape)}. Write z[None] for "
            "the value of one row."
        )
    return found


def _without_guide(fitted: FittedProgram, batch: Batch, rows: int) -> Run:
    """The run of a model alone, on the user's arguments or on a number of rows."""
    fitted.check_complete()
    call = batch.call if isinstance(batch, Arguments) else None
    real = all(getattr(torch, spec.dtype).is_floating_point for spec in fitted.instance.inputs)
    if not batch and isinstance(fitted.program, FunctionProgram) and fitted.program.num_required and real:
        batch = fitted.example(rows)  # a function reads the number of rows off its data, which are nan here
    run = fitted._run(fitted.program.pad(batch), num_rows(batch) if batch else rows, 1, call=call)
    return replace(run, guide=no_sites)


def reconstructed(fitted: FittedProgram, batch: Batch, draws: int) -> Trace:
    """The model's trace with its observed sites drawn, under draws of the latent sites given the rows."""
    if not fitted.structure.summed:
        return fitted.run(batch, draws, predict=True)[1]
    return fitted.predicted(fitted.prepared(batch, draws, predict=True), explaining(fitted, batch, draws))[1]


def explaining(fitted: FittedProgram, batch: Batch, draws: int) -> dict[str, Tensor]:
    """Draws of all latent sites given the rows, those summed out of the bound included, each ``(K, *site)``."""
    structure, layout = fitted.structure, fitted.layout(draws)
    guide_trace, model_trace = fitted.run(batch, draws)
    values = {name: layout.draws_first(guide_trace.nodes[name]) for name in structure.latent}
    return values | {name: layout.draws_first(model_trace.nodes[name]) for name in structure.summed}
