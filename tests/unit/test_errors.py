"""The shared argument checks: whole and positive numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepprob.errors import positive, whole


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_whole_converts_every_integer_type_to_int(value: object) -> None:
    assert whole("epochs", value) == 3 and type(whole("epochs", value)) is int


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, 2.0, 2.5, "3", None, [3], float("nan")),
        *(True, np.True_, np.array(True), np.float64(3.0), torch.tensor(3.0), torch.tensor(True), torch.tensor([1, 2])),
    ],
)
def test_whole_refuses_other_values(value: object) -> None:
    with pytest.raises(ValueError, match=r"^epochs must be a whole number of at least 1; got ") as caught:
        whole("epochs", value)
    assert str(caught.value).endswith(f"{value!r}.")


def test_whole_error_states_the_least_number() -> None:
    assert whole("seed", 0, least=0) == 0
    with pytest.raises(ValueError, match=r"seed must be a whole number of at least 0; got -1\."):
        whole("seed", -1, least=0)


@pytest.mark.parametrize("value", [0.5, 2, np.float32(0.5), np.int64(2), torch.tensor(0.5)])
def test_positive_converts_every_number_type_to_float(value: object) -> None:
    assert type(positive("noise", value)) is float and positive("noise", value) == float(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value", [0.0, -1, True, float("nan"), float("inf"), "1", None, 1j, np.ones(2), torch.ones(2), np.True_]
)
def test_positive_refuses_other_values(value: object) -> None:
    with pytest.raises(ValueError, match=r"^noise must be a positive number; got "):
        positive("noise", value)
