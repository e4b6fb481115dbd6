"""Diagnostics: one file per question, every answer a `Check`; `deepprob.report.check` asks all that apply."""

from __future__ import annotations

from deepprob.diagnostics.calibration import intervals_hold, probabilities_come_true
from deepprob.diagnostics.check import Case, Check, Diagnostic, Verdict
from deepprob.diagnostics.collapse import codes_are_used
from deepprob.diagnostics.convergence import elbo_converged
from deepprob.diagnostics.khat import khat_of_global_latents, khat_of_local_latents
from deepprob.diagnostics.novelty import novelty_is_noticed
from deepprob.diagnostics.predictive import replicates_look_alike
from deepprob.diagnostics.scores import predictions_inform
from deepprob.diagnostics.steps import finite_steps
from deepprob.diagnostics.tightness import bound_is_tight

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

__all__ = ["CHECKS", "Case", "Check", "Diagnostic", "Verdict"]
