"""The set-up of AutoGuides, stored so that a saved guide is set up without a run of the model.

On its first run an AutoGuide runs the model, and learns of every latent site its shape, support and plates. These are
stored. To set a guide up again, Pyro runs a stand-in for the model that has the same sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoCallable, AutoDiscreteParallel, AutoGuide, AutoStructured
from pyro.infer.autoguide.gaussian import AutoGaussian
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to, transform_to

from deepprob.programs.names_apart import NamesApart
from deepprob.programs.supports import NotStored, constraint_from_json, constraint_to_json

_DISCRETE = {"Bernoulli": dist.Bernoulli, "Categorical": dist.Categorical, "OneHotCategorical": dist.OneHotCategorical}


def prototypes_to_json(program: nn.Module, row_plate: str) -> tuple[dict[str, Any], list[str]]:
    """What the AutoGuides of a program learned on their first run.

    Args:
        program: The program.
        row_plate: The plate of rows.

    Returns:
        The set-up of each guide as JSON, by the guide's path; and the paths of the guides that cannot be stored.
    """
    found, left = {}, []
    for path, guide in program.named_modules():
        if isinstance(guide, AutoGuide) and guide.prototype_trace is not None:
            try:
                found[path] = _to_json(guide, row_plate)
            except NotStored:
                left.append(path)
    return found, left


def has_new_guide(program: nn.Module) -> bool:
    """Whether an AutoGuide of the program has not met data yet."""
    guides = (part for part in program.modules() if isinstance(part, AutoGuide) and not isinstance(part, AutoCallable))
    return any(guide.prototype_trace is None for guide in guides)


def set_up(program: nn.Module, saved: Mapping[str, Any], device: torch.device) -> None:
    """Set up the AutoGuides of a program as they were when `prototypes_to_json` described them."""
    for path, entry in saved.items():
        guide: Any = program.get_submodule(path)
        names = {site: name for site, name in entry["names"]}
        if isinstance(guide, NamesApart):
            guide.names.kept, guide.names.sites = names, {name: site for site, name in names.items()}
        if isinstance(guide, AutoStructured) and not isinstance(guide.dependencies, dict):
            kind = guide.dependencies
            guide.dependencies = {down: dict.fromkeys(ups, kind) for down, ups in entry["dependencies"]}
        if entry.get("rank"):
            guide.rank = entry["rank"]
        with _running(guide, _stand_in(entry["sites"], device)):
            guide._setup_prototype()
            if isinstance(guide, AutoContinuous):
                guide.get_posterior()  # a flow makes its layers here
        for plate in entry["open_plates"]:
            guide._prototype_frames[plate] = guide._prototype_frames[plate]._replace(size=None)


def _to_json(guide: Any, row_plate: str) -> dict[str, Any]:
    own = not type(guide)._setup_prototype.__module__.startswith("pyro.")
    if own or isinstance(guide, AutoGaussian):
        raise NotStored(f"the set-up of {type(guide).__name__} cannot be stored")
    nodes = guide.prototype_trace.nodes
    if isinstance(guide, AutoStructured):  # which clears its trace
        kept = dict(guide._sorted_sites)
        sites = [_structured(guide, kept[name], row_plate) for name in nodes if name in kept]
    else:
        sites = [_site(s, s["value"], s["fn"], row_plate) for _, s in guide.prototype_trace.iter_stochastic_nodes()]
    if isinstance(guide, AutoDiscreteParallel):
        drawn = {site["name"]: [kind.__name__, list(specs[0][1].shape)] for site, kind, specs in guide._discrete_sites}
        sites = [site | {"discrete": drawn[site["name"]]} for site in sites]
    edges: Any = guide.dependencies if isinstance(guide, AutoStructured) else {}
    return {
        "sites": sites,
        "open_plates": [name for name, frame in guide._prototype_frames.items() if frame.size is None],
        "names": [[site, name] for site, name in guide.names.kept.items()] if isinstance(guide, NamesApart) else [],
        "rank": getattr(guide, "rank", None),
        "dependencies": [[down, list(ups)] for down, ups in edges.items()],
    }


def _site(site: Any, value: Tensor, fn: Any, row_plate: str) -> dict[str, Any]:
    frames = site["cond_indep_stack"]
    return {
        "name": site["name"],
        "shape": list(value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
        "event_dim": fn.event_dim,
        "support": constraint_to_json(fn.support, per_row=any(frame.name == row_plate for frame in frames)),
        "frames": [[f.name, f.dim, f.size, f.counter, f.full_size] for f in frames],
    }


def _structured(guide: Any, site: Any, row_plate: str) -> dict[str, Any]:
    name, fn = site["name"], site["fn"]
    free = (*guide._batch_shapes[name], *guide._unconstrained_event_shapes[name])
    loc = guide.locs
    for part in name.split("."):
        loc = getattr(loc, part)
    like = loc.detach().reshape(free)
    return _site(site, torch.empty(biject_to(fn.support).forward_shape(free), dtype=like.dtype), fn, row_plate)


class _StandIn(TorchDistribution):
    """A distribution with a shape and a support, and nothing else."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  as in torch

    def __init__(self, value: Tensor, support: Any, event_dim: int) -> None:
        split = value.dim() - event_dim
        self.value, self._support = value, support
        super().__init__(value.shape[:split], value.shape[split:], validate_args=False)

    @property
    def support(self) -> Any:
        return self._support

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.value


class _Frames(Messenger):
    """Puts sites into plates that are not there."""

    def __init__(self, frames: Mapping[str, Any]) -> None:
        super().__init__()
        self.frames = frames

    def _pyro_sample(self, msg: Any) -> None:
        msg["cond_indep_stack"] = self.frames[msg["name"]]


def _stand_in(sites: list[dict[str, Any]], device: torch.device) -> Callable[[], None]:
    frames = {s["name"]: tuple(CondIndepStackFrame(*frame) for frame in s["frames"]) for s in sites}

    def model() -> None:
        with _Frames(frames):
            for site in sites:
                pyro.sample(site["name"], _distribution(site, device))

    return model


def _distribution(site: Mapping[str, Any], device: torch.device) -> Any:
    if drawn := site.get("discrete"):
        kind, shape = drawn
        return _DISCRETE[kind](torch.full(shape, 1.0 if kind == "Bernoulli" else 1.0 / shape[-1], device=device) * 0.5)
    support, shape, dtype = (
        constraint_from_json(site["support"]),
        torch.Size(site["shape"]),
        getattr(torch, site["dtype"]),
    )
    if support.is_discrete:
        return _StandIn(torch.zeros(shape, dtype=dtype, device=device), support, site["event_dim"])
    with torch.device(device):
        transform = transform_to(_on(support, device))
        value = transform(torch.zeros(transform.inverse_shape(shape), dtype=dtype))
    return _StandIn(value.expand(shape).clone(), _on(support, device), site["event_dim"])


def _on(support: Any, device: torch.device) -> Any:
    """A constraint with its bounds on a device."""
    for name, value in vars(support).items():
        if isinstance(value, Tensor):
            setattr(support, name, value.to(device))
    if hasattr(support, "base_constraint"):
        _on(support.base_constraint, device)
    return support


@contextmanager
def _running(guide: Any, model: Callable[[], None]) -> Any:
    """A context in which a guide runs another model."""
    kept, guide.__dict__["_model"] = guide.__dict__["_model"], (model,)
    try:
        yield
    finally:
        guide.__dict__["_model"] = kept
