"""Every routine as the method of an estimator."""

from __future__ import annotations

import numpy as np
import pytest
from scenarios import ROUTINE_SETTINGS

from deepprob.estimators import BayesianClassifier, BayesianRegressor
from deepprob.inference import ROUTINES


@pytest.mark.parametrize("method", sorted(ROUTINES))
def test_a_routine_makes_the_posterior_of_an_estimator(method: str) -> None:
    x = np.random.default_rng(0).normal(size=(40, 3))
    settings = {"method": method, "options": ROUTINE_SETTINGS[method], "random_state": 0}
    mean, sd = BayesianRegressor((4,), **settings).fit(x, x.sum(1)).predict(x, return_std=True)
    assert mean.shape == sd.shape == (40,) and (sd > 0).all()
    probs = BayesianClassifier((4,), **settings).fit(x, x.sum(1) > 0).predict_proba(x)
    np.testing.assert_allclose(probs.sum(1), 1.0)
