"""The commands: ``fit``, ``check``, ``report``, ``compare``, ``sample``, ``list``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from deepprob.cli.exit_codes import Command
from deepprob.cli.options import Table, data_sets, models, options_of, routines
from deepprob.cli.screen import Screen
from deepprob.cli.work import check_on, compare_on, exit_code, image_grid, load, samples, write
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
    str | None, typer.Argument(metavar="[DATA]", help="Other data to check on; by default the data of the fit.")
]
_Ood = Annotated[str | None, typer.Option(metavar="DATA", help="Out-of-distribution data to compare with.")]
_Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]
_Draws = Annotated[int, typer.Option(min=25, help="Number of posterior draws, and of importance samples per row.")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda.")]
_Csv = Annotated[Path | None, typer.Option(metavar="FILE", help="CSV file for the scores of every epoch.")]
_Board = Annotated[Path | None, typer.Option(metavar="DIR", help="TensorBoard folder for the scores of every epoch.")]


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
    """


@app.command()
def fit(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="See: deepprob list models", show_default=False)],
    data: Annotated[str, typer.Argument(metavar="DATA", help="See: deepprob list data", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Output folder; by default runs/MODEL-DATA.")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the data; by default until the bound has levelled.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step; by default 128.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate; by default the model's own.")] = None,
    warm_up: Annotated[float | None, typer.Option(help="Epochs of KL warm-up.")] = None,
    guide: Annotated[
        str | None, typer.Option(help="Guide, such as normal or low_rank; by default the model's own.")
    ] = None,
    latent_dim: Annotated[int | None, typer.Option(help="Size of the latent code or state.")] = None,
    hidden: Annotated[str | None, typer.Option(help="Sizes of hidden layers, such as 200,100.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other argument of the model.")
    ] = None,
    split: Annotated[int, typer.Option(help="Number of the standard split of the data.")] = 0,
    seed: _Seed = 0,
    device: _Device = "auto",
    csv: _Csv = None,
    tensorboard: _Board = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted fit in the same folder.")] = False,
) -> None:
    """Fit MODEL to DATA; save the posterior and a report on the test rows."""
    # Heavy modules are imported on use, so that help and errors appear at once.
    from deepprob.cli.fit import loggers_to, plan_fit, report_fit, report_interruption, run_fit

    screen = Screen()
    plan = plan_fit(
        model,
        data,
        lambda kind: options_of(kind, latent_dim, hidden, settings or []),
        split=split,
        out=out,
        epochs=epochs,
        batch_size=batch_size,
    )
    if resume and not plan.can_resume:
        screen.note(f"there is no interrupted fit in {plan.folder}; the fit starts from the beginning.")
    posterior = run_fit(
        screen,
        plan,
        guide=guide,
        learning_rate=learning_rate,
        warm_up=warm_up,
        device=device,
        seed=seed,
        resume=resume,
        loggers=loggers_to(csv, tensorboard),
    )
    if posterior.history.interrupted:
        report_interruption(screen, plan, posterior)
        raise typer.Exit(130)
    try:
        report = report_fit(screen, plan, posterior)
    except KeyboardInterrupt:
        screen.note(f"interrupted before the report was written. The posterior is in {plan.folder}.")
        raise typer.Exit(130) from None
    raise typer.Exit(exit_code(report))


@app.command()
def check(
    folder: _Folder,
    data: _Data = None,
    ood: _Ood = None,
    draws: _Draws = 200,
    seed: _Seed = 0,
    device: _Device = "cpu",
) -> None:
    """Check a saved posterior and print the report; exit code 1 if the verdict is fail."""
    screen = Screen()
    posterior, dataset, same = load(folder, data, device)
    report = check_on(screen, posterior, dataset, train=same, ood=ood, draws=draws, seed=seed)
    screen.report(report)
    raise typer.Exit(exit_code(report))


@app.command()
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
) -> None:
    """Check a saved posterior and write the report: an HTML page with pictures, and JSON."""
    screen = Screen()
    if out is not None and out.suffix != ".html":
        raise ValueError(f"--out must end in .html; got {str(out)!r}. The JSON file is written next to it.")
    posterior, dataset, same = load(folder, data, device)
    result = check_on(screen, posterior, dataset, train=same, ood=ood, draws=draws, seed=seed)
    page = write(result, out or folder / "report.html")
    screen.report(result, full=False)
    screen.say()
    screen.say(("report  ", "dim"), str(page))
    screen.say(("json    ", "dim"), str(page.with_suffix(".json")))
    raise typer.Exit(exit_code(result))


@app.command()
def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Folders of saved posteriors.", show_default=False)
    ],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Other data to compare on; by default the data of the fits.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page with all checks, and JSON next to it.")
    ] = None,
    draws: Annotated[int, typer.Option(min=25, help="Number of draws from each posterior.")] = 1000,
    seed: _Seed = 0,
    device: _Device = "cpu",
) -> None:
    """Rank saved posteriors by their predictions of the test rows; exit code 1 if the best one's verdict is fail."""
    screen = Screen()
    if out is not None and out.suffix != ".html":
        raise ValueError(f"--out must end in .html; got {str(out)!r}. The JSON file is written next to it.")
    result = compare_on(screen, folders, data, device, draws=draws, seed=seed)
    screen.paragraph(result.summary, style="bold")
    screen.say()
    header, *rows = result.table
    screen.table(header, rows)
    if out is not None:
        page = write(result, out)
        screen.say()
        screen.say(("page     ", "dim"), str(page))
        screen.say(("json     ", "dim"), str(page.with_suffix(".json")))
    raise typer.Exit(exit_code(result.best.report))


@app.command()
def sample(
    folder: _Folder,
    draws: Annotated[int, typer.Option(min=1, help="Number of draws.")] = 100,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Output file; by default samples.npz in DIR.")
    ] = None,
    seed: _Seed = 0,
    device: _Device = "cpu",
) -> None:
    """Draw rows from the fitted model, or targets of the test rows if it has inputs; images also as a PNG grid."""
    import numpy as np

    screen = Screen()
    file = out or folder / "samples.npz"
    if file.suffix != ".npz":
        raise ValueError(f"--out must end in .npz; got {str(file)!r}. A grid of images is written next to it.")
    posterior, dataset, _ = load(folder, None, device)
    values = samples(posterior, dataset, draws, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        np.savez_compressed(stream, **values)
    for name, value in values.items():
        screen.say((f"{name:<8}", "bold"), f"{value.shape!s:<18}", (f"mean {value.mean():.4g}", "dim"))
    screen.say(("samples  ", "dim"), str(file))
    if (image := image_grid(dataset, values)) is not None:
        file.with_suffix(".png").write_bytes(image)
        screen.say(("picture  ", "dim"), str(file.with_suffix(".png")))


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="models, data or routines.", show_default=False)],
) -> None:
    """List the available models, data sets or routines."""
    tables: dict[str, Callable[[], Table]] = {"models": models, "data": data_sets, "routines": routines}
    if what not in tables:
        raise unknown("list", what, tables)
    Screen().table(*tables[what]())


def main() -> None:
    """Run the command ``deepprob``."""
    app()
