"""Processor seconds of a first compilation, by checkout: what a change of the compile path saves or costs.

    python benchmarks/first_compile.py LABEL=CHECKOUT [LABEL=CHECKOUT ...] [--rounds 5] [--program schools ...]

Seconds (user and system, of the process and of the compilers that it starts) are those of a whole fit of one epoch,
as ``benchmarks/compile_time.py`` of the same checkout makes it, in a fresh process: on a machine where nothing was
compiled before, and where torch's compiler ran before but not for this model. Those of a second process, which finds
the code in the cache, count from the start of Python, imports included. Checkouts take turns within a round.
Writes ``benchmarks/results/first_compile.json``.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROGRAMS = "schools", "bnn", "vae", "dmm"
SITUATIONS = "new machine", "first epoch", "second process"


def processor_seconds(*whose: int) -> float:
    """User and system time."""
    used = [resource.getrusage(each) for each in whose]
    return sum(each.ru_utime + each.ru_stime for each in used)


def first_fit(name: str, situation: str) -> float:
    """Processor seconds of the first fit in this process; for a second process, of all that it did."""
    import compile_time
    import torch

    torch.manual_seed(0)
    made = compile_time.PROGRAMS[name]()
    both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    before = 0.0 if situation == "second process" else processor_seconds(*both)
    posterior = compile_time.fit(made, 1, compile=True)[1]
    if not posterior.config["compiled"]:
        raise RuntimeError(f"the fit of {name} was not compiled.")
    return processor_seconds(*both) - before


def in_fresh_process(checkout: Path, name: str, situation: str, folder: Path) -> float:
    """The same in a process of its own, with its caches in a folder."""
    environment = os.environ | {"TMPDIR": str(folder), "XDG_CACHE_HOME": str(folder)}
    environment |= {"PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'benchmarks'}"}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    command = [sys.executable, __file__, "--child", name, situation]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, cwd=folder)
    return float(done.stdout.splitlines()[-1])


def measure(checkout: Path, name: str) -> dict[str, float]:
    """All situations, in a fresh folder."""
    with tempfile.TemporaryDirectory() as path:
        folder, found = Path(path), {}
        for situation in SITUATIONS:
            if situation == "first epoch":
                for compiled in folder.glob("deepprob/compiled/*.pt2"):
                    compiled.unlink()  # leave of a fit what other models leave as well
            found[situation] = in_fresh_process(checkout, name, situation, folder)
    return found


def table(values: dict[str, dict[str, dict[str, list[float]]]]) -> list[list[str]]:
    """One line a situation and checkout: medians by model, and their sum."""
    measured = [name for name in PROGRAMS if all(name in programs for programs in values.values())]
    lines = [["situation", "checkout", *measured, "sum"]]
    for situation in SITUATIONS:
        for label, programs in values.items():
            medians = [statistics.median(programs[name][situation]) for name in measured]
            lines.append([situation, label, *(f"{m:.1f}" for m in medians), f"{sum(medians):.1f}"])
    return lines


def main() -> None:
    """Measure all, round by round; print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", metavar="LABEL=CHECKOUT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--program", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the figures")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(first_fit(*options.child))
        return
    from common import shown, write_result

    checkouts = {label: Path(path).resolve() for label, _, path in (x.partition("=") for x in options.checkouts)}
    values: dict[str, Any] = {label: {} for label in checkouts}
    labels = list(checkouts)
    for turn in range(options.rounds):
        for name in options.program:
            for i in range(len(labels)):
                label = labels[(i + turn) % len(labels)]
                for situation, seconds in measure(checkouts[label], name).items():
                    values[label].setdefault(name, {}).setdefault(situation, []).append(round(seconds, 3))
                    print(f"round {turn + 1}, {name}, {label}, {situation}: {seconds:.1f} s", flush=True)
    print(f"\n{shown(table(values), options.markdown)}\n")
    print(f"written to {write_result('first_compile', [{'seconds': values}], 'cpu', options.out)}")


if __name__ == "__main__":
    main()
