"""`lift`: a network with random weights, as a part of any Pyro program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

from deepprob.errors import positive, shown, whole
from deepprob.networks.inputs import has_lazy_parts
from deepprob.networks.lifting import run_with
from deepprob.programs.random_network import RandomNetwork


def lift(
    net: nn.Module | Mapping[str, Any],
    prior: Any = "hierarchical",
    prior_scale: float = 1.0,
    *,
    layers: Any = None,
    name: str = "",
    event_dim: int | Sequence[int] = 1,
) -> LiftedNetwork:
    """Give the weights of a network a prior, for use in any Pyro program.

    The result is called like the network. The first call of a run samples the weights as sites, later calls use the
    same weights. Call it outside of the plate over rows, or `draw` it there, because rows share the weights.

    Args:
        net: The network, or the ``config`` of a deepprob network. It is copied and does not change.
        prior: A name in ``PRIORS`` (see `WeightPrior`), or a mapping from layers to names or pairs of name and scale,
            ``{"last": ("normal", 0.5)}``. Parameters that a mapping does not name are hierarchical.
        prior_scale: Scale of the prior.
        layers: The random layers, by name, pattern or type, or ``"last"``; None for all. All other weights are trained
            as numbers, unless they are frozen.
        name: Prefix of the sites: ``"decoder"`` makes ``"decoder.0.weight"``. Two lifted networks in a program need
            different names.
        event_dim: Number of axes of one row of an input, 3 for an image with channels; several for several inputs. All
            axes before that of the rows are draws.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If a name or a layer is unknown, a number is out of range, or the network cannot have random
            weights.

    Examples:
        The prior of a function is that of the weights, and two calls see one function:

        >>> import torch
        >>> f = lift(nn.Linear(2, 1), name="f")
        >>> def model(x):
        ...     first, second = f(x), f(x)
        ...     return bool((first == second).all())
        >>> trace = pyro.poutine.trace(model).get_trace(torch.zeros(3, 2))
        >>> [n for n in trace.stochastic_nodes], trace.nodes["_RETURN"]["value"]
        (['f.weight.scale', 'f.weight', 'f.bias'], True)
    """
    return LiftedNetwork(net, prior, prior_scale, layers, name, event_dim)


class LiftedNetwork(RandomNetwork):
    """A network whose weights are sites; see `lift`."""

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        prior: Any,
        prior_scale: float,
        layers: Any,
        name: str,
        event_dim: int | Sequence[int],
    ) -> None:
        super().__init__()
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, the prefix of the sites; got {shown(name)}. Write name='net'.")
        sizes = [event_dim] if isinstance(event_dim, int) else list(event_dim)
        self.event_dims = [whole("event_dim", size, least=0) for size in sizes]
        if isinstance(net, nn.Module) and has_lazy_parts(net):
            raise ValueError("net has lazy layers without sizes. Run net(...) on some rows first.")
        self.name = name
        self.hold(net, prior, positive("prior_scale", prior_scale), layers, prefix=f"{name}." if name else "")
        self.train()

    def forward(self, *inputs: Tensor) -> Tensor:
        """The network's outputs for rows, with the weights of this run.

        Args:
            inputs: Rows, ``(B, *event)`` each, or one set of rows for every draw, ``(*K, B, *event)``.

        Returns:
            Outputs, ``(B, ...)``, with leading dimensions where weights or inputs have them.

        Raises:
            ValueError: If it is first called inside of the plate over rows, or the network does not keep the rows.
        """
        return self.run(self.draw(), *inputs)

    def draw(self) -> dict[str, Tensor]:
        """The weights of this run, by parameter: drawn as sites by the first call, looked up by later ones.

        Raises:
            ValueError: If the first call is inside of the plate over rows.
        """
        if any(p.requires_grad for p in self.net.parameters()):
            pyro.module(self.name or "net", self.net)  # trains the weights that are not random
        found = {name: _drawn(self.weights.prefix + name) for name in self.shapes}
        known = {name: value for name, value in found.items() if value is not None}
        if len(known) == len(found):
            return known
        self._check_plates()
        return self.sample_prior()

    def guide(self) -> None:
        """Draw the weights from a mean-field guide relative to the prior, for a guide written by hand."""
        own = nn.ModuleList([self.raw_loc, self.raw_sd, self.scale_loc, self.scale_raw])
        pyro.module(f"{self.name or 'net'}.guide", own)
        self.sample_guide()

    def run(self, weights: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
        """The network's outputs for rows, with given weights.

        Args:
            weights: Weights by parameter, each with leading dimensions ``(*K, 1)`` or none.
            inputs: As for a call.
        """
        sizes = self.event_dims * len(inputs) if len(self.event_dims) == 1 else self.event_dims
        return run_with(self.net, weights, self.shapes, *inputs, event_dims=sizes, check=_checked)

    def _check_plates(self) -> None:
        for handler in _PYRO_STACK:
            if isinstance(handler, IndepMessenger) and handler.dim == -1 and not handler.name.startswith("_"):
                what = repr(self.name) if self.name else type(self.net).__name__
                raise ValueError(
                    f"the lifted network {what} is called inside of plate {handler.name!r}, so every row would have "
                    "weights of its own. Write weights = net.draw() before the plate, and net.run(weights, x) inside."
                )


def _drawn(site: str) -> Tensor | None:
    """The value that this run has already drawn for a site."""
    for handler in reversed(_PYRO_STACK):
        if isinstance(handler, TraceMessenger) and (node := handler.trace.nodes.get(site)) is not None:
            return node["value"]
    return None


def _checked(out: Any, net: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(out, Tensor) or not out.dim() or len(out) != len(x):
        came = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"the lifted network {type(net).__name__} must return one tensor with a row for each of {len(x)} rows; got "
            f"{came}. Wrap it in a module that does, or give event_dim, the number of axes of one row."
        )
    return out
