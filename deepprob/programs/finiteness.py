"""Where a run of a program is not finite: the first such site, its rows, and the gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from deepprob.distributions.columns import Columns
from deepprob.programs.minibatch import Batch
from deepprob.programs.program import Program
from deepprob.programs.run import Run, run_program
from deepprob.programs.sites import log_prob, sample_sites

A_GRADIENT = "a gradient is not finite"
_MOST_NAMED = 3  # parameters in a message


def run_on_all(program: Program, batch: Batch, num_data: int) -> Run:
    """A run of a program on all of its rows, or on a sample of them."""
    rows = torch.arange(len(batch[0]) if batch else num_data, device=batch[0].device if batch else None)
    return Run(program, batch, rows, num_data)


def first_bad_site(run: Run) -> str:
    """Describe the first site of a run that is not finite.

    Returns:
        The first site whose value, parameters or log-probability are not finite, with its first such row, and which of
        them; `A_GRADIENT` if there is none.
    """
    row_plate = run.program.row_plate
    try:
        traces = run_program(run)
    except (ValueError, RuntimeError) as error:
        return f"the program itself fails: {str(error).splitlines()[0]}"
    for trace in traces:
        for name, site in sample_sites(trace):
            base = _innermost(site["fn"])
            for part in base.parts if isinstance(base, Columns) else [base]:
                part = _innermost(part)
                size = len(part.batch_shape) - len(site["fn"].batch_shape)
                for parameter, constraint in getattr(part, "arg_constraints", {}).items():
                    value = part.__dict__.get(parameter)
                    if isinstance(value, Tensor):
                        what, bad = _what_is_wrong(parameter, constraint, value)
                        if bool(bad.any()):
                            return f"site {name!r}{_row(site, bad, row_plate, size)}: {parameter} {what}"
            if not (isinstance(base, Columns) or bool(torch.isfinite(torch.as_tensor(site["value"])).all())):
                return f"site {name!r}: its value is not finite"
            if bool((bad := ~torch.isfinite(site["fn"].log_prob(site["value"]))).any()):
                where = f"site {name!r}{_row(site, bad, row_plate)}: its log-probability is not finite"
                return where + (", as its value is outside of the support" if _is_outside(site) else "")
    return A_GRADIENT


@torch.enable_grad()
def first_bad_gradient(run: Run, parameters: Mapping[str, Tensor]) -> str:
    """Describe the first site of a run whose log-probability has a gradient that is not finite.

    Args:
        run: A run whose sites are finite.
        parameters: The trained parameters, by the user's names.

    Returns:
        The site and the parameters whose gradient is not finite; `A_GRADIENT` if no single site is at fault.
    """
    for whose, trace in zip((" of the guide", ""), run_program(run), strict=True):
        for name, site in sample_sites(trace):
            if not (total := log_prob(site).sum()).requires_grad:
                continue
            gradients = torch.autograd.grad(total, [*parameters.values()], allow_unused=True, retain_graph=True)
            pairs = zip(parameters, gradients, strict=True)
            if bad := [n for n, g in pairs if g is not None and not bool(torch.isfinite(g).all())]:
                more = f" and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
                return (
                    f"site {name!r}{whose}: its log-probability is finite, but its gradient with respect to "
                    f"{', '.join(bad[:_MOST_NAMED])}{more} is not"
                )
    return A_GRADIENT


def _innermost(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _what_is_wrong(parameter: str, constraint: Any, value: Tensor) -> tuple[str, Tensor]:
    """What is wrong with a distribution's parameter, and where, of its batch shape."""
    known = not constraints.is_dependent(constraint)
    bad, what = ~torch.isfinite(value), "is nan" if bool(value.isnan().any()) else "is not finite"
    if bool(bad.any()):
        return what, bad.flatten(-constraint.event_dim).any(-1) if known and constraint.event_dim else bad
    if parameter == "scale":
        return "reached 0", value <= 0
    return f"is not in {constraint}", ~constraint.check(value) if known else bad


def _is_outside(site: Any) -> bool:
    """Whether any part of a site's value is known to lie outside of the support of its distribution."""
    try:
        return not bool(site["fn"].support.check(torch.as_tensor(site["value"])).all())
    except (NotImplementedError, AttributeError):
        return False


def _row(site: Any, bad: Tensor, row_plate: str, event_dim: int = 0) -> str:
    """The first row of a site at which something is bad, in words; empty if it is bad in all rows, or there are none.

    Args:
        site: The site.
        bad: Where it is bad.
        row_plate: The plate of rows; without a name, the only one around the site.
        event_dim: The number of dimensions of ``bad`` to the right of the site's batch dimensions.
    """
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    named = [frame for frame in frames if frame.name == row_plate] or frames
    dim = bad.dim() - event_dim + named[0].dim if len(named) == 1 else -1
    if dim < 0 or bool(bad.all()):
        return ""
    return f", row {int(bad.nonzero()[0, dim])}"
