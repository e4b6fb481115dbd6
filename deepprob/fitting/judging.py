"""What a fit leaves behind for those who judge its posterior."""

from __future__ import annotations

from deepprob.posteriors.guide_accuracy import GuideAccuracy, guide_accuracy
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.minibatch import Batch

_FEWEST_STEPS, _STEPS_OF_A_SEARCH, _LEAST_SECONDS, _SHARE = 100, 1000, 2.0, 0.1


def accuracy_after(posterior: Posterior, data: Batch, seconds: float) -> GuideAccuracy | None:
    """How far the guide is from the posterior given the training data; see `deepprob.posteriors.guide_accuracy`.

    Args:
        posterior: The posterior of the fit.
        data: The training data, accepted.
        seconds: The time of the fit, of which this takes at most about a tenth, or two seconds.

    Returns:
        None where all latents belong to rows, so that any rows can tell; where the fit was so short that the answer
        would take longer than its steps; or where the answer takes too long, or the program does not give it. A check
        on the training data then looks for itself.
    """
    fitted, steps = posterior._fitted, len(posterior.history.steps["elbo"])
    if fitted.amortized or not fitted.structure.latent or steps < _FEWEST_STEPS:
        return None
    most, long = max(_LEAST_SECONDS, _SHARE * seconds), steps >= _STEPS_OF_A_SEARCH
    try:
        return guide_accuracy(fitted, data, seed=posterior.seed, seconds=most, search=long)
    except Exception:  # of the program, in runs that a fit does not need
        return None
