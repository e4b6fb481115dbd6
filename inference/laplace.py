"""The Laplace approximation: a normal distribution around the mode, with the curvature there.

From top to bottom: the state before the fit of the mode (`init`), the approximation at a mode (`approximate`), and the
routine (`laplace`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepprob.engine.random import RandomStream
from deepprob.fitting.at_mode import AtMode
from deepprob.fitting.callbacks import Callback, Fit, callback_list
from deepprob.fitting.judging import accuracy_after
from deepprob.fitting.laplace import Choice, Laplace
from deepprob.fitting.loop_state import LoopState
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.starting import running_fit, start_fit
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.minibatch import Batch
from deepprob.programs.program import Program
from deepprob.programs.setup import facts, forms
from deepprob.programs.structured_guide import AutoStructuredNormal

QUICK = {"epochs": 3, "batch_size": 8}
"""Settings of a short fit, for the contract tests of all routines."""

__all__ = ["QUICK", "approximate", "init", "laplace", "start_at"]

_FITS = 2  # of the mode, the second one with the scales that the first one found
_SEARCHES = 5  # for scales after a fit
_FAR = 0.2  # change of the logarithm of a scale, after which the mode is fitted again


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
    """The state before the fit of the mode. The arguments are those of `laplace`.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If data, program and settings do not fit together.
    """
    state = start_fit(
        program,
        data,
        routine="laplace",
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        objective="elbo",
        guide=AutoStructuredNormal,
        optimizer=optimizer,
        weights=weights,
        device=device,
        seed=seed,
    )
    if state.chunks is not None:
        state.chunks.close()
        raise ValueError(
            "laplace needs all rows at once for the curvature, and these data are read while the fit runs. Give arrays "
            "in memory, such as numpy.array(x), or use svi."
        )
    if state.instance.structure.summed:
        raise ValueError(
            f"laplace cannot sum out {state.instance.structure.summed[0]!r}: it needs the curvature with every site "
            "drawn. Use svi(..., guide='multivariate_normal')."
        )
    return state


def approximate(posterior: Posterior, found: Laplace, data: Batch, rounds: int = _SEARCHES) -> Posterior:
    """Turn the mode that a fit has reached into a normal distribution.

    Args:
        posterior: The mode; its program changes.
        found: The approximation at this mode.
        data: All rows, accepted, on the device.
        rounds: The most searches for scales.

    Returns:
        The posterior.

    Raises:
        ValueError: If the curvature is not that of a maximum.
    """
    instance = posterior.instance
    with torch.inference_mode(False):
        parts, left, _ = found.settle(rounds)
        blocks = found.blocks(parts)
        config = posterior.config | found.facts()
        config |= {"log_marginal_likelihood": found.log_marginal_likelihood(parts, blocks), "nats_to_mode": left}
        values = found.mode.values(found.mode.guide.loc.detach().clone())
        found.mode.guide.take(blocks)
        if found.linearised:
            instance.program.linearise(values)
        instance.adapted = forms(instance.program), facts(instance.program)
        with RandomStream(0, instance.device).drawing():
            instance.dry_run(data)
    record: dict[str, Any] = {"history": posterior.history, "config": config, "seed": posterior.seed}
    made = Posterior(instance, **record, training_rows=posterior.training_rows)
    if not posterior.history.interrupted:
        made.accuracy = accuracy_after(made, data, sum(posterior.history.epochs.get("seconds", ())))
    return made


def start_at(state: LoopState, before: Laplace) -> None:
    """Let a fit of the mode begin where another one ended, with its scales.

    Args:
        state: The state before the fit; it changes.
        before: The approximation of the other fit.
    """
    program: Any = state.instance.program
    program.current_guide.hold(before.scales)
    state.instance.load(before.mode.instance.snapshot())
    for name in before.known:
        program.set_scale(name, getattr(before.mode.program, name))


def laplace(
    program: Program,
    data: Any = None,
    *,
    structure: str = "auto",
    subset: str | Sequence[str] = "all",
    prediction: str = "auto",
    tune: bool = False,
    rank: int = 20,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | str | None = "auto",
    optimizer: str | Optimizer | type[torch.optim.Optimizer] | None = None,
    weights: str = "auto",
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | str = "auto",
    callbacks: Sequence[Callback | Callable[[Fit], object]] = (),
) -> Posterior:
    r"""Approximate the posterior by a normal distribution around its mode.

    .. math:: q(w) = N(\hat w, P^{-1}), \qquad \hat w = \arg\max_w \log p(y, w), \qquad
              P = \sum_i J_i^T F_i J_i - \nabla^2 \log p(\hat w)

    in unconstrained coordinates, with the derivatives :math:`J_i` of the parameters of row i's distribution by the
    weights, and its Fisher information :math:`F_i`: the generalised Gauss-Newton matrix. It replaces the Hessian of the
    log-likelihood, which need not be negative at the mode of a network. The Fisher information has a closed form for
    normal, categorical, Bernoulli, Poisson and other common families; of others it is estimated from drawn
    observations, and ``posterior.config["fisher"]`` then is ``["sampled"]``. A program that is not a network has the
    exact Hessian.

    The mode is fitted by gradient steps, as ``svi`` fits ``guide="map"``, and then approached by Newton steps.

    *Scales.* The joint mode of weights and the scales of their prior is at a scale of zero, so no such mode is taken:
    in a network, positive latent sites (scales, noise) have the values that maximise the marginal likelihood,

    .. math:: \log p(y \mid h) \approx \log p(y, \hat w \mid h) + \tfrac D2 \log 2\pi - \tfrac12 \log\det P(h),

    times their prior density, and the posterior holds them as points. ``tune`` does this for known scales, too, with a
    flat prior of their logarithm. ``posterior.config`` has them as ``"scales"``, and ``"log_marginal_likelihood"``.

    *Prediction.* The network of a `BayesianNeuralNetwork` predicts by its first-order expansion around the mode,
    :math:`f(x; \hat w) + J(x)(w - \hat w)`, the model for which the Gauss-Newton matrix is exact. The network itself
    usually predicts worse at weights far from the mode. Every query of the posterior follows, and so does a save.

    Args:
        program: A `Program` with global latent sites, above all a `BayesianNeuralNetwork`.
        data: The model's arguments, in memory, as for `svi`.
        structure: ``"full"``; ``"kronecker"``, one Kronecker product for the weights and the bias of each linear or
            convolutional layer, with any other weights independent; ``"low_rank"``, the largest eigenvalues of the
            likelihood's curvature and the diagonal of the rest; ``"diagonal"``; ``"auto"`` for ``"kronecker"`` in a
            network with such layers, else ``"full"``.
        subset: ``"all"``; ``"last"`` for the last layer of a network; or names of sites. The others are points.
        prediction: ``"linearised"``; ``"sampled"``, the network at drawn weights; ``"auto"`` for the first where the
            program can.
        tune: Whether to choose the known scales of a `BayesianNeuralNetwork`, the ``prior_scale`` of a normal prior and
            a given ``noise``, by the marginal likelihood. Your values are where the search begins.
        rank: Number of eigenvalues of ``"low_rank"``.
        epochs: Passes over the data of a fit of the mode, as for `svi`. A second fit follows if scales change much.
        steps: Gradient steps, in place of ``epochs``.
        batch_size: Rows per step, as for `svi`.
        optimizer: The optimizer, as for `svi`.
        weights: As for `svi`; ``"keep"`` starts at the program's own weights.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``.
        seed: Seed of weights and shuffle.
        progress: As for `svi`.
        callbacks: As for `svi`; they see every fit of the mode.

    Returns:
        The posterior. ``config["nats_to_mode"]`` is what the log joint can still gain by a Newton step. After Ctrl-C
        the approximation is made where the fit was.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If data, program and settings do not fit together, or the fit has not reached a mode.
        DivergenceError: If too many steps in a row are skipped; it carries the last good mode.

    References:
        MacKay (1992), A Practical Bayesian Framework for Backpropagation Networks.
        Ritter, Botev, Barber (2018), A Scalable Laplace Approximation for Neural Networks.
        Immer, Korzepa, Bauer (2021), Improving Predictions of Bayesian Neural Nets via Local Linearization.
        Daxberger et al. (2021), Laplace Redux.

    Examples:
        The posterior of this conjugate model is N(2, 1/3), and the marginal likelihood is exact:

        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> y = torch.tensor([2.0, 4.0])
        >>> posterior = laplace(Program.of(model), y, steps=200, progress=False)
        >>> draws = posterior.sample(draws=4000)["loc"]
        >>> bool((draws.mean() - 2.0).abs() < 0.05), bool((draws.std() - 3**-0.5).abs() < 0.03)
        (True, True)
        >>> exact = dist.MultivariateNormal(torch.zeros(2), torch.ones(2, 2) + torch.eye(2)).log_prob(y)
        >>> abs(posterior.config["log_marginal_likelihood"] - float(exact)) < 1e-3
        True
    """
    with torch.inference_mode(False):
        choice = Choice(structure, subset, prediction, tune, rank)
        callbacks, announce = callback_list(callbacks), progress is not False

        def state_before_fit() -> LoopState:
            return init(
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

        state = state_before_fit()
        for number in range(_FITS):
            found = Laplace(AtMode(state.instance, state.data), choice)
            found.mode.guide.hold(found.scales)
            posterior = running_fit(state, None, "auto", callbacks, announce).run(progress)
            if number + 1 == _FITS or not found.tuned or posterior.history.interrupted:
                break
            *_, moved = found.settle(_SEARCHES)
            if moved < _FAR:
                break
            state, before = state_before_fit(), found
            start_at(state, before)
        return approximate(posterior, found, state.data)
