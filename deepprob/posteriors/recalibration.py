"""Posteriors whose predictions are recalibrated on held-out rows: temperature scaling, conformal prediction."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.errors import StorageError, shown
from deepprob.posteriors.posterior import Posterior
from deepprob.posteriors.prediction import Prediction

_FILE = "recalibration.json"
_RANGE = 0.02, 50.0  # of temperatures
_ROUNDING = 1e-9  # 0.9 / (1 - 0.9) is above 9
# Of a number: equal rows, as of counts or categories, differ by rounding, and belong inside together.
_TIES = 8 * torch.finfo(torch.float32).eps


class TemperatureScaled:
    r"""A posterior of classes whose logits are divided by a temperature, fitted to held-out rows.

    .. math:: p_T(y = c \mid x) = \frac1K \sum_k \mathrm{softmax}_c\big(\log p(y = \cdot \mid x, \theta_k) / T\big),
              \qquad T = \arg\max_T \sum_i \log p_T(y_i \mid x_i)

    The most likely class of a single draw does not change. A temperature above 1 makes predictions less certain.

    Args:
        posterior: The posterior.
        temperature: The temperature T, see `fit`.
        draws: Number of draws from the posterior for predictions, K.

    References:
        Guo, Pleiss, Sun, Weinberger (2017), On Calibration of Modern Neural Networks.

    Examples:
        A posterior that is sure of a coin that it does not know becomes unsure:

        >>> import pyro
        >>> from deepprob.inference import svi
        >>> from deepprob.programs import Program
        >>> def model(x, y=None):
        ...     pyro.sample("w", dist.Normal(0.0, 0.001))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Bernoulli(logits=4 * x), obs=y)
        >>> x, y = torch.tensor([1.0, 1.0, 1.0, -1.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
        >>> posterior = svi(Program.of(model, "normal"), (x, y), steps=10, progress=False)
        >>> scaled = TemperatureScaled.fit(posterior, x, y)
        >>> bool(scaled.temperature > 1), bool(scaled.predict(x).probs[0] < posterior.predict(x).probs[0])
        (True, True)
    """

    def __init__(self, posterior: Posterior, temperature: float, draws: int = 200) -> None:
        if not (isinstance(temperature, float | int) and 0 < temperature < math.inf):
            raise ValueError(f"temperature must be a positive number; got {shown(temperature)}. Use fit.")
        self.posterior, self.temperature, self.draws = posterior, float(temperature), draws

    @classmethod
    def fit(cls, posterior: Posterior, *data: Any, draws: int = 200, seed: int = 0) -> TemperatureScaled:
        """Choose the temperature by the log-likelihood of held-out rows.

        Args:
            posterior: The posterior.
            data: The program's arguments with the labels, of rows that the fit has not seen.
            draws: Number of draws from the posterior, K.
            seed: Random seed of the draws.

        Raises:
            ValueError: If the posterior does not predict classes.
        """
        from scipy.optimize import minimize_scalar

        prediction, labels = _of_held_out(posterior, data, draws, seed)

        def loss(log_temperature: float) -> float:
            return -float(_at_temperature(prediction, math.exp(log_temperature)).log_prob(labels).double().sum())

        found = minimize_scalar(loss, bounds=[math.log(t) for t in _RANGE], method="bounded")
        return cls(posterior, math.exp(found.x), draws)

    def predict(self, *inputs: Any, seed: int = 0) -> Prediction:
        """The predictive distribution of rows at the temperature.

        Args:
            inputs: The program's arguments without the target.
            seed: Random seed of the draws.
        """
        found = self.posterior.predict(*inputs, draws=self.draws, seed=seed)
        return _at_temperature(found, self.temperature, seed)

    def save(self, path: str | Path) -> None:
        """Write posterior and temperature to a folder."""
        _save(self.posterior, path, {"kind": "temperature", "temperature": self.temperature, "draws": self.draws})

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> TemperatureScaled:
        """Read what `save` wrote; ``options`` are those of `Posterior.load`."""
        posterior, known = _load(path, "temperature", options)
        return cls(posterior, known["temperature"], known["draws"])


class Conformal:
    r"""A posterior with intervals, or sets of classes, that cover a new target with a given probability.

    For numbers the ends :math:`l(x), h(x)` of the predictive interval of mass m are moved by a quantile of how far
    held-out targets lie outside of theirs; for classes, those are kept whose probability reaches a quantile:

    .. math:: [l(x) - q, \; h(x) + q], \quad q = Q\{\max(l(x_i) - y_i, \, y_i - h(x_i))\}; \qquad
              \{c : p(c \mid x) \ge 1 - q\}, \quad q = Q\{1 - p(y_i \mid x_i)\}

    where Q is the :math:`\lceil (n + 1)\, m \rceil`-th smallest of n values. If the held-out rows and the new one are
    exchangeable, the target of the new one is covered with a probability of at least m, whatever the posterior. This is
    an average over rows, not a promise for each of them.

    Args:
        posterior: The posterior.
        mass: The probability m.
        margin: The quantile q, one for every output; see `fit`.
        draws: Number of draws from the posterior for predictions, K.

    References:
        Vovk, Gammerman, Shafer (2005), Algorithmic Learning in a Random World.
        Romano, Patterson, Candes (2019), Conformalized Quantile Regression.
        Sadinle, Lei, Wasserman (2019), Least Ambiguous Set-Valued Classifiers with Bounded Error Levels.

    Examples:
        A model with far too little noise, made to cover 90 %:

        >>> import pyro
        >>> from deepprob.inference import svi
        >>> from deepprob.programs import Program
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal(w * x, 0.01), obs=y)
        >>> x = torch.linspace(-1, 1, 400)
        >>> y = x + torch.randn(400, generator=torch.Generator().manual_seed(0))
        >>> posterior = svi(Program.of(model, "normal"), (x[::2], y[::2]), steps=500, progress=False)
        >>> low, high = Conformal.fit(posterior, x[1:200:2], y[1:200:2], mass=0.9).interval(x[201::2])
        >>> bool(((low <= y[201::2]) & (y[201::2] <= high)).float().mean() > 0.8)
        True
    """

    def __init__(self, posterior: Posterior, mass: float, margin: Tensor, draws: int = 200) -> None:
        self.posterior, self.mass, self.margin, self.draws = posterior, mass, margin, draws

    @classmethod
    def fit(cls, posterior: Posterior, *data: Any, mass: float = 0.9, draws: int = 200, seed: int = 0) -> Conformal:
        """Find the margin on held-out rows.

        Args:
            posterior: The posterior.
            data: The program's arguments with the target, of rows that the fit has not seen.
            mass: Probability inside of the intervals or sets, between 0 and 1.
            draws: Number of draws from the posterior, K.
            seed: Random seed of the draws.

        Raises:
            ValueError: If ``mass`` is out of range, or there are too few rows for it.
        """
        if not (isinstance(mass, float) and 0 < mass < 1):
            raise ValueError(f"mass must lie between 0 and 1; got {shown(mass)}. Write 0.9 for 90 %.")
        prediction, target = _of_held_out(posterior, data, draws, seed)
        count = len(target)
        place = math.ceil((count + 1) * mass - _ROUNDING)
        if place > count:
            needed = math.ceil(mass / (1 - mass) - _ROUNDING)
            raise ValueError(
                f"mass={mass} needs at least {needed} held-out rows; got {count}. Give more rows, or a smaller mass."
            )
        scores = _scores(prediction, target, mass)
        return cls(posterior, mass, scores.sort(0).values[place - 1], draws)

    def interval(self, *inputs: Any, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Both ends of the intervals of rows, each of the target's shape.

        Args:
            inputs: The program's arguments without the target.
            seed: Random seed of the draws.

        Raises:
            ValueError: If the target is a class.
        """
        prediction = self.posterior.predict(*inputs, draws=self.draws, seed=seed)
        if prediction.kind in ("classes", "binary"):
            raise ValueError(f"{prediction.site!r} is a class, which has no interval. Use sets.")
        ends = prediction.interval(self.mass)
        low, high = (end.double() for end in ends)
        margin = self.margin.to(low) + _TIES * torch.maximum(low.abs(), high.abs())
        middle = (low + high) / 2  # a negative margin must not exchange the ends
        return torch.minimum(low - margin, middle).to(ends[0]), torch.maximum(high + margin, middle).to(ends[1])

    def sets(self, *inputs: Any, seed: int = 0) -> Tensor:
        """Whether each class belongs to the set of each row, ``(B, C)``; a set may be empty or hold several classes.

        Several binary columns have a set each, ``(B, columns, 2)``.

        Args:
            inputs: The program's arguments without the target.
            seed: Random seed of the draws.

        Raises:
            ValueError: If the target is not a class.
        """
        probs = _by_class(self.posterior.predict(*inputs, draws=self.draws, seed=seed))
        return 1 - probs <= self.margin.to(probs).unsqueeze(-1) + _TIES

    def save(self, path: str | Path) -> None:
        """Write posterior and margin to a folder."""
        known = {"kind": "conformal", "mass": self.mass, "margin": self.margin.tolist(), "draws": self.draws}
        _save(self.posterior, path, known)

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> Conformal:
        """Read what `save` wrote; ``options`` are those of `Posterior.load`."""
        posterior, known = _load(path, "conformal", options)
        return cls(posterior, known["mass"], torch.tensor(known["margin"], dtype=torch.float64), known["draws"])


def _of_held_out(posterior: Posterior, data: tuple[Any, ...], draws: int, seed: int) -> tuple[Prediction, Tensor]:
    """The prediction of held-out rows from their inputs, and their targets."""
    parts = data[0] if len(data) == 1 and isinstance(data[0], tuple) else data
    names = posterior.structure.observed
    if len(names) != 1:
        raise ValueError(f"recalibration needs one observed site; the program has {', '.join(names) or 'none'}.")
    site: Any = posterior.trace(*parts, draws=1, seed=seed)[1].nodes[names[0]]
    if not site["is_observed"]:
        raise ValueError(f"recalibration needs the values of {names[0]!r}; got none. Give them behind the inputs.")
    inputs = parts[:-1] if len(parts) > 1 else parts
    return posterior.predict(*inputs, draws=draws, seed=seed), site["value"]


def _scores(prediction: Prediction, target: Tensor, mass: float) -> Tensor:
    """How far each target lies outside of its interval, or the probability of the other classes."""
    if prediction.kind in ("classes", "binary"):
        probs = _by_class(prediction)
        one_hot = prediction.kind == "classes" and target.shape == probs.shape
        labels = target.argmax(-1) if one_hot else target
        return 1 - probs.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    low, high = (end.double() for end in prediction.interval(mass))
    return torch.maximum(low - target, target - high)


def _by_class(prediction: Prediction) -> Tensor:
    """Probabilities of the classes along the last axis; in float64, in which 1 - p is exact."""
    probs = prediction.probs.double()
    return torch.stack([1 - probs, probs], -1) if prediction.kind == "binary" else probs


def _at_temperature(prediction: Prediction, temperature: float, seed: int = 0) -> Prediction:
    """The prediction with the logits of every draw divided by a temperature."""
    if prediction.kind not in ("classes", "binary"):
        raise ValueError(
            f"a temperature scales probabilities of classes, but {prediction.site!r} is {prediction.kind}. Use "
            "Conformal for intervals."
        )
    probs = prediction.probs_by_draw.clamp_min(torch.finfo(prediction.probs.dtype).tiny)
    if prediction.kind == "classes":
        scaled: Any = dist.Categorical(logits=probs.log() / temperature)
    else:
        scaled = dist.Bernoulli(logits=torch.logit(probs, eps=1e-7) / temperature)
    with RandomStream(seed, probs.device).drawing():
        return Prediction(scaled, scaled.sample(), prediction.site, names=prediction.names)


def _save(posterior: Posterior, path: str | Path, known: dict[str, Any]) -> None:
    folder = Path(path)
    posterior.save(folder / "posterior")
    (folder / _FILE).write_text(json.dumps(known), encoding="utf-8")


def _load(path: str | Path, kind: str, options: dict[str, Any]) -> tuple[Posterior, dict[str, Any]]:
    folder = Path(path)
    try:
        known: dict[str, Any] = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{folder} holds no recalibrated posterior. Give the folder that save wrote.") from error
    if known.get("kind") != kind:
        raise StorageError(f"{folder} holds a recalibration of kind {known.get('kind')!r}, not {kind!r}.")
    return Posterior.load(folder / "posterior", **options), known
