"""Private parameter stores."""

from __future__ import annotations

import pyro
import pytest
import torch

from deepprob.programs.store import empty_store, private_store


def test_a_private_store_is_closed_after_an_error() -> None:
    mine = empty_store()
    with pytest.raises(RuntimeError, match="on purpose"), private_store(mine):
        pyro.param("loc", torch.zeros(()))
        raise RuntimeError("on purpose")
    assert "loc" not in pyro.get_param_store()


def test_the_callers_store_is_restored() -> None:
    pyro.param("theirs", torch.ones(()))
    with private_store(empty_store()):
        assert "theirs" not in pyro.get_param_store()
    assert pyro.param("theirs").item() == 1.0
    pyro.clear_param_store()


def test_validation_is_set_and_restored() -> None:
    before = pyro.settings.get("validate_distributions_pyro")
    for asked in (True, False):
        with private_store(empty_store(), validate=asked):
            assert pyro.settings.get("validate_distributions_pyro") is asked
    assert pyro.settings.get("validate_distributions_pyro") == before
