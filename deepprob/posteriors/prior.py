"""Draws from a program's prior, before a fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepprob.engine.machine import pick_device
from deepprob.engine.random import RandomStream
from deepprob.errors import whole
from deepprob.posteriors.fitted import FittedProgram
from deepprob.programs.guides import with_prior_guide
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import num_rows
from deepprob.programs.program import Program


def sample_prior(
    program: Program,
    data: Any = None,
    *,
    draws: int = 1000,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> dict[str, Tensor]:
    r"""Draw all sites of a program from the prior, before a fit: a prior predictive check needs no posterior.

    .. math:: z \sim p(z), \qquad y \sim p(y \mid z)

    The data give the number of rows and the inputs; observed values may be left out, and are drawn anew if they are
    given. The program keeps the weights of its networks. The caller's program, Pyro's global store and the caller's
    random state do not change.

    Args:
        program: A `Program`; wrap an existing Pyro model with `Program.of`.
        data: The model's arguments, as in a fit; None for a program without arguments.
        draws: Number of draws, K.
        seed: Random seed of the draws.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``.

    Returns:
        Values by site, computed sites included: ``(K, *site)`` for global sites, ``(K, B, *site)`` for local and
        observed sites.

    Raises:
        TypeError: If ``program`` is not a `Program`.
        ValueError: If the program cannot run on the data.

    Examples:
        The variance of the data is that of the mean plus that of the noise:

        >>> import pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal(loc + x, 4.0), obs=y)
        >>> found = sample_prior(Program.of(model), torch.tensor([0.0, 100.0]), draws=20_000)
        >>> found["loc"].shape, found["y"].shape
        (torch.Size([20000]), torch.Size([20000, 2]))
        >>> [round(x) for x in found["y"].mean(0).tolist()], [round(x) for x in found["y"].std(0).tolist()]
        ([0, 100], [5, 5])
    """
    if not isinstance(program, Program):
        raise TypeError(
            f"sample_prior expects a Program; got {type(program).__name__}. Wrap a Pyro model: Program.of(model)."
        )
    draws, seed, place = whole("draws", draws), whole("seed", seed, least=0), pick_device(device)
    batch = program.accept(data)
    with RandomStream(seed, place).drawing():
        instance = ProgramInstance(with_prior_guide(program), batch, num_rows(batch), device=place, check=False)
    instance.program.eval()
    fitted = FittedProgram(instance)
    batch = fitted.accept(() if data is None else (data,))
    with fitted.querying(seed):
        return fitted.prior_draws(batch, instance.num_data, draws)
