"""The prediction of one variable of a table whose columns are of different kinds."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from deepprob.distributions.columns import Columns, Variable
from deepprob.distributions.per_draw import PerDraw, unwrapped


def variable_of(prediction: Any, variable: Variable) -> Any:
    """The prediction of one variable of rows of `Columns`: of categories, of their class numbers.

    Args:
        prediction: The `Prediction` of whole rows.
        variable: One of the variables of `Columns.variables`.

    Examples:
        >>> from deepprob.posteriors.prediction import Prediction
        >>> age, island = dist.Normal(torch.zeros(2, 3, 1), 1.0), dist.OneHotCategorical(torch.ones(2, 3, 2))
        >>> rows = Columns([(age, [0]), (island, [1, 2])], ["age", "island=a", "island=b"])
        >>> [variable_of(Prediction(rows, rows.sample(), "x"), variable) for variable in rows.variables]
        [Prediction('age': real, 3 rows, 2 draws), Prediction('island': classes, 3 rows, 2 draws)]
    """

    def marginal(fn: Any) -> Any:
        found = _columns(fn).marginal(variable.name)
        return dist.Categorical(logits=found.logits) if variable.kind == "classes" else found

    fn = prediction.distribution
    made = fn.replaced(marginal) if isinstance(fn, PerDraw) else marginal(fn)
    unused = tuple(place - len(fn.batch_shape) for place in prediction._unused)
    draws = value_of(prediction.draws, variable)
    return type(prediction)(made, draws, variable.name, unused=unused, log_weights=prediction._log_weights)


def value_of(rows: Tensor, variable: Variable) -> Tensor:
    """The values of one variable of rows, ``(*batch, D)`` to ``batch``: of categories the class number.

    A missing value is NaN; class numbers of rows without one are whole numbers.
    """
    x = rows[..., list(variable.places)]
    if variable.kind != "classes":
        return x[..., 0]
    missing = x.isnan().any(-1)
    label = x.nan_to_num().argmax(-1)
    return torch.where(missing, torch.nan, label.to(rows.dtype)) if bool(missing.any()) else label


def _columns(fn: Any) -> Columns:
    found: Columns = unwrapped(fn)
    return found
