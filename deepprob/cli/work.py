"""Functions that several commands share: open data, load a posterior, check it, predict, draw samples."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepprob.cli.screen import Screen
from deepprob.errors import StorageError

if TYPE_CHECKING:
    from deepprob.data import DataSet
    from deepprob.diagnostics.compare import Comparison
    from deepprob.diagnostics.report import Report
    from deepprob.posteriors.posterior import Posterior


@dataclass(frozen=True)
class Subject:
    """A saved posterior and the rows to ask it about.

    Attributes:
        posterior: The posterior.
        name: The name of the data.
        rows: The rows: the test rows of a data set, or all rows of a file or folder.
        train: The training rows, if the data are those of the fit.
        task: The task of the data set; empty for other data.
        files: The files of images, one a row; None for other data.
    """

    posterior: Posterior
    name: str
    rows: Any
    train: Any = None
    task: str = ""
    files: Sequence[str] | None = None

    @property
    def title(self) -> str:
        """Model, data and number of rows."""
        kind = "test rows" if self.train is not None else "rows"
        return f"{type(self.posterior.program).__name__} on {self.name}, {len(self.rows)} {kind}"


def opened(screen: Screen, name: str, **options: Any) -> DataSet:
    """The data set of a name, a file or a folder; warnings are printed as notes."""
    from deepprob.data.opening import open_data

    with warnings_as_notes(screen):
        return open_data(name, **options)


def load(screen: Screen, folder: Path, other: str | None, device: str, *, to_predict: bool = False) -> Subject:
    """A saved posterior, with the test rows of its fit or all rows of other data.

    The file of the fit means its test rows, too, except to predict: then it means all rows, with or without a target.
    """
    from deepprob.data.opening import open_rows, reopen_data, same_data
    from deepprob.engine.machine import pick_device
    from deepprob.models import MODELS  # noqa: F401 - registers the classes of saved programs
    from deepprob.posteriors.posterior import Posterior

    posterior = Posterior.load(folder, device=pick_device(device))
    recipe = posterior.config.get("data") or {}
    with warnings_as_notes(screen):
        if other is not None and (to_predict or not same_data(other, recipe)):
            rows, files = open_rows(other, recipe, with_target=not to_predict)
            return Subject(posterior, Path(other).name or other, rows, files=files)
        if not recipe:
            raise StorageError(
                f"{folder} does not name its data set. Name one: deepprob check {folder} DATA, or compare with --data "
                "DATA."
            )
        dataset = reopen_data(recipe if other is None else recipe | {"name": other})
    return Subject(posterior, dataset.name, dataset.test, dataset.train, dataset.task, dataset.extras.get("test_files"))


def exit_code(report: Report) -> int:
    """The exit code of a report's verdict."""
    return 1 if report.verdict == "fail" else 0


def check_on(screen: Screen, subject: Subject, *, ood: str | None = None, draws: int = 200, seed: int = 0) -> Report:
    """Check a posterior on its rows."""
    from deepprob.data.opening import open_rows
    from deepprob.diagnostics.report import check

    with warnings_as_notes(screen), screen.status("checking"):
        return check(
            subject.posterior,
            subject.rows,
            train=subject.train,
            ood=None if ood is None else open_rows(ood, subject.posterior.config.get("data"))[0],
            draws=draws,
            particles=draws,
            seed=seed,
            title=subject.title,
        )


def compare_on(
    screen: Screen, folders: Sequence[Path], other: str | None, device: str, *, draws: int, seed: int
) -> Comparison:
    """Compare saved posteriors on the test rows of their data set, or on other data.

    Raises:
        ValueError: If they were fitted to different data, or a folder comes twice.
    """
    from deepprob.diagnostics.compare import compare

    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a folder is named twice. Name the folders of different posteriors.")
    subjects = [load(screen, folder, other, device) for folder in folders]
    recipes = [subject.posterior.config.get("data") or {} for subject in subjects]
    found = dict.fromkeys(f"{recipe.get('name')} split {recipe.get('split', 0)}" for recipe in recipes)
    if other is None and len(found) > 1:
        raise ValueError(
            f"the posteriors were fitted to different data: {', '.join(found)}. Name the data to use: --data DATA"
        )
    names = [folder.resolve().name for folder in folders]
    names = names if len({*names}) == len(names) else [str(folder) for folder in folders]
    posteriors = [subject.posterior for subject in subjects]
    with warnings_as_notes(screen), screen.status("comparing"):
        return compare(*posteriors, data=subjects[0].rows, names=names, draws=draws, seed=seed)


def predict_on(screen: Screen, subject: Subject, *, draws: int, mass: float, seed: int) -> Any:
    """The predictions of all rows as a frame; columns that the fit dropped, such as an id, come first."""
    recipe = subject.posterior.config.get("data") or {}
    with warnings_as_notes(screen), screen.status("predicting"):
        found = subject.posterior.predict(subject.rows, draws=draws, seed=seed).to_frame(mass)
    if subject.files is not None:
        found = found.set_axis([*subject.files]).rename_axis("file")
    columns = getattr(subject.rows, "columns", ())
    for name in reversed([name for name in recipe.get("drop", ()) if name in columns]):
        found.insert(0, name, subject.rows[name].to_numpy())
    return found


def samples(subject: Subject, draws: int, seed: int) -> dict[str, Any]:
    """Arrays by name: prior samples, or predictions of the test rows if the model has inputs."""
    from deepprob.diagnostics import Case

    posterior = subject.posterior
    (case, *others) = Case(posterior, subject.rows).by_site()
    if others or not case.supervised:
        sites = posterior.sample_prior(draws, seed=seed)
        parts = {name: value[0] for name, value in sites.items()}
        if len(posterior.structure.observed) == 1:  # the means of the same draws make a clearer picture
            parts["mean"] = posterior.predict_prior(draws, seed=seed).mean
        return {name: value.cpu().numpy() for name, value in parts.items()}
    prediction = posterior.predict(*case.inputs, draws=draws, seed=seed)
    parts = {prediction.site: prediction.draws, "mean": prediction.mean, "sd": prediction.sd}
    return {name: value.cpu().numpy() for name, value in parts.items()}


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
