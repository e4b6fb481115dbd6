"""Posteriors of svi against reference draws: posteriordb, and the tasks of sbibm written as programs.

Each program is fitted under three guides and two lengths. Means and sds are compared in units of the reference; C2ST is
the cross-validated accuracy of a classifier that tells draws of the fit from reference draws (0.5: alike, 1: disjoint).
A fit is off if a mean is wrong by more than half an sd or an sd by more than a third; the report should flag it.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from common import shown, write_result
from sklearn.model_selection import cross_val_score
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import deepprob as dp
from deepprob.inference import svi
from verdicts.registry import OFF, UNLIKE
from verdicts.truths import density_posterior

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "golden"))

import posteriordb

GUIDES = ("normal", "multivariate_normal", "low_rank")
LENGTHS: tuple[int | None, ...] = (None, 300)  # None is the default length
DRAWS, COMPARED = 20_000, 2_000
BELOW = -1e4


@dataclass(frozen=True)
class Target:
    """A posterior with reference numbers, and with reference draws where there are some.

    Attributes:
        program: Builds the program.
        data: The program's arguments.
        numbers: From draws by site to draws by number.
        moments: Mean and sd of the reference by number.
        draws: Reference draws by number; empty if there are only moments.
    """

    program: Callable[[], dp.Program]
    data: tuple[Any, ...]
    numbers: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    moments: dict[str, tuple[float, float]]
    draws: dict[str, np.ndarray]


def by_number(draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """Draws of single numbers, by names such as ``beta[1]``."""
    found = {}
    for name, value in draws.items():
        if value.dim() == 1:
            found[name] = value
        else:
            found |= {f"{name}[{i + 1}]": x for i, x in enumerate(value.flatten(1).unbind(1))}
    return found


# -- posteriordb ----------------------------------------------------------------------------------------------------


def of_posteriordb(name: str) -> Target:
    problem = posteriordb.PROBLEMS[name]
    folder = problem.folder.replace("eight_schools_centered", "eight_schools_noncentered")  # the same posterior
    file = posteriordb.FOLDER / folder / "draws.npz"
    draws: dict[str, np.ndarray] = {}
    if file.exists():
        with np.load(file) as found:
            values = found["draws"].transpose(1, 0, 2)  # (P, chains, draws)
            draws = dict(zip(map(str, found["names"]), values.reshape(len(values), -1), strict=True))
    reference = problem.reference()
    return Target(problem.program, problem.data(), lambda x: by_number(problem.quantities(x)), reference, draws)


# -- sbibm ----------------------------------------------------------------------------------------------------------


def gaussian_linear(x: Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(torch.zeros(10), 0.1**0.5).to_event(1))
    pyro.sample("x", dist.Normal(theta, 0.1**0.5).to_event(1), obs=x)


def gaussian_mixture(x: Tensor) -> None:
    theta = pyro.sample("theta", dist.Uniform(-10.0, 10.0).expand([2]).to_event(1))
    shape = dist.Categorical(torch.tensor([0.5, 0.5]))
    sd = torch.tensor([[1.0, 1.0], [0.1, 0.1]])
    pyro.sample("x", dist.MixtureSameFamily(shape, dist.Normal(theta[..., None, :], sd).to_event(1)), obs=x)


def two_moons(x: Tensor) -> None:
    """The crescent's density is that of its radius, spread over half a circle; the other half is a steep wall."""
    theta = pyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1))
    first, second = theta[..., 0], theta[..., 1]
    across = x[0] - 0.25 + (first + second).abs() / 2**0.5
    along = x[1] - (second - first) / 2**0.5
    radius = (across**2 + along**2).sqrt()
    wall = -0.5 * (torch.relu(-across) / 0.002) ** 2
    pyro.factor("crescent", dist.Normal(0.1, 0.01).log_prob(radius) - radius.log() + wall.clamp(min=BELOW))


def slcp(x: Tensor) -> None:
    """Four points in the plane; the scales enter by their squares, so that there are four equal modes."""
    theta = pyro.sample("theta", dist.Uniform(-3.0, 3.0).expand([5]).to_event(1))
    pyro.sample("x", slcp_law(theta).expand([*theta.shape[:-1], 4]).to_event(1), obs=x)


def slcp_law(theta: Tensor) -> Any:
    """The law of one point, batch shape ``(*theta.shape[:-1], 1)``."""
    first, second = 1e-4 + theta[..., 2] ** 2, 1e-4 + theta[..., 3] ** 2
    rho = torch.tanh(theta[..., 4])
    zero = torch.zeros_like(first)
    below = torch.stack([rho * second, second * (1 - rho**2).clamp(min=1e-8).sqrt()], -1)
    tril = torch.stack([torch.stack([first, zero], -1), below], -2)
    return dist.MultivariateNormal(theta[..., None, :2], scale_tril=tril[..., None, :, :])


def slcp_target() -> Target:
    """An observation of our own (sbibm's is not in the data folder), with exact draws by importance sampling."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = slcp_law(torch.tensor([0.7, -2.9, -1.0, -0.9, 0.6])).expand([4]).sample()

    def bounds(z: Tensor) -> tuple[Tensor, Tensor]:
        low = torch.tensor([-3.0, -3.0, 0.0, 0.0, -3.0], dtype=torch.float64)
        share = torch.sigmoid(z)
        size = 3.0 - low
        return low + size * share, (share.log() + (1 - share).log() + size.log()).sum(-1)

    def joint(z: Tensor) -> Tensor:
        theta, jacobian = bounds(z)
        return slcp_law(theta).log_prob(x.double()).sum(-1) + jacobian

    start = torch.tensor([0.5, -2.0, -0.5, -0.5, 0.2])
    theta, _ = bounds(walked(density_posterior(joint, start, draws=20 * DRAWS, least=0.005)[:DRAWS], joint))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        signs = torch.ones_like(theta)
        signs[:, 2:4] = torch.randint(2, (len(theta), 2)).double() * 2 - 1
    draws = {name: value.numpy() for name, value in by_number({"theta": theta * signs}).items()}
    return Target(lambda: dp.Program.of(slcp), (x,), by_number, moments_of(draws), draws)


def walked(z: Tensor, log_joint: Callable[[Tensor], Tensor], steps: int = 400) -> Tensor:
    """Points after random-walk Metropolis steps, one chain each: mends what importance sampling left uneven."""
    tril = torch.linalg.cholesky(torch.cov(z.T)) * 2.4 / z.shape[1] ** 0.5
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        now = log_joint(z)
        for _ in range(steps):
            tried = z + torch.randn_like(z) @ tril.T
            then = log_joint(tried)
            taken = torch.rand(len(z)).log() < then - now
            z, now = torch.where(taken[:, None], tried, z), torch.where(taken, then, now)
    return z


def moments_of(draws: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    return {name: (float(value.mean()), float(value.std())) for name, value in draws.items()}


def of_sbibm(task: Callable[..., None], number: int) -> Target:
    folder = Path(os.environ["DEEPPROB_DATA"]) / "sbibm" / task.__name__
    x = torch.tensor(json.loads((folder / "observations.json").read_text())[str(number)]["observation"])
    if task is gaussian_linear:  # its posterior has a closed form, and no file
        samples = x / 2 + 0.05**0.5 * torch.randn(10_000, 10, generator=torch.Generator().manual_seed(number))
    else:
        with np.load(folder / f"reference_{number:02d}.npz") as found:
            samples = torch.tensor(found["samples"])
    draws = {name: value.numpy() for name, value in by_number({"theta": samples}).items()}
    return Target(lambda: dp.Program.of(task), (x,), by_number, moments_of(draws), draws)


TARGETS: dict[str, Callable[[], Target]] = {
    **{f"posteriordb {name}": partial(of_posteriordb, name) for name in posteriordb.PROBLEMS},
    **{
        f"sbibm {task.__name__} {number}": partial(of_sbibm, task, number)
        for task in (gaussian_linear, gaussian_mixture, two_moons)
        for number in (1, 2)
    },
    "slcp, own observation": slcp_target,
}


# -- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One fit against its reference.

    Attributes:
        name: The posterior.
        guide: The guide.
        steps: The steps taken.
        default: Whether the fit chose its length.
        mean: The largest distance of a mean, in reference sds.
        narrowest: The smallest ratio of an sd to the reference's.
        widest: The largest.
        c2st: Accuracy of the classifier; nan without reference draws.
        verdict: That of the report.
        complaints: Checks that failed or raised a caution.
        unchecked: Checks that could not look.
        seconds: Processor time of the fit and the report.
        error: The message, if there is no fit or no report.
    """

    name: str
    guide: str
    steps: int
    default: bool
    mean: float = math.nan
    narrowest: float = math.nan
    widest: float = math.nan
    c2st: float = math.nan
    verdict: str = "error"
    complaints: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    seconds: float = 0.0
    error: str = ""

    @property
    def is_off(self) -> bool:
        return self.mean > OFF or self.narrowest < 1 - UNLIKE or self.widest > 1 + UNLIKE

    @property
    def is_flagged(self) -> bool:
        return self.verdict in ("caution", "fail")


def c2st(own: np.ndarray, reference: np.ndarray) -> float:
    """Cross-validated accuracy of a network that tells two sets of draws apart, ``(draws, numbers)`` each."""
    rng = np.random.default_rng(0)
    size = min(len(own), len(reference), COMPARED)
    both = np.concatenate([x[rng.permutation(len(x))[:size]] for x in (own, reference)])
    labels = np.repeat([0, 1], size)
    width = 10 * both.shape[1]
    network = MLPClassifier((min(width, 100),), max_iter=200, early_stopping=True, random_state=0)
    order = rng.permutation(len(both))
    found = cross_val_score(make_pipeline(StandardScaler(), network), both[order], labels[order], cv=5)
    return float(found.mean())


def one(name: str, target: Target, guide: str, steps: int | None) -> Row:
    began = time.process_time()
    try:
        posterior = svi(target.program(), target.data, guide=guide, steps=steps, progress=False)
        data = target.data if len(target.data) > 1 else target.data[0]
        report = dp.check(posterior, data)
        seconds = time.process_time() - began
        own = target.numbers(posterior.sample(*target.data, draws=DRAWS, seed=1))
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return Row(name, guide, steps or 0, steps is None, error=text[:200])
    names = [name for name in target.moments if name in own]
    means = [abs(float(own[n].double().mean()) - target.moments[n][0]) / target.moments[n][1] for n in names]
    ratios = [float(own[n].double().std()) / target.moments[n][1] for n in names]
    score = math.nan
    if target.draws:
        score = c2st(np.stack([own[n].numpy() for n in names], 1), np.stack([target.draws[n] for n in names], 1))
    return Row(
        *(name, guide, len(posterior.history.steps.get("elbo", ())) or (steps or 0), steps is None),
        *(max(means), min(ratios), max(ratios), score, report.verdict),
        tuple(check.name for check in report.checks if check.verdict in ("caution", "fail")),
        tuple(check.name for check in report.checks if check.verdict == "unchecked"),
        round(seconds, 1),
    )


def compare(only: Sequence[str], out: Path | None, markdown: bool) -> None:
    """Fit, print a line for every fit and the table, and write the figures.

    Raises:
        SystemExit: If the data are not there, or no posterior has the words.
    """
    if not posteriordb.IS_HERE:
        raise SystemExit(f"the table of references {posteriordb.WHY_NOT}.")
    rows = []
    for name, make in TARGETS.items():
        if only and not any(words in name for words in only):
            continue
        target = make()
        for guide in GUIDES:
            for steps in LENGTHS:
                rows.append(row := one(name, target, guide, steps))
                mark = "MISS" if row.is_off and not row.is_flagged else "    "
                found = f"{row.mean:.2f} sds, {row.narrowest:.2f} to {row.widest:.2f}, C2ST {row.c2st:.2f}"
                print(mark, name, guide, row.steps, row.verdict, row.error or found, file=sys.stderr, flush=True)
    if not rows:
        raise SystemExit(f"no posterior has one of the words {list(only)}. Choose from: {', '.join(TARGETS)}.")
    lines = [["posterior", "guide", "steps", "mean, in sds", "sd, ratios", "C2ST", "off", "verdict", "checks"]]
    for r in rows:
        steps_said = f"{r.steps} (default)" if r.default else str(r.steps)
        said = f"{r.mean:.2f}", f"{r.narrowest:.2f} to {r.widest:.2f}", f"{r.c2st:.2f}", "yes" if r.is_off else "no"
        lines.append([r.name, r.guide, steps_said, *said, r.verdict, ", ".join(r.complaints) or r.error])
    print(shown(lines, markdown))
    off = [r for r in rows if r.is_off]
    flagged, found = sum(r.is_flagged for r in off), sum(bool(r.complaints) for r in off)
    near = [r for r in rows if not r.is_off and not r.error]
    print(f"\nflagged: {flagged} of {len(off)} fits that are off ({found} of them by a check that looked)")
    print(f"pass: {sum(r.verdict == 'pass' for r in near)} of {len(near)} fits that are not off")
    if out:
        content = [asdict(r) | {"off": r.is_off, "flagged": r.is_flagged} for r in rows]
        print("written to", write_result(out.stem, {"guides": GUIDES, "rows": content}, "cpu", out.parent))
