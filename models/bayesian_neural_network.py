"""The Bayesian neural network: any torch network with a distribution over its weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import softplus

from deepprob.errors import positive, unknown
from deepprob.networks.dense import MLP
from deepprob.networks.for_data import described, network_for, table_for
from deepprob.networks.inputs import as_accepted, input_names, meet_rows, moments, signature_of
from deepprob.networks.lifting import run_with
from deepprob.networks.registry import NETWORKS
from deepprob.networks.row_noise import GRADIENTS
from deepprob.networks.target_families import NOISE
from deepprob.networks.target_likelihood import TargetLikelihood
from deepprob.programs.example import Example
from deepprob.programs.minibatch import Batch
from deepprob.programs.network_program import NetworkProgram
from deepprob.programs.origin import Origin
from deepprob.programs.random_network import HYPER_RAW, RandomNetwork


class BayesianNeuralNetwork(NetworkProgram, RandomNetwork):
    r"""A network whose weights are random variables, for regression, classification and counts.

    .. code-block:: text

        s ~ LogNormal(log prior_scale, 1)        for each matrix of weights              "<name>.scale"
        W_kj ~ N(0, s^2 / fan_in)                weights; biases ~ N(0, 1)               "<name>", the network's own
        sigma ~ LogNormal(log 0.1, 1.5)          noise, in standard deviations of y      "noise"
        r ~ LogNormal(log 10, 1.5)               total count of negative binomials       "total_count"
        y_i ~ N(net(x_i; W), sigma^2)            or Categorical, Bernoulli(logits),      "y", i = 1..N
                                                 Poisson, NegativeBinomial(mean, r)
        q(s), q(sigma), q(r) log-normal; q(W_kj | s) = N(m_kj, v_kj^2) times s / sqrt(fan_in)

    Other likelihoods and priors have other sites: ``"degrees_of_freedom"``, ``"cutpoints"``, ``"dispersion"``,
    ``"<name>.input_scale"``. Given their scale, the guide's weights are independent and proportional to it, as in the
    prior: the scale can change without new values for all means.

    The program runs a copy of the network as a pure function of the weights, over all draws at once; the original does
    not change. A fit starts at the weights of your own network, or at means drawn from the prior for a network of
    deepprob, such as an `MLP`; ``svi(..., weights="keep")`` and ``"fresh"`` force one. So does a guide by name, such as
    ``guide="normal"``, except for a flow. Frozen parameters (``requires_grad=False``) stay fixed and have no site.
    With ``layers``, the weights of all other layers are trained as numbers, without a prior; ``layers="last"`` makes a
    Bayesian last layer.

    The network always runs in evaluation mode. Dropout is off, because the weights are already random. A batch norm
    uses its stored statistics, and its scale and shift are weights like any other. A batch norm without running
    statistics is an error, because it makes rows depend on each other.

    Data and predictions are in the units of the data: `adapt` takes means and scales from the training rows. Counts
    have the mean ``scale * softplus(net(x))``, with the scale at which an output of 0 gives the training mean. The
    variance of a Poisson is its mean, that of a negative binomial is ``mean + mean^2 / total_count``.

    Args:
        net: A network with one output per column of y or per class, or the ``config`` of a deepprob network. An ordinal
            y needs one output, a heteroscedastic one two per column: all means, then all log-scales.
        likelihood: ``"normal"``, ``"student_t"`` (degrees of freedom learned, too), ``"heteroscedastic_normal"``,
            ``"censored_normal"``, ``"categorical"``, ``"ordinal"`` (cutpoints learned), ``"bernoulli"``, ``"poisson"``
            or ``"negative_binomial"``; or a function from outputs ``(..., B, outputs)``, and a dispersion if it has a
            second argument, to a Pyro distribution of y in its own units. See `TargetLikelihood`.
        num_classes: Number of classes for ``"categorical"`` and ``"ordinal"``.
        prior: ``"hierarchical"``, as above; ``"normal"``, all weights and biases ``N(0, prior_scale^2)``;
            ``"student_t"``; ``"horseshoe"`` (regularized) or ``"plain_horseshoe"``, which turn inputs of a layer off;
            ``"pretrained"``, ``N(w, prior_scale^2)`` around the given weights; or a mapping from layers (name, type,
            pattern, ``"last"``) to these or to pairs of name and scale. Other layers of a mapping are hierarchical. See
            `WeightPrior`.
        prior_scale: Scale of the prior, see above.
        noise: Known standard deviation or scale of the noise, in the units of y; None to learn it.
        standardize: Whether to standardize real inputs (each column of a table, an image as a whole) and the columns
            of y. Without it, counts have a scale of 1.
        limits: The limits ``(low, high)`` of ``"censored_normal"``, in the units of y; None for no limit on one side.
        layers: The random layers: names, types, patterns or ``"last"``; None for all.
        gradients: ``"shared"``, one draw of the weights for all rows of a step; or, for linear and convolutional layers
            in fits with this guide, a draw for every row by ``"local"`` reparameterization or ``"flipout"``, with the
            same expectation and less variance. See `RowNoise`. Other guides and queries share their draws.

    Raises:
        TypeError: If ``net`` is not a network.
        ValueError: If a name or a layer is unknown, a number is out of range, or the network cannot have random
            weights.

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
        likelihood: str | Callable[..., Any] = "normal",
        num_classes: int | None = None,
        prior: str | Mapping[Any, Any] = "hierarchical",
        prior_scale: float = 1.0,
        noise: float | None = None,
        standardize: bool = True,
        limits: Sequence[float | None] | None = None,
        layers: Any = None,
        gradients: str = "shared",
    ) -> None:
        super().__init__()
        if gradients not in GRADIENTS:
            raise unknown("gradients", gradients, GRADIENTS)
        self.gradients = gradients
        self.observation = TargetLikelihood(likelihood, num_classes=num_classes, limits=limits)
        self.likelihood = likelihood
        self.num_classes = self.observation.num_classes
        prior_scale = positive("prior_scale", prior_scale)
        self.noise = None if noise is None else positive("noise", noise)
        if noise is not None and NOISE not in self.observation.shared:
            raise ValueError(
                "noise is only for likelihood='normal', 'student_t' and 'censored_normal'; got "
                f"likelihood={self.observation.name!r}. Leave it out."
            )
        self.limits = self.observation.limits
        self.learned = tuple(one for one in self.observation.shared if noise is None or one is not NOISE)
        self.known_scales = ("prior_scale",) * (prior == "normal") + ("noise",) * (noise is not None)
        self.standardize = bool(standardize)
        taken = {"data", "y", *(one.name for one in self.observation.shared)}
        self.hold(net, prior, prior_scale, layers, taken=taken)
        self.inputs = input_names(self.net)
        self.noise_loc, self.noise_raw = nn.ParameterList(), nn.ParameterList()
        self._set_units([(torch.zeros(1), torch.ones(1)) for _ in self.inputs], (torch.zeros(1), torch.ones(1)))
        self.start_narrow()
        own = type(self.net) in NETWORKS.values()
        self.built = [self] if own and not self.weights.centered else []  # the guide, whose means are drawn anew
        self.train()
        if own and not self.frozen and isinstance(likelihood, str):
            names = ("likelihood", "num_classes", "prior_scale", "noise", "standardize")
            self.config = {"net": self.net.config, "prior": self.weights.described}
            self.config |= {name: getattr(self, name) for name in names}
            chosen = None if layers is None else self.weights.names
            later = {"limits": self.limits, "layers": chosen, "gradients": None if gradients == "shared" else gradients}
            self.config |= {name: value for name, value in later.items() if value is not None}

    @classmethod
    def from_data(
        cls,
        data: Any,
        hidden_dims: tuple[int, ...] = (50,),
        activation: str = "tanh",
        *,
        target: str | Sequence[str] | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> BayesianNeuralNetwork:
        """Create a dense network for a table or a convolutional one for images.

        Targets of classes make it categorical: text, booleans, and whole numbers, two in a frame, 0, 1, ... in arrays.
        Printing the program shows the choice; ``likelihood="normal"`` forces regression. The program and its posterior
        keep the encoding of a frame, so fits and queries take frames with the same columns.

        Args:
            data: A data set, a frame with its ``target``, or a table that `deepprob.table` made.
            hidden_dims: Sizes of a dense network's hidden layers, beside which it has a linear path.
            activation: Activation of the hidden layers.
            target: The target's name in a frame, or names of several numeric targets.
            dropout: Rate of dropout after a dense network's hidden layers, for the routine ``dropout``.
            options: Other arguments of the constructor.

        Raises:
            TypeError: If the data are neither a data set nor a table nor a frame with its target.
            ValueError: If there are no targets.
        """
        made = data if target is None else table_for(data, target, options.get("likelihood"))
        net, options = network_for(made, hidden_dims, activation, options, dropout)
        program = cls(net, **options)
        program.__dict__["origin"] = Origin.of_source(made)
        return program

    @property
    def prior_scale(self) -> Any:
        """The scale of the prior."""
        return self.weights.prior_scale

    @prior_scale.setter
    def prior_scale(self, value: Any) -> None:
        self.weights.rescale(value)

    def extra_repr(self) -> str:
        return described(self.observation, self.origin.encoding)

    @classmethod
    def example(cls) -> Example:
        """A small dense network that learns the sum of three numbers."""
        x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
        return Example(cls(MLP(3, 1, (5,), "tanh")), (x, x.sum(1, keepdim=True)))

    def draw_weights(self, generator: Generator | None = None) -> dict[str, str]:
        if not self.shapes:
            self.built = [self]  # draw them when the sizes of lazy layers are known
        return super().draw_weights(generator)

    def start(self, site: str) -> Tensor | None:
        return RandomNetwork.start(self, site)

    # -- the program ---------------------------------------------------------------------------------------------

    def model(self, *batch: Tensor | None) -> Tensor:
        """Draw weights, dispersion and targets given inputs; returns the targets."""
        inputs, y = self._parts(batch)
        weights = self.sample_prior()
        numbers = self._numbers()
        with self.data_plate(*inputs):
            out = self.outputs(weights, *inputs)
            columns = self.y_loc.numel() if y is None else self.observation.columns(y)
            self.observation.check_outputs(out.shape[-1], columns, exactly=y is not None)
            fn = self.observation.distribution(out, loc=self.y_loc, scale=self.y_scale, numbers=numbers)
            value: Tensor = pyro.sample("y", fn, obs=None if y is None else self.observation.as_events(y, fn))
        return value

    def guide(self, *batch: Tensor | None) -> None:
        """Draw every global latent site: scales, weights and dispersion."""
        self.sample_guide(per_row=self.training and self.gradients != "shared")
        for one, loc, raw in zip(self.learned, self.noise_loc, self.noise_raw, strict=True):
            pyro.sample(one.name, one.distribution(loc, softplus(raw)))

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
        self.weights.check_settled()
        if self.standardize:
            inputs = tuple(
                (x - getattr(self, loc)) / getattr(self, scale) if x.is_floating_point() else x
                for x, (loc, scale) in zip(inputs, self._unit_names(), strict=True)
            )
        noise = self.weights.noise(self.gradients, weights) if self.training else None
        return run_with(self.net, weights, self.shapes, *inputs, noise=noise)

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
        if y is not None and self.observation.has_columns:
            columns = self.observation.columns(y)
            plain = torch.zeros(columns), torch.ones(columns)
            start = self.observation.around(*moments(y, 0)) if self.standardize else {}
            y_units = start.get("loc", plain[0]), start.get("scale", plain[1])
        self._set_units(x_units, y_units)
        meet_rows(self.net, self.inputs, [x[:2].to(self.y_loc.device) for x in inputs])
        if not self.shapes:
            self.make_random()
            if self.built:
                self.draw_weights()

    def restore(self) -> None:
        if not self.shapes:
            self.make_random()

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
        return (*inputs,) if y is None else (*inputs, self.observation.validate(y))

    # -- internals -----------------------------------------------------------------------------------------------

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
        starts = [start.to(like) for start in self._number_starts()]
        if [x.shape for x in self.noise_loc] != [x.shape for x in starts]:
            self.noise_loc = nn.ParameterList(starts)
            self.noise_raw = nn.ParameterList([torch.full_like(start, HYPER_RAW) for start in starts])

    @torch.no_grad()
    def start_narrow(self) -> None:
        super().start_narrow()
        for loc, raw, start in zip(self.noise_loc, self.noise_raw, self._number_starts(), strict=True):
            loc.copy_(start)
            raw.fill_(HYPER_RAW)

    def _number_starts(self) -> list[Tensor]:
        """Locations of the priors of the numbers that all rows share."""
        return [one.start(self.y_loc.numel(), self.num_classes) for one in self.learned]

    def _numbers(self) -> dict[str, Tensor]:
        """The numbers that all rows share, known or drawn from their priors; noise in the units of y."""
        numbers = {} if self.noise is None else {"noise": torch.ones_like(self.y_loc) * self.noise}
        for one, start in zip(self.learned, self._number_starts(), strict=True):
            value: Tensor = pyro.sample(one.name, one.distribution(start.to(self.y_loc), one.spread))
            numbers[one.name] = value * self.y_scale if one.scaled else value
        return numbers
