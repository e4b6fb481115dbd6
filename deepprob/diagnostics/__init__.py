"""Diagnostics: whether to believe a fit. Every answer is a `Check`, all of them together a `Report`."""

from __future__ import annotations

from deepprob.diagnostics.case import Case, Diagnostic
from deepprob.diagnostics.check import Check, Verdict
from deepprob.diagnostics.checks import CHECKS
from deepprob.diagnostics.pictures import Picture
from deepprob.diagnostics.report import Report

__all__ = ["CHECKS", "Case", "Check", "Diagnostic", "Picture", "Report", "Verdict"]
