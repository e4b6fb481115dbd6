"""Programs: what a program is, and how one is run."""

from __future__ import annotations

from deepprob.programs.example import Example
from deepprob.programs.guides import GUIDES
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.penalties import penalize
from deepprob.programs.program import Program
from deepprob.programs.run import Run
from deepprob.programs.tracing import LogDensity, log_density

__all__ = ["GUIDES", "Example", "LogDensity", "Program", "ProgramInstance", "Run", "log_density", "penalize"]
