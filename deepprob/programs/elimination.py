r"""Summing out discrete sites instead of drawing them, without a host sync.

A site marked ``infer={"enumerate": "parallel"}`` takes all of its values at once, along a dimension of its own to the
left of all plates. A site of the guide marked ``"sequential"`` takes one value per run. Pyro lays out these dimensions
and contracts the model's factors. Pyro's own bound reads masks and scales on the host; this one does not, so it is a
pure function of tensors and can be traced.

Example: a mixture of three components over two rows, ``k ~ Categorical(probs)`` (marked in the model) and
``x ~ Normal(locs[k], 1)`` (observed), both inside ``pyro.plate("data", 2)``.

1. The plate has dimension -1 and symbol ``a``; the values of ``k`` have dimension -2 and symbol ``b``.
2. The factors ``log p(k)`` and ``log p(x | k)`` are both packed as ``ba``, shape ``(3, 2)``. They share ``b``, so they
   form one component.
3. The factors are added and summed over ``b`` by logsumexp. One ``likelihood`` term remains, packed as ``a``, shape
   ``(2,)``: ``log p(x)`` of every row.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from opt_einsum import shared_intermediates
from pyro.distributions import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import Dice
from pyro.ops import packed
from pyro.ops.contract import _partition_terms, contract_tensor_tree
from pyro.ops.einsum.adjoint import require_backward
from pyro.ops.rings import LogRing, MarginalRing
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from deepprob.programs.enumeration import is_enumerated
from deepprob.programs.sites import Site, is_deterministic, sample_sites

Part = Literal["likelihood", "kl_local", "kl_global"]
PARTS: tuple[Part, ...] = ("likelihood", "kl_local", "kl_global")
Plates = frozenset[str]  # symbols of the plates that a term is inside of
Packed = Any  # a tensor without dimensions of size 1, the others named by the letters of its _pyro_dims


@dataclass(frozen=True)
class Term:
    """A part of the bound, averaged over the guide's enumerated sites.

    Attributes:
        part: Which named term it adds to: ``likelihood``, or (with the sign of a KL) ``kl_local``, ``kl_global``.
        value: Shape ``(draws, *plates)``, without leading dimensions on which it does not depend.
        frames: The plates around it.
    """

    part: Part
    value: Tensor
    frames: tuple[Any, ...]


def terms(
    guide_trace: Trace,
    model_trace: Trace,
    plate: str,
    closed: Mapping[str, Tensor],
    *,
    compare_scales: bool = False,
    average: bool = True,
) -> list[Term]:
    r"""The terms of the bound, with marked sites summed out.

    With :math:`y` enumerated in the guide, :math:`k` in the model only, and :math:`z` drawn by the guide:

    .. math::
        \sum_y q(y \mid x)\, \Big[ \underbrace{\log p(x \mid y, z)}_\text{likelihood} -
        \big( \underbrace{\log q(y, z \mid x) - \log p(y, z)}_\text{kl} \big) \Big],
        \qquad p(x \mid y, z) = \frac{\sum_k p(x, k, y, z)}{\sum_k p(k, y, z)}

    Tensor variable elimination computes the sums over :math:`k`, one connected component of factors at a time. A mask
    applies inside the logarithm, a scale outside. A term is averaged over the guide's enumerated sites in its own and
    surrounding plates. It carries the DiCE factor of sites drawn there without a reparameterized gradient.

    Args:
        guide_trace: Trace of the guide, from `run_enumerated`.
        model_trace: Trace of the model replayed on it.
        plate: Name of the data plate.
        closed: Closed-form KLs by site, each of the site's batch shape. They replace ``log q - log p``, except for
            sites whose prior depends on a summed-out site.
        compare_scales: Whether to compare scales that are tensors, which reads their values from the device.
        average: Whether to average over the guide's enumerated sites, with DiCE factors. If False, the guide must
            not enumerate, and the terms are plain log-probabilities.

    Returns:
        The terms. The sum of the likelihood's entries minus the sum of the KL's is the bound of these rows.

    Raises:
        ValueError: If a sum would be exponential in the size of a plate or would include an average of the guide, if
            a component's scales differ, or if a site has dimensions outside of its plates.

    References:
        Obermeyer et al. (2019), Tensor Variable Elimination for Plated Factor Graphs.
        Foerster et al. (2018), DiCE: The Infinitely Differentiable Monte-Carlo Estimator.

    Examples:
        If the guide draws nothing, the likelihood is the evidence:

        >>> import pyro, pyro.distributions as dist
        >>> from deepprob.programs.enumeration import run_enumerated
        >>> from deepprob.programs.program import Program
        >>> from deepprob.programs.run import Run
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        ...         pyro.sample("x", dist.Normal(2 * k - 1, 1.0), obs=x)
        >>> x = torch.tensor([0.0, 1.0])
        >>> program = Program.of(model, lambda x: None, data_plate="data")
        >>> ((guide_trace, model_trace),) = run_enumerated(Run(program, (x,), torch.arange(2), 2))
        >>> (term,) = terms(guide_trace, model_trace, "data", {})
        >>> evidence = (dist.Normal(-1.0, 1.0).log_prob(x).exp() + dist.Normal(1.0, 1.0).log_prob(x).exp()).log()
        >>> term.part, torch.allclose(term.value, evidence - math.log(2))
        ('likelihood', True)
    """
    traces = _SymbolicTraces(guide_trace, model_trace, plate, compare_scales)
    kls = traces.without_summed(closed)
    found = [*traces.model_terms(kls), *traces.guide_terms(kls)]
    if not average:
        return [Term(c.part, packed.unpack(c.value, traces.symbol_to_dim), traces.frames(c.plates)) for c in found]
    dice = Dice(traces.guide, traces.site_plates)
    by_plates: dict[Plates, list[_PackedTerm]] = {}
    for term in found:
        by_plates.setdefault(term.plates, []).append(term)
    return [
        Term(term.part, packed.unpack(value, traces.symbol_to_dim), traces.frames(plates))
        for plates, group in by_plates.items()
        for term, value in zip(group, _average(dice, plates, [c.value for c in group]), strict=True)
    ]


@dataclass(frozen=True)
class _PackedTerm:
    part: Part
    plates: Plates
    value: Packed


@dataclass(frozen=True)
class _Factor:
    site: Site
    plates: Plates
    value: Packed  # masked, not scaled
    summed: bool


class _SymbolicTraces:
    """Traces of guide and model in which a symbol names every plate and every enumerated dimension."""

    def __init__(self, guide_trace: Trace, model_trace: Trace, plate: str, compare_scales: bool) -> None:
        self.guide, self.model = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
        self.plate, self.compare_scales = plate, compare_scales
        self.guide.symbolize_dims()
        for name, site in sample_sites(self.guide):
            parts = site["fn"].score_parts(site["value"])
            log_prob = scale_and_mask(parts.log_prob, site["scale"], site["mask"])
            if site["infer"].get("replayed"):  # a given value has no density, and its guide has no plates
                log_prob = log_prob.new_zeros(())
            site["packed"] = {
                # A draw from q has weight 1 and the gradient of log q, whatever its scale and mask.
                "score_parts": parts._replace(score_function=_pack(name, site, parts.score_function)),
                "log_prob": _pack(name, site, log_prob),
            }
        # The model's dimensions may continue the guide's, and a replayed site has both.
        self.model.symbolize_dims(self.guide.plate_to_symbol)
        self.symbols: dict[str, str] = self.model.plate_to_symbol
        self.symbol_to_dim: dict[str, int] = self.guide.symbol_to_dim | self.model.symbol_to_dim
        self.site_plates = {n: self._plates(s) for t in (self.model, self.guide) for n, s in sample_sites(t)}
        self.summed = {
            site["infer"]["_enumerate_symbol"]: name
            for name, site in sample_sites(self.model)
            if name not in self.guide.nodes and is_enumerated(site)
        }

    def _plates(self, site: Site) -> Plates:
        return frozenset(self.symbols[f.name] for f in site["cond_indep_stack"] if f.vectorized)

    def frames(self, plates: Plates) -> tuple[Any, ...]:
        """The plates of some symbols."""
        sites = (s for t in (self.model, self.guide) for _, s in sample_sites(t))
        found = {self.symbols[f.name]: f for s in sites for f in s["cond_indep_stack"] if f.vectorized}
        return tuple(found[symbol] for symbol in sorted(plates))

    def _kl(self, plates: Plates) -> Part:
        return "kl_local" if self.symbols.get(self.plate) in plates else "kl_global"

    def without_summed(self, closed: Mapping[str, Tensor]) -> dict[str, Packed]:
        """The closed-form KLs, packed, of the sites whose prior does not depend on a summed-out site."""
        found = {n: _pack(n, self.model.nodes[n], kl) for n, kl in closed.items() if n in self.model.nodes}
        kept = {n: kl for n, kl in found.items() if self.summed.keys().isdisjoint(kl._pyro_dims)}
        helpers = {n: kl for n, kl in closed.items() if n not in found and n.removesuffix("_unconstrained") in kept}
        return kept | helpers

    def guide_terms(self, closed: Mapping[str, Packed]) -> list[_PackedTerm]:
        """The guide's terms: ``log q`` of its sites, or their closed-form KL."""
        found = []
        for name, site in sample_sites(self.guide):
            helper = name in closed and name not in self.model.nodes  # its KL is counted under the site that it serves
            if not helper and not (site["is_observed"] and is_deterministic(site)):
                value = closed[name] if name in closed else site["packed"]["log_prob"]
                found.append(_PackedTerm(self._kl(self.site_plates[name]), self.site_plates[name], value))
        return found

    def model_terms(self, closed: Mapping[str, Packed]) -> list[_PackedTerm]:
        """The model's terms: log-probabilities of its sites, and the factors that remain after the sums."""
        found, factors = [], []
        for name, site in sample_sites(self.model):
            plates = self.site_plates[name]
            if name in closed or (site["is_observed"] and is_deterministic(site)):
                continue
            summed = name in self.summed.values()
            fn = site["fn"].base_dist if summed and isinstance(site["fn"], MaskedDistribution) else site["fn"]
            raw = fn.log_prob(site["value"])
            value = _pack(name, site, raw)
            if summed:
                factors.append(_Factor(site, plates, value, summed))
            elif not self.summed.keys().isdisjoint(value._pyro_dims):
                value = _pack(name, site, scale_and_mask(raw, 1.0, site["mask"]))
                factors.append(_Factor(site, plates, value, summed))
            else:
                value = _pack(name, site, scale_and_mask(raw, site["scale"], site["mask"]))
                observed = bool(site["is_observed"])
                part = "likelihood" if observed else self._kl(plates)
                found.append(_PackedTerm(part, plates, value if observed else packed.neg(value)))
        return found + self._sum_out(factors)

    def _sum_out(self, factors: list[_Factor]) -> list[_PackedTerm]:
        by_value = {f.value: f for f in factors}
        found = []
        with shared_intermediates() as cache:
            ring = LogRing(cache=cache)
            for values, dims in _partition_terms(ring, list(by_value), set(self.summed)):
                found += self._marginals([f for v, f in by_value.items() if any(v is w for w in values)], dims, ring)
        return found

    def _marginals(self, factors: list[_Factor], dims: set[str], ring: LogRing) -> list[_PackedTerm]:
        """Sum out the sites of one connected component.

        If the guide drew a site whose prior depends on a summed-out site, the latent factors are also summed alone:
        this sum is the prior. The log-likelihood is then the logarithm of the whole sum minus the log-prior.
        """
        scale = self._common_scale(factors)
        if isinstance(scale, Tensor) and scale.dim():
            scale = _pack(factors[0].site["name"], factors[0].site, scale)
        prior, joint = [], []
        if any(not f.summed and not f.site["is_observed"] for f in factors):
            prior = self._contract([f for f in factors if not f.site["is_observed"]], dims, ring, scale)
        if any(f.site["is_observed"] for f in factors):
            joint = self._contract(factors, dims, ring, scale)
        found = [_PackedTerm("likelihood", plates, value) for plates, value in joint]
        for plates, value in prior:
            found.append(_PackedTerm(self._kl(plates), plates, packed.neg(value)))
            if joint:
                found.append(_PackedTerm("likelihood", plates, packed.neg(value)))
        return found

    def _contract(
        self, factors: list[_Factor], dims: set[str], ring: LogRing, scale: Any
    ) -> list[tuple[Plates, Packed]]:
        tree: OrderedDict[Plates, list[Packed]] = OrderedDict()
        for factor in factors:
            tree.setdefault(factor.plates, []).append(factor.value)
        used = {d for f in factors for d in f.value._pyro_dims}
        try:
            contracted = contract_tensor_tree(tree, dims & used, ring=ring)
        except NotImplementedError as error:
            raise ValueError(
                f"summing out {self._names(dims)} is exponential in the size of a plate: a site depends on summed-out "
                f"sites of two plates, neither inside the other. Sample {self._names(dims)} in the guide, or write "
                "one of the plates as a loop."
            ) from error
        left = [(plates, value) for plates, values in contracted.items() for value in values]
        for plates, value in left:
            self._check_order(factors, dims, plates, value)
        if not getattr(scale, "_pyro_dims", ""):
            return [(plates, packed.scale_and_mask(value, scale=scale)) for plates, value in left]
        if any(not {*scale._pyro_dims} <= {*value._pyro_dims} for _, value in left):
            raise ValueError(
                f"{self._names(dims)} is summed out of all rows at once, so rows cannot have weights of their own. "
                "Sample it in the guide, or leave out the weights."
            )
        return [(plates, _weighted(value, scale)) for plates, value in left]

    def _check_order(self, factors: list[_Factor], dims: set[str], plates: Plates, value: Packed) -> None:
        """Refuse a sum outside of a plate if the guide's choices inside the plate must be averaged first."""
        inside = frozenset().union(*(f.plates for f in factors))
        for name, site in sample_sites(self.guide):
            own = self.site_plates[name]
            if own <= plates or not own <= inside:
                continue
            chosen = is_enumerated(site) and (
                "_enum_total" in site["infer"] or site["infer"]["_enumerate_symbol"] in value._pyro_dims
            )
            rough = isinstance(site["packed"]["score_parts"].score_function, Tensor)
            if chosen or (rough and not is_enumerated(site)):
                within = ", ".join(sorted(repr(f.name) for f in self.frames(own - plates)))
                raise ValueError(
                    f"the model sums out {self._names(dims)} outside of plate {within}, but the guide chooses {name!r} "
                    f"inside it: the average over {name!r} cannot be taken before the sum. Sample {self._names(dims)} "
                    f"in the guide too, or leave {name!r} out of the guide and mark it for enumeration in the model."
                )

    def _names(self, dims: Iterable[str]) -> str:
        return ", ".join(repr(self.summed[d]) for d in sorted(dims))

    def _common_scale(self, factors: list[_Factor]) -> Any:
        first = factors[0].site["scale"]
        if all(factor.site["scale"] is first for factor in factors):
            return first  # also the weights of rows, which guide and model share
        for factor in factors:
            scale = factor.site["scale"]
            if isinstance(scale, Tensor) and scale.dim():
                raise ValueError(
                    f"site {factor.site['name']!r} depends on a site that is summed out, so its scale must be one "
                    f"number; got one of shape {tuple(scale.shape)}. Scale the sites of every row alike."
                )
            tensors = isinstance(scale, Tensor) + isinstance(first, Tensor)
            if (tensors < 2 or self.compare_scales) and (tensors == 1 or float(scale) != float(first)):
                one, other = factors[0].site["name"], factor.site["name"]
                raise ValueError(
                    f"sites {one!r} and {other!r} belong to one sum over discrete sites, but have scales {first} and "
                    f"{scale}. Put both inside of the same plates and scales; where minibatches make the difference, "
                    "use batch_size=None."
                )
        return first


def _pack(name: str, site: Site, value: Any) -> Any:
    """Name a site's dimensions by its plates and enumerated sites."""
    try:
        return packed.pack(value, site["infer"]["_dim_to_symbol"])
    except ValueError as error:
        raise ValueError(
            f"site {name!r} has batch shape {tuple(value.shape)}, with dimensions outside of its plates, which are "
            "reserved for enumerated values. Add .to_event(1) to its distribution, or a plate, and write its shapes "
            "from the right (Vindex for tables)."
        ) from error


def _average(dice: Dice, plates: Plates, values: list[Packed]) -> list[Packed]:
    """Average terms of the same plates over the guide's enumerated sites there, with DiCE factors.

    This is Pyro's ``Dice.compute_expectation`` without the host sync, and with one result per term and plate entry.
    """
    parts: list[Packed] = dice._get_log_factors(plates)
    weight = math.exp(sum(x for x in parts if not isinstance(x, Tensor)))
    factors: list[Packed] = [x for x in parts if isinstance(x, Tensor)]
    if not factors:
        return [packed.mul(v, weight) if weight != 1.0 else v for v in values]
    queries: dict[frozenset[str], Packed] = {frozenset(f._pyro_dims): f for f in reversed(factors)}
    for value in values:
        if (key := frozenset(value._pyro_dims)) not in queries:
            query: Packed = torch.zeros_like(value)
            query._pyro_dims = value._pyro_dims
            queries[key] = query
            factors.append(query)
    with shared_intermediates() as cache:
        ring = MarginalRing(cache=cache)
        for query in queries.values():
            require_backward(query)
        ring.sumproduct(factors, set().union(*(f._pyro_dims for f in factors)) - plates)._pyro_backward()
        averaged = []
        for value in values:
            query = queries[frozenset(value._pyro_dims)]
            probability = query._pyro_backward_result.exp()
            probability._pyro_dims = query._pyro_dims
            averaged.append(_weighted_sum(probability, value, plates, weight))
    return averaged


def _weighted(value: Packed, weights: Packed) -> Packed:
    value, weights = packed.broadcast_all(value, weights)
    dims, product = value._pyro_dims, value * weights
    product._pyro_dims = dims
    return product


def _weighted_sum(probability: Packed, value: Packed, plates: Plates, weight: float) -> Packed:
    value, probability = packed.broadcast_all(value, probability)
    dims: str = value._pyro_dims
    # A term may be -inf where the probability is zero.
    product = weight * probability * torch.where(probability > 0, value, torch.zeros_like(value))
    chosen = [i for i, d in enumerate(dims) if d not in plates]
    result = product.sum(chosen) if chosen else product
    result._pyro_dims = "".join(d for d in dims if d in plates)
    return result
