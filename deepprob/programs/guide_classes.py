"""Classes of guides, which make a guide of a model: Pyro's own, by name, and those of the user."""

from __future__ import annotations

import functools
from typing import Any

from pyro.infer import autoguide
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.effect import AutoMessenger

from deepprob.programs.structured_guide import AutoStructuredNormal

# A saved folder names one of these, never code to import.
GUIDE_CLASSES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        autoguide.AutoDelta,
        autoguide.AutoDiagonalNormal,
        autoguide.AutoDiscreteParallel,
        autoguide.AutoGaussian,
        autoguide.AutoHierarchicalNormalMessenger,
        autoguide.AutoIAFNormal,
        autoguide.AutoLaplaceApproximation,
        autoguide.AutoLowRankMultivariateNormal,
        autoguide.AutoMultivariateNormal,
        autoguide.AutoNormal,
        autoguide.AutoNormalMessenger,
        autoguide.AutoRegressiveMessenger,
        autoguide.AutoStructured,
        AutoStructuredNormal,
    )
}


def makes_guide(spec: Any) -> bool:
    """Whether a callable makes a guide of a model: a class of Pyro's guides, maybe with some of its arguments.

    Examples:
        >>> makes_guide(functools.partial(autoguide.AutoStructured, conditionals="normal"))
        True
        >>> makes_guide(lambda y: None)
        False
    """
    while isinstance(spec, functools.partial):
        spec = functools.partial.func.__get__(spec)  # Pyro's handlers use a subclass whose own .func never ends
    return isinstance(spec, type) and issubclass(spec, AutoGuide | AutoMessenger)


def check_functions(model: Any, guide: Any, data_plate: Any) -> None:
    """Refuse a model, a guide or the name of a plate that has a wrong type.

    Raises:
        TypeError: If one has.
    """
    for name, value in (("model", model), ("guide", guide)):
        if not (callable(value) or (name == "guide" and (value is None or isinstance(value, str)))):
            raise TypeError(f"{name} must be a callable Pyro program; got {type(value).__name__}.")
    if not isinstance(data_plate, str | None):
        raise TypeError(f"data_plate must be the name of a plate; got {data_plate!r}. Write data_plate='data'.")
