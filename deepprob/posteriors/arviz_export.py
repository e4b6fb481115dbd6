"""A posterior as an ArviZ container."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepprob.posteriors.arviz_compat import combined, from_dict
from deepprob.posteriors.densities import joint_weights, log_likelihood, site_by_row
from deepprob.posteriors.draw_chunks import DrawArray, draw_chunks
from deepprob.posteriors.export_labels import Labels
from deepprob.posteriors.fitted import FittedProgram
from deepprob.programs.arguments import Arguments
from deepprob.programs.minibatch import Batch, num_rows
from deepprob.programs.sites import Site, drawn_sites, is_factor, observed_sites, sample_sites
from deepprob.programs.support import likelihood_sites

GROUPS = (
    *("posterior", "posterior_predictive", "prior", "prior_predictive"),
    *("log_likelihood", "sample_stats", "observed_data", "constant_data"),
)
# A model may refuse to run without the values that it observes, in its own words.
_REFUSALS = (ValueError, RuntimeError, TypeError, IndexError, AttributeError, NotImplementedError)
_RESERVED = ("chain", "draw")


def latents_to_arviz(fitted: FittedProgram, latents: Mapping[str, Tensor], attrs: Mapping[str, Any]) -> Any:
    """Draws of latent sites as a container with one group, ``posterior``.

    Args:
        fitted: The fitted program.
        latents: Draws by site, shape ``(K, *site)``.
        attrs: Attributes of the group.
    """
    values = {name: _by_chain(fitted, value.detach().cpu().numpy()) for name, value in latents.items()}
    return from_dict({"posterior": values}, attrs=attrs)


def to_arviz(
    fitted: FittedProgram, batch: Batch, draws: int, seed: int, labels: Labels, attrs: Mapping[str, Any]
) -> Any:
    """The posterior and its predictions for some rows, as a container.

    The draws are made in parts that fit in memory, and large arrays lie in temporary files.

    Args:
        fitted: The fitted program.
        batch: The program's arguments, including the observed ones.
        draws: Number of draws, K.
        seed: Random seed of the draws.
        labels: Labels of rows and columns.
        attrs: Attributes of the posterior's group.
    """
    export = _Export(draws)
    for part, count, own_seed in draw_chunks(fitted, batch, draws, seed):
        export.add_posterior(part, batch, count, own_seed)
        export.add_prior(part, batch, count, own_seed)
    for name, value in _inputs(fitted, batch, export.observed):
        plate = fitted.structure.row_plate
        has_rows = plate and value.ndim and len(value) == num_rows(batch)
        columns = (f"{name}_column",) if value.ndim == 2 and name in labels.columns else ()
        export.data["constant_data", name] = value
        export.axes["constant_data", name] = (plate if has_rows else "", *columns)
    coords = {f"{name}_column": columns for name, columns in labels.columns.items()}
    return export.container(fitted, coords | {fitted.structure.row_plate: labels.rows}, attrs)


class _Export:
    """Values by group and variable, with the names of their axes.

    Args:
        draws: Number of draws, K.
    """

    def __init__(self, draws: int) -> None:
        self.draws, self.has_prior = draws, True
        self.drawn: dict[tuple[str, str], DrawArray] = {}
        self.data: dict[tuple[str, str], NDArray[Any]] = {}
        self.axes: dict[tuple[str, str], tuple[str, ...]] = {}
        self.observed: list[Tensor] = []

    def add_posterior(self, part: FittedProgram, batch: Batch, count: int, seed: int) -> None:
        """Add some draws from the posterior, and all that follows from them."""
        layout, structure = part.layout(count), part.structure
        with part.querying(seed):
            guide_trace, model_trace = part.run(batch, count)
        for name in structure.latent:
            self._add_site("posterior", guide_trace.nodes[name], part, count)
        for name in structure.summed + structure.computed:
            self._add_site("posterior", model_trace.nodes[name], part, count)
        seen = observed_sites(model_trace)
        self.observed = [layout.draws_first(site)[0] for site in seen.values()]
        for (name, site), value in zip(seen.items(), self.observed, strict=True):
            self.data["observed_data", name] = value.cpu().numpy()
            self.axes["observed_data", name] = layout.plates_of(site)
        if not structure.undrawable:
            with part.querying(seed):
                _, predicted = part.run(batch, count, predict=True)
            for name in seen:
                self._add_site("posterior_predictive", predicted.nodes[name], part, count)
        with part.querying(seed):
            for name, plate, value in _likelihoods(part, batch, count, model_trace):
                self._add("log_likelihood", name, value, (plate,))
        if structure.latent:
            with part.querying(seed):
                weights = joint_weights(part, part.prepared(batch, count, weighted=True))
            log_q = sum((layout.total(s) for s in drawn_sites(guide_trace).values()), torch.zeros_like(weights))
            self._add("sample_stats", "lp", weights + log_q)
            if part.chains is None:
                self._add("sample_stats", "log_q", log_q)

    def add_prior(self, part: FittedProgram, batch: Batch, count: int, seed: int) -> None:
        """Add some draws of the model alone, if it can be run without the values that it observes."""
        if part.structure.undrawable or not self.has_prior:
            return
        try:
            with part.querying(seed):
                trace = part.run_prior(batch, part.instance.num_data, count)
        except _REFUSALS as error:
            self.has_prior = False
            reason = (str(error).splitlines() or [type(error).__name__])[0].removesuffix(".")
            warnings.warn(f"to_arviz leaves out the prior: the model does not run alone ({reason}).", stacklevel=4)
            return
        for name, site in sample_sites(trace):
            if not is_factor(site):
                group = "prior_predictive" if name in part.structure.observed else "prior"
                self._add_site(group, site, part, count)

    def container(self, fitted: FittedProgram, coords: Mapping[str, Sequence[Any]], attrs: Mapping[str, Any]) -> Any:
        """All groups as one container of ArviZ."""
        values = {key: _by_chain(fitted, found.finish()) for key, found in self.drawn.items()} | self.data
        variables = {name for _, name in values}
        sizes: dict[str, int] = {}
        parts = []
        for group in GROUPS:
            found = {name: value for (own, name), value in values.items() if own == group}
            dims = {}
            for name, value in found.items():
                shape = value.shape[2 if (group, name) in self.drawn else 0 :]
                dims[name] = _dims(name, shape, self.axes[group, name], sizes, variables)
            labels = {dim: coords[dim] for dim, size in sizes.items() if len(coords.get(dim, ())) == size}
            if found:
                parts.append(from_dict({group: found}, dims=dims, coords=labels, attrs=attrs))
        return combined(parts)

    def _add_site(self, group: str, site: Site, part: FittedProgram, count: int) -> None:
        layout = part.layout(count)
        self._add(group, site["name"], layout.draws_first(site), layout.plates_of(site))

    def _add(self, group: str, name: str, values: Tensor, axes: tuple[str, ...] = ()) -> None:
        key = group, name
        self.axes[key] = axes
        self.drawn.setdefault(key, DrawArray(self.draws)).add(values)


def _dims(
    name: str, shape: Sequence[int], axes: Sequence[str], sizes: dict[str, int], variables: set[str]
) -> list[str]:
    """A name for every axis: that of its plate, if the axis has the plate's size."""
    found = []
    for i, size in enumerate(shape):
        dim = axes[i] if i < len(axes) else ""
        if dim in variables or dim in _RESERVED:  # xarray keeps these names for coordinates
            dim = f"{dim}_dim"
        if not dim or dim in found or sizes.setdefault(dim, size) != size:
            dim = f"{name}_dim_{i}"
        found.append(dim)
    return found


def _likelihoods(part: FittedProgram, batch: Batch, count: int, trace: Any) -> Iterator[tuple[str, str, Tensor]]:
    """The log-likelihoods ``(K, B)`` by observed site, with the plates over their rows."""
    layout, structure = part.layout(count), part.structure
    if structure.summed_across_rows:
        return
    seen = observed_sites(trace)
    if structure.summed:  # summed-out sites couple the observed ones, so only their joint likelihood exists
        yield "+".join(seen), structure.row_plate, log_likelihood(part, batch, count)
        return
    for name, site in (seen or likelihood_sites(trace, layout.plate)).items():
        info = structure.sites[name]
        yield name, structure.row_plate if info.local else info.row_plate, site_by_row(layout, structure, site)


def _inputs(fitted: FittedProgram, batch: Batch, observed: Sequence[Tensor]) -> Iterator[tuple[str, NDArray[Any]]]:
    """The arguments of a program that are not observed, by name."""
    parameters = fitted.program._signature().parameters
    names, whole = argument_names(fitted, batch), {}
    if isinstance(batch, Arguments):
        given = [*zip(parameters, batch.call.args, strict=False), *batch.call.kwargs.items()]
        whole = {name: value for name, value in given if isinstance(value, Tensor | int | float)}
    rest = {n: x for n, x in zip(names, batch, strict=False) if not any(_equal(x, y) for y in observed)}
    if len(batch) - len(rest) < len(observed):  # data that the program changes, such as standardized ones
        rest = {n: x for n, x in rest.items() if n not in parameters or parameters[n].default is not None}
    for name, value in (rest | whole).items():
        yield name, value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def argument_names(fitted: FittedProgram, batch: Batch) -> Sequence[str]:
    """A name for every tensor of a batch."""
    return batch.call.names if isinstance(batch, Arguments) else fitted.program.argument_names


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.numel() != b.numel():
        return False
    return bool(torch.isclose(a.flatten().to(b), b.flatten(), rtol=0, atol=0, equal_nan=True).all())


def _by_chain(fitted: FittedProgram, values: NDArray[Any]) -> NDArray[Any]:
    chains = 1 if fitted.chains is None else next(iter(fitted.chains.values())).shape[0]
    return values.reshape(chains, -1, *values.shape[1:])
