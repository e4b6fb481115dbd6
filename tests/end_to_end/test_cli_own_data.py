"""The command `deepprob` on the user's own files: tables, arrays and folders of images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from deepprob.cli.commands import app

TINY = ["--epochs", "2", "--hidden", "4", "--device", "cpu"]


def deepprob_(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def error_of(*arguments: str) -> str:
    """The single line that a failed command prints."""
    result = deepprob_(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("note:")]
    return line.removeprefix("error: ")


def flowers(rows: int = 60) -> pd.DataFrame:
    random = np.random.default_rng(0)
    kind = np.array(["red", "white"])[np.arange(rows) % 2]
    petal = np.where(kind == "red", 1.0, -1.0) + random.normal(size=rows)
    petal[7] = np.nan
    soil = np.array(["clay", "sand", "peat"])[np.arange(rows) % 3]
    return pd.DataFrame({"id": [f"p{i}" for i in range(rows)], "petal": petal, "soil": soil, "kind": kind})


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table, and fits of it and of a folder of images."""
    home = tmp_path_factory.mktemp("own")
    flowers().to_csv(home / "flowers.csv", index=False)
    run = ["--target", "kind", "--drop", "id", "--out", str(home / "bnn"), "--json"]
    fit = deepprob_("fit", "bnn", str(home / "flowers.csv"), *run, *TINY)
    assert fit.exit_code in (0, 1), fit.output
    (home / "fit.json").write_text(fit.stdout)
    (home / "fit.txt").write_text(fit.stderr)
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (5, 4), np.uint8)
        (home / "pictures").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(home / "pictures" / f"{i:02d}.png")
    fit = deepprob_("fit", "vae", str(home / "pictures"), "--out", str(home / "vae"), "--quiet", *TINY)
    assert fit.exit_code in (0, 1), fit.output
    assert (fit.stdout, fit.stderr) == ("", "")
    return home


def test_fit_prints_json_alone_and_says_how_rows_were_split(home: Path) -> None:
    found = json.loads((home / "fit.json").read_text())
    assert found["verdict"] in ("pass", "caution", "fail") and found["checks"]
    assert found["paths"] == {
        "posterior": str(home / "bnn"),
        "report": str(home / "bnn" / "report.html"),
        "json": str(home / "bnn" / "report.json"),
    }
    said = (home / "fit.txt").read_text()
    assert "BayesianNeuralNetwork on flowers.csv: rows of shape (" in said
    assert "36 train / 12 valid / 12 test" in said and "flowers.csv, split at random (seed 0)" in said


def test_check_finds_the_test_rows_again(home: Path) -> None:
    result = deepprob_("check", str(home / "bnn"), "--draws", "30", "--json")
    assert result.exit_code in (0, 1), result.output
    assert json.loads(result.stdout)["title"] == "BayesianNeuralNetwork on flowers.csv, 12 test rows"


def test_check_says_that_the_file_has_changed(home: Path) -> None:
    path = home / "flowers.csv"
    before = path.read_bytes()
    try:
        flowers(62).to_csv(path, index=False)
        assert "flowers.csv' has changed since the fit, which had 60 rows, so its test" in error_of(
            "check", str(home / "bnn")
        )
        path.unlink()
        assert "flowers.csv', are not there any more. Restore or name them." in error_of("check", str(home / "bnn"))
    finally:
        path.write_bytes(before)


def test_predict_keeps_the_id_and_the_order_of_rows(home: Path) -> None:
    new = flowers()[["soil", "id", "petal"]].iloc[::-1]
    new.to_csv("new.csv", index=False)
    result = deepprob_("predict", str(home / "bnn"), "new.csv", "--out", "p.csv", "--draws", "10")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "predictions  p.csv" and "... 55 more rows" in result.stdout
    found = pd.read_csv("p.csv", index_col=0)
    assert [*found.columns] == ["id", "class", "prob[red]", "prob[white]"]
    assert found["id"].tolist() == new["id"].tolist() and set(found["class"]) <= {"red", "white"}


@pytest.mark.parametrize("kind", ["blue", None])
def test_predict_does_not_read_the_target(home: Path, kind: str | None) -> None:
    new = flowers()
    new.loc[::3, "kind"] = kind
    new.to_csv("new.csv", index=False)
    result = deepprob_("predict", str(home / "bnn"), "new.csv", "--out", "p.csv", "--draws", "10")
    assert result.exit_code == 0, result.output
    assert len(pd.read_csv("p.csv")) == 60


def test_arrays_without_a_target_are_refused() -> None:
    np.savez("rows.npz", x=np.zeros((40, 3)), price=np.zeros(40))
    assert error_of("fit", "bnn", "rows.npz") == (
        "data set 'rows.npz' has no target, and model 'bnn' needs one. Name it by --target, one of: 'x', 'price'."
    )


def test_predict_takes_arrays_without_their_target() -> None:
    x = np.random.default_rng(0).normal(size=(40, 3))
    np.savez("rows.npz", x=x, price=x.sum(1), note=np.arange(40))
    run = ["--target", "price", "--drop", "note", "--out", "run", "--quiet"]
    assert deepprob_("fit", "bnn", "rows.npz", *run, *TINY).exit_code in (0, 1)
    np.savez("new.npz", x=x[:4])
    result = deepprob_("predict", "run", "new.npz", "--out", "p.csv", "--draws", "10")
    assert result.exit_code == 0, result.output
    assert len(pd.read_csv("p.csv")) == 4


def test_other_columns_than_those_of_the_fit_are_named(home: Path) -> None:
    flowers().rename(columns={"petal": "petals"}).to_csv("new.csv", index=False)
    assert "'new.csv' lacks the column 'petal', which the fit had. Rename 'petals' if it is 'petal'." in error_of(
        "predict", str(home / "bnn"), "new.csv"
    )
    flowers().drop(columns="kind").to_csv("new.csv", index=False)
    assert "'new.csv' lacks the column 'kind'" in error_of("check", str(home / "bnn"), "new.csv")
    assert "no posterior at" in error_of("check", str(home / "bn")) and "Did you mean" in error_of(
        "check", str(home / "bn")
    )
    assert "has no readable manifest.json: it is not a save of deepprob" in error_of("check", str(home / "pictures"))


def test_images_are_fitted_sampled_and_predicted(home: Path) -> None:
    assert deepprob_("sample", str(home / "vae"), "--draws", "4", "--out", "grid.png").exit_code == 0
    assert Path("grid.png").read_bytes().startswith(b"\x89PNG")
    assert "samples of this model are images" in error_of("sample", str(home / "vae"), "--out", "rows.csv")
    result = deepprob_("predict", str(home / "vae"), str(home / "pictures"), "--out", "p.csv", "--json")
    assert json.loads(result.stdout)["rows"] == 12
    assert pd.read_csv("p.csv")["file"].tolist()[:2] == ["00.png", "01.png"]


def test_classes_of_a_folder_have_their_names() -> None:
    random = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        Path("pets", kind).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(f"pets/{kind}/{i}.png")
    assert deepprob_("fit", "bnn", "pets", "--out", "run", "--quiet", *TINY).exit_code in (0, 1)
    result = deepprob_("predict", "run", "pets", "--out", "p.csv", "--draws", "10")
    assert result.exit_code == 0, result.output
    found = pd.read_csv("p.csv")
    assert [*found.columns] == ["file", "class", "prob[cat]", "prob[dog]"] and {*found["class"]} <= {"cat", "dog"}


def test_sampled_rows_are_like_those_of_the_table() -> None:
    flowers().to_csv("flowers.csv", index=False)
    fitted = deepprob_("fit", "vae", "flowers.csv", "--drop", "id", "--out", "run", "--quiet", *TINY)
    assert fitted.exit_code in (0, 1), fitted.output
    result = deepprob_("sample", "run", "--draws", "30", "--out", "rows.csv")
    assert result.exit_code == 0, result.output
    found = pd.read_csv("rows.csv", index_col="draw")
    assert [*found.columns] == ["petal", "soil", "kind"] and len(found) == 30
    assert {*found["soil"]} <= {"clay", "sand", "peat"} and {*found["kind"]} <= {"red", "white"}
    assert deepprob_("predict", "run", "flowers.csv", "--out", "p.csv", "--draws", "10").exit_code == 0
    columns = [*pd.read_csv("p.csv").columns]
    assert {"id", "mean[petal]", "class[soil]", "prob[soil=peat]"} <= {*columns}


def test_draws_of_targets_are_a_table(home: Path) -> None:
    assert "--out grid.png is for images" in error_of("sample", str(home / "bnn"), "--out", "grid.png")
    assert deepprob_("sample", str(home / "bnn"), "--draws", "3", "--out", "draws.csv").exit_code == 0
    found = pd.read_csv("draws.csv", index_col=0)
    assert [*found.columns] == ["draw 0", "draw 1", "draw 2"] and len(found) == 12
    assert {*found.to_numpy().ravel()} <= {"red", "white"}


WRONG = {
    "needs a target, the column to predict. Name it by --target, one of: 'id', 'petal', 'soil', 'kind'": [],
    "unknown target 'kinds'. Did you mean 'kind'?": ["--target", "kinds", "--drop", "id"],
    "unknown column to drop 'ids'. Did you mean 'id'?": ["--target", "kind", "--drop", "ids"],
    "size does not apply to 'my.csv', which is not a folder of images": ["--target", "kind", "--size", "8"],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_columns(message: str) -> None:
    flowers().to_csv("my.csv", index=False)
    assert message in error_of("fit", "bnn", "my.csv", *WRONG[message])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'my.csv' is empty"),
        ("x,y\n", "has names of columns but no rows"),
        (
            "x,y\n1,2\n2,2\n3,2\n4,2\n5,2\n",
            "the target 'y' is 2 in every row of 'my.csv', so nothing is left to predict",
        ),
        ("x,y\n1,2\n2,\n3,2\n4,1\n5,2\n", "the target 'y' is missing in 1 row of 5 in 'my.csv'. Remove these rows"),
        ("x,y\n1,2\n2,3\n", "'my.csv' has 2 rows, too few for train, valid and test parts. Give at least 5."),
    ],
)
def test_tables_that_cannot_be_fitted(text: str, message: str) -> None:
    Path("my.csv").write_text(text)
    assert message in error_of("fit", "bnn", "my.csv", "--target", "y")


def test_a_missing_file_suggests_the_nearest_name() -> None:
    flowers().to_csv("flowers.csv", index=False)
    assert "there is no file or folder 'flower.csv'. Did you mean 'flowers.csv'?" in error_of(
        "fit", "bnn", "flower.csv", "--target", "kind"
    )


def test_an_output_folder_that_cannot_be_written() -> None:
    flowers().to_csv("my.csv", index=False)
    fit = ["fit", "bnn", "my.csv", "--target", "kind", "--drop", "id"]
    assert "'my.csv/run' cannot be written: '" in error_of(*fit, "--out", "my.csv/run")


def test_list_alone_lists_everything() -> None:
    plain = deepprob_("list")
    assert plain.exit_code == 0
    assert all(name in plain.stdout for name in ("vae", "digits", "svi"))
    found = json.loads(deepprob_("list", "--json").stdout)
    assert [*found] == ["models", "data", "routines", "objectives"] and found["models"][0]["model"] == "vae"


def test_help_shows_no_type_for_flags() -> None:
    for command in ([], ["fit"], ["check"], ["list"]):
        assert "<bool>" not in deepprob_(*command, "--help").stdout
