"""How far a guide, or draws, are from the posterior given the training data, as a posterior keeps and saves it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepprob.engine.accuracy import (
    Accuracy,
    Array,
    accuracy_by_gradients,
    accuracy_by_number,
    accuracy_by_weights,
    divergence_by_gradients,
)
from deepprob.posteriors.arviz_compat import ess
from deepprob.posteriors.fitted import FittedProgram
from deepprob.posteriors.guide_draws import GuideDraws, guide_draws
from deepprob.posteriors.label_switching import Switching, label_switching
from deepprob.posteriors.other_modes import POINTS, OtherMode, density_to_search, other_mode
from deepprob.posteriors.wide_draws import wide_draws
from deepprob.programs.minibatch import Batch

DRAWS = 1000
_DRAWS_PER_NUMBER = 3  # that tell their covariance
_FEW = 40
_FEWEST_OF_A_CHAIN = 4  # draws that tell an effective size; in a shorter chain, a chain counts as one draw
_MOST_CHAINS = 20  # numbers of a site whose effective draws are counted
_MOST_TOGETHER = 1000  # numbers of a divergence, spread evenly over more
_MOST_NUMBERS = 2**23  # coordinates times draws

_Judge = Callable[[Array, Array], Accuracy]


@dataclass(frozen=True, eq=False)
class GuideAccuracy:
    """How far a guide is from the posterior given the training data; or draws, which have equal weights.

    Attributes:
        log_weights: ``log p(z, x) - log q(z)`` of all rows together, in nats, shape ``(K,)``; zeros for stored draws.
        by_gradients: By latent site, from the gradients of the log-density, an `Accuracy` of every number as an array
            ``(4, n)``, in unconstrained coordinates.
        by_weights: The same from importance weights, of the sites that are judged together.
        by_wide_weights: The same from importance weights of draws that reach further than the guide, of few numbers.
        wide_log_weights: The log-weights of these draws, shape ``(S,)``.
        together: The sites whose numbers are judged together. The others are judged number by number, given the rest:
            the weights of a network with hidden units, of which many values make the same function, and what would be
            more numbers than the draws can tell.
        divergence: The divergence from guide to posterior in nats for every number, and its standard error, from the
            gradients, of more numbers than the draws can tell together; None for fewer, and for a network.
        points: Latent sites of which the guide is a point estimate.
        switching: Entries that can change places without changing the posterior; None if there are none.
        searched: Whether other modes were searched for.
        other: The mode with the most mass that the guide does not cover, if one was found.
        why: The reason why there are no gradients.
    """

    log_weights: Tensor
    by_gradients: Mapping[str, Tensor]
    by_weights: Mapping[str, Tensor] = field(default_factory=dict)
    by_wide_weights: Mapping[str, Tensor] = field(default_factory=dict)
    wide_log_weights: Tensor | None = None
    together: tuple[str, ...] = ()
    divergence: tuple[float, float] | None = None
    points: tuple[str, ...] = ()
    switching: Switching | None = None
    searched: bool = False
    other: OtherMode | None = None
    why: str = ""

    @property
    def numbers(self) -> int:
        """How many numbers a draw has."""
        return sum(x.shape[1] for x in self.by_gradients.values())

    def to_tensors(self) -> dict[str, Tensor]:
        """The arrays, to save."""
        kinds = {"gradients": self.by_gradients, "weights": self.by_weights, "wide": self.by_wide_weights}
        named = {f"{kind}.{site}": x for kind, found in kinds.items() for site, x in found.items()}
        wide = {} if self.wide_log_weights is None else {"wide_log_weights": self.wide_log_weights}
        return {"log_weights": self.log_weights, **wide, **named}

    def facts(self) -> dict[str, Any]:
        """The rest, as JSON."""
        switching = None if self.switching is None else [list(self.switching.sites), self.switching.labels]
        return {
            "together": list(self.together),
            "divergence": None if self.divergence is None else list(self.divergence),
            "points": list(self.points),
            "switching": switching,
            "searched": self.searched,
            "other": None if self.other is None else list(self.other),
            "why": self.why,
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> GuideAccuracy:
        """The inverse of `to_tensors` and `facts`."""
        kinds: dict[str, dict[str, Tensor]] = {"gradients": {}, "weights": {}, "wide": {}}
        for key, x in tensors.items():
            kind, _, site = key.partition(".")
            if site:
                kinds[kind][site] = x
        return cls(
            tensors["log_weights"],
            kinds["gradients"],
            kinds["weights"],
            kinds["wide"],
            tensors.get("wide_log_weights"),
            together=tuple(facts["together"]),
            divergence=tuple(facts["divergence"]) if facts.get("divergence") else None,
            points=tuple(facts["points"]),
            switching=facts["switching"] and Switching(tuple(facts["switching"][0]), facts["switching"][1]),
            searched=facts["searched"],
            other=facts["other"] and OtherMode(*facts["other"]),
            why=facts["why"],
        )


def guide_accuracy(fitted: FittedProgram, batch: Batch, *, seed: int = 0, seconds: float) -> GuideAccuracy | None:
    """Judge a guide, or stored draws, on the training data.

    Args:
        fitted: The program of a posterior.
        batch: The training data, accepted.
        seed: Random seed of the draws.
        seconds: About the most processor time to spend, so that other work on the machine does not matter; it decides
            how many draws are taken, of 1000, 300, 100 and 40.

    Returns:
        None if 40 draws would take longer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that draws run one by one is told where the user asks for draws
        guide_draws(fitted, batch, 2, seed)  # chooses how draws are run
        found = None
        for few, draws in ((2, _FEW), (_FEW, DRAWS)):
            began = time.thread_time()
            sample = guide_draws(fitted, batch, few, seed)
            each = (time.thread_time() - began) / few
            numbers = sum(x.shape[-1] for x in sample.values.values())
            affordable = min(draws, int(seconds / each), _MOST_NUMBERS // max(numbers, 1), fitted.num_stored or draws)
            if affordable < _FEW:
                break
            found = guide_draws(fitted, batch, _round(affordable), seed)
        return None if found is None else judged(fitted, batch, found, seed)


def _round(draws: int) -> int:
    """A number of draws that depends little on the speed of the machine."""
    return max(k for k in (_FEW, 100, 300, DRAWS) if k <= draws)


def judged(fitted: FittedProgram, batch: Batch, draws: GuideDraws, seed: int) -> GuideAccuracy:
    """The accuracy of a guide, or of stored draws, from draws given the training data.

    Args:
        fitted: The program.
        batch: The training data, accepted.
        draws: The draws.
        seed: Random seed.
    """
    drawn = {n for n in fitted.structure.latent if not fitted.structure.sites[n].discrete}
    points = tuple(sorted(drawn - draws.values.keys()))
    weights = draws.log_weights.double()
    if fitted.chains is not None:
        weights = torch.zeros_like(weights)
    if not draws.values:
        return GuideAccuracy(weights, {}, points=points, why=draws.why)
    names = _outside_networks(draws.values)
    together = names if len(weights) >= _DRAWS_PER_NUMBER * sum(draws.values[n].shape[1] for n in names) else []
    divergence: tuple[float, float] | None = None
    by_gradients: dict[str, Tensor] = {}
    by_weights: dict[str, Tensor] = {}
    if draws.scores:
        alone = [name for name in draws.values if name not in together]
        by_gradients |= _by_site(draws.values, together, accuracy_by_gradients, draws.scores)
        by_gradients |= _by_site(draws.values, alone, accuracy_by_number, draws.scores)
        if names and not together:
            columns = [_joined(x, names) for x in (draws.values, draws.scores)]
            chosen = np.unique(np.linspace(0, columns[0].shape[1] - 1, _MOST_TOGETHER).astype(int))
            divergence = divergence_by_gradients(*(x[:, chosen] for x in columns))
    if fitted.chains is not None:
        by_gradients = {n: _with_chain_error(x, fitted.chains[n], len(weights)) for n, x in by_gradients.items()}
        return GuideAccuracy(weights, by_gradients, together=tuple(together), points=points, why=draws.why)
    if together and bool(weights.isfinite().all()):
        shares = _truncated(weights.cpu().numpy())
        by_weights = _by_site(draws.values, together, lambda values, _: accuracy_by_weights(values, shares))
    facts: dict[str, Any] = {"together": tuple(together), "divergence": divergence, "points": points, "why": draws.why}
    found = GuideAccuracy(weights, by_gradients, by_weights, **facts)
    if points:
        return found
    found = replace(found, switching=label_switching(fitted, batch, seed))
    return _searched(fitted, batch, draws, seed, found)


def _with_chain_error(found: Tensor, chains: Tensor, draws: int) -> Tensor:
    """The accuracy of a site's stored draws, with the Monte Carlo error of their own mean and sd.

    Args:
        found: Its `Accuracy`, ``(4, n)``.
        chains: Its values, ``(chains, draws, *site)``.
        draws: How many of them were judged.
    """
    values = chains.reshape(*chains.shape[:2], -1).double().cpu().numpy()
    places = np.unique(np.linspace(0, values.shape[-1] - 1, _MOST_CHAINS).astype(int))
    varied = [i for i in places if np.ptp(values[..., i]) > 0]
    long = values.shape[1] >= _FEWEST_OF_A_CHAIN
    sizes = [ess(values[..., i]) for i in varied] if long else [float(len(values))]
    effective = float(np.clip(np.nanmin(sizes or [1.0]), 1.0, draws))
    shift, shift_se, width, width_se = found
    return torch.stack([shift, (shift_se**2 + 1 / effective) ** 0.5, width, (width_se**2 + 0.5 / effective) ** 0.5])


def _searched(fitted: FittedProgram, batch: Batch, draws: GuideDraws, seed: int, found: GuideAccuracy) -> GuideAccuracy:
    """An accuracy, with what lies beyond the guide's draws, where it can be searched for."""
    log_evidence = float(found.log_weights.logsumexp(0)) - math.log(len(found.log_weights))
    try:
        density = density_to_search(fitted, batch, draws.values)
        other = other_mode(fitted, batch, density, draws.values, log_evidence, seed)
        own = torch.cat([draws.values[name] for name in density.shapes], 1)
        with fitted.querying(seed):
            wide = wide_draws(density, own, POINTS)
    except Exception:  # too large, or the model cannot run at many points at once, or without its data
        return found
    found = replace(found, searched=True, other=other)
    if wide is None or not bool(wide[1].isfinite().any()):
        return found
    points, log_weights = (x.cpu() for x in wide)
    log_weights = log_weights.nan_to_num(-math.inf).clamp_min(float(log_weights.max()) - 700)
    everything = torch.cat([own.double().cpu(), points]).numpy()
    guide, posterior = np.zeros(len(everything)), np.zeros(len(everything))
    guide[: len(own)], posterior[len(own) :] = 1.0, _truncated(log_weights.numpy())
    wide_accuracy = accuracy_by_weights(everything, posterior, guide)
    sizes = {n: shape.numel() for n, shape in density.shapes.items()}
    return replace(found, by_wide_weights=_by_name(wide_accuracy, sizes), wide_log_weights=log_weights)


def _outside_networks(values: Mapping[str, Tensor]) -> list[str]:
    """The sites that are no weights of a network with hidden units, see `GuideAccuracy`."""
    layers = {name.rpartition(".")[0] for name in values if "." in name}
    return [name for name in values if "." not in name or len(layers) < 2]


def _truncated(log_weights: Array) -> Array:
    r"""Normalized importance weights, cut off at :math:`\sqrt K` times their mean.

    References:
        Ionides (2008), Truncated importance sampling.
    """
    weights = np.exp(log_weights - log_weights.max())
    weights = np.minimum(weights, weights.mean() * np.sqrt(len(weights)))
    shares: Array = weights / weights.sum()
    return shares


def _by_site(
    values: Mapping[str, Tensor], names: Sequence[str], judge: _Judge, scores: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The judgement of some sites, each as an array."""
    if not names:
        return {}
    columns = (_joined(x, names) for x in (values, scores or values))
    return _by_name(judge(*columns), {n: values[n].shape[1] for n in names})


def _by_name(found: Accuracy, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """An accuracy of many coordinates, as an array for each site."""
    parts = torch.as_tensor(np.stack(found), dtype=torch.float32).split([*sizes.values()], 1)
    return {name: part.clone() for name, part in zip(sizes, parts, strict=True)}


def _joined(columns: Mapping[str, Tensor], names: Sequence[str]) -> Array:
    joined: Array = torch.cat([columns[name] for name in names], -1).double().cpu().numpy()
    return joined
