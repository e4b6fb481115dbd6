"""Models, data sets and settings by the names that the command accepts."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from deepprob.cli.routines import keywords_of
from deepprob.errors import unknown

if TYPE_CHECKING:
    from deepprob.data import DataSet
    from deepprob.programs.program import Program

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""A header and rows, for `Screen.table`."""


def models() -> Table:
    """All models."""
    from deepprob.models import MODELS

    return ("model", "tasks", "description"), [
        (n, ", ".join(m.tasks) or "any", _first_line(m)) for n, m in MODELS.items()
    ]


def data_sets() -> Table:
    """All data sets."""
    from deepprob.data import list_data

    # The licence is last because a narrow terminal cuts off the end of a line.
    order = ("name", "task", "shape", "rows", "where", "licence")
    rows = [row._replace(rows=row.rows.replace(" ", "")) for row in list_data()]
    return order, [[getattr(row, column) for column in order] for row in rows]


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def model_named(name: str) -> type[Program]:
    """The model class with a given name.

    Raises:
        ValueError: If the name is unknown.
    """
    from deepprob.models import MODELS

    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return MODELS[name]


def program_for(name: str, kind: type[Program], dataset: DataSet, options: dict[str, Any]) -> Program:
    """A model built for a data set.

    Raises:
        ValueError: If the model does not support the task of the data set.
    """
    if kind.tasks and dataset.task not in kind.tasks:
        from deepprob.data import list_data

        if dataset.task == "table" and "digest" in dataset.recipe:
            listed = ", ".join(map(repr, dataset.train.names))
            raise ValueError(
                f"data set {dataset.name!r} has no target, and model {name!r} needs one. Name it by --target, one of: "
                f"{listed}."
            )
        suitable = [row.name for row in list_data() if row.task in kind.tasks]
        raise ValueError(
            f"model {name!r} is for {' or '.join(kind.tasks)}; data set {dataset.name!r} is for {dataset.task}. "
            f"Choose from: {', '.join(suitable)}."
        )
    return kind.from_data(dataset, **options)


def options_of(
    kind: type[Program], routine: Callable[..., Any], latent_dim: int | None, hidden: str | None, settings: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the model, and those of the routine, that the user set, by name."""
    accepted, more = _argument_names(kind), keywords_of(routine)
    given: dict[str, Any] = {} if latent_dim is None else {"latent_dim": latent_dim}
    if routine.__name__ == "dropout" and "dropout" in accepted:
        from deepprob.networks.dropout import USUAL_RATE

        given["dropout"] = USUAL_RATE
    if hidden is not None:
        sizes = _whole_numbers(hidden)
        given |= {"hidden_dim": sizes[0]} if "hidden_dim" in accepted and len(sizes) == 1 else {"hidden_dims": sizes}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set needs NAME=VALUE; got {setting!r}. For example: --set likelihood=normal")
        given[name] = _value(value)
    for name in given:
        if name not in accepted and name not in more:
            raise unknown(f"option of {kind.__name__}", name, [*accepted, *more])
    own = {name: value for name, value in given.items() if name in accepted}
    return own, {name: value for name, value in given.items() if name not in own}


def _argument_names(kind: type[Program]) -> list[str]:
    """Names of the arguments that the data set does not determine."""
    _, *own = inspect.signature(kind.from_data).parameters.values()
    names = [p.name for p in own if p.kind is not p.VAR_KEYWORD]
    if len(names) < len(own):
        names += [p.name for p in inspect.signature(kind).parameters.values() if p.default is not p.empty]
    return names


def names_of(options: Sequence[str] | None) -> list[str]:
    """Names that an option lists: separated by commas, or by several uses of the option."""
    return [name.strip() for option in options or () for name in option.split(",") if name.strip()]


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--hidden needs whole numbers, such as 200,100; got {text!r}.") from None


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def describe_rows(dataset: DataSet) -> str:
    """Shape of a row, and number of rows of each part."""
    parts = {"train": dataset.train, "valid": dataset.valid, "test": dataset.test}
    counts = " / ".join(f"{len(part)} {name}" for name, part in parts.items() if part is not None)
    return f"rows of shape {tuple(dataset.shape)}, {counts}"
