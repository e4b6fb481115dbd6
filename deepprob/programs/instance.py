"""A routine's own copy of a program, with its guide, its private store and all of its parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.nn.parameter import is_lazy

from deepprob.engine.random import RandomStream
from deepprob.networks.initialisation import init_weights
from deepprob.programs.arguments import Arguments, explaining_lengths
from deepprob.programs.copying import copy_with_modules
from deepprob.programs.elimination import terms
from deepprob.programs.enumeration import run_enumerated
from deepprob.programs.explaining import FAILURES, explained
from deepprob.programs.guides import GuideSpec, attach_guide, check_minibatches
from deepprob.programs.inputs import InputSpec, columns_of, specs_of
from deepprob.programs.late import adopt, own_parameters
from deepprob.programs.minibatch import Batch, draws_rows
from deepprob.programs.origin import Origin, check_weighted, origin_of
from deepprob.programs.parameters import (
    check_ownership,
    constrained_parameters,
    unseen_parameters,
    used_parameters,
    warn_of_unseen,
)
from deepprob.programs.program import Program
from deepprob.programs.run import Run, run_held, run_program
from deepprob.programs.setup import apply_setup, facts, forms, setup_to_json, structure_from_json
from deepprob.programs.sites import is_deterministic, is_local, log_prob, sample_sites
from deepprob.programs.store import StoreState, copy_parameter, empty_store, private_store
from deepprob.programs.structure import SameLatents, Structure, structure
from deepprob.programs.support import check_observations

_PROBE_ROWS = 4


class ProgramInstance:
    """A copy of a program with its guide, run once so that every parameter exists.

    Args:
        program: The caller's program; it is not changed.
        batch: The data, or rows like them.
        num_data: Number of rows of the whole data.
        guide: The guide, see `attach_guide`.
        device: Device to run on.
        full_batch: Whether every step will see all rows.
        weights: ``"keep"`` starts from the program's weights, ``"auto"`` draws new ones for the networks that the
            program built, ``"fresh"`` for all; never where marked by `deepprob.networks.initialisation.pretrained`.
        check: Whether to require observed data within the supports of their sites, and to refuse parameters that
            were not copied with the program.
        saved: The set-up and the state of a saved instance; the program then runs on no data here.
        spread: Whether a named guide starts at random, see `attach_guide`.

    Raises:
        ValueError: If the program cannot run on the data, the guide lacks a latent site of the model, or the guide
            cannot be fitted on minibatches.

    Attributes:
        program: The copy.
        store: The parameters registered by ``pyro.param`` and AutoGuides.
        structure: Its sites and plates.
        inputs: Types and shapes of the data.
        stacks: Whether the program broadcasts over a leading plate of particles.
        ways: How draws are run, by job; see `deepprob.posteriors.draws`.
        graphs: Graphs of single draws.
        unseen: The ids of the parameters that Pyro does not see, and so would not train.
        registered: Names of the store's parameters that are the instance's own.
        late: Those that a later run than the first registered.
        unsaved: Those of networks that a later run than the first made, so that they cannot be saved.
        averages: The decaying averages of baselines by site, part of a fit's state.
        adapted: Forms and facts of the program, see `deepprob.programs.setup`, as the data or a routine made it.
        first_run_finite: Whether all log-probabilities of the first run were finite.
        guide_name: The guide's name if it has one.
        unmet: Whether the program was loaded and has not run since.
        waiting: The saved state, if a part of it can only be loaded after a run.
    """

    def __init__(
        self,
        program: Program,
        batch: Batch,
        num_data: int,
        *,
        guide: GuideSpec = None,
        device: torch.device | str = "cpu",
        full_batch: bool = True,
        weights: str = "keep",
        check: bool = True,
        saved: tuple[Mapping[str, Any], Mapping[str, Tensor]] | None = None,
        spread: bool = False,
    ) -> None:
        memo: dict[int, Any] = {}  # one memo: program and guide may share modules
        self.program: Program = copy_with_modules(program, memo)
        self.store: StoreState = empty_store()
        self._callers_store: StoreState = pyro.get_param_store().get_state()
        self.num_data = num_data
        self.stacks = True
        self.ways: dict[str, str] = {}
        self.graphs: dict[Any, Any] = {}
        self.late: list[str] = []
        self.unsaved: list[str] = []
        self.registered: frozenset[str] = frozenset()
        self.averages: dict[str, Tensor] = {}
        self.unseen: set[int] = set()
        self.first_run_finite = True
        self._used_unseen: list[Tensor] = []
        self.device = torch.device(device)
        self.guide_name = attach_guide(self.program, copy_with_modules(guide, memo), spread=spread)
        self.program.to(self.device)
        for network in {"keep": (), "auto": self.program.built, "fresh": (self.program,)}[weights]:
            init_weights(network)
        if isinstance(batch, Arguments):
            self.program.__dict__["call"] = replace(batch.call.to(self.device), origin=Origin())
        self.program.bound_rows.take(origin_of(batch).weights, self.device)
        self.unmet, self.waiting = saved is not None, dict[str, Tensor]()
        self._saved, self._built = saved, (forms(self.program), facts(self.program))
        if saved is not None:
            self._restore(*saved)
            return
        self.program.adapt(*batch)
        self.adapted = forms(self.program), facts(self.program)
        probe = batch if full_batch else tuple(x[: min(_PROBE_ROWS, len(x))] for x in batch)
        self.structure = self.dry_run(probe, check=check)
        if not self.program.data_name and self.structure.row_plate:
            # Sites are local or global relative to the row plate, which the first run has shown.
            self.program.found_plate = self.structure.row_plate
            self.structure = self.dry_run(probe, check=check)
        if not batch:
            self.num_data = max(1, self.structure.rows)
        check_minibatches(self.program, self.structure, full_batch)
        check_weighted(self.program, self.structure)
        warn_of_unseen(self.program, self._used_unseen)
        self.inputs: list[InputSpec] = specs_of(
            batch, batch.call.names if isinstance(batch, Arguments) else self.program.argument_names, origin_of(batch)
        )
        self.program.__dict__["origin"] = program.origin.after_fit(batch, columns_of(self.inputs))

    def setup(self) -> dict[str, Any]:
        """What data made of the program, as JSON."""
        if self._saved is not None:
            return dict(self._saved[0])
        return setup_to_json(self.program, self.store, self.structure, self.unseen, self._built, self.adapted)

    def _restore(self, setup: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        with RandomStream(0, self.device).drawing():
            self.unseen = apply_setup(self.program, self.store, setup, state, self.device)
        self.structure = found = structure_from_json(setup)
        self.program.enumerates = bool(found.summed or found.enumerated)
        self.program.observes = found.observed
        self.program.found_plate = "" if self.program.data_name else found.row_plate
        self.registered = frozenset(self.store["params"])
        self.load(state, setup["waiting"])
        self.waiting = dict(state) if setup["waiting"] else {}

    def complete(self, run: Run) -> None:
        """Run a loaded program for the first time, on a user's data, and load what only a run makes.

        Raises:
            StorageError: If the program has other latent sites than the saved one.
        """
        with self.running(), RandomStream(0, self.device).drawing(), SameLatents(self.structure):
            run_program(run)
        if self.waiting:
            own_parameters(self, self.store, [name for name in self.store["params"] if name not in self.registered])
            self.load(self.waiting)
        self.unmet, self.waiting = False, {}

    def dry_run(self, batch: Batch, *, check: bool = True) -> Structure:
        """Run the program once, with validation on if checked, which registers every parameter in the emptied store.

        Args:
            batch: The data, or rows like them.
            check: As for the class.
        """
        self.store.update(empty_store())
        self.ways.clear()
        self.graphs.clear()
        batch = tuple(x.to(self.device).detach() for x in batch)
        rows = torch.arange(len(batch[0]) if batch else 1, device=self.device)
        training = self.program.training
        frozen = [p for p in self.program.parameters() if not p.requires_grad]
        self.program.eval()  # a dry run must not update the statistics of a batch norm
        with private_store(self.store, validate=check, device=self.device):
            # Without arguments, plates have the rows of data that the program holds itself.
            run = Run(self.program, self.program.prepare(*batch), rows, self.num_data, query=None if batch else "")
            with torch.no_grad():
                traces = self._run_or_explain(run)
                if any(draws_rows(trace, self.program.data_name) for trace in traces):
                    with RandomStream(0, self.device).drawing():  # a query has all rows, and so all sites
                        traces = self._run_or_explain(replace(run, query=self.program.data_name))
            if check:
                self._check_observed_sites(traces[1], len(batch))
            found = structure(self.program, *traces)
            self.program.enumerates = bool(found.summed or found.enumerated)
            self.program.observes = found.observed
            self.program.has_baselines = any("baseline" in site["infer"] for _, site in sample_sites(traces[0]))
            if found.summed and self.guide_name == "laplace":
                raise ValueError(
                    f"guide='laplace' cannot sum out {found.summed[0]!r}: it needs the curvature with every site "
                    "drawn. Use guide='multivariate_normal', or 'map'."
                )
            if self.program.enumerates:
                with torch.no_grad():
                    self._check_enumeration(found, replace(run, plates=found.plates))
        own_parameters(self, self.store, list(self.store["params"]))
        self.unseen = unseen_parameters(self.program, self.store, traces)
        for parameter in frozen:
            parameter.requires_grad_(False)  # a PyroModule's parameter trains once Pyro has seen it
        if check:
            with RandomStream(0, self.device).drawing(), self.running(validate=True):
                traces = self._run_or_explain(run)
                while adopt(self):
                    traces = self._run_or_explain(run)
                with explaining_lengths(self.program.call):
                    check_observations(traces[1], found.unchecked)
            with RandomStream(0, self.device).drawing(), self.running():
                try:
                    values = [log_prob(site) for trace in traces for _, site in sample_sites(trace)]
                    self.first_run_finite = all(bool(x.isfinite().all()) for x in values)
                except ValueError:  # torch's check of a value, which names no site
                    traces, self.first_run_finite = self._run_or_explain(run), False
                used = used_parameters(traces)
                check_ownership(self.program, self.store, used)
                self._used_unseen = [p for p in used if id(p) in self.unseen]
        self.program.train(training)
        return found

    def _is_trained(self, parameter: Tensor) -> bool:
        return parameter.requires_grad and id(parameter) not in self.unseen

    def _run_or_explain(self, run: Run) -> tuple[Trace, Trace]:
        """Run the program, and raise an error in it again with an explanation."""
        try:
            return run_program(run)
        except KeyError as error:
            copy_parameter(self._callers_store, error, self.device)
            return self._run_or_explain(run)
        except FAILURES as error:
            bound = self.program.bound_rows
            if "require grad" in str(error) and not bound.gradients:
                bound.gradients = True
                return self._run_or_explain(replace(run))
            raise explained(error, run) from error

    def _check_enumeration(self, found: Structure, run: Run) -> None:
        """Run the program with all values of its enumerated sites, and raise an error in it with an explanation."""
        plate = self.program.row_plate
        try:
            for guide_trace, model_trace in run_enumerated(run):
                terms(guide_trace, model_trace, plate, {}, compare_scales=True)
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            reason = str(error).splitlines()[0]
            if isinstance(error, ValueError) and reason.endswith("."):
                raise ValueError(reason) from error
            raise ValueError(
                f"the program fails when {', '.join(found.summed + found.enumerated)} takes all of its values in a "
                f"leading dimension: {reason.removesuffix('.')}. Write its shapes from the right, and index tables by "
                "Vindex(table)[..., k]."
            ) from error

    def check_data(self, batch: Batch, size: int) -> None:
        """Run the program on all rows, in pieces of one size, and check them against the supports of their sites.

        Args:
            batch: All rows; empty if the program holds them.
            size: Rows in a piece.

        Raises:
            ValueError: If values lie outside of the support of the site that observes them, a site observes rows
                outside of the data plate, or the plate's indices do not select the rows that the program holds.
        """
        if not batch:
            check_minibatches(self.program, self.structure, full_batch=False, held=True)
        with torch.no_grad(), RandomStream(0, self.device).drawing(), self.evaluating():
            for start in range(0, self.num_data, size):
                first = min(start, self.num_data - size)
                piece = tuple(x[first : first + size].to(self.device) for x in batch)
                rows = torch.arange(first, first + size, device=self.device)
                self.check_rows(piece, rows)

    def check_rows(self, batch: Batch, rows: Tensor) -> None:
        """Check a part of the rows, given their numbers in the data, inside a running program; see `check_data`."""
        batch = self.program.prepare(*(x.to(self.device) for x in batch))
        run = Run(self.program, batch, rows.to(self.device), self.num_data)
        _, trace = self._run_or_explain(run) if batch else run_held(run)
        check_observations(trace, self.structure.unchecked)
        self._check_plate(batch, trace)

    def _check_plate(self, batch: Batch, trace: Trace) -> None:
        for name, site in sample_sites(trace):
            if any(site["value"] is x for x in batch) and not is_local(site, self.program.data_name):
                raise ValueError(
                    f"site {name!r} observes rows outside of plate {self.program.data_name!r}: minibatches would "
                    "be weighted wrongly. Put it inside the plate, or use batch_size=None."
                )

    def _check_observed_sites(self, model_trace: Trace, given: int) -> None:
        """Refuse a program that observes nothing because arguments were left out; others are fitted to their prior."""
        names = self.program.argument_names
        observed = any(s["is_observed"] and not is_deterministic(s) for _, s in sample_sites(model_trace))
        if not observed and given < len(names):
            raise ValueError(
                "nothing is observed, so there is nothing to learn from. Give the observed arguments too, all of "
                f"{', '.join(names)}, and pass them to pyro.sample(..., obs=...)."
            )

    @property
    def query_plate(self) -> str:
        """The plate that holds the rows of a query: the data plate, or the row plate if it has a row for each datum."""
        found = self.structure
        return self.program.data_name or (found.row_plate if found.rows == self.num_data else "")

    @contextmanager
    def running(self, *, validate: bool = False) -> Iterator[None]:
        """A context in which the program runs with its own parameter store."""
        with private_store(self.store, validate=validate, device=self.device):
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context in which the program runs in evaluation mode: dropout is off, batch norm uses its statistics."""
        training = [module for module in self.program.modules() if module.training]
        self.program.eval()
        try:
            with self.running():
                yield
        finally:
            for module in training:
                module.training = True

    def parameters(self) -> dict[str, Tensor]:
        """The trained tensors by name: the modules' parameters and the store's unconstrained values, each once."""
        found: dict[str, Tensor] = {n: p for n, p in self.program.named_parameters() if self._is_trained(p)}
        known = {id(p) for p in self.program.parameters()}
        for name, value in self.store["params"].items():
            if id(value) not in known and self._is_trained(value):
                found[f"store.{name}"] = value
        return found

    def constrained(self, *, trained: bool = False) -> dict[str, Tensor]:
        """A copy of the parameters at their constrained values, by the names that the user gave them.

        A parameter has its name in Pyro's store, such as ``s`` for ``pyro.param("s")``, ``net.weight`` for
        ``pyro.module("net", net)`` and ``AutoNormal.locs.w`` for a guide; a parameter that Pyro did not register has
        its name in the program, such as ``net.weight``. If two parameters have the same name, the ``pyro.param`` is
        called ``store.<name>``.

        Args:
            trained: Whether to leave out parameters that are not trained.
        """
        return constrained_parameters(self.program, self.store, self._is_trained if trained else lambda _: True)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the program's state by name, including frozen parameters and buffers."""
        named = self.program.state_dict(keep_vars=True).items()
        found = {f"program.{n}": t for n, t in named if not is_lazy(t)}  # the prior alone runs no encoder
        known = {id(t) for t in found.values()}
        for name, value in self.store["params"].items():
            if id(value) not in known:
                found[f"store.{name}"] = value
        return {name: value.detach() for name, value in found.items()}

    def load(self, tensors: Mapping[str, Tensor], late: Collection[str] = ()) -> None:
        """Set the state, in place.

        Args:
            tensors: The state.
            late: Names that may be left over, because only a run on data makes them.

        Raises:
            ValueError: If a tensor is missing, left over, or has another shape.
        """
        own = self.tensors()
        missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys() - {*late})
        if missing or extra:
            raise ValueError(
                f"the file belongs to another program: missing {missing or 'nothing'}, left over {extra or 'nothing'}. "
                "Give the program that was saved."
            )
        for name, value in own.items():
            if value.shape != tensors[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)} in this program but {tuple(tensors[name].shape)} in the "
                    "file. Give the program that was saved."
                )
            with torch.no_grad():
                value.copy_(tensors[name])

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the state."""
        return {name: value.clone() for name, value in self.tensors().items()}
