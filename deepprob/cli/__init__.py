"""The command ``deepprob``."""

from deepprob.cli.commands import main

__all__ = ["main"]
