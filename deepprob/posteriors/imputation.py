"""Drawing the missing values of rows given their observed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from deepprob.distributions.columns import Columns
from deepprob.distributions.per_draw import unwrapped
from deepprob.errors import unknown
from deepprob.posteriors.decoding import reconstructed
from deepprob.posteriors.encoding import local_summed, of_draws
from deepprob.posteriors.fitted import FittedProgram
from deepprob.posteriors.latent_draws import latent_draws
from deepprob.posteriors.prediction import Prediction
from deepprob.posteriors.stored_draws import replay
from deepprob.programs.arguments import Arguments, rows_of
from deepprob.programs.enumeration import draw_summed
from deepprob.programs.minibatch import Batch, num_rows
from deepprob.programs.run import Known, Run, run_program
from deepprob.programs.sites import Site, observed_sites, sample_sites

Guide = Callable[..., None]

_MOST_NUMBERS = 2**22  # in the rows of the chains that run together


def imputed(
    fitted: FittedProgram, data: tuple[Any, ...], missing: Any, draws: int, sweeps: int, seed: int, site: str | None
) -> Prediction:
    """The distribution of rows whose missing values are drawn; see `Posterior.impute`."""
    gaps, structure = Gaps(fitted, missing), fitted.structure
    batch = fitted.accept(data, gaps.fill)
    # A program may itself mark more values as missing, such as all columns of a category.
    masks = [mask.to(x.device).reshape(x.shape) | x.isnan() for mask, x in zip(gaps.masks, batch, strict=False)]
    chained = bool(structure.local or local_summed(structure)) and not gaps.allowed
    if chained and structure.local and (fitted.keeps_rows or fitted.chains is not None):
        raise ValueError(
            "the posterior of every row was fitted to complete rows, so that it tells nothing about rows with missing "
            "values. Fit them with missing values, Program.of(..., missing='allow'), or use an amortized guide."
        )
    shared = latent_draws(fitted, (), draws, seed) if chained and structure.global_ else {}
    shared = {name: shared[name] for name in structure.global_ if name in shared}
    with fitted.querying(seed):
        places = _places(fitted, batch, masks, gaps)
        masks = [_whole(places[i], mask) if i in places else mask for i, mask in enumerate(masks)]
        chosen = _chosen(places, masks, site)
        if chained:
            filled = _chained(fitted, batch, masks, places, shared, draws, sweeps)[chosen]
        else:
            filled = _direct(fitted, batch, masks, places, draws)[chosen]
            if bool(filled.isnan().any()):  # a program may take missing inputs, too; from one that does not come NaN
                _check_placed(places, masks, gaps.names)
    found = places[chosen]
    return of_draws(filled.reshape(draws, *found["value"].shape), found, found["name"])


class Gaps:
    """The missing values of a program's arguments.

    Args:
        fitted: The program.
        missing: The user's mask, or masks by argument; None for NaN alone.

    Attributes:
        masks: Where the values of every argument are missing.
        names: Names of the arguments.
        allowed: Whether the program itself takes all of the missing values, as NaN, and its guide can read them.
    """

    def __init__(self, fitted: FittedProgram, missing: Any) -> None:
        self._fitted, self._missing = fitted, missing
        self.masks: list[Tensor] = []
        self.names: Sequence[str] = ()
        self.allowed = fitted.program.explains_gaps and fitted.program.reads_missing

    def fill(self, rows: Batch) -> Batch:
        """The arguments with NaN in the place of missing values, or values of the fit if the program refuses NaN."""
        program = self._fitted.program
        self.names = rows.call.names if isinstance(rows, Arguments) else program.argument_names
        self.masks = [x.isnan() if x.is_floating_point() else torch.zeros_like(x, dtype=torch.bool) for x in rows]
        for i, mask in self._given(rows):
            self.masks[i] = self.masks[i] | mask.to(self.masks[i].device)
        incomplete = [x for x, mask in zip(rows, self.masks, strict=True) if bool(mask.any())]
        as_nan = program.missing == "allow" and all(x.is_floating_point() for x in incomplete)
        self.allowed = self.allowed and as_nan
        values = {spec.name: spec.fill for spec in self._fitted.instance.inputs}
        found = [
            torch.where(mask, torch.nan if as_nan else values.get(name, 0.0), x).to(x.dtype) if mask.any() else x
            for name, mask, x in zip(self.names, self.masks, rows, strict=False)
        ]
        return Arguments(found, rows.call) if isinstance(rows, Arguments) else tuple(found)

    def _given(self, rows: Batch) -> Iterator[tuple[int, Tensor]]:
        """The user's masks, each with the place of its argument."""
        if self._missing is None:
            return
        shapes = {name: tuple(x.shape) for name, x in zip(self.names, rows, strict=False)}
        known = self._missing if isinstance(self._missing, Mapping) else {None: self._missing}
        for name, value in known.items():
            mask = torch.as_tensor(value, device="cpu")
            if name is not None and name not in shapes:
                raise unknown("argument of missing", name, shapes)
            fits = [n for n, shape in shapes.items() if name in (None, n) and shape == tuple(mask.shape)]
            if len(fits) != 1 or mask.dtype != torch.bool:
                has = ", ".join(f"{n} {shape}" for n, shape in shapes.items())
                raise ValueError(
                    f"missing must be an array of bools in the shape of one of the arguments ({has}); got "
                    f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}. Write True where a value is "
                    "missing, and missing={name: array} if several arguments have this shape."
                )
            yield list(shapes).index(fits[0]), mask


# Arguments and sites -------------------------------------------------------------------------------------------------


def _places(fitted: FittedProgram, batch: Batch, masks: Sequence[Tensor], gaps: Gaps) -> dict[int, Site]:
    """The observed sites that hold the values of an argument, by the argument's place.

    Raises:
        ValueError: If an argument has missing values that no site, or no site of independent values, holds.
    """
    guide = None if fitted.chains is None else fitted.replayed()
    run = replace(fitted.prepared(batch, 1), draws=None, guide=guide)
    found: dict[int, Site] = {}
    for name, site in observed_sites(run_program(run)[1]).items():
        same = (i for i, mask in enumerate(masks) if i not in found and _holds(site["value"], run.batch[i], mask))
        if (i := next(same, None)) is not None:
            _check_independent(name, site, masks[i])
            found[i] = site
    if not gaps.allowed:
        _check_placed(found, masks, gaps.names)
    return found


def _check_placed(places: Mapping[int, Site], masks: Sequence[Tensor], names: Sequence[str]) -> None:
    """Refuse missing values of an input, whose values no site has."""
    for i, mask in enumerate(masks):
        if i not in places and bool(mask.any()):
            raise ValueError(
                f"{names[i]} has missing values, but no single observed site of the program has its values, so that "
                f"they cannot be drawn. Give {names[i]} complete."
            )


def _holds(value: Tensor, x: Tensor, missing: Tensor) -> bool:
    if value.numel() != x.numel():
        return False
    return bool(((value.reshape(x.shape) == x) | missing).all())


def _check_independent(name: str, site: Site, missing: Tensor) -> None:
    """Refuse to draw a part of values that depend on each other given the latent sites."""
    base = _base(site)
    if not base.event_dim or isinstance(base, Columns):
        return
    events = missing.reshape(site["value"].shape).flatten(-base.event_dim)
    if bool((events.any(-1) & ~events.all(-1)).any()):
        raise ValueError(
            f"site {name!r} has one {type(base).__name__} over values of which some are missing, and these cannot be "
            "drawn given the others. Mark all values of such an event missing, or write a site of independent values."
        )


def _whole(site: Site, missing: Tensor) -> Tensor:
    """The missing values of a site, with all columns of a block of categories if one of them is missing."""
    base = _base(site)
    return (
        base.with_whole_blocks(missing.reshape(site["value"].shape)).reshape(missing.shape)
        if isinstance(base, Columns)
        else missing
    )


def _base(site: Site) -> Any:
    fn = unwrapped(site["fn"])
    return unwrapped(getattr(fn, "first", fn))


def _chosen(places: Mapping[int, Site], masks: Sequence[Tensor], site: str | None) -> int:
    """The place of the argument to return."""
    known = {str(found["name"]): i for i, found in places.items()}
    if site is not None and site not in known:
        raise unknown("observed site", site, known)
    names = [name for name, i in known.items() if bool(masks[i].any())] or list(known)
    if site is None and len(names) != 1:
        has = f"several sites ({', '.join(names)}) may be filled" if names else "no argument is observed by a site"
        hint = "Choose one with site='...'" if names else "Ask for posterior.predict(*data)"
        raise ValueError(f"{has}, so that impute has no one answer. {hint}.")
    return known[site or names[0]]


# Draws ---------------------------------------------------------------------------------------------------------------


def _filled(batch: Batch, masks: Sequence[Tensor], drawn: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The arguments with drawn values in the place of missing ones, by place: ``(K, *shape)``."""
    shaped = {i: x.reshape(-1, *batch[i].shape).to(batch[i].dtype) for i, x in drawn.items()}
    return {i: torch.where(masks[i], x, batch[i]) for i, x in shaped.items()}


def _direct(
    fitted: FittedProgram, batch: Batch, masks: Sequence[Tensor], places: Mapping[int, Site], draws: int
) -> dict[int, Tensor]:
    """Draws of the missing values given latent sites that are drawn given the observed ones."""
    trace, layout = reconstructed(fitted, batch, draws), fitted.layout(draws)
    return _filled(batch, masks, {i: layout.draws_first(trace.nodes[site["name"]]) for i, site in places.items()})


def _chained(
    fitted: FittedProgram,
    batch: Batch,
    masks: Sequence[Tensor],
    places: Mapping[int, Site],
    shared: Mapping[str, Tensor],
    draws: int,
    sweeps: int,
) -> dict[int, Tensor]:
    """Draws of the missing values by Markov chains, which run together where rows and draws are independent."""
    structure = fitted.structure
    alike = all(bool((value == value[:1]).all()) for value in shared.values())
    together = structure.by_row and structure.all_local(structure.observed + structure.summed) and alike
    size = sum(x.numel() for x in batch)
    most = max(1, _MOST_NUMBERS // max(1, size)) if together else 1
    parts: dict[int, list[Tensor]] = {i: [] for i in places}
    for start in range(0, draws, most):
        copies = min(most, draws - start)
        index = torch.arange(num_rows(batch), device=fitted.instance.device).repeat(copies)
        sites = structure.sites
        known = {n: Known(v[start], sites[n].event_dim, sites[n].plate_dims) for n, v in shared.items()}
        chain = _Chain(fitted, [mask[index] for mask in masks], places, known)
        state = chain.run(rows_of(batch, index), sweeps)
        for i, found in parts.items():
            found.append(state[i].reshape(copies, *batch[i].shape))
    return {i: torch.cat(found) for i, found in parts.items()}


@dataclass(frozen=True)
class _Chain:
    """A Markov chain of the missing values of rows.

    Attributes:
        fitted: The posterior's program.
        masks: Where the values of every argument are missing.
        places: The sites that hold the values of an argument, by the argument's place.
        known: The values of global latent sites.
    """

    fitted: FittedProgram
    masks: Sequence[Tensor]
    places: Mapping[int, Site]
    known: Mapping[str, Known]

    def run(self, rows: Batch, sweeps: int) -> Batch:
        """The rows after some sweeps, started at a draw of the local latents from their prior."""
        structure = self.fitted.structure
        shared = replay({name: known.value for name, known in self.known.items()}, structure)
        guide = None if structure.local else shared
        for sweep in range(sweeps + 1):
            run = replace(self.fitted.prepared(rows, 1), draws=None, given=self.known)
            if sweep == 0:
                trace = _drawn_anew(run, shared)
            elif structure.summed:
                trace = _drawn_anew(run, self._with_summed(replace(run, guide=guide)))
            else:
                trace = _drawn_anew(run, guide)
            sites = dict(sample_sites(trace))
            drawn = _filled(rows, self.masks, {i: sites[x["name"]]["value"] for i, x in self.places.items()})
            found = [drawn[i][0] if i in drawn else x for i, x in enumerate(rows)]
            rows = Arguments(found, rows.call) if isinstance(rows, Arguments) else tuple(found)
        return rows

    def _with_summed(self, run: Run) -> Guide:
        """A guide that returns one draw of all latent sites given complete rows, those summed out included."""
        structure = self.fitted.structure
        guide_sites, model_sites = (dict(sample_sites(trace)) for trace in draw_summed(run))
        values = {name: guide_sites[name]["value"] for name in structure.latent}
        values |= {name: model_sites[name]["value"] for name in structure.summed}
        return replay(values, structure)


def _drawn_anew(run: Run, guide: Guide | None) -> Trace:
    """The model's trace with its observed sites drawn, under one draw of a guide."""
    return run_program(replace(run, guide=guide, predict=True))[1]
