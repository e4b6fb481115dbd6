"""`check` runs every diagnostic that applies to a posterior; `Report` holds the checks and the verdict."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader

from deepprob.diagnostics.case import REFUSALS, Case, Diagnostic
from deepprob.diagnostics.check import Check, Verdict, jsonable, number, worst
from deepprob.diagnostics.checks import CHECKS
from deepprob.diagnostics.pictures import Picture, pictures
from deepprob.programs.minibatch import num_rows

if TYPE_CHECKING:
    from deepprob.posteriors.posterior import Posterior


ALPHA = 0.05
WIDTH = 100
NOTE = (
    "The number after ± is the standard error. The checks that are statistical tests share a false-alarm rate of 5% "
    "(Bonferroni): if the posterior is exact and the model is correct, at most one report in twenty has another "
    "verdict than pass."
)


@dataclass(frozen=True)
class Report:
    """The checks of a posterior with their overall verdict, pictures and the facts of the fit.

    The verdict is that of the worst check; one that could not look counts as a caution. Each of the ``m`` checks that are statistical tests has the
    level ``0.05 / m``, so that together they raise a false alarm at most one time in twenty. The other checks have
    thresholds that an exact posterior does not reach.

    Args:
        checks: The checks.
        title: Names the posterior and the data.
        facts: Tables by heading: versions, seed, configuration.
        draw: Makes the pictures when they are needed.

    Examples:
        >>> fine = Check("a", 0.0, None, None, "pass", "The value is small.")
        >>> high = Check("b", 1.0, 0.1, 0.5, "caution", "The value is high.", "Look at it.")
        >>> Report((fine, high), "my fit").verdict
        'caution'
        >>> print(Report((fine,), "my fit"))
        PASS · my fit
        The only check passed.
        <BLANKLINE>
        pass     a                              0
                 The value is small.
    """

    checks: tuple[Check, ...]
    title: str
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    draw: Callable[[], Sequence[Picture]] = field(default=tuple, repr=False, compare=False)

    @property
    def verdict(self) -> Verdict:
        """The verdict of the worst check."""
        return worst(check.verdict for check in self.checks)

    @property
    def summary(self) -> str:
        """The verdict in one sentence."""
        if not self.checks:
            return "No check applies."
        if all(check.verdict == "pass" for check in self.checks):
            return f"All {len(self.checks)} checks passed." if len(self.checks) > 1 else "The only check passed."
        parts = []
        for verdict, words in (("fail", "failed"), ("caution", "raised a caution"), ("unchecked", "could not look")):
            if names := [check.name for check in self.checks if check.verdict == verdict]:
                parts.append(f"{len(names)} {words} ({'; '.join(names)})")
        parts = [", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts
        return f"Of {len(self.checks)} checks, {' and '.join(parts)}."

    def __getitem__(self, name: str) -> Check:
        """The check with a given name."""
        for check in self.checks:
            if check.name == name:
                return check
        names = "; ".join(check.name for check in self.checks) or "none"
        raise KeyError(f"the report has no check {name!r}. It has: {names}.")

    def __str__(self) -> str:
        lines = textwrap.wrap(f"{self.verdict.upper()} · {self.title}", WIDTH)
        lines += [*textwrap.wrap(self.summary, WIDTH), ""]
        for check in self.checks:
            limit = f"  ({check.limit})" if check.limit else ""
            lines.append(f"{check.verdict + ' ':<9}{check.name + ' ':<31}{check.measured}{limit}".rstrip())
            lines += _indented(check.reading)
            if check.next_step:
                lines += _indented(f"Next: {check.next_step}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report without pictures, as JSON types."""
        return {
            "format": "deepprob report",
            "schema": 1,
            "verdict": self.verdict,
            "title": self.title,
            "summary": self.summary,
            "checks": [check.to_dict() for check in self.checks],
            **jsonable(self.facts),
        }

    def to_html(self) -> str:
        """The report as one self-contained HTML page with pictures and without scripts."""
        folder = PackageLoader("deepprob.diagnostics", "")
        environment = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
        tables = [(heading, list(_flat(rows))) for heading, rows in self.facts.items()]
        numbers = [(c.name, "; ".join(f"{k}: {v}" for k, v in _flat(c.to_dict()["details"]))) for c in self.checks]
        return environment.get_template("report.html.jinja").render(
            report=self,
            pictures=self.draw(),
            tables=[*tables, ("Details of the checks", numbers)],
            number=number,
            note=NOTE,
        )

    def _repr_html_(self) -> str:
        # The frame keeps the page's style apart from the notebook's; the sandbox blocks scripts and requests.
        page = Environment(autoescape=True).from_string(
            '<iframe sandbox srcdoc="{{ page }}" style="width:100%;height:640px;border:0" title="report"></iframe>'
        )
        return page.render(page=self.to_html())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report to a ``.html`` or ``.json`` file. A write that fails leaves an old file unchanged.

        Args:
            path: The file; missing folders are created.

        Returns:
            The path.

        Raises:
            ValueError: If the file name ends in neither ``.html`` nor ``.json``.
        """
        target = Path(path)
        kind = target.suffix.lower()
        if kind == ".html":
            text = self.to_html()
        elif kind == ".json":
            text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        else:
            raise ValueError(f"path must end in .html or .json; got {target.name!r}. Choose one of these endings.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, suffix=".part", delete=False) as part:
            try:
                part.write(text)
                part.flush()
                os.fsync(part.fileno())
            except BaseException:
                Path(part.name).unlink(missing_ok=True)
                raise
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(part.name, 0o666 & ~umask)  # temporary files are private; a report gets the usual permissions
        os.replace(part.name, target)
        return target


def check(
    posterior: Posterior,
    data: Any,
    *,
    train: Any = None,
    ood: Any = None,
    draws: int = 200,
    particles: int = 200,
    seed: int = 0,
    site: str | None = None,
) -> Report:
    """Run every diagnostic that applies to a posterior, on data that were not used in the fit.

    Args:
        posterior: The posterior to check.
        data: Held-out data, in any form that the program accepts; None for a program that holds its data.
        train: The training data; needed for the Pareto k-hat of global latents (such as weights).
        ood: Out-of-distribution data, on which the posterior should be less certain.
        draws: Number of posterior draws for predictions; the smallest possible p-value is about ``1 / draws``.
        particles: Number of importance samples per row.
        seed: Seed of all random numbers; the same seed gives the same report.
        site: The observed site whose predictions to check; None for all of them.

    Returns:
        The report: ``print`` or ``save`` it, or read its ``verdict``. A check that cannot look says ``unchecked``.

    Raises:
        ValueError: If the data cannot be those of the program, or there is no such site.
    """
    case = Case(posterior, data, train=train, ood=ood, draws=draws, particles=particles, seed=seed, site=site)
    case.check_data()
    asked = [question for diagnostic in CHECKS.values() for question in _questions(diagnostic, case)]
    level = ALPHA / max(sum(question.diagnostic.tests and not question.reason for question in asked), 1)
    return Report(
        checks=tuple(question.answer(level) for question in asked),
        title=_title(case),
        facts=_facts(case, level),
        draw=_cached(lambda: pictures(case)),
    )


@dataclass(frozen=True)
class _Question:
    """A diagnostic and a case that it applies to, or the reason why it cannot look."""

    diagnostic: Diagnostic
    case: Case
    name: str
    reason: str = ""

    def answer(self, level: float) -> Check:
        """The check, at a false-alarm level."""
        reason = self.reason
        if not reason:
            try:
                found = self.diagnostic.answer(self.case, level)
                return replace(found, name=self.name, question=self.diagnostic.question)
            except REFUSALS as error:  # the data were checked: a query cannot answer this
                reason = _reason(error)
        return Check(self.name, math.nan, None, None, "unchecked", reason, question=self.diagnostic.question)


def _questions(diagnostic: Diagnostic, case: Case) -> Iterator[_Question]:
    cases = case.by_site() if diagnostic.by_site else [case]
    for each in cases:
        name = f"{diagnostic.name} of {each.site}" if len(cases) > 1 else diagnostic.name
        try:
            if diagnostic.applies(each):
                yield _Question(diagnostic, each, name)
        except REFUSALS as error:
            yield _Question(diagnostic, each, name, _reason(error))


def _reason(error: Exception) -> str:
    text = str(error).split("\n")[0] or type(error).__name__
    if not isinstance(error, ValueError):  # from the program's own code, such as a model that needs its target
        text = f"the program cannot run in this way: {text.removesuffix('.')}."
    return text[:1].upper() + text[1:]


def _cached(make: Callable[[], Sequence[Picture]]) -> Callable[[], Sequence[Picture]]:
    made: list[Sequence[Picture]] = []

    def draw() -> Sequence[Picture]:
        if not made:
            made.append(make())
        return made[0]

    return draw


def _title(case: Case) -> str:
    name = type(case.program).__name__
    rows = case.rows
    return f"{'Pyro program' if name == 'FunctionProgram' else name} on {rows} row{'s' * (rows != 1)}"


def _facts(case: Case, level: float) -> dict[str, dict[str, Any]]:
    posterior, history = case.posterior, case.posterior.history
    fit: dict[str, Any] = {"seed": posterior.seed, "exact": posterior.exact, **history.facts()}
    fit["epochs"] = len(next(iter(history.epochs.values()), ()))
    fit |= {f"last {name}": values[-1] for name, values in history.epochs.items() if len(values)}
    evaluation = {
        "rows": case.rows,
        "data": case.overlap.words,
        "rows predicted": num_rows(case.batch) if case.batch else case.rows,
        "draws": case.draws,
        "particles": case.particles,
        "seed": case.seed,
    }
    return {
        "fit": fit,
        "routine": dict(posterior.config),
        "program": dict(case.program.config or {}),
        "judged on": evaluation | {"level of each test": level},
        "versions": dict(posterior.versions),
    }


def _flat(rows: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The rows of a table, from a nested mapping."""
    for key, value in rows.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, float):
            yield name, f"{value:.5g}"
        elif isinstance(value, list | tuple) and len(value) and all(isinstance(v, float) for v in value):
            yield name, ", ".join(f"{v:.3g}" for v in value)
        else:
            yield name, str(value)


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * 9, subsequent_indent=" " * 9)
