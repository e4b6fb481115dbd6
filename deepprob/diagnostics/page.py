"""The report as one self-contained HTML page, and as a frame in a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader

from deepprob.diagnostics.advice import QUESTIONS
from deepprob.diagnostics.check import number

NOTE = (
    "The number after ± is the standard error; a value counts as beyond its limit only if it is so significantly. "
    "A value beyond its limit is a caution; a fail is far beyond it, at a second limit of its own. "
    "Unchecked means that a check could not look. The checks that are statistical tests share a false-alarm rate of 5% "
    "(Bonferroni): if the posterior is exact and the model is correct, at most one report in twenty has another "
    "verdict than pass."
)
_WARY = {
    "fail": "These numbers are the guide's; those of the posterior differ, as the checks say.",
    "caution": "These numbers are the guide's; those of the posterior may differ, as the checks say.",
}
# Heights in a notebook of about 900 px, in px: of the page without its parts, and of one of each.
_EMPTY, _STEP, _SCORE, _CHECK, _PICTURES = 430, 40, 60, 105, 430


def page(report: Any) -> str:
    """A `Report` as one self-contained HTML page with pictures and without scripts."""
    environment = Environment(
        loader=PackageLoader("deepprob.diagnostics", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    groups = [
        (question, report.claims[about], [check for check in report.checks if check.about == about])
        for about, question in QUESTIONS.items()
        if about in report.claims
    ]
    others = [check for check in report.checks if check.about not in report.claims]
    details = [(c.name, "; ".join(f"{k}: {v}" for k, v in _flat(c.to_dict()["details"]))) for c in report.checks]
    return environment.get_template("report.html.jinja").render(
        report=report,
        groups=[*groups, *([("", "", others)] if others else [])],
        judged=report.facts.get("judged on", {}),
        pictures=report.draw(),
        settings=[(heading, list(_flat(rows))) for heading, rows in report.facts.items() if rows],
        details=[(name, text) for name, text in details if text],
        note=NOTE,
        number=number,
        wary=_WARY.get(report.claims.get("posterior")),
    )


def frame(report: Any) -> str:
    """The page in a frame for a notebook, as high as the page but no higher than the window."""
    # The frame keeps the page's style apart from the notebook's; the sandbox blocks scripts and requests.
    template = Environment(autoescape=True).from_string(
        '<iframe sandbox srcdoc="{{ page }}" style="width:100%;height:min({{ height }}px,85vh);border:0" '
        'title="report"></iframe>'
    )
    numbers = sum(map(len, report.scores.values()))
    height = _EMPTY + _STEP * len(report.next_steps) + _SCORE * numbers + _CHECK * len(report.checks)
    return template.render(page=page(report), height=height + _PICTURES * -(-len(report.draw()) // 2))


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
