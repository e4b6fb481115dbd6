"""Does an installed deepprob work? Run from an empty folder: python smoke.py [ROOT].

With ROOT, the package must also have been imported from somewhere below it, so that a checkout
or another environment cannot stand in for the one that is meant.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

MODULES = ("deepprob", "deepprob.models", "deepprob.inference")


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]).resolve() if arguments else None
    for name in MODULES:
        module = importlib.import_module(name)
        where = Path(str(module.__file__)).resolve()
        print(f"{name}: {where}")
        if root is not None and not where.is_relative_to(root):
            print(f"smoke test failed: {name} should come from below {root}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
