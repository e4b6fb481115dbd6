"""Maximum a posteriori: one point, by gradient ascent on the log joint density."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepprob.fitting.callbacks import Callback, Fit, callback_list
from deepprob.fitting.loop_state import LoopState
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.points import check_has_sites
from deepprob.fitting.starting import running_fit, start_fit
from deepprob.fitting.starts import checked_restarts, other_starts
from deepprob.fitting.tiers import compile_choice
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

QUICK = {"epochs": 3, "batch_size": 8}
"""Settings of a short fit, for the contract tests of all routines."""

__all__ = ["QUICK", "init", "map_estimate"]


def init(
    program: Program,
    data: Any = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | str | None = "auto",
    optimizer: str | Optimizer | type[torch.optim.Optimizer] | None = None,
    weights: str = "auto",
    device: str | torch.device = "auto",
    seed: int = 0,
) -> LoopState:
    """The state before the first step, of which `deepprob.inference.svi.step` takes the steps of a loop by hand.

    The arguments are those of `map_estimate`.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If data, program and settings do not fit together.
    """
    state = start_fit(
        program,
        data,
        routine="map_estimate",
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
    check_has_sites(state.instance, "map_estimate")
    return state


def map_estimate(
    program: Program,
    data: Any = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | str | None = "auto",
    optimizer: str | Optimizer | type[torch.optim.Optimizer] | None = None,
    held_out: Any = None,
    weights: str = "auto",
    compile: bool | str = "auto",
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | str = "auto",
    callbacks: Sequence[Callback | Callable[[Fit], object]] = (),
    restarts: int = 1,
) -> Posterior:
    r"""Find the mode of the latent sites given the data: a network with weight decay.

    .. math:: \hat z, \hat\theta = \arg\max_{z, \theta} \; \log p_\theta(x \mid z) + \log p(z)

    with latent sites :math:`z` and the program's parameters :math:`\theta`, if it has any. A normal prior of sd
    :math:`s` is a weight decay of :math:`1 / (N s^2)` per datum. The density is that of the sites' own values: another
    parametrization has another mode. The joint mode of a network's weights and the scales of their prior is at zero,
    so these scales keep their prior medians: with the hierarchical prior of a `BayesianNeuralNetwork`, the weight decay
    is that of ``prior_scale``. `deepprob.inference.laplace` finds scales by the marginal likelihood.

    It is ``svi(program, data, guide="map")``.

    Args:
        program: A `Program` with latent sites.
        data: As in `svi`.
        epochs: Passes over the data. Without ``epochs`` and ``steps`` the fit ends when the density has levelled.
        steps: Gradient steps, in place of ``epochs``.
        batch_size: As in `svi`.
        optimizer: As in `svi`.
        held_out: Data to score after every epoch, as in `svi`.
        weights: As in `svi`.
        compile: As in `svi`.
        device: As in `svi`.
        seed: Seed of weights and shuffle.
        progress: As in `svi`.
        callbacks: As in `svi`.
        restarts: Number of starts, of which the best is kept, as in `svi`.

    Returns:
        A posterior that is a point: its guide is a Delta at the mode, and all draws are equal.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If the program has no latent site, or data, program and settings do not fit together.
        DivergenceError: If too many steps in a row are skipped; it carries the last good posterior.

    References:
        MacKay (1992), A Practical Bayesian Framework for Backpropagation Networks.

    Examples:
        The mode of this conjugate model is the posterior's mean, 2, and every draw is the mode:

        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> fast = Optimizer(learning_rate=0.05)
        >>> posterior = map_estimate(Program.of(model), torch.tensor([2.0, 4.0]), steps=500, optimizer=fast)
        >>> draws = posterior.sample(draws=3)["loc"]
        >>> round(float(draws.mean()), 2), float(draws.std())
        (2.0, 0.0)
    """
    with torch.inference_mode(False):
        callbacks, compile = callback_list(callbacks), compile_choice(compile)
        restarts = checked_restarts(restarts, held_out)
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
        state.config = {**state.config, "restarts": restarts}
        others = other_starts(state, restarts, program, "map", batch_size, weights)
        return running_fit(state, held_out, compile, callbacks, progress is not False, others).run(progress)
