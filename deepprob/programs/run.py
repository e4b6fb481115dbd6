"""Running a program: paired traces of guide and model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.hmm import IndependentHMM
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from deepprob.distributions.per_draw import is_delta
from deepprob.networks.layer_modes import broadcast_linear
from deepprob.programs.arguments import Call
from deepprob.programs.copying import forget_values
from deepprob.programs.layout import placed
from deepprob.programs.minibatch import Batch, RowWeights
from deepprob.programs.program import Program
from deepprob.programs.sites import (
    Site,
    drawn_sites,
    is_auxiliary,
    is_data,
    is_deterministic,
    is_factor,
    sample_sites,
)
from deepprob.programs.structure import values_along

DRAWS = "_draws"


class _Unobserve(UnconditionMessenger):
    """Draws data anew, except for factors and deterministic sites, which Pyro also stores as observed.

    A hidden Markov chain of any length has the length of its data.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not is_deterministic(msg) and not is_factor(msg):
            if getattr(msg["fn"], "duration", 1) is None:
                msg["fn"] = _of_length_of(msg)
            super()._pyro_sample(msg)


def _of_length_of(site: Site) -> Any:
    """A hidden Markov chain of any length, as long as the data that a site observes."""
    if site["value"] is None:
        raise ValueError(
            f"site {site['name']!r} cannot be predicted: its hidden Markov chain has no length where its values are "
            "left out. Give it its duration=."
        )
    chain, outer = copy(site["fn"]), site["fn"].event_shape[1:]
    length = site["value"].shape[-chain.event_dim]
    if isinstance(chain, IndependentHMM):
        chain.base_dist = _of_length_of({**site, "fn": chain.base_dist, "value": site["value"].mT.unsqueeze(-1)})
    else:
        chain._duration = length
    chain._event_shape = torch.Size((length, *outer))
    return chain


@dataclass(frozen=True)
class Known:
    """The value of a site that a query fixes.

    Attributes:
        value: The value of one draw, without axes for plates that the site is outside of; that of a computed site has
            the axes that it has in a run of one draw.
        event_dim: The site's number of event dimensions.
        plate_dims: Dimensions of the plates around the site.
    """

    value: Tensor
    event_dim: int
    plate_dims: tuple[int, ...]


class _Fix(Messenger):
    """Gives sites known values, in the place of those that they would draw, observe or take from a guide."""

    def __init__(self, run: Run, known: Mapping[str, Known], *, observed: bool) -> None:
        super().__init__()
        self.run, self.known, self.observed = run, known, observed

    def _pyro_sample(self, msg: Any) -> None:
        if (known := self.known.get(msg["name"])) is not None:
            value, draws = known.value, self.run.draws
            if is_deterministic(msg):
                msg["value"] = _in_the_place_of(msg["value"], value)
                return
            value = value if draws is None else value.expand(draws, *value.shape)
            msg["value"] = placed(value, known.event_dim, known.plate_dims, self.run.plates, draws)
            msg["done"], msg["is_observed"] = True, self.observed


def _in_the_place_of(computed: Tensor, value: Tensor) -> Tensor:
    """A value of one draw with the axes of a computed one, whose first axis may be the draws."""
    shape = computed.shape if computed.numel() == value.numel() else computed.shape[1:]
    return value.reshape(shape).expand(computed.shape)


@dataclass(frozen=True)
class Run:
    """A program, the rows to run it on, and options.

    Attributes:
        program: The program.
        batch: Its arguments; may be empty if it needs none.
        rows: Indices of the batch's rows in the data, shape ``(B,)``.
        num_data: Number of rows of the whole data, N.
        draws: Number of draws in a leading plate around guide and model; None for no such plate.
        plates: Depth of the program's own plates: the draws' dimension is ``-plates - 1``.
        predict: Whether the model draws its observed sites instead of observing them.
        guide: A guide to run instead of the program's own.
        query: In a query, the plate that holds the rows, empty for none; every plate then has all of its rows.
        call: How the batch makes the arguments; None for the call of the fit.
        averages: The decaying averages of baselines by site, which an objective updates in place.
        given: Sites with known values, in the guide and in the model.
        do: Sites with known values, in the model only.
        weighted: Whether a query weighs rows as the fit did; a run of a fit always does.
        row_weights: Their weights; None for 1 each.
        stacks: Whether the program broadcasts over a leading plate of draws; if not, objectives run it once per draw.
        leaves: Whether guide and model are evaluated at copies of the guide's draws that are leaves of the graph. A
            site of the guide then has the copy as ``site["value"]`` and the draw as ``site["drawn"]``.
    """

    program: Program
    batch: Batch
    rows: Tensor
    num_data: int
    draws: int | None = None
    plates: int = 1
    predict: bool = False
    guide: Callable[..., Any] | None = None
    query: str | None = None
    call: Call | None = None
    averages: dict[str, Tensor] = field(default_factory=dict)
    given: Mapping[str, Known] = field(default_factory=dict)
    do: Mapping[str, Known] = field(default_factory=dict)
    stacks: bool = True
    leaves: bool = False
    weighted: bool = False
    row_weights: RowWeights | None = field(default=None, init=False, compare=False)

    def __post_init__(self) -> None:
        weights = self.program.bound_rows.weights
        if weights is not None and (self.query is None or self.weighted):
            object.__setattr__(self, "row_weights", RowWeights(weights[self.rows]))
        if self.program.bound_rows.gradients:  # the program may mark its arguments, x.requires_grad_()
            object.__setattr__(self, "batch", tuple(x.detach() if torch.is_tensor(x) else x for x in self.batch))

    def bound(self) -> AbstractContextManager[None]:
        """Within this context the program's data plate holds these rows."""
        return self.program.bound(self.rows, self.num_data, self.query, self.call, self.row_weights)

    @property
    def fixed_guide(self) -> Callable[..., Any]:
        """The guide to run, with the given values in the place of its draws."""
        guide: Callable[..., Any] = self.guide or self.program.guide
        return _Fix(self, self.given, observed=False)(guide) if self.given else guide

    @property
    def constants(self) -> list[Any]:
        """The values that are constants of the program's graph: those passed whole, and those of known sites."""
        found = [] if self.call is None else self.call.constants
        found += ["weighted"] if self.row_weights is not None else []
        for kind, known in (("given", self.given), ("do", self.do)):
            found += [part for name, site in known.items() for part in (f"{kind} {name}", site.value)]
        return found

    def stacked(self) -> AbstractContextManager[None]:
        """A context in which a leading plate of draws surrounds the program, if there are draws."""
        return _stacked(self.draws, self.plates)


def run_program(run: Run) -> tuple[Trace, Trace]:
    """Run the guide, and the model on the guide's draws.

    Returns:
        The guide's trace and the model's.
    """
    guide_trace = run_guide(run)
    if run.leaves:
        with run.bound(), run.stacked():
            cut_off(run, run.fixed_guide, guide_trace)
    model: Any = _Unobserve()(run.program.model) if run.predict else run.program.model
    model = poutine.replay(model, trace=guide_trace)
    if run.given or run.do:
        model = _Fix(run, {**run.given, **run.do}, observed=True)(model)
    with run.bound(), run.stacked():
        model_trace = poutine.trace(model).get_trace(*run.batch)
    share_masks(guide_trace, model_trace)
    return guide_trace, model_trace


def run_held(run: Run) -> tuple[Trace, Trace]:
    """Run a program on some rows of the data that it holds.

    Raises:
        ValueError: If the indices of its data plate do not select the rows.
    """
    plate, came = run.program.data_name, len(run.rows)
    hint = (
        f"Select the rows by the indices of the plate, with pyro.plate({plate!r}, {run.num_data}) as rows: "
        "... obs=data[rows], or use batch_size=None."
    )
    try:
        traces = run_program(run)
    except (RuntimeError, IndexError, ValueError) as error:
        reason = str(error).splitlines()[0].removesuffix(".")  # Pyro appends the shapes of all sites
        raise ValueError(
            f"the program cannot run on {came} of the {run.num_data} rows that it holds: {reason}. {hint}"
        ) from error
    for name, site in sample_sites(traces[1]):
        for frame in site["cond_indep_stack"]:
            if is_data(site) and frame.name == plate and (rows := values_along(site, frame)) != came:
                raise ValueError(f"site {name!r} observes {rows} rows where plate {plate!r} holds {came}. {hint}")
    return traces


def share_masks(guide_trace: Trace, model_trace: Trace) -> None:
    """Mask the guide's sites as the model's: an entry that the model masks has no posterior, and so no entropy."""
    for name, site in sample_sites(guide_trace):
        prior = model_trace.nodes.get(name.removesuffix("_unconstrained") if is_auxiliary(site) else name)
        if prior is not None and prior["mask"] is not None:
            site["mask"] = prior["mask"] if site["mask"] is None else site["mask"] & prior["mask"]


def run_guide(run: Run) -> Trace:
    """Run the guide alone."""
    with run.bound(), run.stacked():
        return trace_guide(run, run.fixed_guide)


def trace_guide(run: Run, guide: Callable[..., Any]) -> Trace:
    """The trace of a guide, without the model's data, which an ``AutoMessenger`` records as it runs the model."""
    forget_values(run.program)
    messenger, observed = run.program.current_guide, run.program.observes
    if not isinstance(messenger, GuideMessenger):
        return poutine.trace(guide).get_trace(*run.batch)  # a guide's own data count in log q
    with _keeping_priors(messenger, observed):
        trace = poutine.trace(guide).get_trace(*run.batch)
    for name in [n for n, s in sample_sites(trace) if is_data(s) or n in observed]:
        trace.remove_node(name)
    return trace


def cut_off(run: Run, guide: Callable[..., Any], guide_trace: Trace) -> None:
    """Evaluate a guide's trace at copies of its draws that are leaves of the graph.

    The density of a site may depend on earlier draws. A guide of several sites is therefore run again on the copies; a
    computed site (a Delta) then follows from the copies of others.

    Args:
        run: The run.
        guide: The guide.
        guide_trace: Its trace, which is changed.
    """
    drawn = {name: site for name, site in drawn_sites(guide_trace).items() if not site["is_observed"]}
    cut: dict[str, Any] = {}
    for name, site in drawn.items():
        if not is_delta(site["fn"]):
            value = site["value"].detach()
            cut[name] = {**site, "value": value.requires_grad_(site["value"].requires_grad)}
    again: Any = cut
    if len(drawn) > 1 or not cut:
        given = Trace()
        given.nodes.update(cut)
        again = trace_guide(run, poutine.replay(guide, trace=given)).nodes
    for name, site in drawn.items():
        evaluated: Any = {**again[name], "drawn": site["value"]}
        guide_trace.nodes[name] = evaluated


@contextmanager
def _keeping_priors(guide: Any, names: Collection[str]) -> Iterator[None]:
    """A context in which sites that are left out to be predicted keep the model's distribution in a messenger."""
    posterior = guide.get_posterior
    guide.__dict__["get_posterior"] = lambda name, prior: prior if name in names else posterior(name, prior)
    try:
        yield
    finally:
        del guide.__dict__["get_posterior"]


@contextmanager
def _stacked(draws: int | None, plates: int) -> Iterator[None]:
    """Surround a program with a leading plate of draws."""
    if draws is None:
        yield
        return
    with pyro.plate(DRAWS, draws, dim=-plates - 1), broadcast_linear():
        yield


def run_prior(run: Run) -> Trace:
    """Run the model alone and draw its observed sites, too: ancestral sampling."""
    with run.bound(), run.stacked():
        return poutine.trace(_Unobserve()(run.program.model)).get_trace(*run.batch)
