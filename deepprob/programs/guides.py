"""Guides by name: Pyro's AutoGuides, attached to a program's own copy."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from pyro import poutine
from pyro.infer import autoguide
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.guides import AutoContinuous, AutoNormalizingFlow
from pyro.infer.autoguide.initialization import InitMessenger, init_to_uniform
from torch import Tensor

from deepprob.errors import unknown
from deepprob.programs.copying import copy_with_modules
from deepprob.programs.guide_classes import GUIDE_CLASSES, makes_guide
from deepprob.programs.minibatch import run_bound
from deepprob.programs.names_apart import HELD, AutoDelta, AutoGaussianDense, AutoStructured
from deepprob.programs.program import FunctionProgram, Program
from deepprob.programs.relative_guides import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from deepprob.programs.sites import Site
from deepprob.programs.structure import Structure

_RADIUS = 2.0  # of a spread start, as in Stan


def _flow(model: Callable[..., Any]) -> AutoGuide:
    return autoguide.AutoIAFNormal(model, num_transforms=2)


GUIDES: dict[str, Callable[[Callable[..., Any]], AutoGuide]] = {
    "normal": AutoNormal,
    "multivariate_normal": AutoMultivariateNormal,
    "low_rank": AutoLowRankMultivariateNormal,
    "flow": _flow,
    "laplace": autoguide.AutoLaplaceApproximation,
    "map": AutoDelta,
}

# In the place of Pyro's classes.
_OWN: dict[Any, type[AutoGuide]] = {
    autoguide.AutoNormal: AutoNormal,
    autoguide.AutoDelta: AutoDelta,
    autoguide.AutoStructured: AutoStructured,
    autoguide.AutoGaussian: AutoGaussianDense,
    autoguide.AutoMultivariateNormal: AutoMultivariateNormal,
    autoguide.AutoLowRankMultivariateNormal: AutoLowRankMultivariateNormal,
}

GuideSpec = str | type[AutoGuide] | Callable[..., Any] | None


def attach_guide(program: Program, guide: GuideSpec, *, spread: bool = False) -> str | None:
    """Attach a guide to a program, which must be a copy of the caller's.

    Args:
        program: The copy to change.
        guide: A name from `GUIDES`, a class of `GUIDE_CLASSES` or its name, another class or a partial one, a callable
            with the model's arguments, or None for the program's own.
        spread: Whether a named guide or a class starts at random, uniform from -2 to 2 for every unconstrained number.

    Returns:
        The name under which the guide can be built again, or None if it came as a callable.

    Raises:
        TypeError: If the guide is not a name, a class or a callable.
        ValueError: If no guide has that name, or the program has no guide.
    """
    spec: Any = guide
    if spec is None and isinstance(program, FunctionProgram) and not program.has_guide:
        spec = program.current_guide
    if isinstance(program, FunctionProgram) and spec is None and isinstance(program.current_guide, AutoGuide):
        _bind_rows(program.current_guide, program)
    if spec is None:
        if not program.has_guide:
            raise ValueError(f"the program has no guide. Name one: guide={'|'.join(map(repr, GUIDES))}.")
        return None
    model = poutine.block(program.bound_model(), hide_fn=is_summed_out)
    model = InitMessenger(lambda site: _start(program, site, spread))(model)  # before the guide's own choice
    name = None
    if isinstance(spec, str) and spec not in (*GUIDES, *GUIDE_CLASSES):
        raise unknown("guide", spec, GUIDES)
    if isinstance(spec, str):
        name = spec
        spec = GUIDES.get(spec) or GUIDE_CLASSES[spec]
        built = _OWN.get(spec, spec)(model)
    elif makes_guide(spec):
        name = next((n for n, g in (*GUIDES.items(), *GUIDE_CLASSES.items()) if g in (spec, _OWN.get(spec))), None)
        built = _OWN.get(spec, spec)(model)
    elif callable(spec):
        built = spec
        if isinstance(built, AutoGuide):
            _bind_rows(built, program)
    else:
        raise TypeError(f"guide must be a name, an AutoGuide class or a callable; got {type(spec).__name__}.")
    program.attach(built)
    return name


def _start(program: Program, site: Site, spread: bool) -> Tensor | None:
    """Where a guide starts a site; None for where the guide chooses."""
    found = program.start(site["name"])
    if found is not None or not spread or site["fn"].support.is_discrete or HELD in site["infer"]:
        return found
    chosen: Tensor = init_to_uniform(site, radius=_RADIUS)
    return chosen


def check_start(program: Program, found: Structure, weights: str) -> None:
    """Refuse to keep weights that a named guide cannot start at, and name those that Pyro has removed.

    Args:
        program: The program, with its guide.
        found: Its structure.
        weights: The choice of the fit.

    Raises:
        ValueError: If the guide is a flow, which starts at random.
    """
    guide = program.current_guide
    if weights != "keep" or not isinstance(guide, AutoGuide):
        return
    kept = [name for name in found.latent if program.start(name) is not None]
    if kept and isinstance(guide, AutoNormalizingFlow):
        raise ValueError(
            f"weights='keep' cannot start guide {type(guide).__name__} at the weights of {', '.join(kept)}, because a "
            "flow starts at random. Use guide='normal', or leave weights out."
        )
    priors = {name for part in program.modules() for name in part.__dict__.get("_pyro_samples", ())}
    if removed := [name for name in found.latent if name.rpartition(".")[2] in priors]:
        warnings.warn(
            f"weights='keep' has no weights to keep for {', '.join(removed)}: Pyro removed them when they became a "
            "PyroSample. To start there, give an AutoGuide with init_loc_fn=init_to_value(values={...}).",
            UserWarning,
            stacklevel=5,
        )


def is_summed_out(site: Site) -> bool:
    """Whether the objective sums over a site of the model, so that a named guide leaves it out."""
    return bool(site["type"] == "sample" and site["infer"].get("enumerate") == "parallel")


def _bind_rows(guide: AutoGuide, program: Program) -> None:
    """Bind the model of a user's AutoGuide to the rows of a batch, if the guide has not run it yet."""
    for part in guide.modules():
        if isinstance(part, AutoGuide) and part.prototype_trace is None:
            part.__dict__["_model"] = (functools.partial(run_bound, program.bound_rows, part.model),)


def check_minibatches(program: Program, found: Structure, full_batch: bool, held: bool = False) -> None:
    """Refuse guides whose per-row parameters would belong to positions in a batch instead of rows.

    An AutoGuide with parameters for every row also forgets the batch size of its first run.

    Args:
        program: The program, with its guide.
        found: Its structure.
        full_batch: Whether every step will see all rows.
        held: Whether the program holds the data, so that its first run had all rows.

    Raises:
        ValueError: If no observed site is in the data plate, or the guide is one joint distribution over the rows of
            a batch, or has parameters for these rows only.
    """
    plate, named = program.data_name, isinstance(program, FunctionProgram) and program.data_name
    if plate not in found.plate_names and (named or not full_batch):
        raise ValueError(
            f"the program has no plate named {plate!r}, so minibatches would be weighted wrongly; its plates are: "
            f"{', '.join(found.plate_names) or 'none'}. Name the plate over rows, or add one."
        )
    if not full_batch and not any(found.sites[name].local for name in found.observed):
        plates = ", ".join(map(repr, found.plate_names)) or "none"
        raise ValueError(
            f"no observed site is inside plate {program.data_name!r}, so minibatches would be weighted wrongly; "
            f"the model's plates: {plates}. Name the data plate (self.data_plate(x), or Program.of(..., "
            "data_plate=...)), or use batch_size=None."
        )
    guide = program.current_guide
    if full_batch or not found.local or not isinstance(guide, AutoGuide):
        return
    sites = ", ".join(found.local)
    for part in guide.modules():
        if isinstance(part, AutoContinuous | autoguide.AutoDiscreteParallel):
            raise ValueError(
                f"guide {type(part).__name__} is one distribution over the latents of all rows ({sites}), which "
                "minibatches cannot fit. Use batch_size=None, or guide='normal'."
            )
        frames = part._prototype_frames if isinstance(part, AutoGuide) else {}
        frame = frames.get(program.data_name)
        if frame is None:
            continue
        if not held and frame.full_size in (None, frame.size):
            raise ValueError(
                f"guide {type(part).__name__} keeps parameters for every row of {sites}, but plate "
                f"{program.data_name!r} has the length of the batch. Write it with the number of all rows, "
                f"pyro.plate({program.data_name!r}, N), or use batch_size=None, or an amortized guide."
            )
        frames[program.data_name] = frame._replace(size=None)


def with_prior_guide(program: Program, sites: Iterable[str] | None = None) -> Program:
    """A copy of the program whose guide draws from the prior, which suffices for a dry run.

    Args:
        program: The program.
        sites: The sites to draw; None for all latent ones that are not summed out.
    """
    twin: Program = copy_with_modules(program)
    twin.attach(functools.partial(_draw_prior, None if sites is None else list(sites), twin.bound_model()))
    return twin


def _draw_prior(sites: list[str] | None, model: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with poutine.block(hide_fn=_is_hidden) if sites is None else poutine.block(expose=sites):
        model(*args, **kwargs)


def _is_hidden(site: Site) -> bool:
    return bool(site["type"] == "sample" and (site["is_observed"] or is_summed_out(site)))
