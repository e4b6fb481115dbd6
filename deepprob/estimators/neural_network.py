"""Bayesian neural networks as estimators of scikit-learn: for pipelines, grid searches and cross-validation."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import assert_all_finite, check_array, check_consistent_length, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, column_or_1d, validate_data
from torch import nn

from deepprob.data import Table, table
from deepprob.data.column_encoding import text_of
from deepprob.data.frames import is_frame, named
from deepprob.data.table_encoding import TargetEncoding, unnamed_columns
from deepprob.errors import shown, unknown
from deepprob.estimators.pickling import PosteriorInPickle
from deepprob.inference import ROUTINES
from deepprob.models import BayesianNeuralNetwork
from deepprob.networks.dropout import USUAL_RATE
from deepprob.posteriors.prediction import Prediction

Floats = NDArray[np.float64]


class _BayesianNetwork(PosteriorInPickle, BaseEstimator):
    """What the two estimators share."""

    def __init__(
        self,
        net: nn.Module | Sequence[int] = (50,),
        method: str = "svi",
        *,
        prior: Any = "hierarchical",
        draws: int = 200,
        options: Mapping[str, Any] | None = None,
        device: str = "auto",
        random_state: Any = None,
    ) -> None:
        self.net, self.method, self.prior, self.draws = net, method, prior, draws
        self.options, self.device, self.random_state = options, device, random_state

    def _fit(self, data: Table, **network: Any) -> None:
        """Fit the network to encoded rows and their targets."""
        if self.method not in ROUTINES:
            raise unknown("method", self.method, ROUTINES)
        self._network = network | {"prior": self.prior}
        self._net = self.net if isinstance(self.net, nn.Module) else None
        program = self._program_to_load()
        if program is None:
            rate = USUAL_RATE if self.method == "dropout" else 0.0
            program = BayesianNeuralNetwork.from_data(data, self._hidden_dims(), dropout=rate, **self._network)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        settings = {"seed": seed, "device": self.device, "progress": False, **(self.options or {})}
        routine = ROUTINES[self.method]
        known = inspect.signature(routine).parameters
        if strange := [name for name in settings if name not in known]:
            raise unknown(f"option of method={self.method!r}", strange[0], [*known][2:])
        self.posterior_ = routine(program, data, **settings)

    def _program_to_load(self) -> BayesianNeuralNetwork | None:
        return None if self._net is None else BayesianNeuralNetwork(self._net, **self._network)

    def _hidden_dims(self) -> tuple[int, ...]:
        sizes = (self.net,) if isinstance(self.net, int) else self.net
        if isinstance(sizes, str) or not isinstance(sizes, Sequence | np.ndarray):
            raise TypeError(f"net must be a torch.nn.Module or sizes of hidden layers; got {shown(self.net)}.")
        return tuple(int(size) for size in sizes)

    def _encoded(self, frame: Any, y: Any, sample_weight: Any, names: Sequence[str], classes: Sequence[str]) -> Table:
        """The rows of a fit as a table: encoded features, targets and weights."""
        weights = None
        if sample_weight is not None:
            weights = _check_sample_weight(sample_weight, y, ensure_non_negative=True)
            kept = weights > 0  # the others have no influence, on means and scales either
            frame, y, weights = frame[kept], y[kept], weights[kept]
        if len(frame) < 2:
            raise ValueError(f"a fit needs at least 2 samples with a weight; got n_samples={len(frame)}.")
        with warnings.catch_warnings():
            # A column can be constant in these rows, as in a part of a cross-validation.
            warnings.filterwarnings("ignore", "columns without two different values make no feature", UserWarning)
            features = table(frame).encoding
        # All classes, also those of which no row has a weight.
        target = TargetEncoding(tuple(names), tuple(classes))
        encoding = replace(features, target=target, unnamed=self._unnamed)
        columns = dict(zip(names, y.reshape(len(y), -1).T, strict=True))
        made = encoding.encode(frame.assign(**columns))
        found = None if weights is None else torch.tensor(weights, dtype=torch.get_default_dtype())
        return Table(dict(zip(made.names, made.tensors, strict=True)), encoding, made.index, found)

    def _target_names(self, y: Any, count: int) -> list[str]:
        """The names of the columns of the target: their own, if no column of the rows has them."""
        given = getattr(y, "columns", [getattr(y, "name", None)])
        if all(isinstance(name, str) and name not in self._columns for name in given) and len({*given}) == count:
            return [*given]
        name = max(("target", *(f"{column}_" for column in self._columns)), key=len)  # that no column has
        return [name] if count == 1 else [f"{name}{i}" for i in range(count)]

    def _frame(self, X: Any, reset: bool) -> Any:
        """Rows as a frame with the columns of the fit: a frame as it is, an array after scikit-learn's checks."""
        import pandas as pd

        if is_frame(X):
            validate_data(self, X, skip_check_array=True, reset=reset)
            frame = named(X)
        else:
            rows = validate_data(
                self, X, dtype=np.float64, accept_sparse="csr", ensure_all_finite="allow-nan", reset=reset
            )
            values = rows.toarray() if issparse(rows) else rows
            frame = pd.DataFrame(values, columns=unnamed_columns(values.shape[1]))
        if reset:
            self._columns, self._unnamed = [*frame.columns], not is_frame(X)
        return frame.set_axis(self._columns, axis=1)  # scikit-learn has compared names, if both have some

    def _predicted(self, X: Any) -> Prediction:
        check_is_fitted(self)
        return self.posterior_.predict(self._frame(X, reset=False), draws=self.draws)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = tags.input_tags.sparse = True
        tags.target_tags.required = True
        tags.non_deterministic = False
        return tags


class BayesianRegressor(RegressorMixin, _BayesianNetwork):
    r"""A Bayesian neural network for regression, with the interface of scikit-learn.

    .. math:: p(y \mid x, X, Y) = \frac1K \sum_{k=1}^K p(y \mid x, w_k), \qquad w_k \sim q(w) \approx p(w \mid X, Y)

    Rows may be an array, a sparse matrix, or a frame with numbers, text, categories, dates and gaps, which
    `deepprob.table` encodes.

    Args:
        net: Sizes of hidden layers, or a ``torch.nn.Module`` with one output per target, which is copied.
        method: The routine that makes the posterior, a name in ``deepprob.inference.ROUTINES``. Hidden layers of sizes
            have dropout of rate 0.1 for ``"dropout"``.
        prior: The prior of the weights, see `deepprob.models.BayesianNeuralNetwork`.
        draws: Number of draws from the posterior for predictions, K.
        options: Further arguments of the routine, such as ``{"epochs": 200}``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        random_state: A seed, a generator of numpy, or None.
        likelihood: The distribution of the targets, see `deepprob.models.BayesianNeuralNetwork`.

    Attributes:
        posterior_: The posterior, to ``check``, ``save`` and export to ArviZ.
        n_features_in_: Number of columns of the fit.
        feature_names_in_: Their names, after a fit of a frame.

    References:
        Blundell, Cornebise, Kavukcuoglu, Wierstra (2015), Weight Uncertainty in Neural Networks.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(200, 1))
        >>> y = 2 * x[:, 0] + 0.1 * rng.normal(size=200)
        >>> model = BayesianRegressor((8,), options={"steps": 2000}, random_state=0).fit(x, y)
        >>> mean, sd = model.predict([[0.5]], return_std=True)
        >>> bool(abs(mean[0] - 1) < 0.2), bool(0.05 < sd[0] < 0.3)
        (True, True)
        >>> low, high = model.predict_interval([[0.5]], mass=0.9)
        >>> bool(low[0] < mean[0] < high[0])
        True
    """

    def __init__(
        self,
        net: nn.Module | Sequence[int] = (50,),
        method: str = "svi",
        *,
        prior: Any = "hierarchical",
        likelihood: Any = "normal",
        draws: int = 200,
        options: Mapping[str, Any] | None = None,
        device: str = "auto",
        random_state: Any = None,
    ) -> None:
        super().__init__(
            net, method, prior=prior, draws=draws, options=options, device=device, random_state=random_state
        )
        self.likelihood = likelihood

    def fit(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> BayesianRegressor:
        r"""Fit the network.

        Args:
            X: Rows, ``(N, D)``.
            y: Targets, ``(N,)`` or ``(N, outputs)``.
            sample_weight: Weights :math:`v_n \ge 0` of rows, ``(N,)``, in the log-likelihood
                :math:`\sum_n v_n \log p(y_n \mid x_n, w)`; None for 1 each.

        Raises:
            ValueError: If rows and targets do not fit together, or an argument is not valid.
        """
        if y is None:
            raise ValueError("this estimator requires y to be passed, but the target y is None.")
        frame, targets = self._frame(X, reset=True), check_array(y, dtype=np.float64, ensure_2d=False, input_name="y")
        check_consistent_length(frame, targets)
        self._single = targets.ndim == 1
        names = self._target_names(y, 1 if self._single else targets.shape[1])
        self._fit(self._encoded(frame, targets, sample_weight, names, ()), likelihood=self.likelihood)
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """The predictive mean of rows, and the predictive standard deviation if asked for.

        Args:
            X: Rows, ``(N, D)``.
            return_std: Whether to return ``(mean, sd)``.
        """
        found = self._predicted(X)
        return (self._shaped(found.mean), self._shaped(found.sd)) if return_std else self._shaped(found.mean)

    def predict_interval(self, X: Any, mass: float = 0.9) -> tuple[Floats, Floats]:
        """Both ends of the central predictive interval of rows.

        Args:
            X: Rows, ``(N, D)``.
            mass: Probability inside the interval, between 0 and 1.
        """
        low, high = self._predicted(X).interval(mass)
        return self._shaped(low), self._shaped(high)

    def _shaped(self, values: torch.Tensor) -> Floats:
        found: Floats = values.double().cpu().numpy()
        return found[:, 0] if self._single else found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class BayesianClassifier(ClassifierMixin, _BayesianNetwork):
    r"""A Bayesian neural network for classification, with the interface of scikit-learn.

    .. math:: p(y = c \mid x, X, Y) = \frac1K \sum_{k=1}^K \mathrm{softmax}_c\big(f(x; w_k)\big),
              \qquad w_k \sim q(w) \approx p(w \mid X, Y)

    Rows may be an array, a sparse matrix, or a frame with numbers, text, categories, dates and gaps, which
    `deepprob.table` encodes.

    Args:
        net: Sizes of hidden layers, or a ``torch.nn.Module`` with one output per class, which is copied.
        method: The routine that makes the posterior, a name in ``deepprob.inference.ROUTINES``. Hidden layers of sizes
            have dropout of rate 0.1 for ``"dropout"``.
        prior: The prior of the weights, see `deepprob.models.BayesianNeuralNetwork`.
        draws: Number of draws from the posterior for predictions, K.
        options: Further arguments of the routine, such as ``{"epochs": 200}``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        random_state: A seed, a generator of numpy, or None.

    Attributes:
        classes_: The classes.
        posterior_: The posterior, to ``check``, ``save`` and export to ArviZ.
        n_features_in_: Number of columns of the fit.
        feature_names_in_: Their names, after a fit of a frame.

    References:
        Blundell, Cornebise, Kavukcuoglu, Wierstra (2015), Weight Uncertainty in Neural Networks.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(200, 2))
        >>> y = np.where(x[:, 0] > 0, "right", "left")
        >>> model = BayesianClassifier((8,), options={"epochs": 300}, random_state=0).fit(x, y)
        >>> model.predict([[2.0, 0.0]]).tolist(), bool(model.predict_proba([[2.0, 0.0]])[0, 1] > 0.9)
        (['right'], True)
    """

    def fit(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> BayesianClassifier:
        r"""Fit the network.

        Args:
            X: Rows, ``(N, D)``.
            y: Classes, ``(N,)``.
            sample_weight: Weights :math:`v_n \ge 0` of rows, ``(N,)``, in the log-likelihood
                :math:`\sum_n v_n \log p(y_n \mid x_n, w)`; None for 1 each.

        Raises:
            ValueError: If rows and classes do not fit together, there is one class only, or an argument is not valid.
        """
        if y is None:
            raise ValueError("this estimator requires y to be passed, but the target y is None.")
        frame, labels = self._frame(X, reset=True), column_or_1d(y, warn=True)
        check_consistent_length(frame, labels)
        assert_all_finite(labels, input_name="y")
        check_classification_targets(labels)
        self.classes_ = np.unique(labels)
        if len(self.classes_) < 2:
            raise ValueError(f"a classifier needs at least 2 classes; got the one class {self.classes_[0]!r}.")
        names = self._target_names(y, 1)
        data = self._encoded(frame, labels, sample_weight, names, [text_of(label) for label in self.classes_])
        self._fit(data, likelihood="categorical", num_classes=len(self.classes_))
        return self

    def predict_proba(self, X: Any) -> Floats:
        """The probabilities of the classes, ``(N, C)``, in the order of ``classes_``."""
        probs = self._predicted(X).probs.double().cpu().numpy()
        return cast(Floats, probs / probs.sum(1, keepdims=True))

    def predict(self, X: Any) -> NDArray[Any]:
        """The most likely class of rows, ``(N,)``."""
        probs = self.predict_proba(X)
        return cast(NDArray[Any], self.classes_[probs.argmax(1)])
