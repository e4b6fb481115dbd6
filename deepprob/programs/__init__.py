"""Programs: what a program is, and how one is run."""

from __future__ import annotations

from deepprob.programs.guides import GUIDES
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program

__all__ = ["GUIDES", "Program", "ProgramInstance"]
