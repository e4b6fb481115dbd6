"""The command on tables of files: it fits, predicts and checks them as the Python calls do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from deepprob.cli.commands import app
from deepprob.posteriors.posterior import Posterior

sys.path.insert(0, str(Path(__file__).parent))
import own_tables

QUICK = ["--epochs", "40", "--batch-size", "64", "--learning-rate", "0.02", "--hidden", "20", "--json"]


def command(*arguments: str) -> dict[str, Any]:
    """What a command prints as JSON; exit code 1 is the verdict "fail" of a short fit."""
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code in (0, 1), result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("name", ["penguins", "cars", "machines"])
def test_a_file_is_fitted_predicted_and_checked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = own_tables.TABLES[name]
    raw = table.read().dropna(subset=[table.target])
    later = raw.iloc[::4].drop(columns=table.target)
    raw.to_csv("own.csv", index=False)
    later.to_csv("later.csv", index=False)

    drop = ["--drop", ",".join(table.drop)] if table.drop else []
    assert command("fit", "bnn", "own.csv", "--target", table.target, *drop, "--out", "run", *QUICK)["verdict"]
    assert Path("run/report.html").stat().st_size > 10_000
    assert command("predict", "run", "later.csv", "--out", "predictions.csv", "--json")["rows"] == len(later)

    said = pd.read_csv("predictions.csv")
    found = Posterior.load("run").predict(pd.read_csv("later.csv"), draws=200).to_frame()
    for column in found.columns:
        if table.classes and column == "class":
            assert [*said[column].astype(str)] == [*found[column].astype(str)]
        else:
            assert abs(said[column].to_numpy() - found[column].to_numpy()).max() < 1e-4 * (1 + abs(found[column]).max())
    target = raw.iloc[::4][table.target].reset_index(drop=True)
    if table.classes:
        assert (said["class"].astype(str) == target.astype(str)).mean() > 1.3 * target.value_counts(
            normalize=True
        ).max()
    else:
        assert ((said["mean"] - target) ** 2).mean() < 0.5 * target.var()
    assert command("check", "run", "own.csv", "--json")["verdict"] in ("pass", "caution", "fail")
