"""A fitted program, run under draws from its posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.posteriors.stored_draws import replay
from deepprob.programs.elimination import Term, terms
from deepprob.programs.enumeration import draw_summed, run_enumerated
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.kl import closed_form_kls
from deepprob.programs.layout import Layout
from deepprob.programs.minibatch import Batch, num_rows, unknown_rows_message
from deepprob.programs.program import FunctionProgram, Program
from deepprob.programs.run import Run, run_guide, run_prior, run_program
from deepprob.programs.structure import Structure, check_stacked
from deepprob.programs.support import check_data

# Most numbers that one layer's activations may hold at a time; more rows are split into several calls.
_CHUNK = 2**24


class FittedProgram:
    """A fitted program, run under a leading plate of draws, which come from its guide or are stored.

    Args:
        instance: The program instance.
        chains: Stored draws by site, shape ``(chains, draws, *site)``; None to draw from the guide.
    """

    def __init__(self, instance: ProgramInstance, chains: Mapping[str, Tensor] | None = None) -> None:
        self.instance, self.chains = instance, chains

    @property
    def program(self) -> Program:
        """The program."""
        return self.instance.program

    @property
    def structure(self) -> Structure:
        """The program's sites."""
        return self.instance.structure

    @property
    def keeps_rows(self) -> bool:
        """Whether the guide holds parameters for every row of the fit."""
        return isinstance(self.program.current_guide, AutoGuide) and bool(self.structure.local)

    @property
    def amortized(self) -> bool:
        """Whether all latents are local and the rows are independent given the parameters."""
        found = self.structure
        return bool(found.local + found.summed) and found.all_local(found.latent + found.summed) and found.by_row

    def layout(self, draws: int) -> Layout:
        """The positions of draws, rows and events in the values of a run."""
        return Layout(self.program.data_name, self.structure.plates, draws)

    @contextmanager
    def querying(self, seed: int) -> Iterator[None]:
        """The context of one query: no gradients, the instance's store, and a separate random stream."""
        with torch.no_grad(), self.instance.running(), RandomStream(seed, self.instance.device).drawing():
            yield

    # -- arguments -----------------------------------------------------------------------------------------------

    def accept(self, data: tuple[Any, ...]) -> Batch:
        """Check the user's data against those of the fit and return the program's arguments, on the device.

        Raises:
            ValueError: If arguments are missing, or do not match those of the fit.
        """
        if not data and self.program.num_required:
            raise ValueError(
                f"the program needs rows of {', '.join(self.program.argument_names)}; got none. "
                "Give them as in the fit; only observed arguments may be left out."
            )
        if not data:
            return ()
        batch = self.program.accept(data[0] if len(data) == 1 else tuple(data))
        free = self.program.variable_length
        known = [spec.conform(x, free) for spec, x in zip(self.instance.inputs, batch, strict=False)]
        return tuple(x.to(self.instance.device) for x in (*known, *batch[len(known) :]))

    def example(self) -> Batch:
        """Rows for a guide that does not read them; a guide that does would return nan."""
        whole = isinstance(self.program, FunctionProgram) or self.keeps_rows
        rows = self.instance.num_data if whole else 1
        examples = (spec.example(rows).to(self.instance.device) for spec in self.instance.inputs)
        return tuple(x.fill_(math.nan) if x.is_floating_point() else x for x in examples)

    def chunks(self, batch: Batch, draws: int) -> Iterator[Batch]:
        """Split an accepted batch into chunks of rows that fit in memory with K draws each."""
        size, found = num_rows(batch), self.structure
        if self.program.data_name and found.all_local(found.observed + found.summed) and not self.keeps_rows:
            width = max((x[0].numel() for x in batch if len(x)), default=1)
            step = max(1, _CHUNK // max(1, draws * width))
            if step < size and not (found.local and found.global_):
                for start in range(0, size, step):
                    yield tuple(x[start : start + step] for x in batch)
                return
        yield batch

    # -- runs ----------------------------------------------------------------------------------------------------

    def run(self, batch: Batch, draws: int, *, predict: bool = False) -> tuple[Trace, Trace]:
        """Run guide and model; draw sites that the bound sums out, given the data unless ``predict`` is true."""
        run = self._prepared(batch, draws, predict=predict)
        traces = draw_summed(run) if self.structure.summed and not predict else run_program(run)
        check_stacked(self.structure, traces[1], self.program.data_name, draws)
        return traces

    def run_guide(self, batch: Batch, draws: int) -> Trace:
        """Run the guide alone."""
        return run_guide(self._prepared(batch, draws))

    def run_prior(self, batch: Batch, rows: int, draws: int) -> Trace:
        """Run the model alone and draw its observed sites."""
        size = num_rows(batch) if batch else rows
        plates = self.structure.plates
        return run_prior(Run(self.program, self.program.pad(batch), torch.arange(size), size, draws, plates))

    def terms(self, batch: Batch, draws: int, *, bound: bool = False) -> list[Term]:
        """The terms of the bound under draws; enumerated sites are summed out.

        Args:
            batch: The program's arguments.
            draws: Number of draws of the guide's other sites.
            bound: Whether to enumerate the guide's marked sites too, and to use closed-form KLs.
        """
        run, plate = self._prepared(batch, draws), self.program.data_name
        with RandomStream(0, self.instance.device).drawing():  # the check must not advance the query's stream
            _, look = run_program(replace(run, draws=2, guide=self._stored(2)))
        check_stacked(self.structure, look, plate, draws)
        check_data(look)
        traces = run_enumerated(run, enumerate_guide=bound)
        pairs = [(g, m, closed_form_kls(g, m) if bound else {}) for g, m in traces]
        return [term for g, m, closed in pairs for term in terms(g, m, plate, closed)]

    def _prepared(self, batch: Batch, draws: int, *, predict: bool = False) -> Run:
        batch = self.program.pad(self.program.prepare(*batch))
        size, fitted = num_rows(batch), self.instance.num_data
        if self.chains is None and self.keeps_rows and size != fitted:
            raise ValueError(unknown_rows_message(self.program.data_name, fitted, size))
        rows = torch.arange(size, device=self.instance.device)
        return Run(self.program, batch, rows, size, draws, self.structure.plates, predict, self._stored(draws))

    def _stored(self, draws: int) -> Callable[..., None] | None:
        return None if self.chains is None else replay(self.chains, self.structure, draws, self.structure.plates)
