"""The pictures of a report: those of the fit and of its latent sites, and all that apply to a case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np

from deepprob.diagnostics import prediction_pictures, row_pictures
from deepprob.diagnostics.case import REFUSALS, Case
from deepprob.diagnostics.check import array
from deepprob.diagnostics.checks.collapse import active_dimensions, code_draws
from deepprob.diagnostics.figures import entries, forest
from deepprob.diagnostics.metrics import MOST_LATENTS, latent_draws
from deepprob.diagnostics.picture import Picture, drawn
from deepprob.diagnostics.plots import kl_bars, latent_scatter, training_curve

Maker = Callable[[Case], Iterator[Picture]]
_MOST_SITES = 4  # observed sites with pictures of their own


def pictures(case: Case) -> list[Picture]:
    """All pictures that apply to a posterior and its data, the predictions first."""
    found: list[Picture] = []
    cases = [each for each in case.by_site()[:_MOST_SITES] if each.sites]
    for each in cases:
        made = _made([*row_pictures.MAKERS, *prediction_pictures.MAKERS], each)
        found += made if len(cases) == 1 else [_named(picture, each.site) for picture in made]
    return found + _made([_latents, _latent_space, _training], case)


def _made(makers: list[Maker], case: Case) -> list[Picture]:
    found: list[Picture] = []
    for make in makers:
        with suppress(*REFUSALS):  # the check of the same name tells the reason
            found += make(case)
    return found


def _named(picture: Picture, site: str) -> Picture:
    return replace(picture, name=f"{picture.name}-{site}", title=f"{picture.title}: {site}")


def _training(case: Case) -> Iterator[Picture]:
    history = case.posterior.history
    if not len(history.steps.get("elbo", ())):
        return
    elbo, (name, held) = history.steps["elbo"], history.held_out
    figure = training_curve(elbo, held, steps_per_epoch=history.steps_per_epoch, held_out_name=name)
    last = f"{np.nanmean(array(elbo)[-history.steps_per_epoch :]):.4g}"
    yield Picture(
        "training",
        "ELBO during training",
        "The curve should level off. A held-out score that falls while the training ELBO rises means overfitting.",
        f"Line plot of the ELBO per datum over {len(elbo)} steps, ending near {last} nats.",
        drawn(figure),
    )


def _latents(case: Case) -> Iterator[Picture]:
    draws = latent_draws(case)
    numbers = dict(entries(draws))
    if not 1 <= len(numbers) <= MOST_LATENTS:
        return
    yield Picture(
        "latents",
        "Posterior of the latent sites",
        "Each line is one number: a dot at its mean, its 50% interval thick and its 90% interval thin.",
        f"Forest plot of {len(numbers)} numbers: {', '.join(draws)}.",
        drawn(forest(numbers), height=0.21 * len(numbers) + 1.0),
    )


def _latent_space(case: Case) -> Iterator[Picture]:
    if not active_dimensions.applies(case):
        return
    draws, kl = code_draws(case)
    name, labels = case.sample_labels or ("", None)
    yield Picture(
        "codes",
        "Latent space",
        "Each point is the posterior mean of one row's code" + (f", colored by {name}." if name else "."),
        f"Scatter plot of the codes of {draws.shape[1]} rows: {draws.shape[2]} latent dimensions, shown in two.",
        drawn(latent_scatter(draws.mean(0), labels)),
    )
    if kl is not None:
        yield Picture(
            "information",
            "KL of each latent dimension",
            "A dimension with a KL near zero is not used: its posterior is the prior.",
            f"Bar chart of the KL of {len(kl)} latent dimensions, {kl.sum():.3g} nats in total.",
            drawn(kl_bars(kl)),
        )
