"""Weight initialization by activation, drawn from one generator and recorded by parameter name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Generator, Tensor, nn

from deepprob.errors import unknown

_RECTIFIERS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}
_SATURATING: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
ACTIVATIONS = _RECTIFIERS | _SATURATING

_Module = TypeVar("_Module", bound=nn.Module)


def activation_module(name: str) -> nn.Module:
    """Create the layer of a named activation.

    Args:
        name: A key of ``ACTIVATIONS``.

    Returns:
        A new layer.

    Raises:
        ValueError: If the name is unknown.

    Examples:
        >>> activation_module("tanh")
        Tanh()
    """
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


def pretrained(module: _Module) -> _Module:
    """Mark a module as pretrained, so that :func:`init_weights` leaves it unchanged.

    Args:
        module: The module, or any part of one.

    Returns:
        The same module.

    Examples:
        >>> net = nn.Sequential(pretrained(nn.Linear(2, 2)), nn.Linear(2, 1))
        >>> sorted(init_weights(net, torch.Generator()))
        ['1.bias', '1.weight']
    """
    module._deepprob_pretrained = True  # type: ignore[assignment]
    return module


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module itself was marked by :func:`pretrained`."""
    return getattr(module, "_deepprob_pretrained", False) is True


def init_weights(module: nn.Module, generator: Generator | None = None) -> dict[str, str]:
    """Redraw a module's weights from one generator.

    A module with a method ``draw_weights(generator)``, such as every network of deepprob, initializes itself; any other
    module uses its ``reset_parameters``. Parameters of modules with neither method and modules marked by
    :func:`pretrained` stay unchanged. With a generator, torch's global random state does not change.

    Args:
        module: A network, or a module with networks and layers anywhere inside.
        generator: Source of the draws; None for torch's global generator.

    Returns:
        The scheme by parameter name.

    Examples:
        The same seed gives the same weights:

        >>> layer, generator = nn.Linear(2, 2), torch.Generator()
        >>> init_weights(layer, generator.manual_seed(0))
        {'weight': 'Linear.reset_parameters', 'bias': 'Linear.reset_parameters'}
        >>> first = layer.weight.clone()
        >>> _ = init_weights(layer, generator.manual_seed(0))
        >>> torch.equal(first, layer.weight)
        True
    """
    if is_pretrained(module):
        return {}
    draw = getattr(module, "draw_weights", None)
    if callable(draw):
        own: dict[str, str] = draw(generator)
        return own
    record = {}
    reset: Callable[[], object] | None = getattr(module, "reset_parameters", None)
    if callable(reset):
        with _seeded(generator, module.parameters(recurse=False)):
            reset()
        scheme = f"{type(module).__name__}.reset_parameters"
        record = {name: scheme for name, _ in module.named_parameters(recurse=False)}
    for name, child in module.named_children():
        inner = init_weights(child, generator)
        record.update({f"{name}.{key}": scheme for key, scheme in inner.items()})
    return record


def can_draw_weights(module: nn.Module) -> bool:
    """Whether :func:`init_weights` would redraw any weight of a module.

    Examples:
        >>> can_draw_weights(nn.Sequential(nn.Linear(2, 2))), can_draw_weights(pretrained(nn.Linear(2, 2)))
        (True, False)
    """
    if is_pretrained(module):
        return False
    own = any(callable(getattr(module, name, None)) for name in ("draw_weights", "reset_parameters"))
    return own or any(map(can_draw_weights, module.children()))


def draw_stack(layers: nn.Sequential, generator: Generator | None = None) -> dict[str, str]:
    r"""Redraw the dense and convolutional layers of a stack, each by the activation that follows it.

    .. math:: w \sim U(-b, b), \qquad b^2 = 6 / n_\text{in} \ \text{(Kaiming, before a rectifier)},
              \quad 6 / (n_\text{in} + n_\text{out}) \ \text{(Glorot, otherwise)}

    where one output sums :math:`n_\text{in}` inputs and one input reaches :math:`n_\text{out}` outputs. Biases
    are zero.

    Args:
        layers: Layers and activations in order.
        generator: Source of the draws; None for torch's global generator.

    Returns:
        The scheme by parameter name.

    References:
        Glorot, Bengio (2010), Understanding the difficulty of training deep feedforward networks.
        He, Zhang, Ren, Sun (2015), Delving deep into rectifiers.

    Examples:
        >>> draw_stack(nn.Sequential(nn.Linear(2, 9), nn.ReLU(), nn.Linear(9, 1)))["0.weight"]
        'kaiming_uniform(relu)'
    """
    record = {}
    stack = list(layers)
    for index, layer in enumerate(stack):
        if is_pretrained(layer):
            continue
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            activation = _next_activation(stack[index + 1 :])
            fan_in, fan_out = _fans(layer)
            rectified = activation in _RECTIFIERS
            square = 6 / fan_in if rectified else 6 / (fan_in + fan_out)
            fill_uniform(layer.weight, math.sqrt(square), generator)
            scheme = "kaiming_uniform" if rectified else "glorot_uniform"
            record[f"{index}.weight"] = f"{scheme}({activation})"
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
                record[f"{index}.bias"] = "zeros"
        elif isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()
            record |= {f"{index}.weight": "ones", f"{index}.bias": "zeros"}
        elif callable(draw := getattr(layer, "draw_weights", None)):
            record |= {f"{index}.{name}": scheme for name, scheme in draw(generator).items()}
    return record


def fill_uniform(parameter: Tensor, bound: float, generator: Generator | None = None) -> None:
    """Fill a parameter from ``U(-bound, bound)``; one seed gives the same values on every device."""
    fresh = torch.empty(parameter.shape, dtype=parameter.dtype, device=_device_of(generator))
    with torch.no_grad():
        parameter.copy_(fresh.uniform_(-bound, bound, generator=generator))


def fill_orthogonal(parameter: Tensor, generator: Generator | None = None) -> None:
    """Fill a parameter with a random orthogonal matrix; one seed gives the same values on every device."""
    fresh = torch.empty(parameter.shape, dtype=parameter.dtype, device=_device_of(generator))
    with torch.no_grad():
        parameter.copy_(nn.init.orthogonal_(fresh, generator=generator))


def _device_of(generator: Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _next_activation(layers: Sequence[nn.Module]) -> str:
    """The first activation before the next layer with weights; "linear" if there is none."""
    for layer in layers:
        for name, activation in ACTIVATIONS.items():
            if type(layer) is activation:
                return name
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            break
    return "linear"


def _fans(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> tuple[float, float]:
    """Number of inputs that one output sums, and number of outputs that one input reaches."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    window, thinning = math.prod(layer.kernel_size), math.prod(layer.stride)
    if isinstance(layer, nn.ConvTranspose2d):  # the stride spreads the inputs: fewer reach one output
        return layer.in_channels * window / thinning, layer.out_channels * window
    return layer.in_channels * window, layer.out_channels * window / thinning


@contextmanager
def _seeded(generator: Generator | None, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Seed torch's global generators from ``generator``, and restore their states afterwards."""
    if generator is None:
        yield
        return
    devices = {parameter.device for parameter in parameters if parameter.device.type == "cuda"}
    used = [torch.default_generator, *(torch.cuda.default_generators[d.index] for d in devices)]
    states = [each.get_state() for each in used]
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    try:
        for each in used:
            each.manual_seed(seed)
        yield
    finally:
        for each, state in zip(used, states, strict=True):
            each.set_state(state)
