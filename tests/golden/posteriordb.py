"""Programs, data and reference posteriors of posteriordb, for tests and benchmarks.

The programs are written as a reader of a textbook would write them: inputs in their own units, and the priors of the
Stan files. The reference numbers are means and sds of long runs of Stan or nutpie; the folder's README names producer,
version and date. The data lie in the folder ``posteriordb`` of ``DEEPPROB_DATA``.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from deepprob.programs.program import Program

FOLDER = Path(os.environ.get("DEEPPROB_DATA", "")) / "posteriordb"
IS_HERE = bool(os.environ.get("DEEPPROB_DATA")) and FOLDER.is_dir()
WHY_NOT = "needs posteriordb in the folder that DEEPPROB_DATA names"

Draws = dict[str, Tensor]


def _same(draws: Draws) -> Draws:
    return draws


@dataclass(frozen=True)
class Problem:
    """A posterior with reference numbers.

    Attributes:
        folder: The folder of the reference.
        file: The file of the data.
        model: The Pyro model.
        fields: The names of the model's arguments in the file.
        quantities: From draws by site to draws of the reference's parameters.
    """

    folder: str
    file: str
    model: Callable[..., Any]
    fields: tuple[str, ...]
    quantities: Callable[[Draws], Draws] = _same

    def program(self, guide: str = "multivariate_normal") -> Program:
        return Program.of(self.model, guide)

    def data(self) -> tuple[Tensor, ...]:
        """The model's arguments; indices begin at 0."""
        path = FOLDER / "_data" / self.file
        raw = path.read_bytes()
        found = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        tensors = {name: torch.tensor(found[name]) for name in self.fields}
        return tuple(x - 1 if name.endswith("_idx") else x.float() for name, x in tensors.items())

    def reference(self) -> dict[str, tuple[float, float]]:
        """Mean and sd of every parameter, by names such as ``beta[1]``."""
        summary = json.loads((FOLDER / self.folder / "reference_summary.json").read_text())["summary"]
        return {name: (row["mean"], row["sd"]) for name, row in summary.items()}

    def errors(self, draws: Draws) -> dict[str, tuple[float, float]]:
        """How far draws are from the reference, by parameter: means in reference sds, and ratios of the sds."""
        own = {name: x for name, value in self.quantities(draws).items() for name, x in _scalars(name, value)}
        return {
            name: ((float(own[name].double().mean()) - mean) / sd, float(own[name].double().std()) / sd)
            for name, (mean, sd) in self.reference().items()
            if name in own
        }


def _scalars(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """The numbers of one site, by their names in the reference."""
    if value.dim() == 1:
        return [(name, value)]
    return [(f"{name}[{i + 1}]", x) for i, x in enumerate(value.flatten(1).unbind(1))]


# -- regressions ----------------------------------------------------------------------------------------------------


def flat(support: Any = constraints.real, size: int | None = None) -> Any:
    """An improper prior with a constant density: Stan's default."""
    return dist.ImproperUniform(support, (), () if size is None else (size,))


def linear_regression(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([x.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def kid_scores(mom_hs: Tensor, mom_iq: Tensor, kid_score: Tensor) -> None:
    beta = pyro.sample("beta", flat(constraints.real_vector, 3))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("kids", len(kid_score)):
        mean = beta[..., 0] + beta[..., 1] * mom_hs + beta[..., 2] * mom_iq
        pyro.sample("kid_score", dist.Normal(mean, sigma), obs=kid_score)


def kilpisjarvi(x: Tensor, y: Tensor, pmualpha: Tensor, psalpha: Tensor, pmubeta: Tensor, psbeta: Tensor) -> None:
    """Summer temperatures by year: years are not centered, so that slope and intercept correlate at 0.99999."""
    alpha = pyro.sample("alpha", dist.Normal(pmualpha, psalpha))
    beta = pyro.sample("beta", dist.Normal(pmubeta, psbeta))
    sigma = pyro.sample("sigma", flat(constraints.positive))
    with pyro.plate("years", len(x)):
        pyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)


def wells(dist_: Tensor, switched: Tensor) -> None:
    """Households that switch to another well, by its distance in meters."""
    beta = pyro.sample("beta", flat(constraints.real_vector, 2))
    with pyro.plate("households", len(dist_)):
        pyro.sample("switched", dist.Bernoulli(logits=beta[..., 0] + beta[..., 1] * dist_), obs=switched)


def diamonds(x: Tensor, y: Tensor) -> None:
    """Log prices by 24 centered columns; the intercept is at their means."""
    slopes = x[:, 1:] - x[:, 1:].mean(0)
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([slopes.shape[1]]).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = pyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0)))
    with pyro.plate("diamonds", len(y)):
        pyro.sample("y", dist.Normal(intercept + slopes @ b, sigma), obs=y)


def autoregression(y: Tensor) -> None:
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([5]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    before = torch.stack([y[5 - k : len(y) - k] for k in range(1, 6)], 1)
    with pyro.plate("times", len(y) - 5):
        pyro.sample("y", dist.Normal(alpha + before @ beta, sigma), obs=y[5:])


# -- hierarchies ----------------------------------------------------------------------------------------------------


def schools_centered(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def schools_noncentered(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def radon_centered(log_radon: Tensor, log_uppm: Tensor, floor: Tensor, county: Tensor) -> None:
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    sigma_alpha = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with pyro.plate("counties", int(county.max()) + 1):
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, sigma_alpha))
    with pyro.plate("houses", len(log_radon)):
        mean = alpha[county] + beta[0] * log_uppm + beta[1] * floor
        pyro.sample("log_radon", dist.Normal(mean, sigma_y), obs=log_radon)


def radon_noncentered(log_radon: Tensor, log_uppm: Tensor, floor: Tensor, county: Tensor) -> None:
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    sigma_alpha = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with pyro.plate("counties", int(county.max()) + 1):
        alpha = mu_alpha + sigma_alpha * pyro.sample("alpha_raw", dist.Normal(0.0, 1.0))
    with pyro.plate("houses", len(log_radon)):
        mean = alpha[county] + beta[0] * log_uppm + beta[1] * floor
        pyro.sample("log_radon", dist.Normal(mean, sigma_y), obs=log_radon)


def schools_theta(draws: Draws) -> Draws:
    return draws | {"theta": draws["mu"][:, None] + draws["tau"][:, None] * draws["z"]}


# -- others ---------------------------------------------------------------------------------------------------------


def gaussian_process(x: Tensor, y: Tensor) -> None:
    """A marginal Gaussian process; sigma is the variance of the noise."""
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    cover = alpha**2 * (-0.5 * ((x[:, None] - x) / rho) ** 2).exp() + sigma * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), cover), obs=y)


def two_components(y: Tensor) -> None:
    """A mixture of two normals whose means are ordered."""
    mu = pyro.sample("mu", flat(constraints.ordered_vector, 2))
    pyro.factor("prior of mu", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    share = torch.stack([theta, 1.0 - theta], -1)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(share), dist.Normal(mu, sigma)), obs=y)


RADON = ("log_radon", "log_uppm", "floor_measure", "county_idx")
PRIORS = ("pmualpha", "psalpha", "pmubeta", "psbeta")

PROBLEMS: dict[str, Problem] = {
    "sblri": Problem("sblri-blr", "sblri.json", linear_regression, ("X", "y")),
    "sblrc": Problem("sblrc-blr", "sblrc.json", linear_regression, ("X", "y")),
    "kidiq": Problem("kidiq-kidscore_momhsiq", "kidiq.json", kid_scores, ("mom_hs", "mom_iq", "kid_score")),
    "kilpisjarvi": Problem(
        "kilpisjarvi_mod-kilpisjarvi", "kilpisjarvi_mod.json", kilpisjarvi, ("x", "y", *PRIORS)
    ),
    "wells": Problem("wells_data-wells_dist", "wells_data.json", wells, ("dist", "switched")),
    "diamonds": Problem("diamonds-diamonds", "diamonds.json.gz", diamonds, ("X", "Y")),
    "arK": Problem("arK-arK", "arK.json", autoregression, ("y",)),
    "eight_schools_centered": Problem(
        "eight_schools-eight_schools_centered", "eight_schools.json", schools_centered, ("y", "sigma")
    ),
    "eight_schools_noncentered": Problem(
        "eight_schools-eight_schools_noncentered", "eight_schools.json", schools_noncentered, ("y", "sigma"),
        schools_theta,
    ),
    "radon_centered": Problem(
        "radon_mn-radon_hierarchical_intercept_centered", "radon_mn.json", radon_centered, RADON
    ),
    "radon_noncentered": Problem(
        "radon_mn-radon_hierarchical_intercept_noncentered", "radon_mn.json", radon_noncentered, RADON
    ),
    "gp_regr": Problem("gp_pois_regr-gp_regr", "gp_pois_regr.json", gaussian_process, ("x", "y")),
    "low_dim_gauss_mix": Problem(
        "low_dim_gauss_mix-low_dim_gauss_mix", "low_dim_gauss_mix.json", two_components, ("y",)
    ),
}  # fmt: skip
