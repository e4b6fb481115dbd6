"""The command ``deepprob``: fit a model to data, check it, report on it, draw from it.

Exit codes: 0, done; 1, done and the verdict is fail; 2, an error that the user can mend; 3, one that we must mend;
130, interrupted.
"""

from __future__ import annotations

import ast
import inspect
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from deepprob.errors import StorageError, unknown
from deepprob.fitting.divergence import DivergenceError
from deepprob.terminal import Screen

# What is heavy is imported where it is used: help and errors come at once.
if TYPE_CHECKING:
    from deepprob.data import DataSet
    from deepprob.diagnostics.report import Report
    from deepprob.posteriors.posterior import Posterior
    from deepprob.programs.program import Program

USER_ERRORS = (ValueError, TypeError, OSError, DivergenceError)
LEAST_EPOCHS = 20
CHECKPOINTS = 50  # so many in a fit: an interrupted one loses little
SHOWN = 100  # images in a grid


class Command(TyperGroup):
    """Ends every run with an exit code, and every error with one line."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **extra: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in given
        given = [a for a in given if a != "--debug"]  # wherever it stands
        screen = Screen()
        try:
            sys.exit(super().main(given, prog_name, *rest, **extra | {"standalone_mode": False}) or 0)
        except KeyboardInterrupt:
            screen.error("interrupted.")
            sys.exit(130)
        except Exception as error:
            if debug:
                traceback.print_exc()
            sys.exit(_explain(error, screen))


def _explain(error: Exception, screen: Screen) -> int:
    """Say what went wrong in one line; the exit code."""
    # The errors of the command line itself have no public class in all versions of typer.
    if message := getattr(error, "format_message", None):
        if text := message():
            where = getattr(getattr(error, "ctx", None), "command_path", "deepprob")
            screen.error(f"{text}{'' if text.endswith(('.', '?')) else '.'} See: {where} --help")
        return 2 if text else 0
    if isinstance(error, typer.Abort):
        screen.error("interrupted.")
        return 130
    if isinstance(error, USER_ERRORS):
        screen.error(str(error))
        return 2
    screen.error(f"{type(error).__name__}: {error} (a defect of deepprob; --debug shows where)")
    return 3


app = typer.Typer(
    cls=Command,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Where `fit` saved the posterior.", show_default=False)]
Seed = Annotated[int, typer.Option(help="Of all random numbers.")]
Draws = Annotated[int, typer.Option(min=25, help="Posterior draws, and importance samples per row.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deepprob {metadata.version('deepprob')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Fit probabilistic deep models, and find out whether to believe them.

    Start with: deepprob fit vae digits
    """


@app.command()
def fit(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="See: deepprob list models", show_default=False)],
    data: Annotated[str, typer.Argument(metavar="DATA", help="See: deepprob list data", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Where to save; by default runs/MODEL-DATA.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data; by default enough for most.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step; by default 128.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="By default the model's own.")] = None,
    warm_up: Annotated[float | None, typer.Option(help="Epochs until the KL has its full weight.")] = None,
    guide: Annotated[str | None, typer.Option(help="normal, low_rank, ...; by default the model's own.")] = None,
    latent_dim: Annotated[int | None, typer.Option(help="Size of the latent code or state.")] = None,
    hidden: Annotated[str | None, typer.Option(help="Sizes of hidden layers: 200,100")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other argument of the model.")
    ] = None,
    split: Annotated[int, typer.Option(help="Which standard split of the data.")] = 0,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted fit in the same folder.")] = False,
) -> None:
    """Fit MODEL to DATA; save the posterior and a report on held-out rows."""
    from deepprob.data import load_data
    from deepprob.fitting.callbacks import Checkpoint, Heading, KLWarmUp
    from deepprob.fitting.optimizers import Optimizer
    from deepprob.inference import svi
    from deepprob.storage import check_free

    screen = Screen()
    kind = _model(model)
    dataset = load_data(data, split=split)
    program = _program(model, kind, dataset, _options(kind, latent_dim, hidden, settings or []))
    folder = out or Path("runs", f"{model}-{data.replace('/', '-')}")
    check_free(folder, kind="posterior")
    saved = folder / "checkpoint"
    if resume and not (saved / "manifest.json").exists():
        screen.note(f"there is no interrupted fit in {folder}; this one starts at the beginning.")

    steps = math.ceil(len(dataset.train) / max(batch_size or 128, 1))
    epochs = max(LEAST_EPOCHS, round(kind.usual_steps / steps)) if epochs is None else epochs

    def announce() -> None:
        screen.say((f"{kind.__name__} on {data}", "bold"), f": rows of {_sizes(dataset)}")
        screen.say((f"{epochs} epochs of {steps} steps, seed {seed}", "dim"))

    began = time.perf_counter()
    warming = [] if warm_up is None else [KLWarmUp(warm_up)]
    checkpoint = Checkpoint(saved, max(1, epochs // CHECKPOINTS), resume=resume)
    with _noting(screen):
        try:
            posterior = svi(
                program,
                dataset.train,
                epochs=epochs,
                batch_size="auto" if batch_size is None else batch_size,
                guide=guide,
                optimizer=Optimizer(learning_rate=learning_rate),
                held_out=dataset.valid,
                device=device,
                seed=seed,
                callbacks=[*warming, checkpoint, Heading(announce)],
            )
        except DivergenceError as error:
            if error.posterior is not None and error.posterior.history.best_epoch:
                _save(error.posterior, dataset, split, folder)
                raise DivergenceError(f"{error} What was kept is in {folder}.", error.posterior) from error
            raise
    _save(posterior, dataset, split, folder)
    screen.say((_what_happened(posterior, time.perf_counter() - began), "dim"))
    if posterior.history.interrupted:
        done, planned = len(posterior.history.steps.get("elbo", ())), epochs * steps
        screen.note(f"interrupted after {done} of {planned} steps. The best posterior so far is in {folder}.")
        if (saved / "manifest.json").exists():
            screen.say(("go on with  ", "dim"), f"{_repeated()} --resume")
        raise typer.Exit(130)
    _remove(saved)

    try:
        report = _judge(screen, posterior, dataset, train=True)
        page = _write(report, folder / "report.html")
    except KeyboardInterrupt:
        screen.note(f"interrupted before the report was written. The posterior is in {folder}.")
        raise typer.Exit(130) from None
    screen.say()
    screen.report(report, full=False)
    screen.say()
    screen.say(("posterior  ", "dim"), str(folder))
    screen.say(("report     ", "dim"), str(page))
    screen.say(("next       ", "dim"), f"deepprob check {folder}   deepprob sample {folder}")
    raise typer.Exit(_code(report))


@app.command()
def check(
    folder: Folder,
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="Judge by other data; by default the test rows.")
    ] = None,
    ood: Annotated[str | None, typer.Option(metavar="DATA", help="Data that should surprise the model.")] = None,
    draws: Draws = 200,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Print the report on a saved posterior; exit code 1 if its verdict is fail."""
    screen = Screen()
    posterior, dataset, same = _load(folder, data, device)
    report = _judge(screen, posterior, dataset, train=same, ood=ood, draws=draws, seed=seed)
    screen.report(report)
    raise typer.Exit(_code(report))


@app.command()
def report(
    folder: Folder,
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="Judge by other data; by default the test rows.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.html", help="By default report.html in DIR.")] = None,
    ood: Annotated[str | None, typer.Option(metavar="DATA", help="Data that should surprise the model.")] = None,
    draws: Draws = 200,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Write the report on a saved posterior: a page with pictures, and the same as JSON."""
    screen = Screen()
    if out is not None and out.suffix != ".html":
        raise ValueError(f"--out must end in .html; got {str(out)!r}. The JSON goes beside it.")
    posterior, dataset, same = _load(folder, data, device)
    found = _judge(screen, posterior, dataset, train=same, ood=ood, draws=draws, seed=seed)
    page = _write(found, out or folder / "report.html")
    screen.report(found, full=False)
    screen.say()
    screen.say(("report  ", "dim"), str(page))
    screen.say(("json    ", "dim"), str(page.with_suffix(".json")))
    raise typer.Exit(_code(found))


@app.command()
def sample(
    folder: Folder,
    draws: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
    out: Annotated[Path | None, typer.Option(metavar="FILE.npz", help="By default samples.npz in DIR.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Draw rows from the fitted model, or targets for the test rows if it predicts; images also as a PNG grid."""
    import numpy as np

    screen = Screen()
    file = out or folder / "samples.npz"
    if file.suffix != ".npz":
        raise ValueError(f"--out must end in .npz; got {str(file)!r}. A grid of images goes beside it.")
    posterior, dataset, _ = _load(folder, None, device)
    values = _drawn(posterior, dataset, draws, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        np.savez_compressed(stream, **values)
    for name, value in values.items():
        screen.say((f"{name:<8}", "bold"), f"{value.shape!s:<18}", (f"mean {value.mean():.4g}", "dim"))
    screen.say(("samples  ", "dim"), str(file))
    if (image := _grid(dataset, values)) is not None:
        file.with_suffix(".png").write_bytes(image)
        screen.say(("picture  ", "dim"), str(file.with_suffix(".png")))


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="models, data or routines.", show_default=False)],
) -> None:
    """List what there is: models, data or routines."""
    tables: dict[str, Callable[[], tuple[Sequence[str], Sequence[Sequence[str]]]]] = {
        "models": _models,
        "data": _data,
        "routines": _routines,
    }
    if what not in tables:
        raise unknown("list", what, tables)
    Screen().table(*tables[what]())


def main() -> None:
    """Run the command ``deepprob``."""
    app()


# Models and data ----------------------------------------------------------------------------------


def _models() -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    from deepprob.models import MODELS

    return ("model", "for", "what it is"), [(n, ", ".join(m.tasks) or "any", _first_line(m)) for n, m in MODELS.items()]


def _data() -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    from deepprob.data import list_data

    # The licence stands last: it is what a narrow terminal may cut off.
    order = ("name", "task", "shape", "rows", "where", "licence")
    rows = [row._replace(rows=row.rows.replace(" ", "")) for row in list_data()]
    return order, [[getattr(row, column) for column in order] for row in rows]


def _routines() -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    from deepprob.inference import ROUTINES

    return ("routine", "what it does"), [(name, _first_line(routine)) for name, routine in ROUTINES.items()]


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _model(name: str) -> type[Program]:
    from deepprob.models import MODELS

    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return MODELS[name]


def _program(name: str, kind: type[Program], dataset: DataSet, options: dict[str, Any]) -> Program:
    if kind.tasks and dataset.task not in kind.tasks:
        from deepprob.data import list_data

        fitting = [row.name for row in list_data() if row.task in kind.tasks]
        raise ValueError(
            f"model {name!r} is for {' or '.join(kind.tasks)}; data set {dataset.name!r} is for {dataset.task}. "
            f"Choose from: {', '.join(fitting)}."
        )
    return kind.from_data(dataset, **options)


def _options(kind: type[Program], latent_dim: int | None, hidden: str | None, settings: list[str]) -> dict[str, Any]:
    """The model's arguments that were given, by name."""
    takes = _takes(kind)
    given: dict[str, Any] = {} if latent_dim is None else {"latent_dim": latent_dim}
    if hidden is not None:
        sizes = _whole_numbers(hidden)
        given |= {"hidden_dim": sizes[0]} if "hidden_dim" in takes and len(sizes) == 1 else {"hidden_dims": sizes}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set wants NAME=VALUE; got {setting!r}. For example: --set likelihood=normal")
        given[name] = _value(value)
    for name in given:
        if name not in takes:
            raise unknown(f"option of {kind.__name__}", name, takes)
    return given


def _takes(kind: type[Program]) -> list[str]:
    """Names of the arguments that the data do not decide."""
    _data, *own = inspect.signature(kind.from_data).parameters.values()
    names = [p.name for p in own if p.kind is not p.VAR_KEYWORD]
    if len(names) < len(own):
        names += [p.name for p in inspect.signature(kind).parameters.values() if p.default is not p.empty]
    return names


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--hidden wants whole numbers, like 200,100; got {text!r}.") from None


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _sizes(dataset: DataSet) -> str:
    parts = {"train": dataset.train, "valid": dataset.valid, "test": dataset.test}
    counts = " / ".join(f"{len(part)} {name}" for name, part in parts.items() if part is not None)
    return f"{tuple(dataset.shape)}, {counts}"


# Posteriors ---------------------------------------------------------------------------------------


def _save(posterior: Posterior, dataset: DataSet, split: int, folder: Path) -> None:
    posterior.config["data"] = {"name": dataset.name, "split": split}
    posterior.save(folder)


def _remove(checkpoint: Path) -> None:
    """A finished fit needs no checkpoint: the posterior is saved."""
    import shutil

    shutil.rmtree(checkpoint, ignore_errors=True)


def _load(folder: Path, other: str | None, device: str) -> tuple[Posterior, DataSet, bool]:
    """A saved posterior, the data to judge it by, and whether it was fitted to that data set."""
    from deepprob.data import load_data
    from deepprob.engine.machine import pick_device
    from deepprob.posteriors.posterior import Posterior

    posterior = Posterior.load(folder, device=pick_device(device))
    own = posterior.config.get("data") or {}
    name = other or own.get("name")
    if name is None:
        raise StorageError(f"{folder} does not say what data it was fitted to. Name them: deepprob check {folder} DATA")
    same = name == own.get("name")
    return posterior, load_data(name, split=own.get("split", 0) if same else 0), same


def _code(report: Report) -> int:
    """The exit code of a verdict."""
    return 1 if report.verdict == "fail" else 0


def _judge(
    screen: Screen,
    posterior: Posterior,
    dataset: DataSet,
    *,
    train: bool,
    ood: str | None = None,
    draws: int = 200,
    seed: int = 0,
) -> Report:
    from deepprob.data import load_data
    from deepprob.diagnostics.report import check as ask

    strange = None if ood is None else load_data(ood).test
    with _noting(screen), screen.err.status("checking"):
        found = ask(
            posterior,
            dataset.test,
            train=dataset.train if train else None,
            ood=strange,
            draws=draws,
            particles=draws,
            seed=seed,
        )
    rows = len(dataset.test)
    return replace(found, title=f"{type(posterior.program).__name__} on {dataset.name}, {rows} test rows")


def _write(report: Report, page: Path) -> Path:
    page.parent.mkdir(parents=True, exist_ok=True)
    report.save(page)
    report.save(page.with_suffix(".json"))
    return page


def _drawn(posterior: Posterior, dataset: DataSet, draws: int, seed: int) -> dict[str, Any]:
    """Arrays by name: what the model draws from its prior, or for the test rows if it predicts."""
    from deepprob.diagnostics import Case

    case = Case(posterior, dataset.test)
    if not case.supervised:
        sites = posterior.sample_prior(draws, seed=seed)
        parts = {name: value[0] for name, value in sites.items()}
        if len(posterior.structure.observed) == 1:  # the same draws' means: a picture of them shows more
            parts["mean"] = posterior.predict_prior(draws, seed=seed).mean
        return {name: value.cpu().numpy() for name, value in parts.items()}
    found = posterior.predict(*case.inputs, draws=draws, seed=seed)
    parts = {found.site: found.draws, "mean": found.mean, "sd": found.sd}
    return {name: value.cpu().numpy() for name, value in parts.items()}


def _grid(dataset: DataSet, values: dict[str, Any]) -> bytes | None:
    """Drawn images side by side, if that is what they are."""
    from deepprob.diagnostics.plots import image_rows, render

    images = values.get("mean")
    if dataset.task != "images" or images is None or images.shape[1:] != tuple(dataset.shape):
        return None
    images = images[:SHOWN]
    lines = [images[i : i + 10] for i in range(0, len(images), 10)]
    return render(image_rows({" " * i: line for i, line in enumerate(lines)}))


def _what_happened(posterior: Posterior, seconds: float) -> str:
    history = posterior.history
    epochs = history.epochs
    text = f"fitted {len(epochs.get('elbo', ()))} epochs in {seconds:.0f} s"
    if scores := epochs.get("held_out_elbo"):
        text += f"; held-out elbo {max(scores):.4g} nats per row at epoch {history.best_epoch}"
    elif scores := epochs.get("elbo"):
        text += f"; elbo {scores[-1]:.4g} nats per row"
    return text


@contextmanager
def _noting(screen: Screen) -> Iterator[None]:
    """Warnings meant for users become notes; those of libraries about themselves stay silent."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        screen.note(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning)
        warnings.filterwarnings("ignore", message="the fit was interrupted")  # said at the end, with the folder
        warnings.showwarning = show
        yield


def _repeated() -> str:
    """The command as it was given."""
    import shlex

    return shlex.join(["deepprob", *(a for a in sys.argv[1:] if a != "--resume")])
