"""The structure of a program, read from one run, and checks of its guide, marks and plates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace

from deepprob.distributions.per_draw import unwrapped
from deepprob.errors import StorageError
from deepprob.programs.program import Program
from deepprob.programs.sites import Site, is_auxiliary, is_data, is_factor, is_local, sample_sites

Role = Literal["latent", "summed", "observed", "fixed", "auxiliary"]


@dataclass(frozen=True)
class SiteInfo:
    """One site of a program, as a dry run showed it.

    Attributes:
        role: ``"latent"`` if the guide draws it; ``"summed"`` if the guide leaves it out, to be summed out of the
            model; ``"observed"`` for data; ``"fixed"`` for a factor or a deterministic value; ``"auxiliary"`` for a
            helper that only the guide has.
        local: Whether it is inside the row plate.
        enumerated: Whether it takes all of its values in the guide.
        event_dim: Number of event dimensions.
        plate_dims: Dimensions of the vectorized plates that it is inside of, from left to right.
        unchecked: Whether its distribution was made with ``validate_args=False``.
        computed: Whether the model computes it from other sites.
        drawable: Whether its distribution can be sampled.
        plates: Names of the vectorized plates around it that have a row for every value of theirs.
        terms: Number of independent terms of its log-probability.
        numbers: Number of elements of its value; for a local site, of one row.
        discrete: Whether its values are discrete.
    """

    role: Role
    local: bool
    enumerated: bool
    event_dim: int
    plate_dims: tuple[int, ...]
    unchecked: bool = False
    computed: bool = False
    drawable: bool = True
    plates: tuple[str, ...] = ()
    terms: int = 1
    numbers: int = 1
    discrete: bool = False

    @property
    def row_plate(self) -> str:
        """The plate over its own rows; ``""`` if there is none or several."""
        return self.plates[0] if len(self.plates) == 1 else ""


@dataclass(frozen=True)
class Structure:
    """The sites and plates of a program, as one dry run showed them.

    Attributes:
        sites: All sites by name: the model's, in its order, then the guide's helpers.
        plates: Depth of vectorized plates, counted from the right, at least 1; draws go one further to the left.
        plate_names: Names of all plates of the model.
        row_plate: The data plate. If the program names none, the one vectorized plate around all observed sites that
            has as many rows as their values along its dimension; ``""`` if there is none or several.
        rows: Number of rows of the row plate, drawn or not; 0 if there is none.
        by_row: Whether the guide's density of local sites is a product over rows.
    """

    sites: dict[str, SiteInfo]
    plates: int
    plate_names: tuple[str, ...]
    row_plate: str
    rows: int
    by_row: bool

    @property
    def local(self) -> tuple[str, ...]:
        """Latent sites inside the row plate."""
        return tuple(name for name in self._of("latent") if self.sites[name].local)

    @property
    def global_(self) -> tuple[str, ...]:
        """Latent sites outside of the row plate."""
        return tuple(name for name in self._of("latent") if not self.sites[name].local)

    @property
    def latent(self) -> tuple[str, ...]:
        """All latent sites that the guide draws, the global ones first."""
        return self.global_ + self.local

    @property
    def observed(self) -> tuple[str, ...]:
        """Sites that observe data."""
        return self._of("observed")

    @property
    def summed(self) -> tuple[str, ...]:
        """Sites of the model that the guide leaves out, because they are marked to be summed out."""
        return self._of("summed")

    @property
    def summed_across_rows(self) -> tuple[str, ...]:
        """Summed-out sites that the rows of the data share, so that the likelihood does not split into rows."""
        local = any(self.sites[name].local for name in self.observed)
        return tuple(name for name in self.summed if local and not self.sites[name].local)

    @property
    def enumerated(self) -> tuple[str, ...]:
        """Sites of the guide that are marked to take all of their values."""
        return tuple(name for name, site in self.sites.items() if site.enumerated)

    @property
    def computed(self) -> tuple[str, ...]:
        """Sites that the model computes from others: deterministic and reparameterised ones."""
        return tuple(name for name in self._of("fixed") if self.sites[name].computed)

    @property
    def undrawable(self) -> tuple[str, ...]:
        """Observed sites that cannot be predicted, because their distributions have no ``sample``."""
        return tuple(name for name in self.observed if not self.sites[name].drawable)

    @property
    def unchecked(self) -> tuple[str, ...]:
        """Sites whose values may lie outside of their supports, because the user wrote ``validate_args=False``."""
        return tuple(name for name, site in self.sites.items() if site.unchecked)

    def check_rows(self) -> None:
        """Refuse a question by row where the observed sites do not share their rows.

        Without a row plate, the independent terms of a single site are its rows, and sites of one term each are rows.

        Raises:
            ValueError: If it is not known which values of several observed sites belong to one row.
        """
        found = {n: s for n, s in self.sites.items() if s.role == "observed" or (s.local and self._is_factor(s))}
        if len(found) < 2 or self.all_local(found) or self.summed or all(s.terms == 1 for s in found.values()):
            return
        names = ", ".join(found)
        if common := _common([s.plates for s in found.values()]):
            raise ValueError(
                f"{names} are observed inside of the plates {', '.join(common)}, and any of them may hold the rows. "
                "Name the one over the rows of the data: Program.of(..., data_plate=...)."
            )
        raise ValueError(
            f"{names} are observed without a plate around all of them, so they share no rows. Put them into one "
            f"plate and name it by data_plate=, or ask for one site: log_likelihood(..., site={next(iter(found))!r})."
        )

    @staticmethod
    def _is_factor(site: SiteInfo) -> bool:
        return site.role == "fixed" and not site.computed

    def all_local(self, names: Iterable[str]) -> bool:
        """Whether all of these sites are inside the row plate."""
        return all(self.sites[name].local for name in names)

    def _of(self, role: Role) -> tuple[str, ...]:
        return tuple(name for name, site in self.sites.items() if site.role == role)


def structure(program: Program, guide_trace: Trace, model_trace: Trace) -> Structure:
    """Read the structure off one run, and check that the guide covers the model.

    Raises:
        ValueError: If the model samples a site that the guide lacks, or the guide one that the model lacks.
    """
    plate = program.row_plate
    model = dict(sample_sites(model_trace))
    latents = {n: s for n, s in model.items() if not s["is_observed"]}
    drawn = {n: s for n, s in sample_sites(guide_trace) if not s["is_observed"]}
    _check_guide(program, latents, drawn)

    def info(name: str, site: Site, role: Role) -> SiteInfo:
        return SiteInfo(
            role,
            local=is_local(site, plate),
            enumerated=name in drawn and _is_marked(drawn[name]),
            event_dim=site["fn"].event_dim,
            plate_dims=tuple(sorted(f.dim for f in _frames(site))),
            computed=role == "fixed" and not is_factor(site),
            drawable=_can_sample(unwrapped(site["fn"])),
            unchecked=unwrapped(site["fn"]).__dict__.get("_validate_args") is False,
            plates=_full_plates(site),
            terms=torch.Size(site["fn"].batch_shape).numel(),
            numbers=_numbers(site, plate),
            discrete=is_discrete(site),
        )

    sites = {n: info(n, s, _role(s, drawn=n in drawn)) for n, s in model.items()}
    sites |= {n: info(n, s, "auxiliary") for n, s in drawn.items() if n not in model}
    likelihood = [s for s in model.values() if is_data(s)] or [s for s in model.values() if is_factor(s)]
    row_plate = str(program.data_name) or _row_plate(likelihood)
    return Structure(
        sites,
        plates=_depth([*model.values(), *(s for _, s in sample_sites(guide_trace))]),
        plate_names=_plate_names(model_trace),
        row_plate=row_plate,
        rows=max((_rows(s, f) for s in likelihood for f in _frames(s) if f.name == row_plate), default=0),
        by_row=all(is_local(s, plate) or n.removesuffix("_unconstrained") in latents for n, s in drawn.items()),
    )


class SameLatents(Messenger):
    """A handler that compares the latent sites of a run with those of a saved structure, as they are drawn.

    Args:
        saved: The structure.

    Raises:
        StorageError: If the program has other latent sites, or one that all rows share with another shape.
    """

    def __init__(self, saved: Structure) -> None:
        super().__init__()
        self.saved, self.missing = saved, dict.fromkeys(saved.latent)

    def _pyro_post_sample(self, msg: Any) -> None:
        name, known = msg["name"], self.saved.sites
        self.missing.pop(name, None)
        if msg["is_observed"] or is_auxiliary(msg) or type(msg["fn"]).__name__ == "_Subsample":
            return
        own, kept = tuple(msg["fn"].shape()), tuple(msg["value"].shape)
        if name not in known:
            raise StorageError(
                f"the program draws site {name!r}, which the saved one did not have. Give the program that was saved."
            )
        if own != kept and not known[name].local:
            raise StorageError(
                f"site {name!r} has shape {own} in this program but {kept} in the file. "
                "Give the program that was saved."
            )

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if error[0] is None and self.missing:
            raise StorageError(
                f"the program has no site {next(iter(self.missing))!r}. Give the program that was saved."
            )


def _role(site: Site, *, drawn: bool) -> Role:
    if site["is_observed"]:
        return "observed" if is_data(site) else "fixed"
    return "latent" if drawn else "summed"


def _numbers(site: Site, plate: str) -> int:
    """Number of elements of a site's value; of one row if it is inside the row plate."""
    rows = next((values_along(site, frame) for frame in _frames(site) if frame.name == plate), 1)
    return torch.as_tensor(site["value"]).numel() // max(rows, 1)


def _can_sample(fn: Any) -> bool:
    kind, plain = type(fn), torch.distributions.Distribution
    return kind.sample is not plain.sample or kind.rsample is not plain.rsample


def _is_marked(site: Site) -> bool:
    return bool(site["infer"].get("enumerate"))


def _check_guide(program: Program, latents: dict[str, Site], drawn: dict[str, Site]) -> None:
    """Refuse a guide that lacks a latent site of the model or has an extra one, and marks that cannot be followed."""
    title = type(program).__name__ if type(program).__name__ != "FunctionProgram" else "the"
    left_out = {n: s for n, s in latents.items() if n not in drawn}
    for name in (n for n, s in left_out.items() if not _is_marked(s)):
        raise ValueError(
            f"{title} guide has no site {name!r} but the model samples it. "
            f'Add pyro.sample("{name}", ...) to the guide, or mark it observed.'
        )
    for name, site in left_out.items():
        _check_values(name, site)
        _check_summed(name, site)
    for name, site in drawn.items():
        if _is_marked(site):
            _check_values(name, site)
    for name, site in drawn.items():
        if name not in latents and not is_auxiliary(site):
            raise ValueError(
                f"{title} guide samples {name!r} but the model has no such latent site. "
                f'Remove it, or mark it infer={{"is_auxiliary": True}}. Latent sites: {", ".join(latents) or "none"}.'
            )


def _check_values(name: str, site: Site) -> None:
    """Refuse to enumerate a site that has no finite support."""
    if site["infer"].get("num_samples") is None and not site["fn"].has_enumerate_support:
        raise ValueError(
            f"site {name!r} is marked for enumeration, but {type(site['fn']).__name__} has no finite support. "
            "Remove the mark, and sample it in the guide."
        )


def _check_summed(name: str, site: Site) -> None:
    """Refuse marks under which a site cannot be summed out of the model."""
    draws = site["infer"].get("num_samples")
    if site["infer"]["enumerate"] != "parallel":
        raise ValueError(
            f"site {name!r} is marked for sequential enumeration, which only sites of a guide can have. Mark it "
            'infer={"enumerate": "parallel"}, or sample it in the guide.'
        )
    if draws is not None:
        raise ValueError(
            f"site {name!r} has num_samples={draws}, but the gradient of a sum over draws in the model would be "
            "biased. Leave num_samples out to sum over all values, or sample the site in the guide."
        )


def _depth(sites: list[Site]) -> int:
    depths: list[int] = [-frame.dim for site in sites for frame in site["cond_indep_stack"] if frame.vectorized]
    # Draws must also stay to the left of batch dimensions that are not plates.
    depths += [len(site["fn"].batch_shape) for site in sites]
    return max([1, *depths])


def _plate_names(trace: Trace) -> tuple[str, ...]:
    """Names of all plates, also of those that have no size and so no statement of their own."""
    found = [n for n, s in trace.nodes.items() if type(s.get("fn")).__name__ == "_Subsample"]
    return tuple(dict.fromkeys([*found, *(f.name for _, s in sample_sites(trace) for f in s["cond_indep_stack"])]))


def _row_plate(sites: list[Site]) -> str:
    inside = [s for s in sites if _frames(s)] if all(is_factor(s) for s in sites) else sites
    common = _common([_full_plates(s) for s in inside])
    return common[0] if len(common) == 1 else ""


def _full_plates(site: Site) -> tuple[str, ...]:
    return tuple(f.name for f in _frames(site) if f.size in (-1, values_along(site, f)))


def _common(plates: list[tuple[str, ...]]) -> list[str]:
    return [name for name in plates[0] if all(name in others for others in plates)] if plates else []


def _frames(site: Site) -> list[Any]:
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized]


def values_along(site: Site, frame: Any) -> int:
    """Size of a site's value along a plate's dimension."""
    shape = torch.as_tensor(site["value"]).shape
    dim = frame.dim - site["fn"].event_dim
    return shape[dim] if -dim <= len(shape) else 1


def _rows(site: Site, frame: Any) -> int:
    """Number of rows of a plate, of which it may have drawn some; a plate without a size has those of the data."""
    return values_along(site, frame) if frame.size == -1 else int(frame.full_size or frame.size)


def is_discrete(site: Site) -> bool:
    """Whether a site's values are discrete; a distribution that names no support is taken for continuous."""
    try:
        return bool(site["fn"].support.is_discrete)
    except (NotImplementedError, AttributeError):
        return False
