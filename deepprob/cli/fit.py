"""The command ``deepprob fit``: plan a fit, run it, save the posterior and report on it."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepprob.cli.files import check_writable, write
from deepprob.cli.options import describe_rows, program_for
from deepprob.cli.routines import accepted_by
from deepprob.cli.screen import Screen
from deepprob.cli.work import Subject, check_on, warnings_as_notes
from deepprob.data import DataSet
from deepprob.diagnostics.report import Report
from deepprob.fitting.callbacks import Callback, Checkpoint, Fit
from deepprob.fitting.course import Length
from deepprob.fitting.divergence import DivergenceError
from deepprob.fitting.kl_schedules import KLWarmUp
from deepprob.fitting.loggers import CSVLogger, TensorBoard
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program
from deepprob.storage import check_free

CHECKPOINTS = 20  # per fit: an interrupted fit loses a twentieth of its steps at most


@dataclass(frozen=True)
class FitPlan:
    """One fit of the command.

    Attributes:
        program: The program to fit.
        data: The data set.
        folder: Folder for the posterior.
        length: The number of steps, or the budget of a fit that ends when its bound has levelled.
        batch_size: Rows per step; None for the routine's choice.
    """

    program: Program
    data: DataSet
    folder: Path
    length: Length
    batch_size: int | None

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint."""
        return self.folder / "checkpoint"

    @property
    def can_resume(self) -> bool:
        """Whether a checkpoint exists."""
        return (self.checkpoint / "manifest.json").exists()


class Heading(Callback):
    """Print a heading once, after data and settings were validated and before the first step.

    Args:
        say: Prints the heading.
    """

    def __init__(self, say: Callable[[], object]) -> None:
        self.say: Callable[[], object] | None = say

    def start(self, fit: Fit) -> None:
        if self.say is not None:
            self.say()
        self.say = None  # some routines fit twice


def plan_fit(
    model: str,
    kind: type[Program],
    data: DataSet,
    options: dict[str, Any],
    *,
    out: Path | None,
    epochs: int | None,
    batch_size: int | None,
) -> FitPlan:
    """Build the fit from the arguments of the command.

    Args:
        model: Name of the model.
        kind: The model's class.
        data: The data set.
        options: The model's arguments.
        out: Output folder; None for ``runs/MODEL-DATA``.
        epochs: Passes over the data; None to fit until the bound has levelled.
        batch_size: Rows per step; None for the routine's choice.
    """
    program = program_for(model, kind, data, options)
    folder = out or Path("runs", f"{model}-{data.name.replace('/', '-').partition('.')[0]}")
    check_free(folder, kind="posterior")
    check_writable(folder)
    steps = math.ceil(len(data.train) / max(batch_size or 128, 1))
    return FitPlan(program, data, folder, Length.of(epochs, None, steps), batch_size)


def loggers_to(csv: Path | None, tensorboard: Path | None) -> list[Callback]:
    """The callbacks that write the scores of every epoch to a CSV file and to a folder of TensorBoard."""
    return [*([CSVLogger(csv)] if csv else []), *([TensorBoard(tensorboard)] if tensorboard else [])]


def run_fit(
    screen: Screen,
    plan: FitPlan,
    routine: Callable[..., Posterior],
    *,
    guide: str | None,
    learning_rate: float | None,
    warm_up: float | None,
    device: str,
    seed: int,
    resume: bool,
    loggers: Sequence[Callback] = (),
    settings: Mapping[str, Any] | None = None,
) -> Posterior:
    """Fit the program and save the posterior.

    Args:
        screen: The screen.
        plan: The fit.
        routine: The routine.
        guide: The guide; None for the model's own.
        learning_rate: The learning rate; None for the model's own.
        warm_up: Epochs of KL warm-up, or None.
        device: The device.
        seed: The seed.
        resume: Whether to resume an interrupted fit.
        loggers: Callbacks that log.
        settings: Other arguments of the routine.

    Raises:
        ValueError: If the routine does not take one of these.
        DivergenceError: If the fit diverged; the last good posterior is saved first.
    """

    def print_heading() -> None:
        name, data = type(plan.program).__name__, plan.data
        screen.say((f"{name} on {data.name}", "bold"), f": {describe_rows(data)}")
        if "digest" in data.recipe:
            screen.say((data.origin, "dim"))
        screen.say((f"{named}{_planned(plan.length)}, seed {seed}", "dim"))

    named = "" if routine is svi else f"routine {routine.__name__}, "
    began = time.perf_counter()
    warming = [] if warm_up is None else [KLWarmUp(warm_up)]
    checkpoint = Checkpoint(
        plan.checkpoint, max(1, plan.length.total // plan.length.steps_per_epoch // CHECKPOINTS), resume=resume
    )
    given = {
        "epochs": plan.length.epochs,
        "batch_size": plan.batch_size,
        "guide": guide,
        "optimizer": None if learning_rate is None else Optimizer(learning_rate=learning_rate),
        **(settings or {}),
    }
    added = {
        "held_out": plan.data.valid,
        "device": device,
        "seed": seed,
        "progress": not screen.quiet and "auto",
        "callbacks": [*warming, checkpoint, *loggers, Heading(print_heading)],
    }
    with warnings_as_notes(screen):
        try:
            posterior = routine(plan.program, plan.data.train, **accepted_by(routine, given, added))
        except DivergenceError as error:
            if error.posterior is not None and error.posterior.history.best_epoch:
                _save(error.posterior, plan)
                raise DivergenceError(f"{error} The kept posterior is in {plan.folder}.", error.posterior) from error
            raise
    _save(posterior, plan)
    screen.say((_summary(posterior, time.perf_counter() - began), "dim"))
    return posterior


def report_interruption(screen: Screen, plan: FitPlan, posterior: Posterior) -> None:
    """Print the progress of an interrupted fit and the command to resume it."""
    done, planned = len(posterior.history.steps.get("elbo", ())), posterior.config["steps"]
    screen.note(f"interrupted after {done} of {planned} steps. The best posterior so far is in {plan.folder}.")
    if plan.can_resume:
        screen.say(("resume with  ", "dim"), f"{_command_line()} --resume")


def report_fit(screen: Screen, plan: FitPlan, posterior: Posterior) -> Report:
    """Check a finished fit on the test rows; write and print the report."""
    shutil.rmtree(plan.checkpoint, ignore_errors=True)  # the posterior is saved, so nothing is left to resume
    data = plan.data
    report = check_on(screen, Subject(posterior, data.name, data.test, data.train, data.task))
    paths = {"posterior": str(plan.folder)} | write(report, plan.folder / "report.html")
    screen.say()
    screen.report(report, full=False)
    screen.say()
    screen.paths({name: path for name, path in paths.items() if name != "json"})
    screen.say(("next       ", "dim"), f"deepprob check {plan.folder}   deepprob sample {plan.folder}")
    screen.result(report.to_dict() | {"paths": paths})
    return report


def _save(posterior: Posterior, plan: FitPlan) -> None:
    posterior.config["data"] = dict(plan.data.recipe)
    posterior.save(plan.folder)


def _planned(length: Length) -> str:
    """The length of a fit in words."""
    if length.fixed:
        return f"{length.epochs} epochs of {length.steps_per_epoch} steps"
    epochs = math.ceil(length.total / length.steps_per_epoch)
    return f"until the bound has levelled, at most {epochs} epochs of {length.steps_per_epoch} steps"


def _summary(posterior: Posterior, seconds: float) -> str:
    """Duration and ELBO of the fit in one line."""
    history = posterior.history
    text = f"fitted {len(history.epochs.get('elbo', ()))} epochs in {seconds:.0f} s"
    name, scores = history.held_out
    best = history.best_epoch
    if scores:
        return f"{text}; {name} {scores[best - 1 if best else -1]:.4g} nats per row at epoch {best or len(scores)}"
    return f"{text}; ELBO {history.epochs['elbo'][-1]:.4g} nats per row" if history.epochs.get("elbo") else text


def _command_line() -> str:
    """The command line without ``--resume``."""
    return shlex.join(["deepprob", *(a for a in sys.argv[1:] if a != "--resume")])
