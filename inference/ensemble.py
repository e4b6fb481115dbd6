"""Deep ensembles: several modes from random starts, all trained in one vectorized step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepprob.errors import whole
from deepprob.fitting.callbacks import Callback, Fit, callback_list
from deepprob.fitting.loop_state import LoopState
from deepprob.fitting.members import MembersFit, bootstrapped
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.points import check_common_buffers, check_global_sites
from deepprob.fitting.starting import running_fit, start_fit
from deepprob.fitting.starts import batch_of, other_starts
from deepprob.fitting.tiers import compile_choice
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

QUICK = {"epochs": 3, "batch_size": 8, "members": 3}
"""Settings of a short fit, for the contract tests of all routines."""

__all__ = ["QUICK", "ensemble", "init"]


def init(
    program: Program,
    data: Any = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | str | None = "auto",
    optimizer: str | Optimizer | type[torch.optim.Optimizer] | None = None,
    weights: str = "fresh",
    device: str | torch.device = "auto",
    seed: int = 0,
) -> LoopState:
    """The state of the first member before its first step.

    `deepprob.inference.svi.step` takes the steps of a loop by hand. The arguments are those of `ensemble`.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If data, program and settings do not fit together.
    """
    state = start_fit(
        program,
        data,
        routine="ensemble",
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        objective="elbo",
        guide="map",
        optimizer=optimizer,
        weights=weights,
        device=device,
        seed=seed,
    )
    check_global_sites(state, "ensemble")
    return state


def ensemble(
    program: Program,
    data: Any = None,
    *,
    members: int = 5,
    bootstrap: bool = False,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | str | None = "auto",
    optimizer: str | Optimizer | type[torch.optim.Optimizer] | None = None,
    weights: str = "fresh",
    compile: bool | str = "auto",
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | str = "auto",
    callbacks: Sequence[Callback | Callable[[Fit], object]] = (),
) -> Posterior:
    r"""Fit a deep ensemble: modes of the log joint density, each from its own random start.

    .. math:: p(y \mid x) \approx \frac1M \sum_{m=1}^M p(y \mid x, \hat z_m), \qquad
              \hat z_m = \text{the mode of } \log p(D \mid z) + \log p(z) \text{ that start } m \text{ reaches}

    with the data :math:`D` and :math:`M` members. The members take every step together, in one vectorized step on the
    same rows. The posterior holds one chain of one draw for each member; predictions are those of the mixture, and
    their epistemic part is the spread of the members. Modes are no draws: the spread is that of the starts, and within
    one mode there is none. Priors matter as in `map_estimate`.

    Args:
        program: A `Program` whose trained numbers are all latent sites, such as `BayesianNeuralNetwork`.
        data: As in `svi`.
        members: Number of members, M.
        bootstrap: Whether every member has its own weights of the rows: how often each row is among N rows drawn with
            replacement. The members then differ by the data, too.
        epochs: Passes over the data. Without ``epochs`` and ``steps`` the fit ends when the mean of the members'
            densities has levelled.
        steps: Gradient steps, in place of ``epochs``.
        batch_size: As in `svi`.
        optimizer: As in `svi`.
        weights: ``"fresh"`` draws random weights for every member, except where marked by `pretrained`; ``"auto"`` and
            ``"keep"`` as in `svi`, for members that start at your weights.
        compile: As in `svi`.
        device: As in `svi`.
        seed: Seed of weights, shuffle and resampling.
        progress: As in `svi`; it shows the member that leads. A fit that skipped steps ends with a warning that names
            the members. One that is out, after too many in a row, is not in the posterior.
        callbacks: As in `svi`; they see the member that leads.

    Returns:
        The posterior, which holds draws: ``posterior.chains[site]`` has shape ``(M, 1, *site)``.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If the program has no latent site, has sites for every row, or trains parameters that are not sites;
            or if data, program and settings do not fit together.
        DivergenceError: If all members skip too many steps in a row; it carries the last good posterior.

    References:
        Lakshminarayanan, Pritzel, Blundell (2017), Simple and Scalable Predictive Uncertainty Estimation using Deep
        Ensembles.

    Examples:
        This density has two modes of nearly the same height, and the members find both:

        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     root = pyro.sample("root", dist.Normal(0.0, 3.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(root**2, 0.5), obs=y)
        >>> posterior = ensemble(Program.of(model), torch.tensor([3.9, 4.1]), members=8, steps=500, progress=False)
        >>> posterior.chains["root"].shape, posterior.chains["root"].round(decimals=1).abs().unique()
        (torch.Size([8, 1]), tensor([2.]))
        >>> sorted(posterior.chains["root"].sign().unique().tolist())
        [-1.0, 1.0]
    """
    with torch.inference_mode(False):
        callbacks, compile = callback_list(callbacks), compile_choice(compile)
        members = whole("members", members)
        state = init(
            program,
            data,
            epochs=epochs,
            steps=steps,
            batch_size=batch_size,
            optimizer=optimizer,
            weights=weights,
            device=device,
            seed=seed,
        )
        state.config = {**state.config, "members": members, "bootstrap": bool(bootstrap)}
        batch = batch_of(state)
        others = other_starts(state, members, program, "map", batch_size, weights, "members")
        if bootstrap:
            others = bootstrapped(state, others)
        kind = functools.partial(MembersFit, program=program, batch=batch)
        fit = running_fit(state, None, compile, callbacks, progress is not False, others, kind)
        check_common_buffers(state, "ensemble")
        return fit.run(progress)
