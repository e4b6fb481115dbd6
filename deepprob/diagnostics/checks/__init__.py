"""All diagnostics, one file per question. `CHECKS` lists them in the order of a report; `EXTRA` are off by default."""

from __future__ import annotations

from deepprob.diagnostics.checks.accuracy import posterior_means, posterior_widths, row_means, row_widths
from deepprob.diagnostics.checks.aggregate import aggregate_posterior
from deepprob.diagnostics.checks.amortization import amortization_gap
from deepprob.diagnostics.checks.calibration import interval_coverage, probability_calibration
from deepprob.diagnostics.checks.chains import effective_draws, rhat_of_chains
from deepprob.diagnostics.checks.collapse import active_dimensions
from deepprob.diagnostics.checks.convergence import elbo_convergence
from deepprob.diagnostics.checks.drift import input_drift
from deepprob.diagnostics.checks.information import code_information
from deepprob.diagnostics.checks.khat import global_khat, local_khat
from deepprob.diagnostics.checks.leakage import data_leakage
from deepprob.diagnostics.checks.loo import influential_rows
from deepprob.diagnostics.checks.modes import agreement_of_restarts, label_switching, other_modes
from deepprob.diagnostics.checks.ood import ood_detection
from deepprob.diagnostics.checks.overfitting import overfitting
from deepprob.diagnostics.checks.pit import pit_uniformity
from deepprob.diagnostics.checks.predictive import posterior_predictive
from deepprob.diagnostics.checks.repeats import repeated_rows
from deepprob.diagnostics.checks.sandwich import evidence_sandwich
from deepprob.diagnostics.checks.scores import predictive_skill
from deepprob.diagnostics.checks.steps import finite_steps
from deepprob.diagnostics.checks.tightness import bound_tightness, global_tightness
from deepprob.diagnostics.checks.weighting import likelihood_weight
from deepprob.diagnostics.diagnostic import Diagnostic

# The order of a report: first the optimization, then the posterior, then its predictions, then the data.
CHECKS: dict[str, Diagnostic] = {
    diagnostic.name: diagnostic
    for diagnostic in (
        finite_steps,
        elbo_convergence,
        rhat_of_chains,
        effective_draws,
        likelihood_weight,
        bound_tightness,
        global_tightness,
        posterior_means,
        posterior_widths,
        global_khat,
        label_switching,
        other_modes,
        agreement_of_restarts,
        row_means,
        row_widths,
        local_khat,
        amortization_gap,
        active_dimensions,
        repeated_rows,
        probability_calibration,
        interval_coverage,
        pit_uniformity,
        predictive_skill,
        posterior_predictive,
        influential_rows,
        overfitting,
        data_leakage,
        input_drift,
        ood_detection,
    )
}

# Checks that a report has only if they are asked for: they take minutes, or are of use for some models only.
EXTRA: dict[str, Diagnostic] = {
    diagnostic.name: diagnostic for diagnostic in (code_information, aggregate_posterior, evidence_sandwich)
}

__all__ = ["CHECKS", "EXTRA"]
