"""Running a program: paired traces of guide and model, and what their sites are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from deepprob.capture import forget_values
from deepprob.networks.layer_modes import broadcast_linear
from deepprob.program import Batch, Program

DRAWS = "_draws"

Site = Any


@dataclass(frozen=True)
class Structure:
    """What one dry run of a program showed.

    Attributes:
        local: Latent sites inside the data plate, in the model's order.
        global_: Latent sites outside of it.
        observed: Observed sites.
        event_dims: Number of event dimensions of every site.
        plates: Depth of vectorised plates, counted from the right; draws go one further to the left.
        places: The plate dimensions of every latent site, from left to right.
        by_row: Whether the guide's density of local sites is a product over rows.
        plate_names: Names of all plates of the model.
        loose: The batch shape of every site, 1 in the dimensions of its plates.
        by_plate: Sites inside the data plate, observed ones included.
        data_plate: The plate that all observed data are in, if there is exactly one with all of its rows.
        summed: Sites of the model that the guide leaves out, because they are marked to be summed out.
        enumerated: Sites of the guide that are marked to take all of their values.
    """

    local: tuple[str, ...]
    global_: tuple[str, ...]
    observed: tuple[str, ...]
    event_dims: dict[str, int]
    plates: int
    places: dict[str, tuple[int, ...]] = field(default_factory=dict)
    by_row: bool = False
    plate_names: tuple[str, ...] = ()
    loose: dict[str, tuple[int, ...]] = field(default_factory=dict)
    by_plate: tuple[str, ...] = ()
    data_plate: str = ""
    summed: tuple[str, ...] = ()
    enumerated: tuple[str, ...] = ()

    @property
    def latent(self) -> tuple[str, ...]:
        """All latent sites."""
        return self.global_ + self.local


def sample_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """The sample statements of a trace, without the plates' own indices."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample":
            yield name, site


def is_deterministic(site: Site) -> bool:
    """Whether a site is ``pyro.deterministic`` (an observed Delta) or an empty factor."""
    return bool(site["infer"].get("_deterministic"))


def is_factor(site: Site) -> bool:
    """Whether a site is ``pyro.factor``: it has a log-probability but no value."""
    return type(site["fn"]).__name__ == "Unit"


def is_auxiliary(site: Site) -> bool:
    """Whether a guide's site is a helper for other sites, without a counterpart in the model."""
    return bool(site["infer"].get("is_auxiliary"))


def is_data(site: Site) -> bool:
    """Whether a site is observed data: neither a factor nor a deterministic value."""
    return bool(site["is_observed"]) and not is_deterministic(site) and not is_factor(site)


class _Unobserve(UnconditionMessenger):
    """Draws data anew, but neither what is deterministic, which Pyro also keeps as observed, nor factors."""

    def _pyro_sample(self, msg: Any) -> None:
        if not is_deterministic(msg) and not is_factor(msg):
            super()._pyro_sample(msg)


def is_local(site: Site, plate: str) -> bool:
    """Whether a site lies inside the data plate."""
    return any(frame.name == plate for frame in site["cond_indep_stack"])


def log_prob(site: Site) -> Tensor:
    """A site's log-probability, weighed and masked, of its batch shape."""
    value: Tensor = scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])
    return value


def run(
    program: Program,
    batch: Batch,
    rows: Tensor,
    num_data: int,
    *,
    draws: int | None = None,
    plates: int = 1,
    predict: bool = False,
    guide: Callable[..., Any] | None = None,
) -> tuple[Trace, Trace]:
    """Run the guide, and the model on what the guide drew.

    Args:
        program: The program.
        batch: Its arguments.
        rows: Which rows of the data they are, shape ``(B,)``.
        num_data: Number of rows of the whole data.
        draws: If given, a leading plate of so many draws surrounds both.
        plates: Depth of the program's own plates: the draws' dimension is ``-plates - 1``.
        predict: Draw the observed sites anew instead of observing them.
        guide: Another guide than the program's own.

    Returns:
        The guide's trace and the model's.
    """
    guide_trace = run_guide(program, batch, rows, num_data, draws=draws, plates=plates, guide=guide)
    model: Any = _Unobserve()(program.model) if predict else program.model
    with program.bound(rows, num_data), stacked(draws, plates):
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*batch)
    share_masks(guide_trace, model_trace)
    return guide_trace, model_trace


def share_masks(guide_trace: Trace, model_trace: Trace) -> None:
    """Mask the guide's sites as the model's: what the model leaves out has no posterior, and so no entropy."""
    for name, site in sample_sites(guide_trace):
        prior = model_trace.nodes.get(name.removesuffix("_unconstrained") if is_auxiliary(site) else name)
        if prior is not None and prior["mask"] is not None:
            site["mask"] = prior["mask"] if site["mask"] is None else site["mask"] & prior["mask"]


def run_guide(
    program: Program,
    batch: Batch,
    rows: Tensor,
    num_data: int,
    *,
    draws: int | None = None,
    plates: int = 1,
    guide: Callable[..., Any] | None = None,
) -> Trace:
    """Run the guide alone; arguments as in `run`."""
    with program.bound(rows, num_data), stacked(draws, plates):
        return trace_guide(program, guide or program.guide, batch)


def trace_guide(program: Program, guide: Callable[..., Any], batch: Batch) -> Trace:
    """The trace of a program's guide without data: an ``AutoMessenger`` runs the model, whose data it does not draw."""
    forget_values(program)
    trace = poutine.trace(guide).get_trace(*batch)
    for name in [n for n, s in sample_sites(trace) if is_data(s)]:
        trace.remove_node(name)
    return trace


@contextmanager
def stacked(draws: int | None, plates: int) -> Iterator[None]:
    """Surround a program with a leading plate of draws, and say what is wrong where it cannot take one."""
    if draws is None:
        yield
        return
    try:
        with pyro.plate(DRAWS, draws, dim=-plates - 1), broadcast_linear():
            yield
    except (RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, ValueError) and "Shape mismatch inside plate" not in str(error):
            raise
        raise ValueError(
            f"the program failed when {draws} draws were stacked in a leading dimension: {str(error).splitlines()[0]} "
            "Write its shapes from the right (x[..., 0], sum(-1), mean @ w.unsqueeze(-1)) so that they broadcast."
        ) from error


def run_prior(program: Program, batch: Batch, num_rows: int, *, draws: int, plates: int = 1) -> Trace:
    """Run the model alone, its observed sites drawn: ancestral samples from the prior.

    Args:
        program: The program.
        batch: Its arguments; may be empty where the model needs none.
        num_rows: Number of rows to draw.
        draws: Number of draws of everything.
        plates: As in `run`.
    """
    rows = torch.arange(num_rows)
    with program.bound(rows, num_rows), stacked(draws, plates):
        return poutine.trace(_Unobserve()(program.model)).get_trace(*batch)


def structure(program: Program, guide_trace: Trace, model_trace: Trace) -> Structure:
    """Read the structure off one run, and check that the guide covers the model.

    Raises:
        ValueError: If the model samples a site that the guide lacks, or the guide one that the model lacks.
    """
    plate = str(program.data_name)
    latents = {n: s for n, s in sample_sites(model_trace) if not s["is_observed"]}
    drawn = {n: s for n, s in sample_sites(guide_trace) if not s["is_observed"]}
    title = type(program).__name__ if type(program).__name__ != "FunctionProgram" else "the"
    summed = {n: s for n, s in latents.items() if n not in drawn and s["infer"].get("enumerate")}
    enumerated = {n: s for n, s in drawn.items() if s["infer"].get("enumerate")}
    for name in (n for n in latents if n not in drawn and n not in summed):
        raise ValueError(
            f"{title} guide has no site {name!r} but the model samples it. "
            f'Add pyro.sample("{name}", ...) to the guide, or mark it observed.'
        )
    _check_marks(summed, enumerated)
    for name, site in drawn.items():
        if name not in latents and not is_auxiliary(site):
            raise ValueError(
                f"{title} guide samples {name!r} but the model has no such latent site. "
                f'Remove it, or mark it infer={{"is_auxiliary": True}}. Latent sites: {", ".join(latents) or "none"}.'
            )
    everything = [s for t in (model_trace, guide_trace) for _, s in sample_sites(t)]
    frames = [f for s in everything for f in s["cond_indep_stack"]]
    return Structure(
        local=tuple(n for n, s in latents.items() if n in drawn and is_local(s, plate)),
        global_=tuple(n for n, s in latents.items() if n in drawn and not is_local(s, plate)),
        observed=tuple(n for n, s in sample_sites(model_trace) if is_data(s)),
        event_dims={n: s["fn"].event_dim for n, s in sample_sites(model_trace)},
        # Batch dimensions outside of any plate are in the way of draws as well.
        plates=max(
            [-f.dim for f in frames if f.vectorized] + [len(s["fn"].batch_shape) for s in everything], default=0
        ),
        places={n: tuple(sorted(f.dim for f in s["cond_indep_stack"] if f.vectorized)) for n, s in latents.items()},
        loose={n: _loose(s) for n, s in sample_sites(model_trace)},
        by_plate=tuple(n for n, s in sample_sites(model_trace) if is_local(s, plate)),
        data_plate=_data_plate(model_trace),
        plate_names=tuple(n for n, s in model_trace.nodes.items() if type(s.get("fn")).__name__ == "_Subsample"),
        by_row=all(is_local(s, plate) or n.removesuffix("_unconstrained") in latents for n, s in drawn.items()),
        summed=tuple(summed),
        enumerated=tuple(enumerated),
    )


def _check_marks(summed: dict[str, Site], enumerated: dict[str, Site]) -> None:
    """Refuse sites marked for enumeration that cannot be enumerated."""
    for name, site in (summed | enumerated).items():
        draws = site["infer"].get("num_samples")
        if draws is None and not site["fn"].has_enumerate_support:
            raise ValueError(
                f"site {name!r} is marked for enumeration, but {type(site['fn']).__name__} has no finite support. "
                "Remove the mark, and sample it in the guide."
            )
        if name in summed and site["infer"]["enumerate"] != "parallel":
            raise ValueError(
                f"site {name!r} is marked for sequential enumeration, which only sites of a guide can have. Mark it "
                'infer={"enumerate": "parallel"}, or sample it in the guide.'
            )
        if name in summed and draws is not None:
            raise ValueError(
                f"site {name!r} is to be drawn {draws} times for a sum in the model, whose gradient would be biased. "
                "Leave num_samples out to sum over all values, or sample it in the guide."
            )


def _loose(site: Site) -> tuple[int, ...]:
    shape = list(site["fn"].batch_shape)
    for frame in site["cond_indep_stack"]:
        if frame.vectorized and -frame.dim <= len(shape):
            shape[frame.dim] = 1
    return tuple(shape)


def _data_plate(model_trace: Trace) -> str:
    frames = [
        {f.name: f for f in s["cond_indep_stack"] if f.vectorized and f.size == (f.full_size or f.size)}
        for _, s in sample_sites(model_trace)
        if is_data(s)
    ]
    common = set.intersection(*map(set, frames)) if frames else set()
    return common.pop() if len(common) == 1 else ""


def check_stacked(found: Structure, model_trace: Trace, plate: str, draws: int) -> None:
    """Refuse a run under a plate of draws whose draws went where they do not belong, or that saw some rows only.

    Args:
        found: The program's structure, from a run without draws.
        model_trace: Trace of the model under draws.
        plate: Name of the data plate.
        draws: How many draws.

    Raises:
        ValueError: If a site's batch shape has grown outside of its plates, or a plate subsamples by itself.
    """
    for name, site in sample_sites(model_trace):
        for frame in site["cond_indep_stack"]:
            if frame.name not in (plate, DRAWS) and frame.vectorized and frame.size < (frame.full_size or frame.size):
                raise ValueError(
                    f"plate {frame.name!r} draws {frame.size} of its {frame.full_size} rows by itself, so that a query "
                    "would see those only. Give it all rows, and let the routine draw them: "
                    f"Program.of(model, guide, data_plate={frame.name!r}) and batch_size={frame.size}."
                )
        now, own = _loose(site), found.loose.get(name, ())
        for dim in range(-len(now), 0):
            before = own[dim] if -dim <= len(own) else 1
            if now[dim] not in (1, before):
                raise ValueError(
                    f"site {name!r} does not take {draws} draws stacked in a leading dimension: its batch shape "
                    f"becomes {tuple(site['fn'].batch_shape)}. Put its rows in a plate, or write its shapes from the "
                    "right (x * w.unsqueeze(-1)) so that draws stay in front."
                )


def first_bad_site(program: Program, batch: Batch, num_data: int) -> str:
    """Where a run stops being finite, in the user's words.

    Args:
        program: The program.
        batch: All rows.
        num_data: Their number.

    Returns:
        The first site whose value, parameters or log-probability are not finite, and which of them.
    """
    rows = torch.arange(num_data, device=batch[0].device if batch else None)
    try:
        traces = run(program, batch, rows, num_data)
    except (ValueError, RuntimeError) as error:
        return f"the program itself fails: {str(error).splitlines()[0]}"
    for trace in traces:
        for name, site in sample_sites(trace):
            base = site["fn"]
            while hasattr(base, "base_dist"):
                base = base.base_dist
            for parameter in getattr(base, "arg_constraints", {}):
                value = base.__dict__.get(parameter)
                if isinstance(value, Tensor):
                    if not bool(torch.isfinite(value).all()):
                        return f"site {name!r}: {parameter} is not finite"
                    if parameter == "scale" and bool((value <= 0).any()):
                        return f"site {name!r}: scale reached 0"
            if not bool(torch.isfinite(torch.as_tensor(site["value"])).all()):
                return f"site {name!r}: its value is not finite"
            if not bool(torch.isfinite(site["fn"].log_prob(site["value"])).all()):
                return f"site {name!r}: its log-probability is not finite"
    return "a gradient is not finite"
