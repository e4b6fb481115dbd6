"""A fitted program, run under draws from its posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.distributions import Delta
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from deepprob.distributions.per_draw import PerDraw, unwrapped
from deepprob.engine.random import RandomStream
from deepprob.posteriors.draws import DrawRunner, Job
from deepprob.posteriors.prediction import Prediction
from deepprob.posteriors.prediction_names import PredictionNames
from deepprob.posteriors.stored_draws import choose, replay
from deepprob.programs.arguments import Arguments, Call, rows_of
from deepprob.programs.elimination import Term, terms
from deepprob.programs.enumeration import draw_summed, run_enumerated
from deepprob.programs.explaining import explaining_left_out
from deepprob.programs.fields import Fill
from deepprob.programs.inputs import InputSpec
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.kl import closed_form_kls
from deepprob.programs.layout import Layout
from deepprob.programs.minibatch import Batch, num_rows, unknown_rows_message
from deepprob.programs.origin import Fields, origin_of
from deepprob.programs.program import FunctionProgram, Program
from deepprob.programs.prototypes import has_new_guide
from deepprob.programs.run import Run, run_guide, run_prior, run_program
from deepprob.programs.sites import is_factor, sample_sites
from deepprob.programs.structure import Structure
from deepprob.programs.support import check_data

# Most numbers that one layer's activations may hold at a time; more rows are split into several calls.
_CHUNK = 2**24
_MOST_TARGETS = 3  # names of targets that a sentence can hold


class FittedProgram:
    """A fitted program, run under a leading plate of draws, which come from its guide or are stored.

    Args:
        instance: The program instance.
        chains: Stored draws by site, shape ``(chains, draws, *site)``; None to draw from the guide.
    """

    def __init__(self, instance: ProgramInstance, chains: Mapping[str, Tensor] | None = None) -> None:
        self.instance, self.chains = instance, chains
        self._draws = DrawRunner(instance)

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
        """Whether all latents and data are local and the rows are independent given the parameters."""
        found = self.structure
        drawn = found.latent + found.summed
        return bool(found.local + found.summed) and found.all_local(drawn + found.observed) and found.by_row

    @property
    def num_stored(self) -> int:
        """Number of stored draws, of all chains together; 0 if the guide draws."""
        return 0 if self.chains is None else next(iter(self.chains.values())).shape[:2].numel()

    def layout(self, draws: int) -> Layout:
        """The positions of draws, rows and events in the values of a run."""
        return Layout(self.structure.row_plate, self.structure.plates, draws)

    @contextmanager
    def querying(self, seed: int) -> Iterator[None]:
        """The context of one query: no gradients, the instance's store, and a separate random stream."""
        try:
            with torch.no_grad(), self.instance.running(), RandomStream(seed, self.instance.device).drawing():
                yield
        except Exception as error:
            if (cause := _without_shapes(error)) is error:
                raise
            raise cause from None

    # -- arguments -----------------------------------------------------------------------------------------------

    def accept(self, data: tuple[Any, ...], fill: Fill | None = None) -> Batch:
        """Check the user's data against those of the fit and return the program's arguments, on the device.

        Args:
            data: The user's data.
            fill: Replaces missing values (NaN); None to refuse them where the program does.

        Raises:
            ValueError: If arguments are missing, or do not match those of the fit.
        """
        if not data and self.program.num_required and (self.instance.inputs or self.program.call is None):
            names = [spec.name for spec in self.instance.inputs] or self.program.argument_names
            raise ValueError(
                f"the program needs rows of {', '.join(names)}; got none. "
                "Give them as in the fit; only observed arguments may be left out."
            )
        batch = self._conforming(data, fill) if data else ()
        self._meet(batch)
        return batch

    def inputs_of(self, data: tuple[Any, ...]) -> tuple[Any, ...]:
        """The user's data for a query that needs no target, which is left out of a frame if it cannot be read.

        Targets stay where they tell about latent sites of their rows.

        Args:
            data: The user's data.
        """
        found = self.structure
        return data if len(data) != 1 or found.local or found.summed else (self.program.origin.inputs(data[0]),)

    def _conforming(self, data: tuple[Any, ...], fill: Fill | None) -> Batch:
        """The program's arguments, with the types and shapes of the fit."""
        batch = self.program.accept(data[0] if len(data) == 1 else tuple(data), fill=fill)
        device = self.instance.device

        def conform(spec: InputSpec, x: Tensor) -> Tensor:
            return spec.conform(x, self.program.is_sequence(spec.name, spec.shape))

        if isinstance(batch, Arguments):
            specs = {spec.name: spec for spec in self.instance.inputs}
            pairs = zip(batch.call.names, batch, strict=True)
            known = [conform(specs[name], x) if name in specs else x for name, x in pairs]
            return Arguments([x.to(device) for x in known], batch.call.to(device))
        known = [conform(spec, x) for spec, x in zip(self.instance.inputs, batch, strict=False)]
        return Fields([x.to(device) for x in (*known, *batch[len(known) :])], origin_of(batch))

    def _meet(self, batch: Batch) -> None:
        """Let a loaded program run once for itself, on data."""
        if not self.instance.unmet:
            return
        if self.chains is None and self.keeps_rows and self._size(batch) != self.instance.num_data:
            return  # the query itself says whether it can do with other rows
        if len(batch) < len(self.instance.inputs) and has_new_guide(self.program):
            self.check_complete()
        guide = None if self.chains is None else self.replayed()
        with torch.no_grad(), RandomStream(0, self.instance.device).drawing():
            self.instance.complete(replace(self.prepared(batch, 1), draws=None, guide=guide))

    def check_complete(self) -> None:
        """Refuse a query without data to a loaded program that needs them.

        Raises:
            ValueError: If the program waits for its first rows.
        """
        if self.instance.waiting:
            raise ValueError(
                "the program makes some of its parameters when it first meets data, so a loaded posterior needs them. "
                "Give the data of the fit once, posterior.sample(*data); later queries can do without."
            )

    def example(self, rows: int | None = None) -> Batch:
        """Rows for a guide or a model that does not read them; one that does would return nan.

        Args:
            rows: Their number; None for as many as a guide needs.
        """
        self.check_complete()
        whole = isinstance(self.program, FunctionProgram) or self.keeps_rows
        rows = rows or (self.instance.num_data if whole else 1)
        examples = (spec.example(rows).to(self.instance.device) for spec in self.instance.inputs)
        return tuple(x.fill_(math.nan) if x.is_floating_point() else x for x in examples)

    def chunks(self, batch: Batch, draws: int, most: int | None = None) -> Iterator[Batch]:
        """Split an accepted batch into chunks of rows that fit in memory with K draws each.

        Args:
            batch: The program's arguments.
            draws: Number of draws, K.
            most: The most numbers of an argument that a chunk may have, of all draws together.
        """
        size, found = num_rows(batch), self.structure
        if self.instance.query_plate and found.all_local(found.observed + found.summed) and not self.keeps_rows:
            width = max((x[0].numel() for x in batch if len(x)), default=1)
            step = max(1, (most or _CHUNK) // max(1, draws * width))
            if step < size and not (found.local and found.global_):
                for start in range(0, size, step):
                    yield rows_of(batch, slice(start, start + step))
                return
        yield batch

    # -- runs ----------------------------------------------------------------------------------------------------

    def run(self, batch: Batch, draws: int, *, predict: bool = False, weighted: bool = False) -> tuple[Trace, Trace]:
        """Guide and model; sites summed out of the bound are drawn, given the data unless the data are predicted."""
        run = self.prepared(batch, draws, predict=predict, weighted=weighted)
        return self.predicted(run) if predict else self.traces(run)

    def traces(self, run: Run) -> tuple[Trace, Trace]:
        """Guide and model of a prepared run; sites summed out of the bound are drawn given the data."""
        guide_trace, model_trace = self.under_draws(_SUMMED if self.structure.summed else _TRACES, run)
        return guide_trace, model_trace

    def predicted(self, run: Run, values: Mapping[str, Tensor] | None = None) -> tuple[Trace, Trace]:
        """Guide and model, with the observed sites drawn.

        Args:
            run: The run.
            values: Latent values to use in the place of draws, by site, each ``(K, *site)``.
        """
        if names := self.structure.undrawable:
            raise ValueError(
                f"site {names[0]!r} cannot be predicted: its distribution has no sample method. Write one, "
                "or ask for sample, log_likelihood and log_evidence only."
            )
        guide_trace, model_trace = self.under_draws(_PREDICTED, run, values)
        return guide_trace, model_trace

    def replayed(self, draw: int = 0) -> Callable[..., None]:
        """A guide that returns one of the stored draws."""
        values = {name: value[draw] for name, value in choose(self.chains or {}, draw + 1).items()}
        return replay(values, self.structure)

    def run_guide(self, batch: Batch, draws: int) -> Trace:
        """Run the guide alone."""
        trace: Trace
        (trace,) = self.under_draws(_GUIDE, self.prepared(batch, draws))
        return trace

    def run_prior(self, batch: Batch, rows: int, draws: int) -> Trace:
        """Run the model alone and draw its observed sites."""
        self.check_complete()
        size = num_rows(batch) if batch else rows
        call = batch.call if isinstance(batch, Arguments) else None
        run = self._run(self.program.pad(batch), size, draws, call=call)
        trace: Trace
        (trace,) = self.under_draws(_PRIOR, run)
        return trace

    def terms(self, run: Run, *, bound: bool = False) -> list[Term]:
        """The terms of the bound under the draws of a prepared run; enumerated sites are summed out.

        Args:
            run: The run.
            bound: Whether the guide's marked sites are enumerated too, and closed forms taken.
        """
        with RandomStream(0, self.instance.device).drawing():  # the check must not advance the query's stream
            guide = None if self.chains is None else self.replayed()
            _, look = run_program(replace(run, draws=None, guide=guide))
        check_data(look, self.structure)
        found: list[Term] = self.under_draws(BOUND if bound else _TERMS, run)
        return found

    def prior_draws(self, batch: Batch, rows: int, draws: int) -> dict[str, Tensor]:
        """Draws of all sites of the model, ``(K, *site)``, computed ones included and factors left out."""
        trace, layout = self.run_prior(batch, rows, draws), self.layout(draws)
        return {name: layout.draws_first(site) for name, site in sample_sites(trace) if not is_factor(site)}

    def prediction(self, model_trace: Trace, site: str | None, draws: int) -> Prediction:
        """The prediction of one site.

        Args:
            model_trace: A trace with the observed sites drawn.
            site: The observed or computed site; None for the only observed one.
            draws: The number of draws.

        Raises:
            ValueError: If the site is unknown or ambiguous.
        """
        observed = [n for n, _ in sample_sites(model_trace) if n in self.structure.observed]
        if site is None:
            if len(observed) != 1:
                known = bool(observed or self.structure.computed)
                hint = "Choose one with site='...'" if known else "There is nothing to predict: ask for sample"
                raise ValueError(f"the program observes {', '.join(observed) or 'no site'}. {hint}.")
            site = observed[0]
        elif site not in (*observed, *self.structure.computed):
            raise ValueError(f"the program observes no site {site!r}. Choose from: {', '.join(observed)}.")
        return self.prediction_of(model_trace, site, draws)

    def prediction_of(self, trace: Trace, name: str, draws: int) -> Prediction:
        """The prediction of any site of a trace, by its name."""
        node, layout = trace.nodes[name], self.layout(draws)
        value = layout.draws_first(node)
        if name in self.structure.computed:
            return Prediction(Delta(value), value, name)
        words = self._names(node["fn"], value)
        return Prediction(node["fn"], value, name, unused=layout.unused(node), names=words)

    def word(self, site: str) -> str:
        """The user's word for an observed site: the columns of the fit's table that it observes, if they are few.

        Args:
            site: The name of the site.
        """
        targets = self._targets
        return ", ".join(targets) if 0 < len(targets) <= _MOST_TARGETS and site in self.structure.observed else site

    @property
    def _targets(self) -> tuple[str, ...]:
        """The target's columns in the fit's table, if the program observes nothing but them."""
        encoding = self.program.origin.encoding
        alone = len(self.structure.observed) == 1 and len(self.instance.inputs) > 1
        return encoding.targets if encoding is not None and alone else ()

    def _names(self, fn: Any, value: Tensor) -> PredictionNames:
        """The words for the values of a site, if the program observes nothing else."""
        origin, width = self.program.origin, value.shape[-1] if value.dim() else 0
        if len(self.structure.observed) != 1:
            return PredictionNames()
        if origin.encoding is None:
            base = unwrapped(fn.first if isinstance(fn, PerDraw) else fn)
            count = base.probs.shape[-1] if type(base).__name__ == "Categorical" else 0
            return PredictionNames(origin.classes if len(origin.classes) == count else ())
        if targets := self._targets:
            return PredictionNames(origin.encoding.classes, targets if len(targets) in (1, width) else ())
        features = origin.encoding.names
        return PredictionNames((), features, origin.encoding.columns) if width == len(features) else PredictionNames()

    def under_draws(self, job: Job, run: Run, values: Mapping[str, Tensor] | None = None) -> Any:
        """The result of a job under a run's draws, which come from the guide, are stored, or are given values."""
        stored = values
        if values is None and self.chains is not None:
            stored = choose(self.chains, run.draws or 1)
        with explaining_left_out(run):
            return self._draws(job, run, stored)

    def prepared(self, batch: Batch, draws: int, *, predict: bool = False, weighted: bool = False) -> Run:
        """The run of a query; the rows have their weights of the fit only if this is asked for."""
        weighted = weighted and self._weigh(batch)
        call = batch.call if isinstance(batch, Arguments) else None
        fitted, size = self.instance.num_data, self._size(batch)
        batch = self.program.pad(self.program.prepare(*batch))
        if self.chains is None and self.keeps_rows and size != fitted:
            raise ValueError(unknown_rows_message(self.structure.row_plate, fitted, size))
        return replace(self._run(batch, size, draws, predict=predict, call=call), weighted=weighted)

    def _weigh(self, batch: Batch) -> bool:
        """Whether rows have weights, those that they bring along or those of the fit, which they then take on."""
        bound, own = self.program.bound_rows, origin_of(batch).weights
        if own is not None and (bound.weights is None or not torch.equal(own, bound.weights.cpu())):
            bound.weights = own.to(self.instance.device)
            self.instance.graphs.clear()  # they hold the earlier weights
        return bound.weights is not None and len(bound.weights) == self._size(batch)

    def row_weights_of(self, batch: Batch) -> NDArray[np.float64] | None:
        """The weights of a batch's rows, ``(B,)``; None for 1 each."""
        found = self.program.bound_rows.weights if self._weigh(batch) else None
        return None if found is None else found.double().cpu().numpy()

    def _size(self, batch: Batch) -> int:
        """Number of rows; without arguments, the program holds its data."""
        return num_rows(batch) if batch else self.instance.num_data

    def _run(self, batch: Batch, size: int, draws: int, *, predict: bool = False, call: Call | None = None) -> Run:
        rows, plate = torch.arange(size, device=self.instance.device), self.instance.query_plate
        return Run(self.program, batch, rows, size, draws, self.structure.plates, predict, query=plate, call=call)


def _without_shapes(error: BaseException) -> BaseException:
    """The error that a program raised, without the table of the shapes of all sites that Pyro appends."""
    while "\nTrace Shapes:" in str(error) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _terms(run: Run, *, bound: bool) -> list[Term]:
    pairs = run_enumerated(run, enumerate_guide=bound)
    plate = run.program.row_plate
    return [t for g, m in pairs for t in terms(g, m, plate, closed_form_kls(g, m) if bound else {})]


def _unmarked(trace: Trace) -> Trace:
    """A trace of the sites that are drawn, not enumerated."""
    for name in [n for n, s in sample_sites(trace) if s["infer"].get("enumerate")]:
        trace.remove_node(name)
    return trace


_TRACES = Job("traces", lambda run: list(run_program(run)))
_PREDICTED = Job("predicted traces", lambda run: list(run_program(run)))
_GUIDE = Job("guide", lambda run: [run_guide(run)])
_PRIOR = Job("prior", lambda run: [run_prior(run)])
_TERMS = Job("terms", lambda run: _terms(run, bound=False), drawn=lambda run: [run_guide(run)])
BOUND = Job("terms of the bound", lambda run: _terms(run, bound=True), drawn=lambda run: [_unmarked(run_guide(run))])
# Draws of the summed-out sites cannot be repeated; the sums that they come from can.
_SUMMED = Job("summed-out sites", lambda run: list(draw_summed(run)), trial=_TERMS)
