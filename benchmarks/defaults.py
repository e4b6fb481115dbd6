"""How near to the answer one line ends: ``svi(program, data, guide=...)`` with default arguments.

For posteriors of posteriordb (see ``tests/golden/posteriordb.py``) the reference is long runs of Stan. For programs of
the zoo of Pyro features (``tests/contract/zoo.py``) it is a fit with ten times the steps and averaged parameters. A fit
is near if every mean is within 0.3 reference sds and every sd within 20 %.

Run it as ``DEEPPROB_DATA=folder python benchmarks/defaults.py [--steps 3000] [name ...]``; without the folder, only the
programs of the zoo run. A run of all programs writes ``benchmarks/results/defaults.json``.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "golden"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "contract"))

import posteriordb
import zoo
from common import RESULTS, shown, write_result

import deepprob as dp
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior

POSTERIORS = ("sblri", "sblrc", "kidiq", "kilpisjarvi", "wells", "diamonds")
UNIMODAL: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
    "regression": (zoo.regression, zoo.table),
    "effect_of_each_row": (zoo.effect_of_each_row, zoo.numbers),
    "groups_and_members": (zoo.groups_and_members, zoo.bits),
    "item_response": (zoo.item_response, zoo.bits),
    "scaled_likelihood": (zoo.scaled_likelihood, zoo.table),
    "masked_likelihood": (zoo.masked_likelihood, zoo.incomplete),
    "smooth_path": (zoo.smooth_path, zoo.series),
    "too_many_zeros": (zoo.too_many_zeros, zoo.counts),
    "directions": (zoo.directions, zoo.angles),
    "random_walk": (zoo.random_walk, zoo.series),
}
MEAN, WIDTH = 0.3, 0.2

Numbers = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Row:
    """How far a fit is from its reference.

    Attributes:
        name: The program.
        guide: The guide.
        seconds: Of the fit, compiling included.
        mean: The largest distance of a mean, in reference sds.
        narrowest: The smallest ratio of an sd to the reference's.
        widest: The largest.
        numbers: How many numbers were compared.
    """

    name: str
    guide: str
    seconds: float
    mean: float
    narrowest: float
    widest: float
    numbers: int

    @property
    def is_near(self) -> bool:
        return self.mean <= MEAN and self.narrowest >= 1 - WIDTH and self.widest <= 1 + WIDTH


def timed(program: dp.Program, data: Any, guide: str, **options: Any) -> tuple[Posterior, float]:
    began = time.perf_counter()
    posterior = svi(program, data, guide=guide, progress=False, **options)
    return posterior, time.perf_counter() - began


def row(name: str, guide: str, seconds: float, errors: Numbers) -> Row:
    means, widths = zip(*errors.values(), strict=True)
    return Row(name, guide, round(seconds, 1), max(map(abs, means)), min(widths), max(widths), len(errors))


def of_posteriordb(name: str, guide: str, options: dict[str, Any]) -> Row:
    problem = posteriordb.PROBLEMS[name]
    posterior, seconds = timed(problem.program(), problem.data(), guide, **options)
    return row(name, guide, seconds, problem.errors(posterior.sample(*problem.data(), draws=20_000, seed=1)))


def moments(posterior: Posterior, data: tuple[Tensor, ...]) -> Numbers:
    """Mean and sd of every latent number."""
    draws = posterior.sample(*data, draws=20_000, seed=1)
    return {
        f"{site}[{i}]": (float(x.double().mean()), float(x.double().std()))
        for site, value in draws.items()
        for i, x in enumerate(value.reshape(len(value), -1).unbind(1))
    }


def of_the_zoo(name: str, guide: str, options: dict[str, Any], steps: int) -> Row:
    model, make = UNIMODAL[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        data = make()
    program = dp.Program.of(model)
    posterior, seconds = timed(program, data, guide, **options)
    averaged = dp.Optimizer(average=0.999)
    best, _ = timed(program, data, guide, steps=10 * steps, optimizer=averaged, seed=1)
    own, reference = moments(posterior, data), moments(best, data)
    errors = {n: ((own[n][0] - mean) / sd, own[n][1] / sd) for n, (mean, sd) in reference.items()}
    return row(name, guide, seconds, errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    every = [*(POSTERIORS if posteriordb.IS_HERE else ()), *UNIMODAL]
    parser.add_argument("names", nargs="*", default=every, help="programs; all by default")
    parser.add_argument("--guide", help="multivariate_normal for posteriordb, normal for the zoo without it")
    parser.add_argument("--steps", type=int, help="steps of a fit; the default length without it")
    parser.add_argument("--reference-steps", type=int, default=3000, help="a tenth of the steps of a reference")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the figures; another one for a trial")
    parser.add_argument("--markdown", action="store_true")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    options = {} if chosen.steps is None else {"steps": chosen.steps}
    rows = []
    for name in chosen.names:
        if name in UNIMODAL:
            rows.append(of_the_zoo(name, chosen.guide or "normal", options, chosen.steps or chosen.reference_steps))
        else:
            rows.append(of_posteriordb(name, chosen.guide or "multivariate_normal", options))
        print(f"{name}: {'near' if rows[-1].is_near else 'far'}", file=sys.stderr, flush=True)
    lines = [["program", "numbers", "seconds", "mean, in sds", "sd, ratios", "near"]]
    for r in rows:
        widths = f"{r.narrowest:.2f} to {r.widest:.2f}"
        lines.append(
            [r.name, str(r.numbers), f"{r.seconds:.1f}", f"{r.mean:.2f}", widths, "yes" if r.is_near else "no"]
        )
    print(shown(lines, chosen.markdown))
    if set(chosen.names) == {*POSTERIORS, *UNIMODAL}:
        rows_of_json = [vars(r) | {"near": r.is_near} for r in rows]
        write_result("defaults", {"steps": chosen.steps, "rows": rows_of_json}, "cpu", chosen.out)


if __name__ == "__main__":
    main()
