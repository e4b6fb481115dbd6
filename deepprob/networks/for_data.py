"""A network for the rows of a data set or a table, and the likelihood that its targets ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from deepprob.data import DataSet, Table, TableEncoding, as_split, table
from deepprob.data.frames import is_frame
from deepprob.data.opening import class_count
from deepprob.networks.convolutional import ConvEncoder
from deepprob.networks.dense import MLP
from deepprob.networks.target_likelihood import CLASSES, TargetLikelihood


def network_for(
    data: Any, hidden_dims: tuple[int, ...], activation: str, options: Mapping[str, Any], dropout: float = 0.0
) -> tuple[nn.Module, dict[str, Any]]:
    """A dense network with a linear path for rows of features, or a convolutional one for images.

    Args:
        data: A data set, a table with a target, or fields of any kind, the inputs before the target.
        hidden_dims: Sizes of a dense network's hidden layers.
        activation: Activation of the hidden layers.
        options: Options of the user, which go before those that the targets ask for.
        dropout: Rate of dropout after a dense network's hidden layers.

    Returns:
        The network, and the options with ``likelihood`` and ``num_classes`` if the targets are classes.

    Raises:
        TypeError: If the data are a frame, or no fields of numbers.
        ValueError: If they have no targets, or the likelihood needs numbers or an order where the targets are classes.
    """
    shape: Sequence[int]
    if isinstance(data, Table):
        if "y" not in data:
            raise ValueError("the table has no target to predict. Make it with one: dp.table(frame, target='column').")
        shape, classes, outputs = data.shape, len(data.encoding.classes), len(data.encoding.targets)
    elif isinstance(data, DataSet):
        if len(data.train.names) < 2:
            raise ValueError(
                f"data set {data.name!r} has no targets to predict. Choose another data set or the model 'vae'."
            )
        shape, classes, outputs = data.shape, data.num_classes or 0, data.train.tensors[1][0].numel()
    else:
        fields = None if is_frame(data) else as_split(data).tensors
        if fields is None or len(fields) < 2:
            raise TypeError(
                f"from_data expects a data set, a table, a frame and its target, or inputs and a target; got "
                f"{type(data).__name__}. Write from_data(frame, target='column') or from_data((x, y))."
            )
        x, y = fields[0], fields[-1]
        shape, classes, outputs = x.shape[1:], class_count(y) or 0, y[0].numel()
    family = options.get("likelihood", "categorical")
    if family in CLASSES and "likelihood" in options and not classes and isinstance(data, Table | DataSet):
        classes = class_count((data.train if isinstance(data, DataSet) else data).tensors[-1]) or 0  # of numbers
    if classes and family not in CLASSES:
        _check_numbers(data, family)
        classes = 0
    if family == "ordinal":
        _check_order(data)
    if classes:
        options = {"likelihood": "categorical", "num_classes": classes} | dict(options)
    chosen = {name: options[name] for name in ("num_classes", "limits") if name in options}
    size = TargetLikelihood(options.get("likelihood", "normal"), **chosen).size(outputs)
    if len(shape) == 1:
        # Without a linear path, the KL of a wide layer's weights outweighs few rows: the fit predicts the base rate.
        net = MLP(shape[0], size, hidden_dims, activation, linear_path=len(hidden_dims) > 0, dropout=dropout)
        return net, dict(options)
    if dropout:
        raise ValueError(
            f"dropout={dropout} is for rows of features; got images of shape {tuple(shape)}. Make a network of your "
            "own with nn.Dropout."
        )
    return ConvEncoder(tuple(shape), size, activation=activation), dict(options)


def table_for(frame: Any, target: str | Sequence[str], likelihood: Any) -> Table:
    """The table of a frame, whose numeric target holds classes or numbers as a likelihood needs them.

    Args:
        frame: The frame.
        target: The name of the target, or names of several.
        likelihood: The name that the user gave; None to choose by the values.
    """
    if likelihood in (None, "bernoulli"):
        return table(frame, target)
    return table(frame, target, classes=likelihood in CLASSES)


def described(likelihood: TargetLikelihood, encoding: TableEncoding | None) -> str:
    """A likelihood with the names of its classes, if they are known.

    Examples:
        >>> described(TargetLikelihood("categorical", num_classes=2), None)
        "likelihood='categorical', num_classes=2"
    """
    number = f", num_classes={likelihood.num_classes}" if likelihood.num_classes else ""
    names = f", classes={encoding.classes}" if encoding and encoding.classes else ""
    return f"likelihood={likelihood.name!r}{number}{names}"


def _check_numbers(data: Any, family: Any) -> None:
    """Refuse a likelihood of numbers for a target that a table reads as classes; two of them are 0 and 1."""
    encoding = _encoding_of(data)
    if encoding is None or (family == "bernoulli" and len(encoding.classes) == 2):
        return
    name, shown = encoding.targets[0], ", ".join(map(repr, encoding.classes[:5]))
    raise ValueError(
        f"likelihood={family!r} is for numbers, but the target {name!r} holds classes: {shown}. Leave likelihood "
        f"out; for numbers, give floats, or make the table with dp.table(frame, target={name!r}, classes=False)."
    )


def _check_order(data: Any) -> None:
    """Refuse an ordinal likelihood for classes of a table that have the order of the alphabet."""
    encoding = _encoding_of(data)
    if encoding is None or not encoding.classes or encoding.target.ordered:
        return
    name = encoding.targets[0]
    raise ValueError(
        f"likelihood='ordinal' needs classes in an order, but the target {name!r} holds text without one. Make it an "
        f"ordered category: pd.Categorical(frame[{name!r}], categories=[...], ordered=True), lowest first; in a file, "
        "number the classes from 0 for the lowest."
    )


def _encoding_of(data: Any) -> Any:
    """The encoding of a table, also of a data set of tables; None for other data."""
    return getattr(data.train if isinstance(data, DataSet) else data, "encoding", None)
