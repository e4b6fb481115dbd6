"""History: what was recorded comes back."""

from __future__ import annotations

import math

from deepprob.posteriors.history import History


def test_round_trip() -> None:
    record = History(steps_per_epoch=2, best_epoch=1, stopped_early=True)
    for value in (-1.0, math.inf):
        record.add_step({"elbo": value, "skipped": 0.0})
    record.add_epoch({"elbo": -1.0, "held_out_elbo": -2.0})
    again = History.restore(record.to_tensors(), record.facts())
    assert again == record
    assert again.steps["elbo"] == [-1.0, math.inf]


def test_an_empty_record() -> None:
    assert History.restore({}, History().facts()) == History()
