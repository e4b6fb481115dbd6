"""Estimators with the interface of scikit-learn."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array, csr_matrix
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from deepprob.estimators import BayesianClassifier, BayesianRegressor

SHORT = {"epochs": 400, "compile": False}


def rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(120, 3))
    return x, 2 * x[:, 0] - x[:, 1] + 0.1 * rng.normal(size=120)


def frame_of(x: np.ndarray) -> Any:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(x, columns=["a", "b", "c"])
    frame["kind"] = np.where(x[:, 0] > 0, "up", "down")
    frame.loc[::7, "b"] = np.nan
    return frame


def test_a_regressor_predicts_with_uncertainty_in_the_units_of_the_target() -> None:
    x, y = rows()
    model = BayesianRegressor((8,), options=SHORT, random_state=0).fit(x, 100 * y + 1000)
    mean, sd = model.predict(x, return_std=True)
    low, high = model.predict_interval(x, mass=0.9)
    assert mean.shape == sd.shape == low.shape == y.shape and mean.dtype == np.float64
    assert model.score(x, 100 * y + 1000) > 0.9
    assert ((low < mean) & (mean < high)).mean() > 0.95 and (sd > 0).all()


def test_several_targets() -> None:
    x, y = rows()
    model = BayesianRegressor((8,), options=SHORT, random_state=0).fit(x, np.stack([y, -y], 1))
    assert model.predict(x).shape == (120, 2)
    assert model.predict_interval(x)[0].shape == (120, 2)


def test_a_classifier_returns_the_classes_of_the_user() -> None:
    x, y = rows()
    labels = np.where(y > 0, "right", "left")
    model = BayesianClassifier((8,), options=SHORT, random_state=0).fit(x, labels)
    assert model.classes_.tolist() == ["left", "right"]
    assert model.score(x, labels) > 0.9
    np.testing.assert_allclose(model.predict_proba(x).sum(1), 1.0)


def test_a_frame_with_text_and_gaps() -> None:
    x, y = rows()
    model = BayesianRegressor((8,), options=SHORT, random_state=0).fit(frame_of(x), y)
    assert model.feature_names_in_.tolist() == ["a", "b", "c", "kind"] and model.n_features_in_ == 4
    assert model.score(frame_of(x), y) > 0.8
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(frame_of(x)[["b", "a", "c", "kind"]])


def test_a_network_of_the_user_is_copied() -> None:
    x, y = rows()
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))
    before = [p.detach().clone() for p in net.parameters()]
    model = BayesianRegressor(net, options=SHORT, random_state=0).fit(x, y)
    assert all(bool((a == b).all()) for a, b in zip(before, net.parameters(), strict=True))
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(x), model.predict(x))


def test_clone_pipeline_search_and_cross_validation() -> None:
    x, y = rows()
    pipeline = make_pipeline(StandardScaler(), BayesianRegressor((4,), options=SHORT, random_state=0))
    search = GridSearchCV(pipeline, {"bayesianregressor__net": [(2,), (4,)]}, cv=2).fit(x, y)
    assert search.best_score_ > 0.5
    copied = clone(pipeline)
    assert copied[-1].get_params()["net"] == (4,) and not hasattr(copied[-1], "posterior_")
    model = BayesianClassifier((4,), options=SHORT, random_state=0)
    assert cross_val_score(model, x, y > 0, cv=2, n_jobs=2).mean() > 0.8


def test_a_row_of_weight_zero_has_no_influence() -> None:
    x, y = rows()
    wrong = y.copy()
    wrong[60:] += 50.0
    weights = np.r_[np.ones(60), np.zeros(60)]
    model = BayesianRegressor((8,), options=SHORT, random_state=0).fit(x, wrong, sample_weight=weights)
    assert model.score(x[:60], y[:60]) > 0.9


def test_a_class_whose_rows_have_no_weight_keeps_its_place() -> None:
    x, y = rows()
    labels = np.digitize(y, [-1.0, 1.0])
    weights = (labels != 1).astype(float)
    model = BayesianClassifier((8,), options=SHORT, random_state=0).fit(x, labels, sample_weight=weights)
    kept = weights > 0
    assert model.classes_.tolist() == [0, 1, 2] and model.score(x[kept], labels[kept]) > 0.9
    model.fit(x, labels, sample_weight=(labels == 2).astype(float))
    assert (model.predict(x[labels == 2]) == 2).all()


def test_dropout_has_a_network_with_dropout() -> None:
    x, y = rows()
    model = BayesianRegressor((8,), "dropout", options={"epochs": 50}, random_state=0).fit(x, y)
    assert model.posterior_.program.config["net"]["dropout"] == 0.1
    assert model.predict(x, return_std=True)[1].shape == (120,)


def test_sparse_rows() -> None:
    x, y = rows()
    x[np.abs(x) < 0.7] = 0.0
    model = BayesianRegressor((8,), options=SHORT, random_state=0).fit(csr_matrix(x), y)
    np.testing.assert_array_equal(model.predict(csr_array(x)), model.predict(x))
    assert model.score(csr_matrix(x), y) > 0.8


@pytest.mark.parametrize("kind", ["array", "frame"])
def test_the_posterior_takes_what_the_estimator_takes(kind: str) -> None:
    pandas = pytest.importorskip("pandas")
    x, y = rows()
    x = 100 * x + 1000
    labels = pandas.Series(np.where(y > 0, "right", "left"), name="side")
    given = x if kind == "array" else pandas.DataFrame(x, columns=["a", "b", "c"])
    short = {"steps": 100, "compile": False}
    model = BayesianClassifier((8,), options=short, random_state=0, draws=20).fit(given, labels)
    found = model.posterior_.predict(given, draws=20)
    np.testing.assert_allclose(found.probs, model.predict_proba(given), rtol=1e-5)
    assert found.to_frame().columns.tolist() == ["class", "prob[left]", "prob[right]"]
    assert found.site == "y" and model.posterior_.program.origin.encoding.targets == ("side",)
    assert model.posterior_.log_likelihood(given, labels, draws=20).mean() > -0.5
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.posterior_.predict(given, draws=20).probs, found.probs)


def test_names_of_columns_may_come_or_go_after_the_fit() -> None:
    pandas = pytest.importorskip("pandas")
    x, y = rows()
    frame = pandas.DataFrame(x, columns=["a", "b", "c"])
    short = {"steps": 20, "compile": False}
    model = BayesianRegressor((4,), options=short, random_state=0).fit(frame, y)
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        np.testing.assert_array_equal(model.predict(x), model.predict(frame))
    model = BayesianRegressor((4,), options=short, random_state=0).fit(x, y)
    with pytest.warns(UserWarning, match="X has feature names"):
        np.testing.assert_array_equal(model.predict(frame), model.predict(x))


@pytest.mark.filterwarnings("error")
def test_a_column_that_is_constant_in_a_part_of_the_rows_needs_no_warning() -> None:
    x, y = rows()
    model = BayesianRegressor((4,), options={"steps": 20, "compile": False}, random_state=0)
    assert model.fit(np.c_[np.ones(120), x], y).predict(np.c_[np.ones(5), x[:5]]).shape == (5,)
    assert model.posterior_.predict(np.c_[np.ones(5), x[:5]]).mean.shape == (5, 1)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": "sv"}, ValueError, "unknown method 'sv'. Did you mean 'svi'?"),
        ({"options": {"epoch": 3}}, ValueError, "unknown option of method='svi' 'epoch'. Did you mean 'epochs'?"),
        ({"net": "wide"}, TypeError, "net must be a torch.nn.Module or sizes of hidden layers; got 'wide'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    x, y = rows()
    with pytest.raises(error, match=message):
        BayesianRegressor(**settings).fit(x, y)


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="needs at least 2 classes; got the one class"):
        BayesianClassifier().fit(rows()[0], np.zeros(120, dtype=int))
