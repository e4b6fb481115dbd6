"""History: the round trip through tensors and JSON."""

from __future__ import annotations

import math

from deepprob.posteriors.history import History


def test_round_trip() -> None:
    record = History(steps={"elbo": [-1.0, math.inf], "skipped": [0.0, 0.0]}, steps_per_epoch=2, best_epoch=1)
    record.add_epochs({"elbo": [-1.0], "held_out_elbo": [-2.0]})
    record.add_epochs({"elbo": [-0.5], "held_out_elbo": [-1.5]})
    assert record.epochs == {"elbo": [-1.0, -0.5], "held_out_elbo": [-2.0, -1.5]}
    again = History.restore(record.to_tensors(), record.facts())
    assert again == record
    assert again.steps["elbo"] == [-1.0, math.inf]


def test_reads_facts_under_their_old_names() -> None:
    facts = History(compiled_graphs=2).facts()
    old = {"specialisations" if name == "compiled_graphs" else name: value for name, value in facts.items()}
    assert History.restore({}, old) == History(compiled_graphs=2)


def test_empty_record() -> None:
    assert History.restore({}, History().facts()) == History()
