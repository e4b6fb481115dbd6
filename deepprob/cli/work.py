"""What several commands do: load a posterior, judge it, write reports and pictures."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepprob.cli.screen import Screen
from deepprob.errors import StorageError

if TYPE_CHECKING:
    from deepprob.data import DataSet
    from deepprob.diagnostics.report import Report
    from deepprob.posteriors.posterior import Posterior

SHOWN = 100  # images in a grid


def load(folder: Path, other: str | None, device: str) -> tuple[Posterior, DataSet, bool]:
    """A saved posterior, the data to judge it by, and whether it was fitted to that data set."""
    from deepprob.data import load_data
    from deepprob.engine.machine import pick_device
    from deepprob.models import MODELS  # noqa: F401 - a saved program finds its class
    from deepprob.posteriors.posterior import Posterior

    posterior = Posterior.load(folder, device=pick_device(device))
    own = posterior.config.get("data") or {}
    name = other or own.get("name")
    if name is None:
        raise StorageError(f"{folder} does not say what data it was fitted to. Name them: deepprob check {folder} DATA")
    same = name == own.get("name")
    return posterior, load_data(name, split=own.get("split", 0) if same else 0), same


def exit_code(report: Report) -> int:
    """The exit code of a verdict."""
    return 1 if report.verdict == "fail" else 0


def judge(
    screen: Screen,
    posterior: Posterior,
    dataset: DataSet,
    *,
    train: bool,
    ood: str | None = None,
    draws: int = 200,
    seed: int = 0,
) -> Report:
    """The report on a posterior, from the test rows of a data set."""
    from deepprob.data import load_data
    from deepprob.diagnostics.report import check as ask

    strange = None if ood is None else load_data(ood).test
    with noting(screen), screen.err.status("checking"):
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


def write(report: Report, page: Path) -> Path:
    """Write a report as a page, and as JSON beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    report.save(page)
    report.save(page.with_suffix(".json"))
    return page


def drawn(posterior: Posterior, dataset: DataSet, draws: int, seed: int) -> dict[str, Any]:
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


def grid(dataset: DataSet, values: dict[str, Any]) -> bytes | None:
    """Drawn images side by side, if that is what they are."""
    from deepprob.diagnostics.plots import image_rows, render

    images = values.get("mean")
    if dataset.task != "images" or images is None or images.shape[1:] != tuple(dataset.shape):
        return None
    images = images[:SHOWN]
    lines = [images[i : i + 10] for i in range(0, len(images), 10)]
    return render(image_rows({" " * i: line for i, line in enumerate(lines)}))


@contextmanager
def noting(screen: Screen) -> Iterator[None]:
    """Warnings meant for users become notes; those of libraries about themselves stay silent."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        screen.note(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning)
        warnings.filterwarnings("ignore", message="the fit was interrupted")  # said at the end, with the folder
        warnings.showwarning = show
        yield
