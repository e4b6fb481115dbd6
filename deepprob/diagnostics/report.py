"""`check` runs every diagnostic that applies to a posterior; `Report` holds the checks and the verdict."""

from __future__ import annotations

import hashlib
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from torch import Tensor

from deepprob.diagnostics import page
from deepprob.diagnostics.advice import Uses, claims, decision, next_steps
from deepprob.diagnostics.case import REFUSALS, Case
from deepprob.diagnostics.check import About, Check, Verdict, array, jsonable, worst
from deepprob.diagnostics.checks import CHECKS, EXTRA
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.diagnostics.document import Document
from deepprob.diagnostics.metrics import Score, scores, summaries
from deepprob.diagnostics.picture import Picture
from deepprob.diagnostics.pictures import pictures
from deepprob.diagnostics.remedies import possible
from deepprob.errors import unknown
from deepprob.programs.minibatch import num_rows

if TYPE_CHECKING:
    from deepprob.posteriors.posterior import Posterior


ALPHA = 0.05  # of the tests together
WIDTH = 100
_NOT_APPLICABLE = "The check does not apply to this posterior and these data."


@dataclass(frozen=True)
class Report(Document):
    """The checks of a posterior with their overall verdict, scores, pictures and the facts of the fit.

    The verdict is that of the worst check; one that could not look counts as a caution. Each of the ``m`` checks that
    are statistical tests has the level ``0.05 / m``, so that together they raise a false alarm at most one time in
    twenty. The other checks have thresholds that an exact posterior does not reach; a noisy estimate may.

    Args:
        checks: The checks.
        title: Names the posterior and the data.
        facts: Tables by heading: versions, seed, configuration.
        draw: Makes the pictures when they are needed.
        uses: What the posterior can be used for, in the words of its program.
        scores: Scores of the predictions by observed site.
        latents: Mean, sd and 90% interval of each number of the latent sites, if they are few.

    Examples:
        >>> fine = Check("a", 0.0, None, None, "pass", "The value is small.")
        >>> high = Check("b", 1.0, 0.1, 0.5, "caution", "The value is high.", "Look at it.")
        >>> Report((fine, high), "my fit").verdict
        'caution'
        >>> print(Report((fine,), "my fit"))
        PASS · my fit
        The only check passed.
        <BLANKLINE>
        pass      a                              0
                  The value is small.
    """

    checks: tuple[Check, ...]
    title: str
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    draw: Callable[[], Sequence[Picture]] = field(default=tuple, repr=False, compare=False)
    uses: Uses = field(default_factory=Uses)
    scores: Mapping[str, tuple[Score, ...]] = field(default_factory=dict)
    latents: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """The verdict of the worst check."""
        return worst(check.verdict for check in self.checks)

    @property
    def claims(self) -> dict[About, Verdict]:
        """The verdict about each claim: that the predictions, the posterior, the fit and the data are right."""
        return claims(self.checks)

    @property
    def decision(self) -> str:
        """What the posterior may be used for and what not, in one sentence; empty if no check supports a use."""
        return decision(self.checks, self.uses)

    @property
    def next_steps(self) -> list[tuple[str, list[str]]]:
        """What to do, most urgent first, each with the names of the checks that ask for it."""
        return next_steps(self.checks)

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
        """The check with a given name or slug."""
        for key, check in self._by_slug.items():
            if name in (check.name, key):
                return check
        names = "; ".join(check.name for check in self.checks) or "none"
        raise KeyError(f"the report has no check {name!r}. It has: {names}.")

    def __str__(self) -> str:
        lines = textwrap.wrap(f"{self.verdict.upper()} · {self.title}", WIDTH)
        for text in (self.decision, self.summary, *self.score_lines, *(f"Next: {s}" for s, _ in self.next_steps)):
            lines += textwrap.wrap(text, WIDTH)
        lines.append("")
        for check in self.checks:
            unit = f" {check.unit}" if check.unit and check.measured else ""
            limit = f"  ({check.limit})" if check.limit else ""
            lines.append(f"{check.verdict:<10}{check.name + ' ':<31}{check.measured}{unit}{limit}".rstrip())
            lines += textwrap.wrap(check.reading, WIDTH, initial_indent=" " * 10, subsequent_indent=" " * 10)
        return "\n".join(lines)

    @property
    def score_lines(self) -> list[str]:
        """The scores as text, one line for each observed site."""
        return [
            f"Predictions of {site}: {', '.join(f'{score.name} {score.measured}' for score in found)}."
            for site, found in self.scores.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report without pictures, as JSON types; checks and scores by slug."""
        return {
            "format": "deepprob report",
            "schema": 2,
            "verdict": self.verdict,
            "title": self.title,
            "decision": self.decision,
            "claims": self.claims,
            "summary": self.summary,
            "next_steps": [step for step, _ in self.next_steps],
            "scores": {
                site: {score.slug: jsonable(asdict(score)) for score in found} for site, found in self.scores.items()
            },
            "latents": jsonable(self.latents),
            "checks": {key: check.to_dict() for key, check in self._by_slug.items()},
            **jsonable(self.facts),
        }

    @property
    def _by_slug(self) -> dict[str, Check]:
        """The checks by slug; a number tells those with the same slug apart, such as those of sites a_b and a.b."""
        found: dict[str, Check] = {}
        for check in self.checks:
            same = sum(other.slug == check.slug for other in found.values())
            found[f"{check.slug}-{same + 1}" if same else check.slug] = check
        return found

    def to_html(self) -> str:
        """The report as one self-contained HTML page with pictures and without scripts."""
        return page.page(self)

    def _repr_html_(self) -> str:
        return page.frame(self)


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
    title: str | None = None,
    extra: Sequence[str | Diagnostic] = (),
) -> Report:
    """Run every diagnostic that applies to a posterior, on data that were not used in the fit.

    Args:
        posterior: The posterior to check.
        data: Held-out data, in any form that the program accepts; None for a program that holds its data.
        train: The training data; needed to judge global latents (such as weights) where the fit did not, because it had
            fewer than 100 steps, was interrupted, or its draws took too long.
        ood: Out-of-distribution data, on which the posterior should be less certain.
        draws: Number of posterior draws for predictions; a p-value takes as many more as its level needs.
        particles: Number of importance samples per row.
        seed: Seed of all random numbers; the same seed gives the same report.
        site: The observed site whose predictions to check; None for all of them.
        title: Names the posterior and the data in the report; by default the program's class and the number of rows.
        extra: Further checks: names of those that are off by default (``"information of the codes"``,
            ``"aggregate posterior"``, ``"sandwich of the evidence"``), or diagnostics of your own.

    Returns:
        The report: ``print`` or ``save`` it, or read its ``verdict``. A check that cannot look says ``unchecked``.

    Raises:
        ValueError: If the data cannot be those of the program, or there is no such site or check.
    """
    added = [_extra(each) for each in extra]
    case = Case(posterior, data, train=train, ood=ood, draws=draws, particles=particles, seed=seed, site=site)
    case.check_data()
    asked = [question for diagnostic in CHECKS.values() for question in _questions(diagnostic, case)]
    asked += [question for diagnostic in added for question in _questions(diagnostic, case, _NOT_APPLICABLE)]
    level = ALPHA / max(sum(question.diagnostic.tests and not question.reason for question in asked), 1)
    return Report(
        checks=tuple(question.answer(level) for question in asked),
        title=_title(case) if title is None else title,
        facts=_facts(case, level),
        draw=_cached(lambda: pictures(case)),
        uses=Uses.of(case),
        scores=scores(case),
        latents=summaries(case),
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
                fit = self.case.posterior
                step = possible(found.next_step, fit.config, extends=fit.training is not None)
                return replace(found, name=self.name, next_step=step, **self._asked)
            except REFUSALS as error:  # the data were checked: a query cannot answer this
                reason = _reason(error)
        return Check(self.name, math.nan, None, None, "unchecked", reason, **self._asked)

    @property
    def _asked(self) -> dict[str, Any]:
        return {"question": self.diagnostic.question, "about": self.diagnostic.about}


def _extra(check: str | Diagnostic) -> Diagnostic:
    if isinstance(check, Diagnostic):
        return check
    if check not in EXTRA:
        raise unknown("extra check", check, EXTRA)
    return EXTRA[check]


def _questions(diagnostic: Diagnostic, case: Case, otherwise: str = "") -> Iterator[_Question]:
    """The questions of a diagnostic about a case; one that does not apply is asked if there is a reason to give."""
    cases = case.by_site() if diagnostic.by_site else [case]
    for each in cases:
        name = f"{diagnostic.name} of {each.site}" if len(cases) > 1 else diagnostic.name
        try:
            if diagnostic.applies(each):
                yield _Question(diagnostic, each, name)
            elif otherwise:
                yield _Question(diagnostic, each, name, otherwise)
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
    rows, named = case.rows, vars(case.program).get("_model", case.program)  # a function, or an object of a class
    name = getattr(named, "__name__", type(named).__name__)
    kind = {"training": "training ", "part": "training ", "held-out": "held-out "}.get(case.overlap.relation, "")
    return f"{name if name.isidentifier() else 'Pyro program'} on {rows} {kind}row{'s' * (rows != 1)}"


def _facts(case: Case, level: float) -> dict[str, dict[str, Any]]:
    posterior, history = case.posterior, case.posterior.history
    fit: dict[str, Any] = {"seed": posterior.seed, "exact": posterior.exact, **history.facts()}
    fit["epochs"] = len(next(iter(history.epochs.values()), ()))
    fit |= {f"last {name}": values[-1] for name, values in history.epochs.items() if len(values)}
    evaluation = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "shapes": "; ".join(f"{name} {_shape(x)}" for name, x in zip(case._names, case.batch, strict=False)),
        "hash of the data": _digest(case.batch),
        "hash of the posterior": _digest(_values(posterior)),
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


def _values(posterior: Posterior) -> Iterator[Tensor]:
    """The numbers that a posterior holds."""
    yield from posterior.instance.tensors().values()
    yield from (posterior.chains or {}).values()


def _shape(x: Tensor) -> str:
    return f"{' × '.join(map(str, x.shape)) or '1'} ({str(x.dtype).removeprefix('torch.')})"


def _digest(tensors: Iterable[Tensor]) -> str:
    """A short fingerprint of values: the same for equal ones, and another for others."""
    found = hashlib.blake2b(digest_size=6)
    for values in tensors:
        found.update(array(values).tobytes())
    return found.hexdigest()
