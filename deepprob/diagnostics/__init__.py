"""Diagnostics: can a fit be trusted? Each answer is a `Check`; a `Report` holds all of them."""

from __future__ import annotations

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Check, Verdict
from deepprob.diagnostics.checks import CHECKS
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.diagnostics.picture import Picture
from deepprob.diagnostics.report import Report

__all__ = ["CHECKS", "Case", "Check", "Diagnostic", "Picture", "Report", "Verdict"]
