"""What a fit leaves behind for those who judge its posterior."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.engine.statistics import signal_to_noise
from deepprob.fitting.gradients import loss_and_gradients
from deepprob.fitting.objectives import objective_named
from deepprob.fitting.state import gather_rows
from deepprob.posteriors.guide_accuracy import GuideAccuracy, guide_accuracy
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.minibatch import Batch, num_rows

_FEWEST_STEPS, _LEAST_SECONDS, _SHARE = 100, 2.0, 0.1
_GRADIENTS = 32  # that tell signal from noise


def accuracy_after(posterior: Posterior, data: Batch, seconds: float) -> GuideAccuracy | None:
    """How far the guide is from the posterior given the training data; see `deepprob.posteriors.guide_accuracy`.

    Args:
        posterior: The posterior of the fit.
        data: The training data, accepted.
        seconds: The time of the fit, of which this takes at most about a tenth, or two seconds
            of processor time.

    Returns:
        None where all latents belong to rows, so that any rows can tell; where the fit was so short that the answer
        would take longer than its steps; or where the answer takes too long, or the program does not give it. A check
        on the training data then looks for itself.
    """
    fitted, steps = posterior._fitted, len(posterior.history.steps["elbo"])
    if fitted.amortized or not fitted.structure.latent or steps < _FEWEST_STEPS:
        return None
    try:
        return guide_accuracy(fitted, data, seed=posterior.seed, seconds=max(_LEAST_SECONDS, _SHARE * seconds))
    except Exception:  # of the program, in runs that a fit does not need
        return None


def gradient_signal(
    posterior: Posterior, data: Batch, batch_size: int, seconds: float, numbers: Tensor | None = None
) -> dict[str, list[float]]:
    """How much of a step's gradient of the ELBO is signal, where the posterior is; by trained parameter.

    Args:
        posterior: The posterior of the fit.
        data: The training data, accepted, or a sample of them.
        batch_size: Rows of a step.
        seconds: The time of the fit, of which this takes at most about a tenth, or two seconds
            of processor time.
        numbers: The numbers of a sample's rows in the data; None for all rows.

    Returns:
        The signal-to-noise ratio of one gradient and its standard error. Parameters without noise are left out, and all
        of them where the fit was too short to pay for it or maximized another objective than the ELBO.
    """
    instance, ends = posterior.instance, time.thread_time() + max(_LEAST_SECONDS, _SHARE * seconds)
    elbo = posterior.config.get("objective", {}).get("name") == "elbo"
    if not elbo or len(posterior.history.steps["elbo"]) < 10 * _GRADIENTS:
        return {}
    params, before, rows = instance.parameters(), instance.snapshot(), num_rows(data)
    shuffled = torch.Generator().manual_seed(posterior.seed)
    found: list[list[torch.Tensor]] = []
    training = instance.program.training
    try:
        instance.program.train()
        with instance.running(), RandomStream(posterior.seed, instance.device).drawing():
            while len(found) < _GRADIENTS and (time.thread_time() < ends or not found):
                chosen = torch.randperm(rows, generator=shuffled)[:batch_size].to(instance.device)
                own = chosen if numbers is None else numbers[chosen]
                args = [*params.values()], gather_rows(data, chosen), own, 1.0
                found.append(loss_and_gradients(instance, objective_named("elbo"), *args)[2])
    except Exception:  # of the program, in runs that a fit does not need
        return {}
    finally:
        instance.program.train(training)
        instance.load(before)
    if len(found) < _GRADIENTS:
        return {}
    columns = zip(instance.constrained(trained=True), zip(*found, strict=True), strict=True)  # in the same order
    ratios = {
        name: signal_to_noise(torch.stack(column).reshape(_GRADIENTS, -1).double().cpu().numpy())
        for name, column in columns
    }
    return {name: [*ratio] for name, ratio in ratios.items() if np.isfinite(ratio).all()}
