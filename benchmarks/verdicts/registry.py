"""The registry of labelled cases: `good` and `wrong` register a function that fits a posterior, `CASES` holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from deepprob.posteriors.posterior import Posterior

Label = Literal["good", "wrong"]
Truth = Mapping[str, tuple[Tensor, Tensor]]

MEAN, WIDTH = 0.25, 0.2  # a good posterior is within these of the truth: sds of a mean, relative error of an sd
OFF, UNLIKE = 0.5, 1 / 3  # a wrong one is beyond one of these for some number
NATS, SHARE = 1.0, 0.1  # or it loses this many nats per row, or this share of the gain that is within reach
DRAWS = 8000


@dataclass(frozen=True)
class Nats:
    """How many nats per row a posterior is below a better one.

    Attributes:
        lost: Nats per row below the best that is known.
        gain: How far the best is above a model that ignores inputs and codes.
    """

    lost: float
    gain: float

    @property
    def is_wrong(self) -> bool:
        return self.lost >= NATS or self.lost >= SHARE * self.gain


@dataclass(frozen=True)
class Fitted:
    """A posterior, the data on which a user would check it, and the proof of its label.

    Attributes:
        posterior: The posterior.
        data: Held-out data, the second argument of `deepprob.check`.
        options: Further arguments of `deepprob.check`; a user gives none.
        train: The data of the fit.
        truth: Mean and sd of the exact posterior, by latent site.
        view: From draws by site to the quantities of ``truth``.
        nats: Measures the nats per row that the posterior loses; may take seconds.
    """

    posterior: Posterior
    data: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    train: tuple[Any, ...] = ()
    truth: Truth | None = None
    view: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    nats: Callable[[], Nats] | None = None

    def distances(self) -> tuple[float, float, float] | None:
        """The largest distance of a mean in sds, the smallest and the largest ratio of sds; None without a truth."""
        if self.truth is None:
            return None
        draws = self.view(self.posterior.sample(*self.train, draws=DRAWS, seed=12345))
        means, ratios = [], []
        for name, (mean, sd) in self.truth.items():
            own = draws[name].double().reshape(len(draws[name]), -1)
            mean, sd = mean.double().reshape(-1), sd.double().reshape(-1)
            means.append(((own.mean(0) - mean) / sd).abs())
            ratios.append(own.std(0) / sd)
        return float(torch.cat(means).max()), float(torch.cat(ratios).min()), float(torch.cat(ratios).max())


@dataclass(frozen=True)
class Case:
    """A posterior that is known to be good, or wrong in a known way.

    Attributes:
        generator: The name of the function.
        variant: The arguments of this variant.
        family: The kind of model.
        label: ``"good"`` or ``"wrong"``.
        reason: Why the label holds.
        source: ``"closed form"``, ``"reference draws"`` or ``"constructed"``.
        half: ``"A"``, on which thresholds are tuned, or ``"B"``, which is scored.
        make: Fits the posterior under a seed.
    """

    generator: str
    variant: Mapping[str, Any]
    family: str
    label: Label
    reason: str
    source: str
    half: str
    make: Callable[..., Fitted] = field(repr=False)

    @property
    def name(self) -> str:
        parts = [f"{name} {value}" for name, value in self.variant.items()]
        return ", ".join([self.generator.replace("_", " "), *parts])


CASES: list[Case] = []
Maker = Callable[..., Fitted]


def _register(label: Label, family: str, source: str, reason: str, grid: Mapping[str, tuple[Any, ...]]) -> Any:
    def add(make: Maker) -> Maker:
        variants = [dict(zip(grid, values, strict=True)) for values in zip(*grid.values(), strict=True)] or [{}]
        generator = make.__name__
        before = sum(case.family == family and case.label == label for case in CASES)
        for i, variant in enumerate(variants):
            half = "AB"[(before + i) % 2]
            said = reason.format(**variant)
            CASES.append(Case(generator, variant, family, label, said, source, half, partial(make, **variant)))
        return make

    return add


def good(family: str, source: str, reason: str, **grid: tuple[Any, ...]) -> Any:
    """Register posteriors that are exact or well converged; ``grid`` holds the arguments of the variants, in step.

    The cases of a family take turns in the halves: a generator that is added at the end moves no other case.
    """
    return _register("good", family, source, reason, grid)


def wrong(family: str, source: str, reason: str, **grid: tuple[Any, ...]) -> Any:
    """Register posteriors that are wrong in a known way."""
    return _register("wrong", family, source, reason, grid)
