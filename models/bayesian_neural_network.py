"""The Bayesian neural network: any torch network with a distribution over its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import softplus

from deepprob.data import DataSet
from deepprob.errors import positive, unknown
from deepprob.networks.convolutional import ConvEncoder
from deepprob.networks.dense import MLP
from deepprob.networks.lifting import fans, gains, lift, pretrained_names, run_with
from deepprob.networks.likelihood import Likelihood
from deepprob.networks.registry import NETWORKS
from deepprob.programs.example import Example
from deepprob.programs.minibatch import Batch
from deepprob.programs.program import Program

PRIORS = ("hierarchical", "normal")

_START_SD = 1e-2
_HYPER_SD = 0.1
_DISPERSIONS = {"noise": 0.1, "total_count": 10.0, None: 1.0}  # medians of the priors, where a fit starts
_DISPERSION_SD = 1.5  # of the logarithm


class BayesianNeuralNetwork(Program):
    r"""A network whose weights are random variables, for regression, classification and counts.

    .. code-block:: text

        s ~ LogNormal(log prior_scale, 1)        for each matrix of weights              "<name>.scale"
        W_kj ~ N(0, s^2 / fan_in)                weights; biases ~ N(0, 1)               "<name>", the network's own
        sigma ~ LogNormal(log 0.1, 1.5)          noise, in standard deviations of y      "noise"
        r ~ LogNormal(log 10, 1.5)               total count of negative binomials       "total_count"
        y_i ~ N(net(x_i; W), sigma^2)            or Categorical, Bernoulli(logits),      "y", i = 1..N
                                                 Poisson, NegativeBinomial(mean, r)
        q(s), q(sigma), q(r) log-normal; q(W_kj | s) = N(m_kj, v_kj^2) times s / sqrt(fan_in)

    The guide's weights are independent given their scale and grow with it, as they do in the prior: the scale can move
    without every mean having to follow.

    The network given stays as it is: the program works on a copy and runs it as a pure function of the weights, over
    all draws at once. A fit begins at means drawn from the prior, or with ``svi(..., weights="keep")`` at the network's
    own weights. Parameters that are frozen (``requires_grad=False``) stay fixed and have no site, so that a Bayesian
    last layer is a network with the rest frozen, fitted with ``weights="keep"``.

    The network always runs in evaluation mode: dropout is off, as the weights are random already, and a batch norm
    uses the statistics that it came with (its scale and shift are weights like others). One without such statistics is
    refused: it would make the rows depend on each other.

    Data are given and predicted in their own units: `adapt` learns means and scales from the training rows. Counts have
    the mean ``scale * softplus(net(x))``, with the scale at which an output of 0 gives the training rows' mean. The
    variance of a Poisson is its mean, that of a negative binomial is ``mean + mean^2 / total_count``.

    Args:
        net: A network from rows of x to as many numbers per row as y has columns, or classes; or the ``config`` of one
            of our networks.
        likelihood: ``"normal"``, ``"categorical"``, ``"bernoulli"``, ``"poisson"`` or ``"negative_binomial"``.
        num_classes: Number of classes for ``"categorical"``.
        prior: ``"hierarchical"``, as above; or ``"normal"``, all weights and biases ``N(0, prior_scale^2)``.
        prior_scale: See above.
        noise: The noise's standard deviation in the units of y, where it is known; None to learn it.
        standardize: Whether the network sees x, and the noise sees y, less its mean and divided by its standard
            deviation: each column of a table, an image as a whole. Without it counts have a scale of 1.

    Raises:
        TypeError: If the network is none.
        ValueError: If a name is unknown, a number out of range, or the network cannot be lifted.

    References:
        Neal (1996), Bayesian Learning for Neural Networks.
        Blundell, Cornebise, Kavukcuoglu, Wierstra (2015), Weight Uncertainty in Neural Networks.

    Examples:
        Weights are sites under the network's own names, and the network is left intact:

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
    usual_steps = 10_000

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
        self.standardize = bool(standardize)
        self.net = lift(net, taken={"data", "y", self.observation.dispersion or "y"})
        weights = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        whole = len(weights) == len(list(self.net.parameters()))
        self.shapes = {name: tuple(w.shape) for name, w in weights.items()}
        self.gains = gains(self.net)
        self.fans = fans(self.net, weights)
        self.kept = pretrained_names(self.net)
        self.net.requires_grad_(False)  # its place is taken by means and scales of the guide
        self.raw_loc = nn.ParameterList([self._relative(name, w) for name, w in weights.items()])
        with torch.no_grad():
            for weight in weights.values():
                weight.zero_()  # unused from here on; zeroed so that saved fits do not depend on it
        self.raw_sd = nn.ParameterList([torch.full_like(w, _raw(_START_SD)) for w in weights.values()])
        scaled = list(self.fans) if prior == "hierarchical" else []
        self.scaled = tuple(scaled)
        self.scale_loc = nn.ParameterList([torch.full((), math.log(self.prior_scale)) for _ in scaled])
        self.scale_raw = nn.ParameterList([torch.full((), _raw(_HYPER_SD)) for _ in scaled])
        self.noise_loc, self.noise_raw = nn.ParameterList(), nn.ParameterList()
        self._set_units(torch.zeros(1), torch.ones(1), torch.zeros(1), torch.ones(1))
        self._narrow()
        self.train()
        if type(self.net) in NETWORKS.values() and whole:
            self.config = {
                "net": self.net.config,
                "likelihood": likelihood,
                "num_classes": self.num_classes,
                "prior": prior,
                "prior_scale": self.prior_scale,
                "noise": self.noise,
                "standardize": self.standardize,
            }

    @classmethod
    def from_data(
        cls, data: DataSet, hidden_dims: tuple[int, ...] = (50,), activation: str = "tanh", **options: Any
    ) -> BayesianNeuralNetwork:
        """A dense network for a table, a convolutional one for images, with the likelihood that the targets ask for.

        Args:
            data: The data set.
            hidden_dims: Sizes of a dense network's hidden layers.
            activation: Of the hidden layers.
            options: Other arguments of the constructor.

        Raises:
            ValueError: If the data set has no targets.
        """
        if len(data.train.names) < 2:
            raise ValueError(
                f"data set {data.name!r} has no targets to predict. Choose another data set or the model 'vae'."
            )
        classes = data.num_classes
        outputs = classes or data.train.tensors[1][0].numel()
        net: nn.Module = (
            MLP(data.shape[0], outputs, hidden_dims, activation)
            if len(data.shape) == 1
            else ConvEncoder(data.shape, outputs, activation=activation)
        )
        if classes:
            options = {"likelihood": "categorical", "num_classes": classes} | options
        return cls(net, **options)

    @classmethod
    def example(cls) -> Example:
        """A sum of three numbers, to be found by a small dense network."""
        x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
        return Example(cls(MLP(3, 1, (5,), "tanh")), (x, x.sum(1, keepdim=True)))

    def draw_weights(self, generator: Generator | None = None) -> dict[str, str]:
        """Start the guide anew: narrow, at means drawn from the prior; pretrained parts stay.

        Biases are drawn as well: at zero they would put the kinks of all rectifiers at the mean of the data.

        Args:
            generator: Where the draws come from; None for torch's own.

        Returns:
            The scheme by parameter name.
        """
        record = {}
        with torch.no_grad():
            for i, (name, loc) in enumerate(zip(self.shapes, self.raw_loc, strict=True)):
                if name in self.kept:
                    continue
                loc.copy_(torch.randn(loc.shape, generator=generator))
                record[f"raw_loc.{i}"] = "prior"
            self._narrow()
        return record

    # -- the program ---------------------------------------------------------------------------------------------

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw weights and noise, and targets given inputs; returns the targets."""
        prior = dist.LogNormal(self.scale_start, 1.0)
        scales = {name: pyro.sample(f"{name}.scale", prior) for name in self.scaled}
        weights = {}
        for name, like in zip(self.shapes, self.raw_loc, strict=True):
            loc, unit = self._prior(name, like, scales.get(name))
            weights[name] = pyro.sample(name, dist.Normal(loc, unit.expand_as(loc + unit)).to_event(like.dim()))
        dispersion = self._dispersion()
        with self.data_plate(x):
            out = self.outputs(weights, x)
            self._check_columns(out, y)
            fn = self.observation.distribution(out, loc=self.y_loc, scale=self.y_scale, dispersion=dispersion)
            value: Tensor = pyro.sample("y", fn, obs=y)
        return value

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """Draw the weights and all else that the model draws outside of the rows."""
        scales = {
            name: pyro.sample(f"{name}.scale", dist.LogNormal(loc, softplus(raw)))
            for name, loc, raw in zip(self.scaled, self.scale_loc, self.scale_raw, strict=True)
        }
        for name, mean, raw in zip(self.shapes, self.raw_loc, self.raw_sd, strict=True):
            loc, unit = self._prior(name, mean, scales.get(name))
            pyro.sample(name, dist.Normal(loc + unit * mean, unit * softplus(raw)).to_event(mean.dim()))
        if self.noise is None and (site := self.observation.dispersion) is not None:
            pyro.sample(site, dist.LogNormal(self.noise_loc[0], softplus(self.noise_raw[0])).to_event(1))

    def outputs(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The network's outputs for rows, on its own scale.

        Args:
            weights: By name, each with the same leading dimensions ``(*K, 1)``, or none of them.
            x: Rows in the user's units, ``(B, ...)``.

        Returns:
            Outputs, ``(*K, B, outputs)``.

        Raises:
            ValueError: If the network does not return one row of numbers for each row, one for each class or column.
        """
        if self.standardize:
            x = (x - self.x_loc) / self.x_scale
        out = run_with(self.net, weights, self.shapes, x)
        self._check_outputs(out)
        return out

    # -- what the data decide ------------------------------------------------------------------------------------

    def adapt(self, *batch: Any) -> None:
        """Take means and scales from the training rows; a column without variation gets scale 1."""
        if not batch:
            return
        x, y = batch[0], batch[1] if len(batch) > 1 else None
        of_x, of_y = (self.x_loc, self.x_scale), (self.y_loc, self.y_scale)
        if self.standardize:
            of_x = _moments(x, 0 if x.dim() == 2 else None)
        if y is not None and (units := self.observation.around(*_moments(y, 0))):
            plain = torch.zeros(y.shape[1]), torch.ones(y.shape[1])
            of_y = (units.get("loc", plain[0]), units["scale"]) if self.standardize else plain
        self._set_units(*(value.to(self.x_loc.device) for value in (*of_x, *of_y)))

    def validate(self, *batch: Any) -> Batch:
        """Check rows and targets, and bring them to the types that the likelihood wants.

        Raises:
            ValueError: If x is not rows of features, or y cannot be targets of the likelihood.
        """
        if not batch:
            return batch
        x = batch[0]
        if x.dim() < 2:
            raise ValueError(
                f"x must be rows of features, shape (N, D); got shape {tuple(x.shape)}. "
                "Reshape one feature to x.reshape(-1, 1), or one row to x.reshape(1, -1)."
            )
        x = x.to(torch.get_default_dtype())
        if len(batch) == 1:
            return (x,)
        return x, self.observation.validate("labels y" if self.num_classes else "y", batch[1])

    def train(self, mode: bool = True) -> BayesianNeuralNetwork:
        """Set the mode; the network itself stays in evaluation mode."""
        super().train(mode)
        self.net.eval()
        return self

    # -- inside --------------------------------------------------------------------------------------------------

    @property
    def scale_start(self) -> Tensor:
        """The scales' prior location, on the program's device."""
        return torch.full_like(self.x_loc.sum(), math.log(self.prior_scale))

    def _prior(self, name: str, like: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and unit (standard deviation) of a weight's prior, given the scale of its matrix."""
        loc = torch.ones_like(like) if name in self.gains else torch.zeros_like(like)
        if self.prior == "normal":
            return loc, torch.full_like(like, self.prior_scale)
        if scale is None:
            return loc, torch.ones_like(like)
        unit = scale.reshape(*scale.shape, *(1,) * like.dim()) / math.sqrt(self.fans[name])  # (*K, 1, 1, 1)
        return loc, unit * torch.ones_like(like)

    def _relative(self, name: str, weight: Tensor) -> Tensor:
        """A weight in units of its prior, as the guide keeps its mean."""
        weight = weight.detach()
        known = self.prior == "hierarchical" and name in self.fans
        loc, unit = self._prior(name, weight, weight.new_tensor(self.prior_scale) if known else None)
        return (weight - loc) / unit

    def _set_units(self, x_loc: Tensor, x_scale: Tensor, y_loc: Tensor, y_scale: Tensor) -> None:
        """Set the standardisation, and a dispersion for every column of y."""
        for name, value in {"x_loc": x_loc, "x_scale": x_scale, "y_loc": y_loc, "y_scale": y_scale}.items():
            self.register_buffer(name, value)
        if self.noise is not None or (site := self.observation.dispersion) is None:
            return
        if not len(self.noise_loc) or self.noise_loc[0].shape != y_loc.shape:
            self.noise_loc = nn.ParameterList([torch.full_like(y_loc, math.log(_DISPERSIONS[site]))])
            self.noise_raw = nn.ParameterList([torch.full_like(y_loc, _raw(_HYPER_SD))])

    @torch.no_grad()
    def _narrow(self) -> None:
        """Start at narrow distributions: the guide finds the function first, and then how sure it may be."""
        starts = {
            self.raw_sd: _raw(_START_SD),
            self.scale_loc: math.log(self.prior_scale),
            self.scale_raw: _raw(_HYPER_SD),
            self.noise_loc: math.log(_DISPERSIONS[self.observation.dispersion]),
            self.noise_raw: _raw(_HYPER_SD),
        }
        for parameters, start in starts.items():
            for parameter in parameters:
                parameter.fill_(start)

    def _dispersion(self) -> Tensor | None:
        """The noise in the units of y, or the total count; known or drawn from its prior."""
        if self.noise is not None:
            return torch.full_like(self.y_loc, self.noise)
        if (site := self.observation.dispersion) is None:
            return None
        loc = torch.full_like(self.noise_loc[0], math.log(_DISPERSIONS[site]))
        value: Tensor = pyro.sample(site, dist.LogNormal(loc, _DISPERSION_SD).to_event(1))
        return value * self.y_scale if site == "noise" else value

    def _check_outputs(self, out: Tensor) -> None:
        if self.num_classes not in (None, out.shape[-1]):
            raise ValueError(
                f"the network has {out.shape[-1]} outputs, but num_classes={self.num_classes}. Make them equal."
            )
        if self.y_loc.numel() not in (1, out.shape[-1]):
            raise ValueError(
                f"the network has {out.shape[-1]} outputs, but y has {self.y_loc.numel()} columns. Make them equal."
            )

    def _check_columns(self, out: Tensor, y: Tensor | None) -> None:
        if y is not None and self.num_classes is None and out.shape[-1] != y.shape[-1]:
            raise ValueError(
                f"the network has {out.shape[-1]} outputs, but y has {y.shape[-1]} columns. Make them equal."
            )


def _raw(sd: float) -> float:
    """What softplus makes a standard deviation of."""
    return math.log(math.expm1(sd))


def _moments(value: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the rows, or over everything; of what does not vary, 1."""
    value = value.to(torch.get_default_dtype())
    loc, sd = (value.mean(), value.std(unbiased=False)) if axis is None else (value.mean(axis), value.std(axis, False))
    # A float column of one number has a standard deviation of rounding errors.
    return loc, torch.where(sd > 1e-6 * loc.abs(), sd, torch.ones_like(sd))
