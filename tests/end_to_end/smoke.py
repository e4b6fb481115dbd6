"""Smoke test of an installed deepprob. Run from an empty folder: python smoke.py [ROOT].

The script imports the packages, then fits, checks, saves and loads on little data, first from Python and then by the
command. With ROOT, the packages must come from below that folder, which excludes a checkout or another environment.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

MODULES = ("deepprob", "deepprob.models", "deepprob.inference")


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]).resolve() if arguments else None
    for name in MODULES:
        module = importlib.import_module(name)
        where = Path(str(module.__file__)).resolve()
        print(f"{name}: {where}")
        if root is not None and not where.is_relative_to(root):
            print(f"smoke test failed: {name} must come from below {root}", file=sys.stderr)
            return 1
    with tempfile.TemporaryDirectory() as folder:
        failure = from_python(Path(folder)) or by_command(Path(folder))
    if failure:
        print(f"smoke test failed: {failure}", file=sys.stderr)
    return bool(failure)


def from_python(folder: Path) -> str | None:
    """Fit, check, save and load from Python; return a message if something fails."""
    from deepprob.data import load_data
    from deepprob.diagnostics.report import check
    from deepprob.inference import svi
    from deepprob.models import VAE
    from deepprob.posteriors.posterior import Posterior

    digits = load_data("digits")
    few, unseen = digits.train.rows(slice(0, 64)), digits.test.rows(slice(0, 32))
    posterior = svi(VAE(digits.shape, latent_dim=2, hidden_dims=(8,)), few, epochs=2, progress=False)
    report = check(posterior, unseen, draws=30, particles=30)
    page = report.save(folder / "report.html")
    posterior.save(folder / "posterior")
    loaded = Posterior.load(folder / "posterior")
    gap = (posterior.log_evidence(unseen) - loaded.log_evidence(unseen)).abs().max().item()
    print(f"from Python: verdict {report.verdict}, log evidence differs by {gap:g} after loading")
    if gap > 1e-6:
        return f"the log evidence of the loaded posterior differs by {gap:g}"
    return None if "<img" in Path(page).read_text() else "the report has no picture"


def by_command(folder: Path) -> str | None:
    """Fit and check by the installed command; return a message if something fails."""
    script, run = str(Path(sys.executable).with_name("deepprob")), str(folder / "run")
    fit = ["fit", "vae", "digits", "--epochs", "1", "--latent-dim", "2", "--hidden", "8", "--out", run]
    for arguments, codes in ((fit, (0, 1)), (["check", run], (0, 1)), (["check", str(folder)], (2,))):
        done = subprocess.run([script, *arguments], capture_output=True, text=True, timeout=300, check=False)
        print(f"deepprob {arguments[0]}: exit code {done.returncode}")
        if done.returncode not in codes or "Traceback" in done.stderr:
            return f"deepprob {' '.join(arguments)}\n{done.stdout}{done.stderr}"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
