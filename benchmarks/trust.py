"""Is the verdict of ``dp.check(posterior, data)`` right? Posteriors that are known to be good, or wrong in a known way.

    python benchmarks/trust.py                       # every case once: a line each, then the table
    python benchmarks/trust.py --half A              # the half on which thresholds are tuned; B is scored
    python benchmarks/trust.py --only style --only "label switching"   # a family, a label, or words of names
    python benchmarks/trust.py --half B --seeds 10   # the good cases under ten seeds: how many reports are flagged
    python benchmarks/trust.py --labels              # recompute the proof of every label
    python benchmarks/trust.py --references          # posteriors of posteriordb and sbibm against reference draws

A verdict is right if it is ``pass`` for a good posterior, and ``caution`` or ``fail`` for a wrong one. A good posterior
on which nothing was found, but some checks could not look (``unchecked``), is counted apart. ``verdicts/`` holds the
cases.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import shown, write_result
from verdicts import CASES, Case, Fitted, Nats
from verdicts.registry import MEAN, OFF, UNLIKE, WIDTH

import deepprob as dp

FLAGS = ("fail", "caution", "unchecked")


@dataclass(frozen=True)
class Row:
    """The report of one posterior.

    Attributes:
        name: The case.
        family: The kind of model.
        label: ``"good"`` or ``"wrong"``.
        half: ``"A"`` or ``"B"``.
        seed: Of data and fit.
        verdict: That of the report; ``"error"`` if there is none.
        fail: Checks that failed.
        caution: Checks that raised a caution.
        unchecked: Checks that could not look.
        fit_seconds: Processor time of the fit, and of the exact posterior.
        check_seconds: Processor time of the report.
        distances: The largest distance of a mean in exact sds, the smallest and the largest ratio of sds; None without
            an exact posterior.
        error: The message, if there is no report.
    """

    name: str
    family: str
    label: str
    half: str
    seed: int
    verdict: str
    fail: tuple[str, ...] = ()
    caution: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    fit_seconds: float = 0.0
    check_seconds: float = 0.0
    distances: tuple[float, float, float] | None = None
    error: str = ""

    @property
    def is_right(self) -> bool:
        return self.verdict == "pass" if self.label == "good" else self.verdict in ("caution", "fail")

    @property
    def only_unchecked(self) -> bool:
        """Whether nothing but checks that could not look stands between the verdict and a pass."""
        return bool(self.unchecked) and not self.fail and not self.caution and not self.error

    @property
    def is_mislabelled(self) -> bool:
        """Whether the posterior of this seed is not what its label says."""
        return self.distances is not None and not moments_agree(self.distances, self.label)

    @property
    def flagged(self) -> bool:
        """Whether a good posterior raised a false alarm."""
        return not self.is_right and not self.only_unchecked

    def __str__(self) -> str:
        mark = "ok  " if self.is_right else "?   " if self.label == "good" and self.only_unchecked else "MISS"
        said = "; ".join(f"{flag}: {', '.join(getattr(self, flag))}" for flag in FLAGS if getattr(self, flag))
        seconds = f"{self.fit_seconds:5.1f} {self.check_seconds:5.1f} s"
        doubt = "  LABEL DOES NOT HOLD" if self.is_mislabelled else ""
        return (
            f"{mark} {self.label:5} {self.half} {self.name:54} {self.verdict:8}{seconds}  {self.error or said}{doubt}"
        )


def moments_agree(distances: tuple[float, float, float], label: str) -> bool:
    """Whether distances from the exact posterior are those of a label."""
    mean, narrowest, widest = distances
    if label == "good":
        return mean <= MEAN and narrowest >= 1 - WIDTH and widest <= 1 + WIDTH
    return mean > OFF or narrowest < 1 - UNLIKE or widest > 1 + UNLIKE


# -- reports --------------------------------------------------------------------------------------------------------


def report(case: Case, seed: int) -> Row:
    facts = case.name, case.family, case.label, case.half, seed
    began = time.process_time()
    try:
        fitted = case.make(seed)
        between = time.process_time()
        found = dp.check(fitted.posterior, fitted.data, **fitted.options)
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        return Row(*facts, "error", error=f"{type(error).__name__}: {text}"[:200])
    flags = [tuple(check.name for check in found.checks if check.verdict == flag) for flag in FLAGS]
    seconds = (round(s, 2) for s in (between - began, time.process_time() - between))
    return Row(*facts, found.verdict, *flags, *seconds, fitted.distances())


def of_case(index: int, seed: int, answer: Callable[[Case, int], Any]) -> Any:
    """One answer, in whichever process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return answer(CASES[index], seed)


def answers(
    cases: Sequence[Case], seeds: Sequence[int], jobs: int, answer: Callable[[Case, int], Any]
) -> Iterator[Any]:
    """Answers in the order of cases and seeds, by ``jobs`` processes."""
    indices, numbers = zip(*[(CASES.index(case), seed) for case in cases for seed in seeds], strict=True)
    run = functools.partial(of_case, answer=answer)
    if jobs == 1:
        yield from map(run, indices, numbers)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(run, indices, numbers)


def scores(rows: Sequence[Row]) -> list[list[str]]:
    """The table: a line for each family, and one for all."""
    lines = [["family", "good", "pass", "unchecked only", "flagged", "wrong", "caught", "by unchecked only"]]
    for family in [*dict.fromkeys(row.family for row in rows), "all"]:
        of_family = [row for row in rows if family in (row.family, "all")]
        good = [row for row in of_family if row.label == "good"]
        wrong = [row for row in of_family if row.label == "wrong"]
        counts = [
            *(
                len(good),
                sum(r.is_right for r in good),
                sum(r.only_unchecked for r in good),
                sum(r.flagged for r in good),
            ),
            *(len(wrong), sum(r.is_right for r in wrong), sum(r.only_unchecked and r.is_right for r in wrong)),
        ]
        lines.append([family, *map(str, counts)])
    return lines


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    good, wrong = ([row for row in rows if row.label == label] for label in ("good", "wrong"))
    found: dict[str, Any] = {"cases": len(rows), "right": sum(row.is_right for row in rows)}
    for name, part in (("good", good), ("wrong", wrong)):
        found[name] = {
            "cases": len(part),
            "right": sum(row.is_right for row in part),
            "only unchecked": sum(row.only_unchecked for row in part),
            "errors": sum(bool(row.error) for row in part),
        }
    found["false alarms by check"] = dict(Counter(check for r in good for check in (*r.fail, *r.caution)).most_common())
    caught = [{*r.fail, *r.caution} for r in wrong]
    found["caught by check"] = dict(Counter(check for checks in caught for check in checks).most_common())
    found["caught by one check alone"] = dict(Counter(c for checks in caught if len(checks) == 1 for c in checks))
    return found


def verdicts(chosen: argparse.Namespace, cases: Sequence[Case]) -> None:
    """Every case, or with several seeds every good one: lines, table, JSON."""
    cases = [case for case in cases if case.label == "good"] if chosen.seeds > 1 else cases
    rows = []
    for row in answers(cases, range(chosen.seeds), chosen.jobs, report):
        rows.append(row)
        print(f"{row}" + (f"  seed {row.seed}" if chosen.seeds > 1 else ""), flush=True)
    print("\n" + shown(scores(rows), chosen.markdown))
    right, flagged = sum(row.is_right for row in rows), sum(row.flagged for row in rows)
    if doubtful := sum(row.is_mislabelled for row in rows):
        print(f"\nlabels that do not hold under these seeds: {doubtful}")
    print(f"\nright: {right} of {len(rows)} ({right / len(rows):.0%})")
    if silent := sum(row.label == "wrong" and row.is_right and row.only_unchecked for row in rows):
        print(f"{silent} of the wrong ones are caught only because a check could not look")
    if chosen.seeds > 1:
        print(f"flagged: {flagged} of {len(rows)} reports on good posteriors ({flagged / len(rows):.1%})")
    if chosen.json:
        content = {
            "half": chosen.half,
            "seeds": chosen.seeds,
            "summary": summary(rows),
            "rows": [asdict(row) | {"right": row.is_right} for row in rows],
        }
        print("written to", write_result(chosen.json.stem, content, "cpu", chosen.json.parent))


# -- labels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proof:
    """What speaks for a label: distances from the exact posterior, or nats per row.

    Attributes:
        name: The case.
        label: ``"good"`` or ``"wrong"``.
        seed: Of data and fit.
        holds: Whether the label holds; None if the case is wrong by its construction.
        text: The numbers.
    """

    name: str
    label: str
    seed: int
    holds: bool | None
    text: str

    def __str__(self) -> str:
        mark = {True: "holds", False: "FALSE", None: "built"}[self.holds]
        return f"{mark} {self.label:5} {self.name:54} {self.text}"


def proof(case: Case, seed: int) -> Proof:
    facts = case.name, case.label, seed
    try:
        fitted: Fitted = case.make(seed)
        if (found := fitted.distances()) is not None:
            text = f"mean {found[0]:.2f} sds off, sd {found[1]:.2f} to {found[2]:.2f} times"
            return Proof(*facts, moments_agree(found, case.label), text)
        if fitted.nats is not None:
            nats: Nats = fitted.nats()
            text = f"{nats.lost:.2f} nats per row lost, {nats.gain:.2f} within reach"
            return Proof(*facts, nats.is_wrong == (case.label == "wrong"), text)
    except Exception:
        return Proof(*facts, False, traceback.format_exc(limit=-1).strip().replace("\n", " ")[-200:])
    return Proof(*facts, None if case.label == "wrong" else False, case.reason)


def labels(chosen: argparse.Namespace, cases: Sequence[Case]) -> None:
    """Recompute the proofs; ends with an error if a label does not hold."""
    proofs: list[Proof] = []
    for found in answers(cases, range(chosen.seeds), chosen.jobs, proof):
        proofs.append(found)
        print(found, f" seed {found.seed}" if chosen.seeds > 1 else "", flush=True)
    false = [found for found in proofs if found.holds is False]
    print(f"\n{len(proofs)} labels: {len(false)} do not hold, {sum(p.holds is None for p in proofs)} by construction")
    if chosen.json:
        content = {"seeds": chosen.seeds, "proofs": [asdict(found) for found in proofs]}
        print("written to", write_result(chosen.json.stem, content, "cpu", chosen.json.parent))
    if false:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("A", "B", "both"), default="both")
    parser.add_argument("--only", action="append", default=[], metavar="WORDS", help="may be given several times")
    parser.add_argument("--seeds", type=int, default=1, help="more than one: the good cases only")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread")
    parser.add_argument("--json", type=Path, help="file of the figures, such as benchmarks/results/trust.json")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--list", action="store_true", help="print cases, labels and reasons, and fit nothing")
    parser.add_argument("--labels", action="store_true", help="prove the labels, and ask for no report")
    parser.add_argument("--references", action="store_true", help="posteriors of posteriordb and sbibm")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if chosen.references:
        from verdicts.references import compare

        compare(chosen.only, chosen.json, chosen.markdown)
        return
    cases = [
        case
        for case in CASES
        if chosen.half in (case.half, "both")
        and (
            not chosen.only
            or any(words in (case.name, case.family, case.label) or words in case.name for words in chosen.only)
        )
    ]
    if not cases:
        raise SystemExit(f"no case of half {chosen.half} has one of the words {chosen.only}. See --list.")
    if chosen.list:
        for case in cases:
            print(f"{case.label:5} {case.half} {case.family:12} {case.name:54} {case.source}: {case.reason}")
    elif chosen.labels:
        labels(chosen, cases)
    else:
        verdicts(chosen, cases)


if __name__ == "__main__":
    main()
