"""Monte Carlo dropout: the dropout of a network stays active in the fit and in predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepprob.fitting.callbacks import Callback, Fit, callback_list
from deepprob.fitting.intake import check_program
from deepprob.fitting.loop_state import LoopState
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.points import check_has_sites
from deepprob.fitting.starting import running_fit, start_fit
from deepprob.fitting.tiers import compile_choice
from deepprob.networks.dropout import dropout_parts, rate_of
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.copying import copy_with_modules
from deepprob.programs.program import Program

QUICK = {"epochs": 3, "batch_size": 8}
"""Settings of a short fit, for the contract tests of all routines."""

__all__ = ["QUICK", "dropout", "init"]


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

    The arguments are those of `dropout`.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If the program has no dropout, or data, program and settings do not fit together.
    """
    check_program(program, weights, "dropout")
    found = dropout_parts(program)
    if not found:
        raise ValueError(
            "dropout needs a network with dropout layers of a rate above 0, and the program has none; a call of "
            "torch.nn.functional.dropout is no layer. Add one to the network, after an activation: nn.Dropout(0.1); or "
            "from_data(..., dropout=0.1)."
        )
    active: Program = copy_with_modules(program)
    active.active_dropout = True
    state = start_fit(
        active,
        data,
        routine="dropout",
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
    check_has_sites(state.instance, "dropout")
    state.config = {**state.config, "dropout": {name: rate_of(part) for name, part in found.items()}}
    return state


def dropout(
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
) -> Posterior:
    r"""Fit a network with its dropout, which stays active in predictions (Monte Carlo dropout).

    .. math:: \max_z \; \mathbb E_{m \sim \mathrm{Bernoulli}} [\log p(D \mid z, m)] + \log p(z), \qquad
              p(y \mid x) \approx \frac1K \sum_{k=1}^K p(y \mid x, \hat z, m_k)

    with the data :math:`D`, the weights :math:`z` and masks :math:`m` of units. The weights are a point; every draw of
    a query has masks of its own, for every row. The prior is the weight decay. With the rates of the dropout, which no
    data change, it decides how wide the predictions are.

    Active are dropout layers (``nn.Dropout``, ``nn.AlphaDropout``, their kin and your subclasses) and the ``dropout=``
    of torch's recurrent and attention layers. Everything else is in evaluation mode, also in the fit: a call of
    ``torch.nn.functional.dropout`` that depends on ``self.training`` drops nothing. Make it an ``nn.Dropout``.

    Args:
        program: A `Program` with latent sites and a network with dropout, such as `BayesianNeuralNetwork`.
        data: As in `svi`.
        epochs: Passes over the data. Without ``epochs`` and ``steps`` the fit ends when the objective has levelled.
        steps: Gradient steps, in place of ``epochs``.
        batch_size: As in `svi`.
        optimizer: As in `svi`.
        held_out: Data to score after every epoch, as in `svi`.
        weights: As in `svi`.
        compile: As in `svi`.
        device: As in `svi`.
        seed: Seed of weights, shuffle and masks.
        progress: As in `svi`.
        callbacks: As in `svi`.

    Returns:
        A posterior whose guide is a Delta, and whose program keeps its dropout active, also after a load.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If the program has no dropout or no latent site, or data, program and settings do not fit together.
        DivergenceError: If too many steps in a row are skipped; it carries the last good posterior.

    References:
        Gal, Ghahramani (2016), Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning.

    Examples:
        The weights are a point, and the masks make the network's function uncertain:

        >>> from deepprob.models import BayesianNeuralNetwork
        >>> x = torch.linspace(-1.0, 1.0, 50).reshape(-1, 1)
        >>> layers = torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(20, 1)
        >>> net = torch.nn.Sequential(*layers)
        >>> posterior = dropout(BayesianNeuralNetwork(net, prior="normal"), (x, x), steps=200, progress=False)
        >>> float(posterior.sample(draws=9)["3.weight"].std(0).max())
        0.0
        >>> bool(posterior.predict(x, draws=9).epistemic.min() > 0)
        True
    """
    with torch.inference_mode(False):
        callbacks, compile = callback_list(callbacks), compile_choice(compile)
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
        return running_fit(state, held_out, compile, callbacks, progress is not False).run(progress)
