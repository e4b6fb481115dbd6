"""``python -m deepprob`` is the command ``deepprob``."""

from __future__ import annotations

from deepprob.cli.commands import main

if __name__ == "__main__":
    main()
