"""The Bayesian neural network: any torch network with a distribution over its weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import softplus

from deepprob.errors import positive, unknown
from deepprob.networks.dense import MLP
from deepprob.networks.for_data import described, network_for, table_for
from deepprob.networks.inputs import as_accepted, has_lazy_parts, input_names, meet_rows, moments, signature_of
from deepprob.networks.lifting import check_columns, fans, gains, lift, pretrained_names, run_with
from deepprob.networks.likelihood import Likelihood
from deepprob.networks.registry import NETWORKS
from deepprob.programs.example import Example
from deepprob.programs.minibatch import Batch
from deepprob.programs.network_program import NetworkProgram
from deepprob.programs.origin import Origin

PRIORS = ("hierarchical", "normal")

_START_RAW, _HYPER_RAW = (math.log(math.expm1(sd)) for sd in (1e-2, 0.1))  # softplus makes them standard deviations
_DISPERSION_MEDIANS = {"noise": 0.1, "total_count": 10.0, None: 1.0}  # of the priors; a fit starts there
_DISPERSION_SD = 1.5  # of the logarithm


class BayesianNeuralNetwork(NetworkProgram):
    r"""A network whose weights are random variables, for regression, classification and counts.

    .. code-block:: text

        s ~ LogNormal(log prior_scale, 1)        for each matrix of weights              "<name>.scale"
        W_kj ~ N(0, s^2 / fan_in)                weights; biases ~ N(0, 1)               "<name>", the network's own
        sigma ~ LogNormal(log 0.1, 1.5)          noise, in standard deviations of y      "noise"
        r ~ LogNormal(log 10, 1.5)               total count of negative binomials       "total_count"
        y_i ~ N(net(x_i; W), sigma^2)            or Categorical, Bernoulli(logits),      "y", i = 1..N
                                                 Poisson, NegativeBinomial(mean, r)
        q(s), q(sigma), q(r) log-normal; q(W_kj | s) = N(m_kj, v_kj^2) times s / sqrt(fan_in)

    Given their scale, the guide's weights are independent and proportional to it, as in the prior: the scale can change
    without new values for all means.

    The program runs a copy of the network as a pure function of the weights, over all draws at once; the original does
    not change. A fit starts at the weights of your own network, or at means drawn from the prior for a network of
    deepprob, such as an `MLP`; ``svi(..., weights="keep")`` and ``"fresh"`` force one. So does a guide by name, such as
    ``guide="normal"``, except for a flow. Frozen parameters (``requires_grad=False``) stay fixed and have no site. For
    a Bayesian last layer, freeze all other layers.

    The network always runs in evaluation mode. Dropout is off, because the weights are already random. A batch norm
    uses its stored statistics, and its scale and shift are weights like any other. A batch norm without running
    statistics is an error, because it makes rows depend on each other.

    Data and predictions are in the units of the data: `adapt` takes means and scales from the training rows. Counts
    have the mean ``scale * softplus(net(x))``, with the scale at which an output of 0 gives the training mean. The
    variance of a Poisson is its mean, that of a negative binomial is ``mean + mean^2 / total_count``.

    Args:
        net: A network with one output per column of y or per class, or the ``config`` of a deepprob network.
        likelihood: ``"normal"``, ``"categorical"``, ``"bernoulli"``, ``"poisson"`` or ``"negative_binomial"``.
        num_classes: Number of classes for ``"categorical"``.
        prior: ``"hierarchical"``, as above; or ``"normal"``, all weights and biases ``N(0, prior_scale^2)``.
        prior_scale: Scale of the prior, see above.
        noise: Known standard deviation of the noise, in the units of y; None to learn it.
        standardize: Whether to standardize real inputs (each column of a table, an image as a whole) and the columns
            of y. Without it, counts have a scale of 1.

    Raises:
        TypeError: If ``net`` is not a network.
        ValueError: If a name is unknown, a number is out of range, or the network cannot have random weights.

    References:
        Neal (1996), Bayesian Learning for Neural Networks.
        Blundell, Cornebise, Kavukcuoglu, Wierstra (2015), Weight Uncertainty in Neural Networks.

    Examples:
        Weights are sites with the network's parameter names, and the network does not change:

        >>> net = nn.Linear(3, 1)
        >>> before = net.weight.clone()
        >>> program = BayesianNeuralNetwork(net)
        >>> trace = pyro.poutine.trace(program.model).get_trace(torch.zeros(5, 3))
        >>> [name for name in trace.stochastic_nodes]
        ['weight.scale', 'weight', 'bias', 'noise', 'data', 'y']
        >>> bool((net.weight == before).all())
        True
    """

    registry_name = "bnn"
    tasks = ("regression", "classification", "images")
    learning_rate = 3e-2

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        likelihood: str = "normal",
        num_classes: int | None = None,
        prior: str = "hierarchical",
        prior_scale: float = 1.0,
        noise: float | None = None,
        standardize: bool = True,
    ) -> None:
        super().__init__()
        shape = () if likelihood == "categorical" else (None,)  # the columns of y are the network's outputs
        self.observation = Likelihood(likelihood, shape, num_classes=num_classes)
        if prior not in PRIORS:
            raise unknown("prior", prior, PRIORS)
        self.likelihood, self.prior = likelihood, prior
        self.num_classes = self.observation.num_classes
        self.prior_scale = positive("prior_scale", prior_scale)
        self.noise = None if noise is None else positive("noise", noise)
        if noise is not None and likelihood != "normal":
            raise ValueError(f"noise is only for likelihood='normal'; got likelihood={likelihood!r}. Leave it out.")
        self.known_scales = ("prior_scale",) * (prior == "normal") + ("noise",) * (noise is not None)
        self.standardize = bool(standardize)
        self.net = lift(net, taken={"data", "y", self.observation.dispersion or "y"})
        self.inputs = input_names(self.net)
        all_trainable = all(p.requires_grad for p in self.net.parameters())
        self._make_random()
        self.noise_loc, self.noise_raw = nn.ParameterList(), nn.ParameterList()
        self._set_units([(torch.zeros(1), torch.ones(1)) for _ in self.inputs], (torch.zeros(1), torch.ones(1)))
        self._start_narrow()
        own = type(self.net) in NETWORKS.values()
        self.built = [self] if own else []  # the guide, whose means are drawn anew
        self.train()
        if own and all_trainable:
            names = ("likelihood", "num_classes", "prior", "prior_scale", "noise", "standardize")
            self.config = {"net": self.net.config} | {name: getattr(self, name) for name in names}

    @classmethod
    def from_data(
        cls,
        data: Any,
        hidden_dims: tuple[int, ...] = (50,),
        activation: str = "tanh",
        *,
        target: str | Sequence[str] | None = None,
        **options: Any,
    ) -> BayesianNeuralNetwork:
        """Create a dense network for a table or a convolutional one for images.

        Targets of classes make it categorical: text, booleans, and whole numbers, two in a frame, 0, 1, ... in arrays.
        Printing the program shows the choice; ``likelihood="normal"`` forces regression. The program and its posterior
        keep the encoding of a frame, so fits and queries take frames with the same columns.

        Args:
            data: A data set, a frame with its ``target``, or a table that `deepprob.table` made.
            hidden_dims: Sizes of a dense network's hidden layers.
            activation: Activation of the hidden layers.
            target: The target's name in a frame, or names of several numeric targets.
            options: Other arguments of the constructor.

        Raises:
            TypeError: If the data are neither a data set nor a table nor a frame with its target.
            ValueError: If there are no targets.
        """
        made = data if target is None else table_for(data, target, options.get("likelihood"))
        net, options = network_for(made, hidden_dims, activation, options)
        program = cls(net, **options)
        program.__dict__["origin"] = Origin.of_source(made)
        return program

    def extra_repr(self) -> str:
        return described(self.observation, self.origin.encoding)

    @classmethod
    def example(cls) -> Example:
        """A small dense network that learns the sum of three numbers."""
        x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
        return Example(cls(MLP(3, 1, (5,), "tanh")), (x, x.sum(1, keepdim=True)))

    def draw_weights(self, generator: Generator | None = None) -> dict[str, str]:
        """Reset the guide to narrow distributions at means drawn from the prior; pretrained parts keep their means.

        Biases are drawn as well, because zero biases put the kinks of all rectifiers at the mean of the data.

        Args:
            generator: Source of the draws; None for torch's global generator.

        Returns:
            The scheme by parameter name.
        """
        record = {}
        if not self.shapes:
            self.built = [self]  # draw them when the sizes of lazy layers are known
        with torch.no_grad():
            for i, (name, loc) in enumerate(zip(self.shapes, self.raw_loc, strict=True)):
                if name in self.kept:
                    continue
                loc.copy_(torch.randn(loc.shape, generator=generator))
                record[f"raw_loc.{i}"] = "prior"
            self._start_narrow()
        return record

    def start(self, site: str) -> Tensor | None:
        if (mean := dict(zip(self.shapes, self.raw_loc, strict=True)).get(site)) is None:
            return None
        start: Tensor = mean.detach()
        loc, unit = self._start_prior(site, start)
        return loc + unit * start

    # -- the program ---------------------------------------------------------------------------------------------

    def model(self, *batch: Tensor | None) -> Tensor:
        """Draw weights, dispersion and targets given inputs; returns the targets."""
        inputs, y = self._parts(batch)
        scales = {name: pyro.sample(f"{name}.scale", dist.LogNormal(self.scale_start, 1.0)) for name in self.scaled}
        weights = {}
        for name, like in zip(self.shapes, self.raw_loc, strict=True):
            loc, unit = self._prior(name, like, scales.get(name))
            weights[name] = pyro.sample(name, dist.Normal(loc, unit.expand_as(loc + unit)).to_event(like.dim()))
        dispersion = self._dispersion()
        with self.data_plate(*inputs):
            out = self.outputs(weights, *inputs)
            columns = self.y_loc.numel() if y is None else y.shape[-1]
            check_columns(out.shape[-1], columns, self.num_classes, exactly=y is not None)
            fn = self.observation.distribution(out, loc=self.y_loc, scale=self.y_scale, dispersion=dispersion)
            value: Tensor = pyro.sample("y", fn, obs=y)
        return value

    def guide(self, *batch: Tensor | None) -> None:
        """Draw every global latent site: scales, weights and dispersion."""
        scales = {
            name: pyro.sample(f"{name}.scale", dist.LogNormal(loc, softplus(raw)))
            for name, loc, raw in zip(self.scaled, self.scale_loc, self.scale_raw, strict=True)
        }
        for name, mean, raw in zip(self.shapes, self.raw_loc, self.raw_sd, strict=True):
            loc, unit = self._prior(name, mean, scales.get(name))
            pyro.sample(name, dist.Normal(loc + unit * mean, unit * softplus(raw)).to_event(mean.dim()))
        if self.noise is None and (site := self.observation.dispersion) is not None:
            pyro.sample(site, dist.LogNormal(self.noise_loc[0], softplus(self.noise_raw[0])).to_event(1))

    def outputs(self, weights: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
        """The network's outputs for rows, before the likelihood applies location and scale.

        Args:
            weights: Weights by name, each with the same leading dimensions ``(*K, 1)`` or none.
            inputs: Rows in the user's units, ``(B, ...)`` each.

        Returns:
            Outputs, ``(*K, B, outputs)``.

        Raises:
            ValueError: If the network does not return one row of outputs for each row, or its lazy layers lack sizes.
        """
        if not self.shapes:
            raise ValueError("net has lazy layers without sizes. Fit the program first, or run net(...) on some rows.")
        if self.standardize:
            inputs = tuple(
                (x - getattr(self, loc)) / getattr(self, scale) if x.is_floating_point() else x
                for x, (loc, scale) in zip(inputs, self._unit_names(), strict=True)
            )
        return run_with(self.net, weights, self.shapes, *inputs)

    # -- data ----------------------------------------------------------------------------------------------------

    def adapt(self, *batch: Any) -> None:
        """Take sizes of lazy layers, and means and scales from the training rows; a constant column gets scale 1."""
        if not batch:
            return
        inputs, y = self._parts(batch)
        x_units, y_units = [(torch.zeros(1), torch.ones(1)) for _ in inputs], (self.y_loc, self.y_scale)
        if self.standardize:
            for i, x in enumerate(inputs):
                if x.is_floating_point():
                    x_units[i] = moments(x, 0 if x.dim() == 2 else None)
        if y is not None and (start := self.observation.around(*moments(y, 0))):
            plain = torch.zeros(y.shape[1]), torch.ones(y.shape[1])
            y_units = (start.get("loc", plain[0]), start["scale"]) if self.standardize else plain
        self._set_units(x_units, y_units)
        meet_rows(self.net, self.inputs, [x[:2].to(self.y_loc.device) for x in inputs])
        if not self.shapes:
            self._make_random()
            if self.built:
                self.draw_weights()

    def restore(self) -> None:
        if not self.shapes:
            self._make_random()

    def validate(self, *batch: Any) -> Batch:
        """Check rows and targets, and convert them to the types that the network and the likelihood need.

        Raises:
            ValueError: If an input has no axis of features, or y is outside the likelihood's support.
        """
        if not batch:
            return batch
        inputs, y = self._parts(batch)
        for name, x in zip(self.inputs, inputs, strict=False):
            if x.dim() < 2 and x.is_floating_point():
                raise ValueError(
                    f"{name} must be rows of features, shape (N, D); got shape {tuple(x.shape)}. "
                    f"Reshape one feature to {name}.reshape(-1, 1), or one row to {name}.reshape(1, -1)."
                )
        inputs = as_accepted(self.net, inputs)
        name = "labels y" if self.num_classes else "y"
        return (*inputs,) if y is None else (*inputs, self.observation.validate(name, y))

    def train(self, mode: bool = True) -> BayesianNeuralNetwork:
        """Set the mode; the network itself stays in evaluation mode."""
        super().train(mode)
        self.net.eval()
        return self

    # -- internals -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _make_random(self) -> None:
        """Replace the network's trainable weights by those that the guide draws, once their sizes are known."""
        lazy = has_lazy_parts(self.net)
        weights = {} if lazy else {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        self.shapes = {name: tuple(w.shape) for name, w in weights.items()}
        self.gains, self.fans, self.kept = gains(self.net), fans(self.net, weights), pretrained_names(self.net)
        relative = [(w - loc) / unit for name, w in weights.items() for loc, unit in [self._start_prior(name, w)]]
        self.raw_loc = nn.ParameterList(relative)  # in units of the prior
        for weight in weights.values():
            weight.requires_grad_(False).zero_()  # unused from here on; zeroed so that saved fits do not depend on it
        self.raw_sd = nn.ParameterList([torch.full_like(w, _START_RAW) for w in weights.values()])
        self.scaled = tuple(self.fans) if self.prior == "hierarchical" else ()
        starts = [weights[name].new_full((), math.log(self.prior_scale)) for name in self.scaled]
        self.scale_loc = nn.ParameterList(starts)
        self.scale_raw = nn.ParameterList([torch.full_like(start, _HYPER_RAW) for start in starts])

    @property
    def scale_start(self) -> Tensor:
        """Prior location of the scales, on the program's device."""
        return torch.full_like(self.y_loc.sum(), math.log(self.prior_scale))

    def _prior(self, name: str, like: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and unit (standard deviation) of a weight's prior, given the scale of its matrix."""
        loc = torch.ones_like(like) if name in self.gains else torch.zeros_like(like)
        if self.prior == "normal":
            return loc, torch.ones_like(like) * self.prior_scale
        if scale is None:
            return loc, torch.ones_like(like)
        unit = scale.reshape(*scale.shape, *(1,) * like.dim()) / math.sqrt(self.fans[name])  # (*K, 1, 1, 1)
        return loc, unit * torch.ones_like(like)

    def _start_prior(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and unit of a weight's prior at the scale where a fit starts."""
        known = self.prior == "hierarchical" and name in self.fans
        return self._prior(name, like, like.new_tensor(self.prior_scale) if known else None)

    def _signature(self) -> inspect.Signature:
        return signature_of(self.inputs)

    def _parts(self, batch: Sequence[Any]) -> tuple[list[Tensor], Tensor | None]:
        """The inputs, and y if it is given."""
        number = len(self.inputs)
        return list(batch[:number]), batch[number] if len(batch) > number else None

    def _unit_names(self) -> list[tuple[str, str]]:
        """Names of the buffers with location and scale of every input."""
        places = ["x", *(f"x{i}" for i in range(1, len(self.inputs)))]
        return [(f"{place}_loc", f"{place}_scale") for place in places]

    def _set_units(self, x_units: Sequence[tuple[Tensor, Tensor]], y_units: tuple[Tensor, Tensor]) -> None:
        """Set the standardization, and start a dispersion for every column of y."""
        like = next(self.net.parameters())
        names = [*self._unit_names(), ("y_loc", "y_scale")]
        for pair, values in zip(names, [*x_units, y_units], strict=True):
            for name, value in zip(pair, values, strict=True):
                self.register_buffer(name, value.to(like))
        if self.noise is not None or (site := self.observation.dispersion) is None:
            return
        if not len(self.noise_loc) or self.noise_loc[0].shape != self.y_loc.shape:
            self.noise_loc = nn.ParameterList([torch.full_like(self.y_loc, math.log(_DISPERSION_MEDIANS[site]))])
            self.noise_raw = nn.ParameterList([torch.full_like(self.y_loc, _HYPER_RAW)])

    @torch.no_grad()
    def _start_narrow(self) -> None:
        """Start at narrow distributions, so that a fit finds the function before its uncertainty."""
        starts = {
            self.raw_sd: _START_RAW,
            self.scale_loc: math.log(self.prior_scale),
            self.scale_raw: _HYPER_RAW,
            self.noise_loc: math.log(_DISPERSION_MEDIANS[self.observation.dispersion]),
            self.noise_raw: _HYPER_RAW,
        }
        for parameters, start in starts.items():
            for parameter in parameters:
                parameter.fill_(start)

    def _dispersion(self) -> Tensor | None:
        """The noise in the units of y, or the total count; known or drawn from its prior."""
        if self.noise is not None:
            return torch.ones_like(self.y_loc) * self.noise
        if (site := self.observation.dispersion) is None:
            return None
        loc = torch.full_like(self.noise_loc[0], math.log(_DISPERSION_MEDIANS[site]))
        value: Tensor = pyro.sample(site, dist.LogNormal(loc, _DISPERSION_SD).to_event(1))
        return value * self.y_scale if site == "noise" else value
