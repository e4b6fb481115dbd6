"""`plot`: the picture that fits a posterior, an encoding, a prediction or the record of a fit."""

from __future__ import annotations

import functools
import itertools
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from deepprob.diagnostics import figures, plots
from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import array
from deepprob.diagnostics.style import panels
from deepprob.errors import unknown
from deepprob.posteriors.encoding import Encoding, local_summed
from deepprob.posteriors.history import History
from deepprob.posteriors.posterior import Posterior
from deepprob.posteriors.prediction import Prediction

_ROWS = 40  # most rows that are shown one by one
_COLUMNS = 6  # most panels of a prediction
_DENSITIES = 12  # most panels of densities; more numbers are a forest
_FOREST = 30  # most lines of a forest
_MOST_NUMBERS = 20_000_000  # in the draws of all global sites
_OPTIONS: Any = {
    Posterior: ("data", "labels", "site"),
    Prediction: ("observed", "inputs"),
    Encoding: ("labels", "site"),
    History: (),
}


def plot(
    subject: Posterior | Prediction | Encoding | History,
    *data: Any,
    observed: Any = None,
    inputs: Any = None,
    labels: Any = None,
    site: str | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Figure:
    """The picture that fits a posterior, a prediction, an encoding or the record of a fit.

    ==================================================  ===============================================================
    subject                                             picture
    ==================================================  ===============================================================
    a posterior                                         densities of its global latent sites; of more than twelve
                                                        numbers a forest of the largest
    a posterior and data, local latents                 the latent space: posterior means of the rows; of one number
                                                        intervals row by row, of a class bars of probabilities
    a posterior and data, a target given inputs         the prediction of the target, as below
    an encoding                                         the latent space
    a prediction of real values or counts               means and intervals row by row; with ``observed`` predicted
                                                        against observed; with one column of ``inputs`` a band
    a prediction of classes, of a binary value          bars of probabilities
    a prediction of images or sequences                 mean images
    ``posterior.history``                               the bound by step
    ==================================================  ===============================================================

    Args:
        subject: What to plot.
        data: With a posterior, the program's arguments.
        observed: With a prediction, the observed values, shape ``(B, ...)``.
        inputs: With a prediction, the inputs, shape ``(B,)`` or ``(B, D)``.
        labels: With latent sites, values for the colors, shape ``(B,)``; by default a field of the data that the
            program does not take.
        site: The latent site, if there are several.
        draws: Number of draws from a posterior.
        seed: Random seed of the draws.

    Returns:
        A matplotlib figure: notebooks show it, ``figure.savefig("name.png")`` writes it.

    Raises:
        TypeError: If there is no picture of the subject, or it does not use one of the options.
        ValueError: If the posterior has only local latents and no data are given, a site is unknown or has to be
            chosen, or the history has no bound.

    Examples:
        A figure is returned, not shown:

        >>> import torch, pyro.distributions as dist
        >>> from deepprob.posteriors import Prediction
        >>> d = dist.Normal(torch.randn(50, 8), 1.0)
        >>> plot(Prediction(d, d.sample()), observed=torch.zeros(8)).axes[0].get_ylabel()
        'predicted, with 90% interval'
    """
    _check(subject, {"data": data or None, "observed": observed, "inputs": inputs, "labels": labels, "site": site})
    if isinstance(subject, History):
        return _history(subject)
    if isinstance(subject, Prediction):
        return _prediction(subject, observed, inputs)
    if isinstance(subject, Encoding):
        return _codes(subject, labels, site, ())
    structure, held = subject.structure, not subject.instance.inputs  # whether the program holds its data
    local = structure.local + local_summed(structure)
    if local and (data or held):
        return _codes(
            subject.encode(*data, seed=seed), _labels(data, subject) if labels is None else labels, site, local
        )
    if data:
        target = Case(subject, data[0] if len(data) == 1 else data, draws=draws, seed=seed).by_site()[0]
        if target.supervised:
            seen = target.target if target.mask is None else np.where(target.mask, target.target, np.nan)
            return _prediction(target.prediction, seen, target.predictors[0] if len(target.predictors) == 1 else None)
    return _globals(subject, site, draws, seed)


def _check(subject: Any, options: Mapping[str, Any]) -> None:
    """Refuse a subject without a picture, and options that its picture does not use."""
    known = next((names for kind, names in _OPTIONS.items() if isinstance(subject, kind)), None)
    if known is None:
        raise TypeError(
            f"plot shows a posterior, a prediction, an encoding or a history; got {type(subject).__name__}. "
            "Plots of arrays are in dp.plots."
        )
    for name, value in options.items():
        if value is not None and name not in known:
            takes = f"It takes {', '.join(known)}" if known else "It takes no options"
            raise TypeError(f"the picture of a {type(subject).__name__} does not use {name}. {takes}.")


def _labels(data: tuple[Any, ...], posterior: Posterior) -> Any:
    """A field of the data that the program does not take."""
    found = Case(posterior, data[0], max_rows=sys.maxsize).labels if len(data) == 1 else None
    return None if found is None else found[1]


def _moved(name: str) -> Any:
    """A plot of arrays by its old name, ``dp.plot.<name>``, until version 0.3."""
    function = getattr(plots, name)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        warnings.warn(f"dp.plot.{name} is now dp.plots.{name}.", DeprecationWarning, stacklevel=2)
        return function(*args, **kwargs)

    return call


for _name in ("image_rows", "kl_bars", "latent_scatter", "predicted_against_observed", "predictive_band", "reliability",
              "render", "training_curve"):  # fmt: skip
    setattr(plot, _name, _moved(_name))


def _history(history: History) -> Figure:
    if not (elbo := history.steps.get("elbo", ())):
        raise ValueError("this history has no elbo: the posterior was not fitted step by step. Plot the posterior.")
    name, held = history.held_out
    return plots.training_curve(elbo, held, steps_per_epoch=history.steps_per_epoch, held_out_name=name)


# Latent sites --------------------------------------------------------------------------------------------------------


def _globals(posterior: Posterior, site: str | None, draws: int, seed: int) -> Figure:
    names = [name for name, kind in posterior.latent_sites.items() if kind == "global"]
    if not names:
        local = posterior.structure.local + local_summed(posterior.structure)
        raise ValueError(
            "every latent site is local, one value a row. Give the rows: dp.plot(posterior, *data)."
            if local
            else "the posterior has draws of no latent site. Plot a prediction: dp.plot(posterior.predict(*data))."
        )
    if site is not None and site not in names:
        raise unknown("global latent site", site, names)
    names = [site] if site else names
    count = sum(x[0].numel() for name, x in posterior.sample(draws=1, seed=seed).items() if name in names)
    draws = min(draws, max(50, _MOST_NUMBERS // max(count, 1)))
    found = {name: x for name, x in posterior.sample(draws=draws, seed=seed).items() if name in names}
    if count <= _DENSITIES:
        return figures.densities(dict(figures.entries(found)))
    size = np.sort(np.concatenate([np.abs(array(x.mean(0, dtype=torch.float64))).ravel() for x in found.values()]))
    largest = dict(itertools.islice(figures.entries(found, float(size[-_FOREST:].min())), _FOREST))
    label = "value" if count <= _FOREST else f"value of the {_FOREST} largest of {count:,} numbers"
    return figures.forest(largest, label)


def _codes(encoding: Encoding, labels: Any, site: str | None, local: tuple[str, ...]) -> Figure:
    mean: Any = encoding.mean
    sd: Any = encoding.sd
    if isinstance(mean, dict):
        if site not in mean:
            hint = f"several latent sites are local ({', '.join(mean)}). Choose one with site='...'."
            raise ValueError(hint) if site is None else unknown("local latent site", site, mean)
        mean, sd = mean[site], sd[site]
    elif site is None and local:
        site = local[0]
    if encoding.classes and site in (None, *encoding.classes) and mean.dim() == 2:
        return _first_rows(figures.class_bars(array(mean)[:_ROWS]), "x", len(mean))
    centres = array(mean).reshape(len(mean), -1)
    if centres.shape[1] > 1:
        return plots.latent_scatter(centres, labels)
    middle, spread = centres[:, 0], array(sd).reshape(-1)
    if labels is None:
        inner, outer = ((middle - n * spread, middle + n * spread) for n in (1, 2))
        figure = figures.intervals_by_row(middle, inner, outer, names=("mean ± sd", "mean ± 2 sd"))
        figures.legend_above(figure)
    else:
        figure = plots.latent_scatter(np.stack([np.arange(len(middle)), middle], 1), labels)
        figure.axes[0].set_xlabel("row")
    figure.axes[0].set_ylabel(site or "latent value")
    return figure


# Predictions ---------------------------------------------------------------------------------------------------------


def _prediction(p: Prediction, observed: Any, inputs: Any) -> Figure:
    truth = None if observed is None else array(observed)
    if p.draws.dim() == 1:  # one value, without rows
        return figures.densities({p.site: array(p.draws)})
    shape = p.draws.shape[2:]
    if len(shape) in (2, 3):
        rows = {"mean": array(p.mean if p.kind != "classes" else p.probs.argmax(-1))}
        return plots.image_rows(rows if truth is None else {"observed": truth, **rows})
    if p.kind in ("classes", "binary"):
        return _classes(p, truth)
    columns = int(np.prod(shape))
    mean, half, most = array(p.mean), p.interval(0.5), p.interval(0.9)
    x = None if inputs is None else array(inputs)
    if columns == 1 and x is not None and x.size == len(x):
        figure = plots.predictive_band(x, truth, mean, half, most)
        figure.axes[0].set_ylabel(p.site)
        return figure
    single = columns == 1
    size = {"width": 5.6, "height": 3.7} if single else {"width": 3.6, "height": 3.0}
    figure, axes = panels(min(columns, _COLUMNS), columns=2 if columns in (2, 4) else 3, **size)
    for column, place in enumerate(axes):
        parts = (array(v).reshape(len(mean), -1)[:, column] for v in (mean, *half, *most))
        middle, *ends = parts
        seen = None if truth is None else truth.reshape(len(mean), -1)[:, column]
        place.set_title("" if single else f"{p.site}[{column}]", fontsize=10)
        if seen is not None:
            plots.predicted_against_observed(seen, middle, *ends[2:], axes=place)
            continue
        a, b, c, d = (end[:_ROWS] for end in ends)
        figures.intervals_by_row(middle[:_ROWS], (a, b), (c, d), axes=place)
        place.set_ylabel(p.site if single else "")
    if truth is not None:
        return figure
    figures.legend_above(figure)
    return _first_rows(figure, "x", len(mean))


def _classes(p: Prediction, truth: Any) -> Figure:
    probs = array(p.probs)
    if p.kind == "binary" and p.mean.dim() > 1 and p.mean.shape[1] > 1:
        return _first_rows(figures.heat(probs[:_ROWS], f"probability that {p.site} is 1", 1.0), "y", len(probs))
    if p.kind == "classes" and probs.ndim > 2:
        figure = figures.heat(array(p.probs.argmax(-1))[:_ROWS], f"most likely class of {p.site}", probs.shape[-1] - 1)
        return _first_rows(figure, "y", len(probs))
    shares = probs if p.kind == "classes" else np.stack([1 - probs.reshape(-1), probs.reshape(-1)], 1)
    return _first_rows(figures.class_bars(shares[:_ROWS], None if truth is None else truth[:_ROWS]), "x", len(shares))


def _first_rows(figure: Figure, axis: str, rows: int) -> Figure:
    """Say on an axis of rows that it shows some of them."""
    for axes in figure.axes[:_COLUMNS] if rows > _ROWS else ():
        if axes.get_label() != "<colorbar>":
            getattr(axes, f"set_{axis}label")(f"row, the first {_ROWS} of {rows}")
    return figure
