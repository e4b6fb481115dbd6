"""Running a program once per draw, many draws in one call.

A query is defined by K runs of the program, one per draw. They are computed in the fastest of three ways that gives
the same result:

- *stacked*: one run under a leading plate of draws, if every statement of the program broadcasts over it;
- *traced*: ``torch.vmap`` of the graph of one run;
- *one by one*: K runs.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from deepprob.distributions.per_draw import unwrapped
from deepprob.engine.batching import over_draws
from deepprob.engine.noise import LiftedNoise
from deepprob.engine.python_state import python_state
from deepprob.engine.random import RandomStream
from deepprob.engine.subject import Untraceable
from deepprob.posteriors.recipes import Recipe, Result, detached, number_of, taken_apart
from deepprob.posteriors.stored_draws import replay
from deepprob.programs.elimination import Term
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.run import Run
from deepprob.programs.sites import Site, is_deterministic, sample_sites
from deepprob.programs.tracing import QueryGraph, trace_query

Stored = Mapping[str, Tensor]

_FAILURES = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError, AssertionError)
_TOLERANCE = 1e-4  # relative: two orders of summation in float32 stay well below
_MOST_GRAPHS = 8
_MOST_NUMBERS = 1000  # of a constant tensor in the key of a graph


@dataclass(frozen=True)
class Job:
    """What to compute from a run of a program.

    Attributes:
        name: Identifies the job among those of a program.
        call: From a run, with or without draws, to traces or terms.
        drawn: For a job whose results are terms, traces of what it draws.
        trial: The job that decides how draws are run, if the draws of this one cannot be repeated.
    """

    name: str
    call: Callable[[Run], Result]
    drawn: Callable[[Run], Result] | None = None
    trial: Job | None = None


class DrawRunner:
    """Runs jobs under draws; the way is chosen once for each job by a trial.

    Args:
        instance: The program.
    """

    def __init__(self, instance: ProgramInstance) -> None:
        self.instance = instance

    def __call__(self, job: Job, run: Run, stored: Stored | None = None) -> Result:
        """The result of a job under ``run.draws`` draws.

        Args:
            job: The job.
            run: The run, with a number of draws.
            stored: Latent values to use in the place of the guide's draws, by site, each ``(K, *site)``.
        """
        ways, trial = self.instance.ways, job.trial or job
        plain, sites = _constants_key(replace(run, given={}, do={})), [*run.given, *run.do]
        key = f"{trial.name}{' replayed' if stored else ''}{sites or ''}{plain or ''}"
        if key not in ways:
            # Under a plate of draws, a network without random weights would run once, with one mask for all draws.
            stacked = not run.program.active_dropout and self.stacks(trial, run, stored)
            ways[key] = "stacked" if stacked else "traced"
        if ways[key] == "stacked":
            found = job.call(self._stacked(run, stored))
            return detached(found) if run.program.bound_rows.gradients else found
        if ways[key] == "traced":
            try:
                return self._traced(job, run, stored)
            except (Untraceable, RuntimeError) as error:
                result = self._one_by_one(job, run, stored)
                ways[key] = "one by one"
                reason = str(error).splitlines()[0].removesuffix(".")
                warnings.warn(f"draws run one by one, which is slow: {reason}.", stacklevel=2)
                return result
        return self._one_by_one(job, run, stored)

    # -- stacked -------------------------------------------------------------------------------------------------

    def _stacked(self, run: Run, stored: Stored | None) -> Run:
        if stored is None:
            return run
        return replace(run, guide=replay(stored, self.instance.structure, run.draws))

    def stacks(self, job: Job, run: Run, stored: Stored | None = None) -> bool:
        """Whether stacked draws give the same distributions as runs of single draws with the same values."""
        draws = _unlike_all_sizes(run.batch, self.instance)
        if stored is not None:
            index = torch.arange(draws) % len(next(iter(stored.values())))
            stored = {name: value[index] for name, value in stored.items()}
        run = replace(run, draws=draws)
        # Neither a graph that is being traced nor the query's random stream may see the trial.
        with _disable_current_modes(), RandomStream(0, self.instance.device).drawing(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a program warns of under draws may not concern its single runs
            try:
                given = job.drawn(self._stacked(run, stored)) if job.drawn else None
                values = {} if given is None else _values_of(given)
                with Fixed(values):
                    together = job.call(self._stacked(run, stored))
                values = _values_of(together) if given is None else values
                for k in range(draws):
                    with Fixed({name: value[k] for name, value in values.items()}):
                        alone = job.call(self._single(run, _draw(stored, k)))
                    _compare(together, alone, k, draws)
            except _FAILURES:
                return False
        return True

    # -- traced --------------------------------------------------------------------------------------------------

    def _traced(self, job: Job, run: Run, stored: Stored | None) -> Result:
        tensors = [x for x in run.batch if isinstance(x, Tensor)]
        kept = {} if stored is None else dict(stored)
        query, recipe = self._graph(job, run, tensors, kept)
        noise = query.noise.draw_stacked(number_of(run), self.instance.device)
        own = [x.detach() for x in query.tensors]

        def one(values: list[Tensor], normal: Tensor, uniform: Tensor) -> list[Tensor]:
            results: list[Tensor] = query.graph(own, (*tensors, *values), normal, uniform)
            return results

        found = over_draws(one, list(kept.values()), *noise)
        return recipe.stack(found, run)

    def _graph(self, job: Job, run: Run, tensors: list[Tensor], stored: Stored) -> tuple[QueryGraph, Recipe]:
        """The graph of one draw, and the recipe of its results."""
        shapes = tuple((tuple(x.shape), x.dtype) for x in tensors)
        constants = _constants_key(run)
        state = frozenset(python_state(self.instance.program, arrays=True).items())
        key = (
            job.name,
            tuple(stored),
            shapes,
            tuple(x is None for x in run.batch),
            len(run.rows),
            run.num_data,
            constants,
            state,
        )
        graphs = self.instance.graphs
        full = key if key in graphs else (*key, _digest(tensors))
        if full not in graphs or constants is None:
            recipes: list[Recipe] = []

            def ask(given: Sequence[Tensor]) -> list[Tensor]:
                rest = iter(given)
                batch = tuple(next(rest) if isinstance(x, Tensor) else x for x in run.batch)
                single = self._single(replace(run, batch=batch), dict(zip(stored, rest, strict=True)) or None)
                recipe, found = taken_apart(job.call(single))
                recipes.append(recipe)
                return found

            with RandomStream(0, self.instance.device).drawing():  # the query's own stream must not advance
                examples = (*tensors, *(x[0] for x in stored.values()))
                query = trace_query(self.instance, ask, examples, known=len(tensors))
                self._compare_with_runs(query, ask, tensors, stored)
            if len(graphs) >= _MOST_GRAPHS:
                graphs.pop(next(iter(graphs)))
            full = (*key, _digest(tensors)) if query.values_read else key
            graphs[full] = query, recipes[0]
        found: tuple[QueryGraph, Recipe] = graphs[full]
        return found

    def _compare_with_runs(
        self, query: QueryGraph, ask: Callable[[Sequence[Tensor]], list[Tensor]], tensors: list[Tensor], stored: Stored
    ) -> None:
        """Compare two batched draws with two runs of the program, where its noise can be served to both."""
        if query.noise.unserved:
            return
        own = [x.detach() for x in query.tensors]
        noise = query.noise.draw_stacked(2, self.instance.device)
        values = [x[[0, -1]] for x in stored.values()]
        graphs = over_draws(lambda v, *n: query.graph(own, (*tensors, *v), *n), values, *noise)
        for k in range(2):
            with LiftedNoise(noise[0][k], noise[1][k]):
                alone = ask((*tensors, *(v[k] for v in values)))
            for batched, one in zip(graphs, alone, strict=True):
                if not _is_close(batched[k], one):
                    raise Untraceable("its graph gives another result than its run")

    # -- one by one ----------------------------------------------------------------------------------------------

    def _single(self, run: Run, stored: Stored | None) -> Run:
        guide = None if stored is None else replay(stored, self.instance.structure)
        return replace(run, draws=None, guide=guide)

    def _one_by_one(self, job: Job, run: Run, stored: Stored | None) -> Result:
        with RandomStream(0, self.instance.device).drawing(), LiftedNoise() as first:
            recipe, _ = taken_apart(job.call(self._single(run, _draw(stored, 0))))
        normal, uniform = first.size.draw_stacked(number_of(run), self.instance.device)
        parts: list[list[Tensor]] = []
        for k in range(number_of(run)):
            with LiftedNoise(normal[k], uniform[k]):
                _, found = taken_apart(job.call(self._single(run, _draw(stored, k))))
            if parts and [x.shape for x in found] != [x.shape for x in parts[0]]:
                raise ValueError(
                    "the program's sites or their shapes differ from draw to draw, so that its draws cannot be put "
                    "together. Give every run the same sites and shapes."
                )
            parts.append(found)
        return recipe.stack([torch.stack(x) for x in zip(*parts, strict=True)], run)


# The trial -----------------------------------------------------------------------------------------------------------


class Fixed(Messenger):
    """Gives sites fixed values.

    Args:
        values: Values by site: those of a stacked run, or of one of its draws.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.values or msg["is_observed"] or msg["done"]:
            return
        value, shape = self.values[msg["name"]], msg["fn"].shape()
        while value.dim() > len(shape) and value.shape[0] == 1:
            value = value[0]
        if value.shape != shape:
            raise ValueError(f"site {msg['name']!r} has another shape in a single run")
        msg["value"], msg["done"] = value, True


def _values_of(result: Result) -> dict[str, Tensor]:
    """The drawn values of all traces, with the draws first."""
    found = {}
    for trace in result:
        for name, site in sample_sites(cast(Trace, trace)):
            if not site["is_observed"]:
                found[name] = site["value"]
    return found


def _compare(together: Result, alone: Result, k: int, draws: int) -> None:
    """Compare one draw of a stacked result with a single run.

    Raises:
        ValueError: If they differ.
    """
    for many, one in zip(together, alone, strict=True):
        if isinstance(one, Term):
            _same("terms", cast(Term, many).value, one.value, k, draws)
            continue
        sites = dict(sample_sites(cast(Trace, many)))
        for name, site in sample_sites(cast(Trace, one)):
            events = site["fn"].event_dim
            if sites[name]["fn"].event_dim != events and not is_deterministic(site):
                raise ValueError(f"site {name!r} has other event dimensions under draws")
            for a, b in zip(_facts(sites[name]), _facts(site), strict=True):
                _same(name, a, b, k, draws)


def _facts(site: Site) -> list[Tensor]:
    """Tensors that identify a site's distribution, given its value."""
    if is_deterministic(site):
        return [site["value"]]
    if isinstance(delta := unwrapped(site["fn"]), Delta):
        return [delta.v, delta.log_density]
    log_prob = site["fn"].log_prob(site["value"])
    return [torch.as_tensor(scale_and_mask(log_prob, site["scale"], site["mask"]))]


def _same(name: str, many: Tensor, one: Tensor, k: int, draws: int) -> None:
    if many.dim() and many.shape[0] == draws and many.dim() > one.dim():
        many = many[k]
    while many.dim() > one.dim() and many.shape[0] == 1:
        many = many[0]
    if not _is_close(many, one):
        raise ValueError(f"{name} differs under draws")


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return bool((a == b).all())
    scale = b.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp_min(1.0) if b.numel() else 1.0
    return bool(((a == b) | ((a - b).abs() <= _TOLERANCE * scale) | (a.isnan() & b.isnan())).all())


def _draw(stored: Stored | None, k: int) -> Stored | None:
    return None if stored is None else {name: value[k] for name, value in stored.items()}


def _constants_key(run: Run) -> str | None:
    """The values that are constants of a run's graph; None if they have no short text."""
    parts = []
    for x in run.constants:
        if isinstance(x, Tensor) and x.numel() <= _MOST_NUMBERS:
            x = (str(x.dtype), tuple(x.shape), x.flatten().tolist())
        elif not isinstance(x, bool | int | float | str | None):
            return None
        parts.append(f" {x!r}")
    return "".join(parts)


def _digest(tensors: Sequence[Tensor]) -> bytes:
    """A short text that tells the values of some tensors from others."""
    found = hashlib.blake2b(digest_size=16)
    for x in tensors:
        found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.digest()


def _unlike_all_sizes(batch: Sequence[Any], instance: ProgramInstance) -> int:
    """A small number of draws that is no size of the data or of a parameter."""
    tensors = [*batch, *instance.tensors().values()]
    sizes = {size for x in tensors if isinstance(x, Tensor) for size in x.shape}
    return next(n for n in itertools.count(3) if n not in sizes)
