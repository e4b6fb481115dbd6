"""Functions that several commands share: load a posterior, check it, draw samples, write reports and pictures."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepprob.cli.screen import Screen
from deepprob.errors import StorageError

if TYPE_CHECKING:
    from deepprob.data import DataSet
    from deepprob.diagnostics.compare import Comparison
    from deepprob.diagnostics.report import Report
    from deepprob.posteriors.posterior import Posterior

GRID_IMAGES = 100


def load(folder: Path, other: str | None, device: str) -> tuple[Posterior, DataSet, bool]:
    """A saved posterior, the data set to check it on, and whether it was fitted to that data set."""
    from deepprob.data import load_data
    from deepprob.engine.machine import pick_device
    from deepprob.models import MODELS  # noqa: F401 - registers the classes of saved programs
    from deepprob.posteriors.posterior import Posterior

    posterior = Posterior.load(folder, device=pick_device(device))
    own = posterior.config.get("data") or {}
    name = other or own.get("name")
    if name is None:
        raise StorageError(
            f"{folder} does not name its data set. Name one: deepprob check {folder} DATA, or compare with --data DATA."
        )
    same = name == own.get("name")
    return posterior, load_data(name, split=own.get("split", 0) if same else 0), same


def exit_code(report: Report) -> int:
    """The exit code of a report's verdict."""
    return 1 if report.verdict == "fail" else 0


def check_on(
    screen: Screen,
    posterior: Posterior,
    dataset: DataSet,
    *,
    train: bool,
    ood: str | None = None,
    draws: int = 200,
    seed: int = 0,
) -> Report:
    """Check a posterior on the test rows of a data set."""
    from deepprob.data import load_data
    from deepprob.diagnostics.report import check

    outside = None if ood is None else load_data(ood).test
    with warnings_as_notes(screen), screen.err.status("checking"):
        return check(
            posterior,
            dataset.test,
            train=dataset.train if train else None,
            ood=outside,
            draws=draws,
            particles=draws,
            seed=seed,
            title=f"{type(posterior.program).__name__} on {dataset.name}, {len(dataset.test)} test rows",
        )


def compare_on(
    screen: Screen, folders: Sequence[Path], other: str | None, device: str, *, draws: int, seed: int
) -> Comparison:
    """Compare saved posteriors on the test rows of their data set, or of another one.

    Raises:
        ValueError: If they were fitted to different data sets, or a folder comes twice.
    """
    from deepprob.diagnostics.compare import compare

    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a folder is named twice. Name the folders of different posteriors.")
    posteriors, datasets, _ = zip(*(load(folder, other, device) for folder in folders), strict=True)
    fits = [posterior.config.get("data") or {} for posterior in posteriors]
    found = dict.fromkeys(f"{fit.get('name')} split {fit.get('split', 0)}" for fit in fits)
    if other is None and len(found) > 1:
        raise ValueError(
            f"the posteriors were fitted to different data: {', '.join(found)}. Name the data to use: --data DATA"
        )
    names = [folder.resolve().name for folder in folders]
    names = names if len({*names}) == len(names) else [str(folder) for folder in folders]
    with warnings_as_notes(screen), screen.err.status("comparing"):
        return compare(*posteriors, data=datasets[0].test, names=names, draws=draws, seed=seed)


def write(report: Report | Comparison, page: Path) -> Path:
    """Write a report or a comparison as an HTML page and as JSON next to it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    report.save(page)
    report.save(page.with_suffix(".json"))
    return page


def samples(posterior: Posterior, dataset: DataSet, draws: int, seed: int) -> dict[str, Any]:
    """Arrays by name: prior samples, or predictions of the test rows if the model has inputs."""
    from deepprob.diagnostics import Case

    (case, *others) = Case(posterior, dataset.test).by_site()
    if others or not case.supervised:
        sites = posterior.sample_prior(draws, seed=seed)
        parts = {name: value[0] for name, value in sites.items()}
        if len(posterior.structure.observed) == 1:  # the means of the same draws make a clearer picture
            parts["mean"] = posterior.predict_prior(draws, seed=seed).mean
        return {name: value.cpu().numpy() for name, value in parts.items()}
    prediction = posterior.predict(*case.inputs, draws=draws, seed=seed)
    parts = {prediction.site: prediction.draws, "mean": prediction.mean, "sd": prediction.sd}
    return {name: value.cpu().numpy() for name, value in parts.items()}


def image_grid(dataset: DataSet, values: dict[str, Any]) -> bytes | None:
    """A PNG of the drawn images in a grid; None if the data are not images."""
    from deepprob.diagnostics.plots import image_rows, render

    images = values.get("mean")
    if dataset.task != "images" or images is None or images.shape[1:] != tuple(dataset.shape):
        return None
    images = images[:GRID_IMAGES]
    lines = [images[i : i + 10] for i in range(0, len(images), 10)]
    return render(image_rows({" " * i: line for i, line in enumerate(lines)}))


@contextmanager
def warnings_as_notes(screen: Screen) -> Iterator[None]:
    """Print user warnings as notes; ignore the warnings of libraries about themselves."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        screen.note(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning)
        warnings.filterwarnings("ignore", message="the fit was interrupted")  # reported at the end, with the folder
        warnings.showwarning = show
        yield
