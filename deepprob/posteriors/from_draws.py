"""A posterior that holds draws of any origin."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.posteriors.guide_accuracy import guide_accuracy
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.guides import with_prior_guide
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import num_rows
from deepprob.programs.program import Program

_SECONDS = 2.0


def draws_posterior(
    program: Program,
    data: Any,
    chains: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Posterior:
    """Build a posterior that holds draws, from a sampling routine or from other software.

    Args:
        program: The program whose latent sites were drawn; it is copied.
        data: The data that the draws are conditioned on. They are judged by the gradients of the log joint density at
            these data, within about two seconds; see ``Posterior.accuracy``.
        chains: Values by latent site, shape ``(chains, draws, *site)``.
        config: The routine and its settings, as JSON.
        seed: The routine's seed.

    Raises:
        ValueError: If a global latent site is missing, or the shapes disagree.

    Examples:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(y=None):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 3):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> p = draws_posterior(Program.of(model), torch.zeros(3), {"loc": torch.arange(6.0).reshape(2, 3)})
        >>> p.sample(draws=6)["loc"]
        tensor([0., 1., 2., 3., 4., 5.])
    """
    counts = {tuple(v.shape[:2]) for v in chains.values()}
    if len(counts) != 1 or any(v.dim() < 2 for v in chains.values()):
        shapes = ", ".join(f"{name} has {tuple(v.shape)}" for name, v in chains.items()) or "there is no site"
        raise ValueError(
            f"all sites must have the same chains and draws, shape (chains, draws, *site); {shapes}. "
            "Give one chain as value.unsqueeze(0)."
        )
    batch = program.accept(data)
    with RandomStream(seed).drawing():
        instance = ProgramInstance(with_prior_guide(program, chains), batch, num_rows(batch))
    found = Posterior(instance, config=dict(config or {}), seed=seed, chains=chains)
    if not found._fitted.amortized:
        with suppress(Exception):  # of the program; a check says that it could not look
            found.accuracy = guide_accuracy(found._fitted, batch, seed=seed, seconds=_SECONDS)
    return found
