"""The commands: ``fit``, ``check``, ``report``, ``compare``, ``predict``, ``sample``, ``list``."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from deepprob.cli.exit_codes import Command, Subcommand
from deepprob.cli.files import checked_ending, write, write_samples
from deepprob.cli.options import data_sets, model_named, models, names_of, options_of
from deepprob.cli.routines import objectives, routine_named, routines
from deepprob.cli.screen import Screen
from deepprob.cli.work import check_on, compare_on, exit_code, load, opened, predict_on, samples
from deepprob.errors import unknown

app = typer.Typer(
    cls=Command,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a saved posterior.", show_default=False)]
_Data = Annotated[
    str | None,
    typer.Argument(metavar="[DATA]", help="Other data: a name, a file or a folder; by default the fit's test rows."),
]
_Ood = Annotated[str | None, typer.Option(metavar="DATA", help="Out-of-distribution data to compare with.")]
_Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]
_Draws = Annotated[int, typer.Option(min=25, help="Number of posterior draws, and of importance samples per row.")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object; messages go to standard error.")]
# Of `fit` only; named here so that its signature fits a screen.
_Target = Annotated[str | None, typer.Option(metavar="COLUMN", help="Column to predict, of a file.")]
_Drop = Annotated[list[str] | None, typer.Option(metavar="COLUMNS", help="Columns to leave out, such as id,name.")]
_Weights = Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of row weights.")]
_Size = Annotated[int | None, typer.Option(help="Height and width to which images of a folder are scaled and cropped.")]
_Split = Annotated[int, typer.Option(help="Number of the standard split; of your own data, seed of the random split.")]
_Out = Annotated[Path | None, typer.Option(help="Output folder; by default runs/MODEL-DATA.")]
_Epochs = Annotated[int | None, typer.Option(help="Passes over the data; by default until the bound has levelled.")]
_Batch = Annotated[int | None, typer.Option(help="Rows per step; by default 128.")]
_Rate = Annotated[float | None, typer.Option(help="Learning rate; by default the model's own.")]
_WarmUp = Annotated[float | None, typer.Option(help="Epochs of KL warm-up.")]
_Routine = Annotated[str, typer.Option(help="The routine that makes the posterior, see: deepprob list routines")]
_Guide = Annotated[str | None, typer.Option(help="Guide, such as normal or low_rank; by default the model's own.")]
_Latent = Annotated[int | None, typer.Option(help="Size of the latent code or state.")]
_Hidden = Annotated[str | None, typer.Option(help="Sizes of hidden layers, such as 200,100.")]
_Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Other argument of model or routine.")
]
_Csv = Annotated[Path | None, typer.Option(metavar="FILE", help="CSV file for the scores of every epoch.")]
_Board = Annotated[Path | None, typer.Option(metavar="DIR", help="TensorBoard folder for the scores of every epoch.")]
_Resume = Annotated[bool, typer.Option("--resume", help="Resume an interrupted fit in the same folder.")]


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"deepprob {metadata.version('deepprob')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Fit probabilistic deep models and check whether the fit can be trusted.

    Start with: deepprob fit vae digits

    Your own table: deepprob fit bnn my.csv --target COLUMN
    """


@app.command(cls=Subcommand)
def fit(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="See: deepprob list models", show_default=False)],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A name (see: deepprob list data), a file (.csv, .tsv, .parquet, .npy, .npz), or a folder of images.",
            show_default=False,
        ),
    ],
    target: _Target = None,
    drop: _Drop = None,
    weights: _Weights = None,
    size: _Size = None,
    split: _Split = 0,
    out: _Out = None,
    epochs: _Epochs = None,
    batch_size: _Batch = None,
    learning_rate: _Rate = None,
    warm_up: _WarmUp = None,
    routine: _Routine = "svi",
    guide: _Guide = None,
    latent_dim: _Latent = None,
    hidden: _Hidden = None,
    settings: _Set = None,
    seed: _Seed = 0,
    device: _Device = "auto",
    csv: _Csv = None,
    tensorboard: _Board = None,
    resume: _Resume = False,
    quiet: _Quiet = False,
    json: _Json = False,
) -> None:
    """Fit MODEL to DATA; save the posterior and a report on the test rows."""
    # Heavy modules are imported on use, so that help and errors appear at once.
    from deepprob.cli.fit import loggers_to, plan_fit, report_fit, report_interruption, run_fit

    screen = Screen(quiet=quiet, json=json)
    kind, make = model_named(model), routine_named(routine)
    given, others = options_of(kind, make, latent_dim, hidden, settings or [])
    own = {"target": target, "drop": names_of(drop), "weights": weights, "size": size}
    dataset = opened(screen, data, split=split, needs_target="table" not in kind.tasks, **own)
    plan = plan_fit(model, kind, dataset, given, out=out, epochs=epochs, batch_size=batch_size)
    if resume and not plan.can_resume:
        screen.note(f"there is no interrupted fit in {plan.folder}; the fit starts from the beginning.")
    steps: dict[str, Any] = {"guide": guide, "learning_rate": learning_rate, "warm_up": warm_up, "settings": others}
    loggers = loggers_to(csv, tensorboard)
    posterior = run_fit(screen, plan, make, device=device, seed=seed, resume=resume, loggers=loggers, **steps)
    if posterior.history.interrupted:
        report_interruption(screen, plan, posterior)
        raise typer.Exit(130)
    try:
        report = report_fit(screen, plan, posterior)
    except KeyboardInterrupt:
        screen.note(f"interrupted before the report was written. The posterior is in {plan.folder}.")
        raise typer.Exit(130) from None
    raise typer.Exit(exit_code(report))


@app.command(cls=Subcommand)
def check(
    folder: _Folder,
    data: _Data = None,
    ood: _Ood = None,
    draws: _Draws = 200,
    seed: _Seed = 0,
    device: _Device = "cpu",
    quiet: _Quiet = False,
    json: _Json = False,
) -> None:
    """Check a saved posterior and print the report; exit code 1 if the verdict is fail."""
    screen = Screen(quiet=quiet, json=json)
    found = check_on(screen, load(screen, folder, data, device), ood=ood, draws=draws, seed=seed)
    screen.report(found)
    screen.result(found.to_dict() | {"paths": {"posterior": str(folder)}})
    raise typer.Exit(exit_code(found))


@app.command(cls=Subcommand)
def report(
    folder: _Folder,
    data: _Data = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Output file; by default report.html in DIR.")
    ] = None,
    ood: _Ood = None,
    draws: _Draws = 200,
    seed: _Seed = 0,
    device: _Device = "cpu",
    quiet: _Quiet = False,
    json: _Json = False,
) -> None:
    """Check a saved posterior and write the report: an HTML page with pictures, and JSON."""
    screen = Screen(quiet=quiet, json=json)
    file = checked_ending(out or folder / "report.html", (".html",))
    found = check_on(screen, load(screen, folder, data, device), ood=ood, draws=draws, seed=seed)
    paths = write(found, file)
    screen.report(found, full=False)
    screen.say()
    screen.paths(paths)
    screen.result(found.to_dict() | {"paths": paths})
    raise typer.Exit(exit_code(found))


@app.command(cls=Subcommand)
def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Folders of saved posteriors.", show_default=False)
    ],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Other data to compare on; by default the fits' test rows.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page with all checks, and JSON next to it.")
    ] = None,
    draws: Annotated[int, typer.Option(min=25, help="Number of draws from each posterior.")] = 1000,
    seed: _Seed = 0,
    device: _Device = "cpu",
    quiet: _Quiet = False,
    json: _Json = False,
) -> None:
    """Rank saved posteriors by their predictions of the test rows; exit code 1 if the best one's verdict is fail."""
    screen = Screen(quiet=quiet, json=json)
    if out is not None:
        checked_ending(out, (".html",))
    found = compare_on(screen, folders, data, device, draws=draws, seed=seed)
    screen.paragraph(found.summary, style="bold")
    screen.say()
    header, *rows = found.table
    screen.table(header, rows)
    paths = {} if out is None else write(found, out)
    if paths:
        screen.say()
        screen.paths(paths)
    screen.result(found.to_dict() | {"paths": paths})
    raise typer.Exit(exit_code(found.best.report))


@app.command(cls=Subcommand)
def predict(
    folder: _Folder,
    data: _Data = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Output file; by default predictions.csv in DIR.")
    ] = None,
    draws: Annotated[int, typer.Option(min=2, help="Number of posterior draws.")] = 200,
    mass: Annotated[float, typer.Option(min=0.01, max=0.99, help="Probability inside the interval.")] = 0.9,
    seed: _Seed = 0,
    device: _Device = "cpu",
    quiet: _Quiet = False,
    json: _Json = False,
) -> None:
    """Predict every row of DATA and write a table: mean, sd and interval, or class and probabilities."""
    screen = Screen(quiet=quiet, json=json)
    file = checked_ending(out or folder / "predictions.csv", (".csv", ".tsv"))
    subject = load(screen, folder, data, device, to_predict=True)
    frame = predict_on(screen, subject, draws=draws, mass=mass, seed=seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(file, sep="\t" if file.suffix == ".tsv" else ",")
    screen.frame(frame)
    screen.say()
    paths = {"predictions": str(file)}
    screen.paths(paths)
    screen.result({"rows": len(frame), "columns": [*frame.columns], "paths": paths})


@app.command(cls=Subcommand)
def sample(
    folder: _Folder,
    draws: Annotated[int, typer.Option(min=1, help="Number of draws.")] = 100,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Output file: .npz, .csv or .png; by default samples.npz in DIR."),
    ] = None,
    seed: _Seed = 0,
    device: _Device = "cpu",
    quiet: _Quiet = False,
    json: _Json = False,
) -> None:
    """Draw rows from the fitted model, or targets of the test rows if it has inputs; images also as a PNG grid."""
    screen = Screen(quiet=quiet, json=json)
    file = checked_ending(out or folder / "samples.npz", (".npz", ".csv", ".png"))
    subject = load(screen, folder, None, device)
    values = samples(subject, draws, seed)
    paths = write_samples(subject, values, file)
    for name, value in values.items():
        screen.say((f"{name:<8}", "bold"), f"{value.shape!s:<18}", (f"mean {value.mean():.4g}", "dim"))
    screen.paths(paths)
    screen.result({"shapes": {name: list(value.shape) for name, value in values.items()}, "paths": paths})


@app.command(name="list", cls=Subcommand)
def list_(
    what: Annotated[
        str | None, typer.Argument(metavar="[WHAT]", help="models, data, routines or objectives; by default all.")
    ] = None,
    json: _Json = False,
) -> None:
    """List the available models, data sets, routines and objectives."""
    screen = Screen(json=json)
    tables = {"models": models, "data": data_sets, "routines": routines, "objectives": objectives}
    if what is not None and what not in tables:
        raise unknown("list", what, tables)
    result: dict[str, Any] = {}
    for name in tables if what is None else [what]:
        header, rows = tables[name]()
        if result:
            screen.say()
        screen.table(header, rows)
        result[name] = [dict(zip(header, row, strict=True)) for row in rows]
    screen.result(result)


def main() -> None:
    """Run the command ``deepprob``."""
    app()
