"""`compare` ranks posteriors by the density of rows that they have not seen, and puts their verdicts side by side."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader

from deepprob.diagnostics.case import Case, given
from deepprob.diagnostics.check import Array, jsonable, number
from deepprob.diagnostics.document import Document
from deepprob.diagnostics.report import WIDTH, Report, check
from deepprob.errors import whole
from deepprob.posteriors.loo import leave_one_out, predictive_density
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import FunctionProgram

TIE = 2.0  # standard errors
_MANY = 0.3  # of the rows
NOTE = (
    "The expected log predictive density (elpd) is the sum over rows of the log density that a posterior gives a row "
    "it has not seen, in nats; higher is better. The number after ± is the standard error. Differences are paired by "
    "row; one within two standard errors is a tie."
)


@dataclass(frozen=True, eq=False)
class Contender:
    """One posterior in a comparison.

    Attributes:
        name: Its name.
        report: Its report.
        pointwise: The log density of every row that the posterior has not seen, in nats.
        method: How the density was computed: of held-out rows, or by leave-one-out.
        unreliable: Number of rows whose leave-one-out weights are unreliable.
        difference: The sum over rows minus that of the best posterior; zero for the best one.
        difference_se: Its standard error, from the differences of the rows.
    """

    name: str
    report: Report
    pointwise: Array
    method: str
    unreliable: int = 0
    difference: float = 0.0
    difference_se: float = 0.0

    @property
    def elpd(self) -> float:
        """The sum over rows, in nats; higher is better."""
        return float(self.pointwise.sum())

    @property
    def se(self) -> float:
        """The standard error of `elpd`; nan for one row."""
        return _se(self.pointwise)

    @property
    def tied(self) -> bool:
        """Whether the difference is within two standard errors; one row cannot tell."""
        return not abs(self.difference) > TIE * self.difference_se

    @property
    def gap(self) -> str:
        """The difference in words."""
        if self.difference == 0:
            return "no difference"
        gap = f"{number(-self.difference, self.difference_se)} nats less"
        if len(self.pointwise) < 2:
            return f"{gap}, but one row cannot tell"
        return f"{gap}, {'within' if self.tied else 'beyond'} two standard errors"

    @property
    def how(self) -> str:
        """The method, and how many rows are unreliable."""
        return self.method + (f", {self.unreliable} rows unreliable" if self.unreliable else "")


@dataclass(frozen=True, eq=False)
class Comparison(Document):
    """Posteriors in the order of their predictions, the best first.

    Print it, show it in a notebook, or write it with ``save("compare.html")`` or ``save("compare.json")``.

    Attributes:
        contenders: The posteriors.
    """

    contenders: tuple[Contender, ...]

    @property
    def best(self) -> Contender:
        """The posterior with the highest density."""
        return self.contenders[0]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.best.pointwise)

    @property
    def leaders(self) -> tuple[Contender, ...]:
        """The best posterior and those that are tied with it."""
        return tuple(x for x in self.contenders if x.tied)

    @property
    def summary(self) -> str:
        """The result in words: which posterior predicts best, or which are tied, and whether it can be believed."""
        rows = f"over {self.rows} row{'s' * (self.rows != 1)}"
        if len(self.leaders) > 1:
            last = self.leaders[-1]
            text = f"Tie: {_listed([x.name for x in self.leaders])} cannot be told apart {rows}; "
            text += f"{last.name} has {last.gap}." if last.difference else "they do not differ."
        else:
            second = self.contenders[1]
            gap = number(-second.difference, second.difference_se)
            text = f"{self.best.name} predicts best: {gap} nats more than {second.name} {rows}."
        if failed := [x.name for x in self.leaders if x.report.verdict == "fail"]:
            text += f" But the verdict of {_listed(failed)} is fail: do not use it yet."
        if rough := [x.name for x in self.contenders if x.unreliable > _MANY * self.rows]:
            text += f" The densities of {_listed(rough)} are unreliable in many rows: compare on held-out rows."
        return text

    def __getitem__(self, name: str) -> Contender:
        """The posterior with a given name."""
        for contender in self.contenders:
            if contender.name == name:
                return contender
        raise KeyError(f"there is no posterior {name!r}. Choose from: {_listed([x.name for x in self.contenders])}.")

    @property
    def table(self) -> list[list[str]]:
        """Name, verdict, elpd, difference and method of every posterior, below a header."""
        lines = [["", "verdict", "elpd", "difference", "method"]]
        for x in self.contenders:
            gap = "best" if x is self.best else f"{number(x.difference, x.difference_se)}{' (tie)' if x.tied else ''}"
            lines.append([x.name, x.report.verdict, number(x.elpd, x.se), gap, x.how])
        return lines

    @property
    def checks(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """The checks of all reports by name: verdict and number of every posterior, empty where it has none."""
        reports = [{c.name: c for c in x.report.checks} for x in self.contenders]
        names = dict.fromkeys(name for report in reports for name in report)
        return [(n, [(r[n].verdict, r[n].measured) if n in r else ("", "") for r in reports]) for n in names]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.table, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in self.table]
        return "\n".join([*textwrap.wrap(self.summary, WIDTH), "", *lines])

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON types, with the report of every posterior."""
        models = {
            x.name: {
                "elpd": x.elpd,
                "se": x.se,
                "difference": x.difference,
                "difference_se": x.difference_se,
                "tied": x.tied,
                "method": x.method,
                "unreliable_rows": x.unreliable,
                "pointwise": x.pointwise,
                "verdict": x.report.verdict,
                "report": x.report.to_dict(),
            }
            for x in self.contenders
        }
        head = {"format": "deepprob comparison", "schema": 1, "summary": self.summary, "rows": self.rows}
        found: dict[str, Any] = jsonable(head | {"best": self.best.name, "models": models})
        return found

    def to_html(self) -> str:
        """The comparison as one self-contained HTML page without scripts."""
        folder = PackageLoader("deepprob.diagnostics", "")
        environment = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
        page = environment.get_template("compare.html.jinja")
        return page.render(comparison=self, bars=_bars(self.contenders), number=number, note=NOTE)

    def _repr_html_(self) -> str:
        # The frame keeps the page's style apart from the notebook's; the sandbox blocks scripts and requests.
        page = Environment(autoescape=True).from_string(
            '<iframe sandbox srcdoc="{{ page }}" style="width:100%;height:{{ height }}px;border:0" '
            'title="comparison"></iframe>'
        )
        return page.render(page=self.to_html(), height=360 + 130 * len(self.contenders))


def compare(
    *posteriors: Posterior, data: Any = None, names: Sequence[str] | None = None, draws: int = 1000, seed: int = 0
) -> Comparison:
    r"""Rank posteriors by the density that they give to rows they have not seen, with their verdicts side by side.

    .. math:: \Delta = \sum_i \log p_a(y_i) - \log p_b(y_i), \qquad
        \mathrm{se} = \sqrt{B} \, \mathrm{sd}_i [\log p_a(y_i) - \log p_b(y_i)]

    Rows that are not those of the fit are scored as they are. Rows of the fit are left out one by one, by importance
    sampling (PSIS-LOO, see `Posterior.loo`). A difference within two standard errors is a tie.

    Args:
        posteriors: At least two posteriors of programs with the same observed values.
        data: The rows on which to compare, in any form that all programs accept; None if they hold their data.
        names: A name for every posterior; by default those of the programs.
        draws: Number of draws from each posterior for the densities.
        seed: Seed of all random numbers.

    Raises:
        TypeError: If something else than posteriors is given by position.
        ValueError: If there are fewer than two posteriors, their names or rows do not match, they observe different
            values, or a row has no finite density.

    References:
        Vehtari, Gelman, Gabry (2017), Practical Bayesian model evaluation using leave-one-out cross-validation and
        WAIC.
    """
    _check_posteriors(posteriors)
    labels, draws = _labels(posteriors, names), whole("draws", draws, least=25)
    cases = [Case(p, data, seed=seed) for p in posteriors]
    _check_values(cases, labels)
    found = [_contender(*each, data, draws) for each in zip(labels, cases, strict=True)]
    counts = {len(x.pointwise) for x in found}
    if len(counts) > 1:
        sizes = ", ".join(f"{x.name} has {len(x.pointwise)}" for x in found)
        raise ValueError(f"the posteriors must split the data into the same rows; {sizes}. Name the data plates alike.")
    best = max(found, key=lambda x: x.elpd)
    gaps = {x.name: x.pointwise - best.pointwise for x in found}
    found = [replace(x, difference=float(gaps[x.name].sum()), difference_se=_se(gaps[x.name])) for x in found]
    return Comparison(tuple(sorted(found, key=lambda x: -x.difference if x.name != best.name else -math.inf)))


def _contender(name: str, case: Case, data: Any, draws: int) -> Contender:
    posterior, fitted = case.posterior, case.posterior._fitted
    posterior.structure.check_rows()
    batch = fitted.accept(() if data is None else given(case.program.accept(data)))
    overlap, method, unreliable = case.overlap, "held-out rows", 0
    if overlap.relation in ("part", "mixed"):
        raise ValueError(
            f"{int(overlap.shared.sum())} of the {case.rows} rows of data are rows of the fit of {name}, but not all "
            "of its rows. Give rows that are new to every posterior, or all rows of the fit."
        )
    if case.knows_train:
        found = leave_one_out(fitted, batch, fitted.num_stored or draws, case.seed)
        pointwise, method, unreliable = found.contributions, f"leave-one-out ({found.method})", len(found.influential)
    else:
        pointwise = predictive_density(fitted, batch, draws, case.seed)
    if len(bad := np.flatnonzero(~np.isfinite(pointwise))):
        raise ValueError(
            f"row {bad[0]} has no finite density under {name}, and so {len(bad)} of {len(pointwise)} rows. "
            "Look at these rows, or leave them out of data."
        )
    report = replace(check(posterior, data, seed=case.seed), title=name)
    return Contender(name, report, pointwise, method, unreliable)


def _check_posteriors(posteriors: Sequence[Any]) -> None:
    for i, value in enumerate(posteriors):
        if not isinstance(value, Posterior):
            raise TypeError(
                f"compare expects posteriors; got {type(value).__name__} in place {i + 1}. "
                "Give the data by name: compare(a, b, data=...)."
            )
    if len(posteriors) < 2:
        raise ValueError(f"compare needs at least two posteriors; got {len(posteriors)}. Use check for one.")


def _labels(posteriors: Sequence[Posterior], names: Sequence[str] | None) -> list[str]:
    """A distinct name for every posterior."""
    if names is not None:
        if isinstance(names, str) or len(names) != len(posteriors) or len({*map(str, names)}) < len(posteriors):
            raise ValueError(f"names must be {len(posteriors)} different names, one a posterior; got {names!r}.")
        return [str(name) for name in names]
    own = [_name(posterior) for posterior in posteriors]
    return [f"{n} {own[: i + 1].count(n)}" if own.count(n) > 1 else n for i, n in enumerate(own)]


def _name(posterior: Posterior) -> str:
    program = posterior.program
    if not isinstance(program, FunctionProgram):
        return type(program).__name__
    model = program.__dict__["_model"]
    while isinstance(model, functools.partial):  # Pyro's handlers hold a model as an argument
        model = next((x for x in model.args if callable(x) and hasattr(x, "__name__")), model.func)
    return str(getattr(model, "__name__", "program"))


def _check_values(cases: Sequence[Case], names: Sequence[str]) -> None:
    """Refuse densities of different values, whose units differ."""
    if any(len(case.sites) != 1 for case in cases):
        return
    (first, name), *others = zip(cases, names, strict=True)
    kind = _is_discrete(first)
    for case, other in others:
        if kind != _is_discrete(case):
            words = {True: "probabilities", False: "densities"}
            raise ValueError(
                f"{name} gives {words[kind]} and {other} gives {words[not kind]} to the observed values, which are not "
                "comparable. Compare models with the same kind of likelihood."
            )
        if first.batch and len(first.target) == len(case.target) and not _same(first.target, case.target):
            raise ValueError(
                f"{name} observes other values than {other}, such as {first.target.flat[0]:.4g} and "
                f"{case.target.flat[0]:.4g} in the first row, so their densities have different units. "
                "Let both programs observe the same values."
            )


def _same(a: Array, b: Array) -> bool:
    return a.size == b.size and bool(np.allclose(a.ravel(), b.ravel(), rtol=1e-4, atol=1e-6, equal_nan=True))


def _is_discrete(case: Case) -> bool:
    site = case._observed[case.sites[0]]
    return bool(getattr(site["fn"].support, "is_discrete", False))


def _se(values: Array) -> float:
    rows = len(values)
    return math.sqrt(rows) * float(values.std(ddof=1)) if rows > 1 else math.nan


def _bars(contenders: Sequence[Contender]) -> list[tuple[float, float, float]]:
    """Begin, middle and end of the interval of two standard errors around each difference, in percent of a line."""
    spans = [(x.difference, TIE * (x.difference_se if math.isfinite(x.difference_se) else 0.0)) for x in contenders]
    low, high = min(d - s for d, s in spans), max(d + s for d, s in spans)
    scale = 100 / (high - low) if high > low else 0.0
    return [tuple((v - low) * scale for v in (d - s, d, d + s)) for d, s in spans]  # type: ignore[misc]


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
