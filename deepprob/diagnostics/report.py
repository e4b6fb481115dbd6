"""The noun `Report`, and `check`, which makes one: every question that applies, and one verdict."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Check, Verdict, jsonable, number, worst
from deepprob.diagnostics.checks import CHECKS
from deepprob.diagnostics.pictures import Picture, pictures
from deepprob.diagnostics.report_template import TEMPLATE

if TYPE_CHECKING:
    from deepprob.posteriors.posterior import Posterior


ALPHA = 0.05
WIDTH = 100
NOTE = (
    "Standard errors follow ±. Questions that are answered by a test share a false-alarm rate of 5 % (Bonferroni): "
    "were the posterior exact and the model right, fewer than one report in twenty would say anything but pass."
)


@dataclass(frozen=True)
class Report:
    """What a diagnosis found: a verdict, its checks, pictures and the facts of the fit.

    The verdict is that of the worst check. Each of the ``m`` checks that are tests has the level
    ``0.05 / m``, so that all of them together raise a false alarm at most one time in twenty; the
    others have thresholds that an exact posterior does not reach.

    Args:
        checks: The answers.
        title: What was judged.
        facts: Headings to facts, for the record: versions, seed, config.
        draw: Makes the pictures; called once, when they are wanted.

    Examples:
        >>> fine = Check("a", 0.0, None, None, "pass", "All is well.")
        >>> odd = Check("b", 1.0, 0.1, 0.5, "caution", "Half is well.", "Look.")
        >>> Report((fine, odd), "my fit").verdict
        'caution'
        >>> print(Report((fine,), "my fit"))
        PASS · my fit
        The one check made is passed.
        <BLANKLINE>
        pass     a                              0
                 All is well.
    """

    checks: tuple[Check, ...]
    title: str
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    draw: Callable[[], Sequence[Picture]] = field(default=tuple, repr=False, compare=False)

    @property
    def verdict(self) -> Verdict:
        """The worst check's verdict."""
        return worst(check.verdict for check in self.checks)

    @property
    def summary(self) -> str:
        """The verdict in one sentence."""
        if not self.checks:
            return "No check applies."
        if self.verdict == "pass":
            return (
                f"All {len(self.checks)} checks are passed."
                if len(self.checks) > 1
                else "The one check made is passed."
            )
        failed = [c.name for c in self.checks if c.verdict == "fail"]
        careful = [c.name for c in self.checks if c.verdict == "caution"]
        said = [f"{len(failed)} failed ({', '.join(failed)})"] if failed else []
        if careful:
            said.append(f"{len(careful)} need{'s' * (len(careful) == 1)} care ({', '.join(careful)})")
        return f"Of {len(self.checks)} checks {' and '.join(said)}."

    def __getitem__(self, name: str) -> Check:
        """The check of a name."""
        return next(_named(self.checks, name))

    def __str__(self) -> str:
        lines = textwrap.wrap(f"{self.verdict.upper()} · {self.title}", WIDTH)
        lines += [*textwrap.wrap(self.summary, WIDTH), ""]
        for check in self.checks:
            limit = "" if check.threshold is None else f"  (limit {number(check.threshold)})"
            lines.append(f"{check.verdict:<9}{check.name:<31}{check.measured}{limit}")
            lines += _indented(check.reading)
            if check.next_step:
                lines += _indented(f"Next: {check.next_step}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON types."""
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
        """One page that needs nothing else: no script, no file beside it, pictures inside."""
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        tables = [(heading, list(_flat(rows))) for heading, rows in self.facts.items()]
        numbers = [(c.name, "; ".join(f"{k}: {v}" for k, v in _flat(c.to_dict()["details"]))) for c in self.checks]
        return environment.from_string(TEMPLATE).render(
            report=self,
            pictures=self.draw(),
            tables=[*tables, ("All numbers", numbers)],
            number=number,
            note=NOTE,
        )

    def _repr_html_(self) -> str:
        # A frame keeps the page's style to itself; sandboxed, it can run and reach nothing.
        page = Environment(autoescape=True).from_string(
            '<iframe sandbox srcdoc="{{ page }}" style="width:100%;height:640px;border:0" title="report"></iframe>'
        )
        return page.render(page=self.to_html())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report, by the name's ending as ``.html`` or ``.json``; whole or not at all.

        Args:
            path: Where to; missing folders are made.

        Returns:
            The path.

        Raises:
            ValueError: If the name has another ending.
        """
        target = Path(path)
        kind = target.suffix.lower()
        if kind == ".html":
            text = self.to_html()
        elif kind == ".json":
            text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        else:
            raise ValueError(f"a report is saved as .html or .json; got {target.name!r}. Choose one of these endings.")
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
        os.chmod(part.name, 0o666 & ~umask)  # a temporary file is its owner's alone; a report is like any other file
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
) -> Report:
    """Ask of a posterior every question that applies, on data it has not seen.

    Args:
        posterior: What to judge.
        data: Held-out data, of the kinds that the program takes.
        train: The data it was fitted to; needed to judge global latents (weights) by importance
            weights.
        ood: Data of another kind, on which the posterior should be less sure.
        draws: Number of posterior draws for predictions; p-values are no finer than one over it.
        particles: Number of importance samples per row.
        seed: Where the random numbers start; the same seed gives the same report.

    Returns:
        The report; ``print`` it, ``save`` it, read its ``verdict``.
    """
    case = Case(posterior, data, train=train, ood=ood, draws=draws, particles=particles, seed=seed)
    asked = [question for question in CHECKS.values() if question.applies(case)]
    level = ALPHA / max(sum(question.tests for question in asked), 1)
    answers = tuple(replace(question.run(case, level), name=question.name) for question in asked)
    return Report(
        checks=answers,
        title=_title(case),
        facts=_facts(case, level),
        draw=_once(lambda: pictures(case)),
    )


def _once(make: Callable[[], Sequence[Picture]]) -> Callable[[], Sequence[Picture]]:
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
    judged = {
        "rows": case.rows,
        "rows predicted": len(case.batch[0]),
        "draws": case.draws,
        "particles": case.particles,
        "seed": case.seed,
    }
    return {
        "fit": fit,
        "routine": dict(posterior.config),
        "program": dict(case.program.config or {}),
        "judged on": judged | {"level of each test": level},
        "versions": dict(posterior.versions),
    }


def _flat(rows: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A nested mapping as rows of a table."""
    for key, value in rows.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}, ")
        elif isinstance(value, float):
            yield name, f"{value:.5g}"
        elif isinstance(value, list | tuple) and len(value) and all(isinstance(v, float) for v in value):
            yield name, ", ".join(f"{v:.3g}" for v in value)
        else:
            yield name, str(value)


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * 9, subsequent_indent=" " * 9)


def _named(checks: Sequence[Check], name: str) -> Iterator[Check]:
    found = [check for check in checks if check.name == name]
    if not found:
        made = ", ".join(check.name for check in checks) or "none"
        raise KeyError(f"no check {name!r} was made. There are: {made}.")
    yield from found
