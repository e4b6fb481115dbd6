"""How much do the codes tell about their rows?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import ArrayLike

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Array, Check, Verdict, array, number
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.diagnostics.remedies import AGAINST_COLLAPSE
from deepprob.programs.minibatch import num_rows
from deepprob.programs.sites import drawn_sites

NAME = "information of the codes"
_LEAST_NATS = 0.1
_NEAR_CEILING = 0.9
_DRAWS = 10


@dataclass(frozen=True)
class Codes:
    """Codes that the guide draws for N rows, and their log-densities, ``(draws, N)`` each.

    Attributes:
        values: The codes, ``(draws, N, Z)``.
        own: Under the guide of the code's own row, ``log q(z_i | x_i)``.
        aggregate: Under the guides of all rows, ``log 1/N sum_j q(z_i | x_j)``.
        prior: Under the prior.
    """

    values: Array
    own: Array
    aggregate: Array
    prior: Array


def codes_of(case: Case) -> Codes:
    """Codes of the rows of `sample_batch`.

    Raises:
        ValueError: If the guide draws other sites too, or the prior differs from row to row.
    """
    fitted, (name,) = case.posterior._fitted, case.posterior.structure.local
    rows, found = num_rows(case.sample_batch), []
    with fitted.querying(case.seed):
        guide, model = fitted.traces(fitted.prepared(case.sample_batch, 1))
        if {*drawn_sites(guide)} != {name}:
            raise ValueError(f"The guide draws other sites beside {name}, on which its density depends.")
        q: Any = guide.nodes[name]["fn"]
        p: Any = model.nodes[name]["fn"]
        for _ in range(_DRAWS):
            z = q.sample().reshape(rows, 1, *q.event_shape)
            log_q, log_p = (fn.log_prob(z).double().expand(rows, rows) for fn in (q, p))  # of z_i given x_j
            if not torch.allclose(log_p, log_p[:, :1]):
                raise ValueError(f"The prior of {name} differs from row to row: there is no single one to compare.")
            found.append((z.reshape(rows, -1), log_q.diagonal(), log_q.logsumexp(1) - math.log(rows), log_p[:, 0]))
    return Codes(*(array(torch.stack(part)) for part in zip(*found, strict=True)))


def check_information(own: ArrayLike, aggregate: ArrayLike) -> Check:
    r"""The mutual information of rows and codes, in nats.

    .. math:: I_q(x; z) = \frac1N \sum_i \mathbb E_{q(z \mid x_i)} \Big[ \log q(z \mid x_i)
              - \log \frac1N \sum_j q(z \mid x_j) \Big] \le \log N

    Args:
        own: ``log q(z_i | x_i)``, shape ``(draws, N)``.
        aggregate: ``log 1/N sum_j q(z_i | x_j)``, likewise.

    Returns:
        The information; a caution if it is surely below 0.1 nats.

    References:
        Hoffman, Johnson (2016), ELBO surgery.

    Examples:
        Codes that tell the rows apart have the most information that N rows can show:

        >>> check_information([[0.0] * 100], [[-math.log(100)] * 100]).reading.split(":")[0]
        'The codes tell 4.61 nats about their rows, near the most that 100 rows can show, log 100'
    """
    terms = (array(own) - array(aggregate)).mean(0)
    rows = len(terms)
    value, se, ceiling = float(terms.mean()), float(terms.std(ddof=1) / math.sqrt(rows)), math.log(rows)
    verdict: Verdict = "caution" if value + 1.645 * se < _LEAST_NATS else "pass"
    reading = f"The codes tell {number(value, se)} nats about their rows"
    if binds := value > _NEAR_CEILING * ceiling:
        reading += f", near the most that {rows} rows can show, log {rows}: they may tell more"
    elif verdict == "caution":
        reading += ": the posterior has collapsed to the same one for all rows"
    return Check(
        name=NAME,
        value=value,
        se=se,
        threshold=_LEAST_NATS,
        verdict=verdict,
        reading=f"{reading}.",
        next_step="" if verdict == "pass" else AGAINST_COLLAPSE,
        details={"rows": rows, "ceiling": ceiling, "ceiling binds": binds},
        unit="nats per row",
        good=">=",
    )


def has_codes(case: Case) -> bool:
    """Whether an encoder gives every row one continuous code, whose density each row's guide has."""
    posterior, structure = case.posterior, case.posterior.structure
    if posterior.kind != "guide" or not case.per_row or case.ragged or structure.plates != 1:
        return False
    if len(structure.local) != 1 or structure.summed or not posterior._fitted.amortized:
        return False
    value = case.traces[0].nodes[structure.local[0]]["value"]
    return num_rows(case.sample_batch) > 2 and bool(value.is_floating_point())


def _run(case: Case, level: float) -> Check:
    found = codes_of(case)
    return check_information(found.own, found.aggregate)


code_information = Diagnostic(NAME, "How much do the codes tell about their rows?", has_codes, _run, about="posterior")
