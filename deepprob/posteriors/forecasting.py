"""Forecasts: the values after the end of each row, given its own."""

from __future__ import annotations

from functools import partial

from pyro import poutine
from pyro.poutine.trace_struct import Trace

from deepprob.errors import unknown
from deepprob.posteriors.decoding import explaining
from deepprob.posteriors.draws import Job
from deepprob.posteriors.fitted import FittedProgram
from deepprob.posteriors.prediction import Prediction
from deepprob.programs.minibatch import Batch
from deepprob.programs.program import Program
from deepprob.programs.run import Run, run_guide
from deepprob.programs.sites import is_data, sample_sites


def forecasted(fitted: FittedProgram, batch: Batch, steps: int, draws: int, site: str | None) -> Prediction:
    """The prediction of the steps after each row, by the program's own `forecast` under draws from the posterior.

    Args:
        fitted: The posterior's program.
        batch: Its arguments.
        steps: Number of steps ahead.
        draws: Number of draws, K.
        site: The site of the forecast to return; None for the last one.

    Raises:
        TypeError: If the program has no forecast.
        ValueError: If the forecast samples nothing new, or not the named site.
    """
    if not fitted.program.has_forecast:
        Program.forecast(fitted.program, steps, *batch)  # raises
    values = explaining(fitted, batch, draws) if fitted.structure.summed else None
    job = Job(f"forecast of {steps} steps", partial(_run, steps))
    trace: Trace
    (trace,) = fitted.under_draws(job, fitted.prepared(batch, draws), values)
    explained = fitted.structure.latent + fitted.structure.summed
    new = [name for name, found in sample_sites(trace) if name not in explained and not is_data(found)]
    if not new:
        raise ValueError(
            "the program's forecast samples no site besides the latent ones of the model. Sample the next values last: "
            "pyro.sample('x', distribution), with event shape (steps, ...)."
        )
    if site is not None and site not in new:
        raise unknown("site of the forecast", site, new)
    return fitted.prediction_of(trace, site or new[-1], draws)


def _run(steps: int, run: Run) -> list[Trace]:
    """The trace of a forecast, under the guide's draws."""
    model = poutine.replay(partial(run.program.forecast, steps), trace=run_guide(run))
    with run.bound(), run.stacked():
        return [poutine.trace(model).get_trace(*run.batch)]
