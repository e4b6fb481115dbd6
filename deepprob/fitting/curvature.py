r"""The curvature of a likelihood at a mode, as a whole matrix or as an approximation with structure.

The curvature is the generalised Gauss-Newton matrix, :math:`H = \sum_i J_i^T F_i J_i`, with the Fisher information
:math:`F_i` of row i's distribution in its parameters, and their derivatives :math:`J_i` by the weights: the sum of
outer products of gradients in the directions of a root of :math:`F_i`. A layer with inputs :math:`a`, and with
gradients :math:`g` of its outputs in these directions, has the approximation

.. math:: H \approx \Big(\sum g g^T\Big) \otimes \Big(\tfrac 1n \sum a a^T\Big)

over all n rows and positions: all rows of the data, positions of a convolution, and calls of a layer that is used more
than once.

References:
    Martens, Grosse (2015), Optimizing Neural Networks with Kronecker-factored Approximate Curvature.
    Grosse, Martens (2016), A Kronecker-factored Approximate Fisher Matrix for Convolution Layers.
    Eschenhagen et al. (2023), Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures.
    Halko, Martinsson, Tropp (2011), Finding Structure with Randomness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from deepprob.fitting.at_mode import AtMode
from deepprob.fitting.fisher import fisher_of
from deepprob.fitting.precision import DensePart, IndependentPart, KroneckerPart, LowRankPart, Part
from deepprob.networks.layer_calls import LayerCalls, in_directions, rows_apart

_MOST_NUMBERS = 2**24  # of gradients by row at a time
_FEW_ROWS = 16  # where gradients by row are taken one row at a time
MOST_DENSE = 10_000  # weights of a whole matrix
_SURPLUS, _PASSES = 10, 3  # of a search for the largest eigenvalues


class Curvature:
    """The curvature of the likelihood in some weights, all of them real latent sites.

    Args:
        mode: The program at its mode.
        names: The sites, in the order of the guide.

    Attributes:
        kinds: The kinds of Fisher information that were used, see `deepprob.fitting.fisher.Fisher`.
    """

    def __init__(self, mode: AtMode, names: Sequence[str]) -> None:
        self.mode, self.names, self.kinds = mode, list(names), set[str]()
        self.sizes = {name: place.stop - place.start for name, place in mode.guide.sites.items() if name in names}
        self.size = sum(self.sizes.values())

    def index(self, names: Sequence[str]) -> Tensor:
        """The places of some sites in the guide's vector."""
        sites, device = self.mode.guide.sites, self.mode.guide.loc.device
        return torch.cat([torch.arange(sites[n].start, sites[n].stop, device=device) for n in names])

    # -- structures ----------------------------------------------------------------------------------------------

    def dense(self) -> Sequence[DensePart]:
        """The whole matrix."""
        matrix = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.mode.guide.loc.device)
        for rows in self._gradients():
            matrix += rows.double().T @ rows.double()
        return [DensePart(self.index(self.names), matrix)]

    def diagonal(self) -> Sequence[IndependentPart]:
        """The diagonal."""
        found = torch.zeros(self.size, dtype=torch.float64, device=self.mode.guide.loc.device)
        for rows in self._gradients():
            found += rows.square().sum(0, dtype=torch.float64)
        return [IndependentPart(self.index(self.names), found)]

    def low_rank(self, rank: int) -> Sequence[LowRankPart]:
        """The largest eigenvalues of the matrix, and the diagonal of the rest.

        Args:
            rank: Their number.
        """
        rank, like = min(rank, self.size), self.mode.guide.loc
        wide = min(rank + _SURPLUS, self.size)
        noise = torch.randn(self.size, wide, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        basis = torch.linalg.qr(noise.to(like.device))[0]
        for _ in range(_PASSES):
            basis = torch.linalg.qr(self._times(basis))[0]
        values, vectors = torch.linalg.eigh(basis.T @ self._times(basis))
        values, vectors = values[-rank:].clamp_min(0.0), basis @ vectors[:, -rank:]
        (part,) = self.diagonal()
        rest = (part.diagonal - vectors.square() @ values).clamp_min(0.0)
        return [LowRankPart(self.index(self.names), vectors, values, rest)]

    def kronecker(self) -> Sequence[Part]:
        """A Kronecker product for every layer, and the diagonal for weights that are in none."""
        factors = self._factors()
        parts: list[Part] = []
        covered: set[str] = set()
        for (weight, bias), (outputs, inputs) in factors.items():
            index = self.index([weight]).reshape(len(outputs), -1)
            if bias is not None:
                index = torch.cat([index, self.index([bias]).unsqueeze(-1)], 1)
            parts.append(KroneckerPart(index, outputs, inputs))
            covered |= {name for name in (weight, bias) if name is not None}
        rest = [name for name in self.names if name not in covered]
        if rest:
            parts += Curvature.diagonal(self._only(rest))
        return parts

    def _only(self, names: Sequence[str]) -> Curvature:
        found = Curvature(self.mode, names)
        found.kinds = self.kinds
        return found

    # -- gradients -----------------------------------------------------------------------------------------------

    def _times(self, columns: Tensor) -> Tensor:
        """The matrix times some columns."""
        total = torch.zeros_like(columns)
        for rows in self._gradients():
            rows = rows.to(columns)
            total += rows.T @ (rows @ columns)
        return total

    def _passes(self, rows: int) -> Iterator[tuple[LayerCalls, dict[str, Tensor], list[Tensor], list[Tensor]]]:
        """Runs on all rows: the calls of layers, the weights, the distributions' parameters and directions."""
        mode = self.mode
        with mode.running():
            for run in mode.runs(rows):
                values = mode.leaves(self.names)
                weights = {name: x for name, x in values.items() if name in mode.real}
                with LayerCalls(weights) as layers:
                    trace = mode.trace(run, values)
                found = [fisher_of(site, weight) for site, weight in mode.observed(trace, run)]
                roots = [root for root in found if root is not None]
                count = sum(len(root.columns[0]) for root in roots)
                results, directions, start = [], [], 0
                for root in roots:
                    self.kinds.add(root.kind)
                    for parameter, columns in zip(root.parameters, root.columns, strict=True):
                        whole = parameter.new_zeros(count, *parameter.shape)
                        whole[start : start + len(columns)] = columns
                        results.append(parameter)
                        directions.append(whole)
                    start += len(root.columns[0])
                if results:
                    yield layers, weights, results, directions

    def _gradients(self) -> Iterator[Tensor]:
        """Gradients by row and direction, ``(R, n)`` at a time: the matrix is the sum of their outer products."""
        by_row = self.mode.by_row & set(self.names)
        most = 512 if len(by_row) == len(self.names) else _FEW_ROWS
        rows = max(1, min(most, _MOST_NUMBERS // max(1, self.size * 8)))
        for layers, weights, results, directions in self._passes(rows):
            # A layer of some rows only, chosen by their values, may have others here than in the trial.
            here = by_row & layers.on_rows(max(x.shape[1] if x.dim() > 1 else 1 for x in directions))
            found: dict[str, Tensor] = {}
            if here:
                parts = layers.weight_gradients(layers.gradients(results, directions), by_row=True, only=here)
                found |= {name: x.flatten(2).flatten(0, 1) for name, x in parts.items()}
            if others := [name for name in self.names if name not in here]:
                rest = in_directions(results, rows_apart(directions), [weights[name] for name in others])
                found |= {name: x.flatten(1) for name, x in zip(others, rest, strict=True)}
            yield torch.cat([found[name] for name in self.names], 1)

    def _factors(self) -> dict[tuple[str, str | None], tuple[Tensor, Tensor]]:
        """By weight and bias of every covered layer, the factors of outputs and of inputs."""
        sums: dict[tuple[str, str | None], list[Tensor]] = {}
        counts: dict[tuple[str, str | None], int] = {}
        for layers, _, results, directions in self._passes(512):
            gradients = layers.gradients(results, directions)
            for (weight, bias), calls in self._layers(layers).items():
                own = [(call, g) for call, g in zip(layers.calls, gradients, strict=True) if call in calls]
                a = torch.cat([call.inputs.flatten(0, 1) for call, _ in own]).double()
                g = torch.cat([g.flatten(0, 2) for _, g in own]).double()
                a = a[:, :-1] if bias is None and own[0][0].bias is not None else a
                pair = [g.T @ g, a.T @ a]
                key = weight, bias
                sums[key] = [x + y for x, y in zip(sums[key], pair, strict=True)] if key in sums else pair
                counts[key] = counts.get(key, 0) + len(a)
        return {key: (outputs, inputs / counts[key]) for key, (outputs, inputs) in sums.items()}

    def _layers(self, layers: LayerCalls) -> dict[tuple[str, str | None], list[object]]:
        """The calls by weight and bias: of covered weights, each with its bias if this has no other use."""
        covered = self.mode.covered & set(self.names)
        found: dict[tuple[str, str | None], list[object]] = {}
        for name in self.names:
            calls = layers.of(name) if name in covered else []
            if not calls:
                continue
            bias = calls[0].bias
            users = {call.weight for call in layers.calls if call.bias == bias}
            whole = bias in covered and users == {name} and all(call.bias == bias for call in calls)
            found[name, bias if whole else None] = list(calls)
        return found


STRUCTURES: dict[str, Callable[[Curvature, int], Sequence[Part]]] = {
    "full": lambda curvature, _: curvature.dense(),
    "diagonal": lambda curvature, _: curvature.diagonal(),
    "kronecker": lambda curvature, _: curvature.kronecker(),
    "low_rank": lambda curvature, rank: curvature.low_rank(rank),
}
