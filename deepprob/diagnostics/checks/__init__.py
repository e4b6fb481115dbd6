"""Checks: one file a question. `CHECKS` has them all, in the order of a report."""

from __future__ import annotations

from deepprob.diagnostics.case import Diagnostic
from deepprob.diagnostics.checks.calibration import intervals_hold, probabilities_come_true
from deepprob.diagnostics.checks.collapse import codes_are_used
from deepprob.diagnostics.checks.convergence import elbo_converged
from deepprob.diagnostics.checks.khat import khat_of_global_latents, khat_of_local_latents
from deepprob.diagnostics.checks.novelty import novelty_is_noticed
from deepprob.diagnostics.checks.predictive import replicates_look_alike
from deepprob.diagnostics.checks.scores import predictions_inform
from deepprob.diagnostics.checks.steps import finite_steps
from deepprob.diagnostics.checks.tightness import bound_is_tight

# In the order of a report: did the fit work, is the posterior right, are its predictions.
CHECKS: dict[str, Diagnostic] = {
    diagnostic.name: diagnostic
    for diagnostic in (
        finite_steps,
        elbo_converged,
        bound_is_tight,
        khat_of_global_latents,
        khat_of_local_latents,
        codes_are_used,
        probabilities_come_true,
        intervals_hold,
        predictions_inform,
        replicates_look_alike,
        novelty_is_noticed,
    )
}

__all__ = ["CHECKS"]
