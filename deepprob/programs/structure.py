"""The structure of a program, read off one run, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyro.poutine.trace_struct import Trace

from deepprob.programs.program import Program
from deepprob.programs.run import DRAWS
from deepprob.programs.sites import Site, is_auxiliary, is_data, is_local, sample_sites


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
