"""Advice from the checks of a report: what the posterior may be used for, and what to do next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from deepprob.diagnostics.case import REFUSALS, Case
from deepprob.diagnostics.check import VERDICTS, About, Check, Verdict, worst

# The order in which a reader asks: may I believe the predictions, the posterior, and why.
QUESTIONS: Mapping[About, str] = {
    "predictions": "Do the predictions match the data?",
    "posterior": "Is the posterior close to the exact one?",
    "fit": "Did the training succeed?",
    "data": "Are the data a fair test?",
}
_SUBJECTS: Mapping[About, str] = {
    "fit": "its training",
    "data": "the data",
    "predictions": "its predictions",
    "posterior": "its posterior",
}
_FINDINGS: Mapping[tuple[About, Verdict], str] = {
    ("fit", "fail"): "has not succeeded",
    ("fit", "caution"): "may not be finished",
    ("data", "fail"): "are not like those of the fit",
    ("data", "caution"): "may not be a fair test",
    ("predictions", "fail"): "do not match the data",
    ("predictions", "caution"): "do not match the data in every respect",
    ("posterior", "fail"): "is wrong",
    ("posterior", "caution"): "may be inaccurate",
}
_MOST_NAMES = 4


@dataclass(frozen=True)
class Uses:
    """What a posterior can be used for, in the words of its program; empty if it cannot.

    Args:
        predictions: Such as ``"predictions of y on data like these"``.
        conclusions: Such as ``"conclusions about mu and tau"``.
    """

    predictions: str = "predictions on data like these"
    conclusions: str = "conclusions about its latent sites"

    @classmethod
    def of(cls, case: Case) -> Uses:
        """What the posterior of a case can be used for."""
        observed = _listed(case.words, "observed sites")
        latent = _listed([*case.posterior.latent_sites], "latent sites")
        predicted = False
        with suppress(*REFUSALS):  # the checks of the predictions tell the reason
            predicted = any(each.supervised for each in case.by_site())
        use = f"predictions of {observed} on data like these" if predicted else "simulations of data like these"
        return cls(use if observed else "", f"conclusions about {latent}" if latent else "")


def claims(checks: Iterable[Check]) -> dict[About, Verdict]:
    """The verdict about each claim that some check supports; ``"unchecked"`` where none of them could look.

    Examples:
        >>> fine, high = (Check("c", 0.0, None, None, v, "", about=a) for v, a in (("pass", "fit"), ("fail", "data")))
        >>> claims([fine, high])
        {'fit': 'pass', 'data': 'fail'}
    """
    found: dict[About, Verdict] = {}
    kept = tuple(checks)
    for about in QUESTIONS:
        if verdicts := [check.verdict for check in kept if check.about == about]:
            found[about] = "unchecked" if set(verdicts) == {"unchecked"} else worst(verdicts)
    return found


def decision(checks: Sequence[Check], uses: Uses) -> str:
    """One sentence for a person who must decide: what the posterior may be used for, what not, and why.

    A use is as good as the claims behind it. Predictions need a fit that succeeded and data that are a fair test;
    conclusions need a fit that succeeded and a right posterior, and care where the predictions do not match the data.
    If the training may not be finished and something fails, it comes first: no use is allowed yet.

    Examples:
        >>> found = (("pass", "predictions"), ("fail", "posterior"))
        >>> checks = [Check("c", 0.0, None, None, v, "", about=a) for v, a in found]
        >>> print(decision(checks, Uses("predictions of y", "conclusions about w")))
        This model may be used for predictions of y, but not for conclusions about w: its posterior is wrong.
    """
    found = claims(checks)
    if not found:
        return ""
    care: Verdict = "caution" if found.get("predictions", "pass") != "pass" else "pass"
    # A fit in doubt comes first: what fails may be right when the training is finished.
    unfinished = found.get("fit") in ("caution", "fail") and "fail" in found.values()
    fit = "fail" if unfinished else found.get("fit", "pass")
    grades: dict[str, tuple[Verdict, ...]] = {
        uses.predictions: (found.get("predictions", "unchecked"), fit, found.get("data", "pass")),
        uses.conclusions: (found.get("posterior", "unchecked"), fit, care),
    }
    sorted_by: dict[Verdict, list[str]] = {"pass": [], "caution": [], "fail": []}
    for use, verdicts in grades.items():
        if use:
            sorted_by["fail" if verdicts[0] == "unchecked" else worst(verdicts)].append(use)
    yes, careful, no = sorted_by.values()
    why = _reasons(checks, found, uses)
    if not yes and not careful:
        yet = " yet" if unfinished else ""
        return f"Do not use this model{yet} for {_joined(no, 'or')}{why}." if no else ""
    allowed = [f"for {_joined(yes)}"] if yes else []
    allowed += [f"with care for {_joined(careful)}"] if careful else []
    return f"This model may be used {' and '.join(allowed)}{f', but not for {_joined(no)}' if no else ''}{why}."


def next_steps(checks: Iterable[Check]) -> list[tuple[str, list[str]]]:
    """What to do, most urgent first, each with the names of the checks that ask for it.

    Steps that mend the fit come first, because the other verdicts may change with it.

    Examples:
        >>> fail = Check("a", 1.0, None, None, "fail", "", "Fit for longer.")
        >>> next_steps([Check("b", 1.0, None, None, "caution", "", "Fit for longer."), fail])
        [('Fit for longer.', ['a', 'b'])]
    """
    raised = [check for check in checks if check.verdict != "pass"]
    raised.sort(key=lambda check: (check.about != "fit", -VERDICTS.index(check.verdict)))
    steps: dict[str, list[str]] = {}
    for check in raised:
        reason = f"Not examined: {check.reading}" if check.verdict == "unchecked" else ""
        if step := check.next_step or reason:
            steps.setdefault(step, []).append(check.name)
    return [*steps.items()]


def _listed(names: Sequence[str], kind: str) -> str:
    """Names in a sentence; the number of them if they are too many to read."""
    return _joined(names) if len(names) <= _MOST_NAMES else f"its {len(names)} {kind}"


def _joined(parts: Sequence[str], word: str = "and") -> str:
    return f" {word} ".join([*([", ".join(parts[:-1])] if len(parts) > 1 else []), *parts[-1:]])


def _reasons(checks: Iterable[Check], found: Mapping[About, Verdict], uses: Uses) -> str:
    """Why the uses are restricted, after a colon; the claim of a use that the program does not have is left out."""
    asked: dict[About, str] = {"predictions": uses.predictions, "posterior": uses.conclusions}
    verdicts = {about: found.get(about, "unchecked" if asked.get(about) else "pass") for about in _SUBJECTS}
    reasons = []
    for about, verdict in verdicts.items():
        subject = _SUBJECTS[about]
        if verdict == "unchecked":
            reasons.append(f"no check could examine {subject}")
        elif verdict == "caution" and not any(c.verdict == "caution" for c in checks if c.about == about):
            reasons.append(f"{subject} could be examined only in part")
        elif verdict != "pass":
            flagged = [c.name for c in checks if c.about == about and c.verdict == verdict]
            named = about == "predictions" and len(flagged) < _MOST_NAMES
            reasons.append(f"{subject} {_FINDINGS[about, verdict]}" + (f" ({', '.join(flagged)})" if named else ""))
    return f": {_joined(reasons)}" if reasons else ""
