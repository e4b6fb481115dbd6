"""Penalties: terms of a program's loss that are no part of its density."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_collected: list[dict[str, list[Tensor]]] = []


def penalize(name: str, value: Tensor) -> None:
    r"""Add a term to the loss of a fit.

    .. math:: \text{loss} = -\text{bound} + \sum_p \text{penalty}_p

    A model or a guide calls it while it runs. The density, the evidence and the bound do not contain the term, and
    outside of a fit the call has no effect. A fit records the term under its name.

    Args:
        name: Name of the term in the history.
        value: One number, in nats per datum, like the bound.

    Raises:
        ValueError: If the value is not one number.

    Examples:
        A penalty on the size of a parameter moves its estimate from 2 to 1:

        >>> import pyro, torch, pyro.distributions as dist
        >>> from deepprob.inference import svi
        >>> from deepprob.programs import Program
        >>> def model(y):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     penalize("size", loc.square() / 2)
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> posterior = svi(Program.of(model, lambda y: None), torch.tensor([1.0, 3.0]), steps=2000, progress=False)
        >>> round(posterior.parameters()["loc"].item(), 2)
        1.0
    """
    if not isinstance(value, Tensor) or value.shape != ():
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the penalty {name!r} must be a tensor of one number; got {got}. Take its mean over rows.")
    if _collected:
        _collected[-1].setdefault(name, []).append(value)


@contextmanager
def collecting_penalties() -> Iterator[dict[str, list[Tensor]]]:
    """Within this context the penalties of runs are collected by name."""
    _collected.append({})
    try:
        yield _collected[-1]
    finally:
        _collected.pop()
