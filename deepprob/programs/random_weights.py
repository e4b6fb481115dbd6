"""The random weights of a network: their sites, under a prior and under a mean-field guide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import pyro
import pyro.distributions as dist
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import softplus

from deepprob.networks.initialisation import init_weights
from deepprob.networks.inputs import has_lazy_parts
from deepprob.networks.layer_choice import chosen_parameters
from deepprob.networks.lifting import Noise
from deepprob.networks.weight_priors import check_prior, weight_priors
from deepprob.programs.names_apart import HELD

PER_ROW = "per_row"  # marks the guide's sites whose value is not what the likelihood of a row sees


class MeanField(Protocol):
    """The parameters of a mean-field guide.

    Attributes:
        raw_loc: Means of the weights in units of the prior.
        raw_sd: Their unbounded sds in these units.
        scale_loc: Means of the logarithms of the priors' positive numbers.
        scale_raw: Their unbounded sds.
    """

    raw_loc: nn.ParameterList
    raw_sd: nn.ParameterList
    scale_loc: nn.ParameterList
    scale_raw: nn.ParameterList


class Hyper(NamedTuple):
    """A positive number in the prior of a parameter."""

    site: str
    parameter: str
    suffix: str
    shape: tuple[int, ...]


class RandomWeights:
    """The weights of a network that are random, and their priors.

    Every random parameter is a site with its name in the network. The positive numbers of its prior are sites with that
    name and a suffix, before all weights. Sites know their values in units of the prior: a weight is its prior mean
    plus its unit times a value.

    Args:
        net: The network. Its random parameters stop being trainable and keep their values, where a fit starts.
        prior: A name in ``PRIORS``, or a mapping from layers to names or pairs of name and scale.
        prior_scale: The scale of priors without one of their own.
        layers: The random layers, see `chosen_parameters`; None for all.
        prefix: What the names of sites begin with.

    Attributes:
        names: Names of the random parameters.
        shapes: Their shapes; empty until the sizes of lazy layers are known.
        priors: Their priors, by name.
        hypers: The positive numbers of the priors.

    Raises:
        TypeError: If ``prior`` or ``layers`` have a wrong type.
        ValueError: If a name or a layer is unknown, or a scale is not a positive number.
    """

    def __init__(
        self,
        net: nn.Module,
        prior: Any = "hierarchical",
        prior_scale: float = 1.0,
        layers: Any = None,
        prefix: str = "",
    ) -> None:
        self.prior, self.prior_scale = check_prior(prior, prior_scale), prior_scale
        self.names, self.prefix = chosen_parameters(net, layers), prefix
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.hypers: tuple[Hyper, ...] = ()
        self.settle(net)

    def settle(self, net: nn.Module) -> None:
        """Take the sizes of the parameters; lazy layers may not know them yet."""
        if self.shapes:
            return
        if has_lazy_parts(net):
            if isinstance(self.prior, Mapping):
                weight_priors(net, [], self.prior, self.prior_scale)  # shows unknown layers at once
            return
        self.priors = weight_priors(net, self.names, self.prior, self.prior_scale)
        parameters = dict(net.named_parameters())
        self.shapes = {name: tuple(parameters[name].shape) for name in self.names}
        self.hypers = tuple(
            Hyper(f"{name}.{suffix}", name, suffix, shape)
            for name, prior in self.priors.items()
            for suffix, shape in prior.hypers(self.shapes[name]).items()
        )
        for name in self.names:
            parameters[name].requires_grad_(False)

    def check_settled(self) -> None:
        """Refuse weights without sizes.

        Raises:
            ValueError: If the sizes of lazy layers are not known.
        """
        if not self.shapes:
            raise ValueError("net has lazy layers without sizes. Fit the program first, or run net(...) on some rows.")

    @property
    def sites(self) -> list[str]:
        """The names of all sites."""
        return [self.prefix + name for name in (*(one.site for one in self.hypers), *self.names)]

    @property
    def centered(self) -> set[str]:
        """Names of the parameters whose prior is centered on the network's own values."""
        named = self.prior.values() if isinstance(self.prior, Mapping) else [self.prior]
        if not self.shapes:
            return set(self.names) if "pretrained" in [*named] else set()
        return {name for name, prior in self.priors.items() if prior.kind == "pretrained"}

    @property
    def described(self) -> Any:
        """The prior as JSON: its name, or name and scale by parameter."""
        if isinstance(self.prior, Mapping):
            return {name: [prior.kind, prior.scale] for name, prior in self.priors.items()}
        return self.prior

    def rescale(self, prior_scale: Any) -> None:
        """Give all priors another scale; not those of a mapping, which may have scales of their own."""
        self.prior_scale = prior_scale
        if self.shapes and not isinstance(self.prior, Mapping):
            self.priors = {name: replace(prior, scale=prior_scale) for name, prior in self.priors.items()}

    # -- sites ---------------------------------------------------------------------------------------------------

    def sample(self, net: nn.Module) -> dict[str, Tensor]:
        """Draw the weights from their prior, as sites; returns them by parameter.

        Raises:
            ValueError: If the sizes of lazy layers are not known.
        """
        self.check_settled()
        parameters = dict(net.named_parameters())
        values = {one.site: self._sample(one, parameters[one.parameter]) for one in self.hypers}
        weights = {}
        for name in self.names:
            fn = self.priors[name].distribution(*self.moments(name, parameters[name], values))
            weights[name] = pyro.sample(self.prefix + name, fn.to_event(parameters[name].dim()))
        return weights

    def sample_guide(self, net: nn.Module, guide: MeanField, *, per_row: bool = False) -> None:
        """Draw the weights from a mean-field guide that is relative to the prior.

        Args:
            net: The network.
            guide: The guide's parameters.
            per_row: Whether the weights tell the model their means and sds, for draws that are separate for every row.
        """
        values = {
            one.site: pyro.sample(self.prefix + one.site, dist.LogNormal(loc, softplus(raw)).to_event(loc.dim()))
            for one, loc, raw in zip(self.hypers, guide.scale_loc, guide.scale_raw, strict=True)
        }
        parameters = dict(net.named_parameters())
        for name, mean, raw in zip(self.shapes, guide.raw_loc, guide.raw_sd, strict=True):
            loc, unit = self.moments(name, parameters[name], values)
            fn = dist.Normal(loc + unit * mean, unit * softplus(raw))
            options: Any = {PER_ROW: per_row}
            value: Any = pyro.sample(self.prefix + name, fn.to_event(mean.dim()), infer=options)
            if per_row:  # the model gets this very tensor, and no other run has it
                value.moments = fn.mean, fn.stddev

    def noise(self, kind: str, weights: Mapping[str, Tensor]) -> Noise | None:
        """The noise of weights that this guide has drawn and that every row may draw anew; None for other weights."""
        found = {name: weight.moments for name, weight in weights.items() if hasattr(weight, "moments")}
        return Noise(kind, found) if len(found) == len(weights) else None

    # -- values --------------------------------------------------------------------------------------------------

    def moments(self, name: str, start: Tensor, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and unit of a weight's prior, given the positive numbers by site."""
        own = {one.suffix: values[one.site] for one in self.hypers if one.parameter == name}
        return self.priors[name].moments(start, own)

    def start_moments(self, name: str, start: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and unit of a weight's prior where a fit starts."""
        prior, values = self.priors[name], self.hyper_starts()
        own = {one.suffix: values[one.site].to(start) for one in self.hypers if one.parameter == name}
        return prior.moments(start, own)

    def hyper_starts(self) -> dict[str, Tensor]:
        """Where a fit starts the positive numbers of the priors, by site."""
        return {
            one.site: torch.full(one.shape, self.priors[one.parameter].hyper_start(one.suffix)) for one in self.hypers
        }

    def relative(self, net: nn.Module) -> Iterator[Tensor]:
        """The network's own weights in units of the prior where a fit starts."""
        parameters = dict(net.named_parameters())
        for name in self.shapes:
            loc, unit = self.start_moments(name, parameters[name])
            yield (parameters[name].detach() - loc) / unit

    @torch.no_grad()
    def forget(self, net: nn.Module) -> None:
        """Zero the network's own values where no prior needs them, so that saved fits do not depend on them."""
        for name in set(self.shapes) - self.centered:
            net.get_parameter(name).zero_()

    @torch.no_grad()
    def draw_others(self, net: nn.Module, generator: Generator | None) -> dict[str, str]:
        """Redraw the trained weights that are not random; see `init_weights`."""
        if not any(p.requires_grad for p in net.parameters()) or not self.shapes:
            return {}
        own = {name: net.get_parameter(name).clone() for name in self.names}
        record = init_weights(net, generator)
        for name, value in own.items():
            net.get_parameter(name).copy_(value)
        return {f"net.{name}": scheme for name, scheme in record.items() if name not in own}

    def _sample(self, one: Hyper, like: Tensor) -> Tensor:
        prior = self.priors[one.parameter]
        options: Any = {HELD: prior.hyper_start(one.suffix)}
        fn = prior.hyper_prior(one.suffix, like.new_empty(one.shape))
        value: Tensor = pyro.sample(self.prefix + one.site, fn, infer=options)
        return value
