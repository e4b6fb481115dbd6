"""Which entries of latent sites can change places without changing the posterior density?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from deepprob.posteriors.fitted import FittedProgram
from deepprob.posteriors.guide_draws import replayed_density
from deepprob.programs.minibatch import Batch

_DRAWS, _MOST_LABELS, _MOST_TRIALS = 64, 20, 64
_TOLERANCE = 2e-5  # relative, of a log-density in single precision
_APART = 2.0  # sds between two entries that the guide tells from each other


@dataclass(frozen=True)
class Switching:
    """A symmetry of the posterior that the guide does not have.

    Attributes:
        sites: The sites whose entries can change places together.
        labels: How many entries there are.
    """

    sites: tuple[str, ...]
    labels: int


def label_switching(fitted: FittedProgram, batch: Batch, seed: int) -> Switching | None:
    """Find entries of global latent sites that can change places, as the components of a mixture.

    The entries move on by one place, in all sites together. The density of the guide's draws then stays the same if
    the posterior does not tell the labels apart; the guide does so if it puts two neighbours apart.

    Args:
        fitted: The program of a posterior that holds a guide.
        batch: The training data, accepted.
        seed: Random seed of the draws.
    """
    found = fitted.structure
    with fitted.querying(seed):
        guide_trace = fitted.run_guide(batch, _DRAWS)
    layout = fitted.layout(_DRAWS)
    drawn = {n: layout.draws_first(guide_trace.nodes[n]) for n in found.latent if n in guide_trace.nodes}
    names = [n for n in found.global_ if n in drawn and "." not in n and not found.sites[n].discrete]
    few = {n: x[:2] for n, x in drawn.items()}
    before: Tensor | None = None
    for labels, moves in itertools.islice(_moves({n: drawn[n] for n in names}), _MOST_TRIALS):
        if not any(_tells_apart(drawn[n], axis) for n, axes in moves.items() for axis in axes):
            continue
        moved = {n: x.roll([1] * len(moves[n]), moves[n]) if n in moves else x for n, x in few.items()}
        before = replayed_density(fitted, batch, few) if before is None else before
        after = replayed_density(fitted, batch, moved)
        if bool(((before - after).abs() <= _TOLERANCE * before.abs().clamp_min(10.0)).all()):
            return Switching(tuple(moves), labels)
    return None


def _moves(drawn: Mapping[str, Tensor]) -> Iterator[tuple[int, dict[str, list[int]]]]:
    """By number of labels, choices of the axes along which the entries of each site move; most sites first."""
    sizes = sorted({size for x in drawn.values() for size in x.shape[1:] if 2 <= size <= _MOST_LABELS})
    for labels in sizes:
        choices = []
        for name, x in drawn.items():
            axes = [i for i in range(1, x.dim()) if x.shape[i] == labels]
            subsets = [list(c) for k in range(len(axes), 0, -1) for c in itertools.combinations(axes, k)]
            choices.append([(name, s) for s in [*subsets, []]] if axes else [(name, [])])
        options = [{n: s for n, s in choice if s} for choice in itertools.product(*choices)]
        for option in sorted(options, key=len, reverse=True):
            if option:
                yield labels, option


def _tells_apart(drawn: Tensor, axis: int) -> bool:
    """Whether a guide puts any two neighbours along an axis of its draws further apart than they are wide."""
    mean, variance = drawn.mean(0), drawn.var(0)
    apart = (mean - mean.roll(1, axis - 1)).abs()
    return bool((apart > _APART * (variance + variance.roll(1, axis - 1)).sqrt()).any())
