"""read_file: tables and arrays in files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from deepprob.data.files import digest_of, read_file
from deepprob.errors import StorageError


def written(folder: Path, text: str, name: str = "my.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("a,b\n1,2.5\n3,4.0\n", {"a": [1, 3], "b": [2.5, 4.0]}),
        ("a;b\n1;2.5\n", {"a": [1], "b": [2.5]}),
        ("a;b\n1;2,5\n3;NA\n", {"a": [1, 3], "b": [2.5, np.nan]}),
        ("a;b\nx,y;1,5\n", {"a": ["x,y"], "b": [1.5]}),
        ("a\tb\n1\t2\n", {"a": [1], "b": [2]}),
        ("a|b\n1|2\n", {"a": [1], "b": [2]}),
        ("a\n1\n2\n", {"a": [1, 2]}),
        ("a, b\n1, x\n", {"a": [1], "b": ["x"]}),
        ('"a;x",b\n1,2\n', {"a;x": [1], "b": [2]}),
        ("größe,b\n1,2\n", {"größe": [1], "b": [2]}),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_separators_and_decimals_are_found(
    tmp_path: Path, text: str, columns: dict[str, list[object]], encoding: str
) -> None:
    pd.testing.assert_frame_equal(read_file(written(tmp_path, text, encoding=encoding)), pd.DataFrame(columns))


def test_a_first_column_without_a_name_names_the_rows(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [1, 2]}, index=["r1", "r2"])
    frame.to_csv(tmp_path / "my.csv")
    pd.testing.assert_frame_equal(read_file(tmp_path / "my.csv"), frame)


@pytest.mark.parametrize("ending", [".csv.gz", ".csv.zip", ".tsv.xz", ".txt.bz2"])
def test_compressed_text_is_read(tmp_path: Path, ending: str) -> None:
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", None]})
    frame.to_csv(tmp_path / f"my{ending}", index=False, sep="\t" if "tsv" in ending else ",")
    pd.testing.assert_frame_equal(read_file(tmp_path / f"my{ending}"), frame)


def test_arrays_are_read_by_name(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.eye(3))
    np.savez(tmp_path / "b.npz", images=np.ones((2, 4, 4)), y=np.arange(2))
    assert read_file(tmp_path / "a.npy")["x"].tolist() == np.eye(3).tolist()
    assert {name: value.shape for name, value in read_file(tmp_path / "b.npz").items()} == {
        "images": (2, 4, 4),
        "y": (2,),
    }


@pytest.mark.parametrize(
    ("text", "name", "encoding", "message"),
    [
        ("", "my.csv", "utf-8", r"my\.csv' is empty"),
        (" \n\n", "my.csv", "utf-8", r"my\.csv' is empty"),
        ("a,b\n", "my.csv", "utf-8", "has names of columns but no rows"),
        ("1,2.5\n3,4\n", "my.csv", "utf-8", r"first line .* holds numbers \(1, 2\.5\) .* Add a first line with names"),
        ("1;2,5;3;4\n", "my.csv", "utf-8", r"holds numbers \(1, 2,5, 3, \.\.\.\)"),
        ("a,b\n1,2\n1,2,3\n", "my.csv", "utf-8", r"cannot be read as a table: Expected 2 fields in line 3, saw 3\. Co"),
        ("a,b\n1,2,3\n", "my.csv", "utf-8", "cannot be read as a table: Length of header"),
        ("é,b\n1,2\n", "my.csv", "latin1", r"is not text in UTF-8 \(byte 0xe9 at position 0\)\. Save it as UTF-8"),
        ("a,b\n1,2\n", "my.csv", "utf-16", "is not text in UTF-8"),
        ("a,b\n1,2\n", "my.csv.gz", "utf-8", "cannot be read as a table: Not a gzipped file"),
        ("a,b\n", "my.npy", "utf-8", r"my\.npy' does not hold arrays of numbers, or is damaged\. Save arrays"),
        ("a,b\n", "my.npz", "utf-8", r"my\.npz' does not hold arrays of numbers, or is damaged"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, name: str, encoding: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        read_file(written(tmp_path, text, name, encoding))


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "my.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(StorageError, match="does not hold arrays of numbers"):
        read_file(tmp_path / "my.npy")


def test_unknown_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has the ending '\.xlsx', which is not read\. Save it as one of: \.csv, \.t"):
        read_file(written(tmp_path, "x", "my.xlsx"))


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"is a Parquet file, which the package pyarrow reads; .* pip install pyarr"):
        read_file(written(tmp_path, "x", "my.parquet"))


def test_damaged_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> None:
        raise ValueError("magic bytes not found")

    monkeypatch.setattr(pd, "read_parquet", fails)
    with pytest.raises(StorageError, match=r"cannot be read as Parquet: magic bytes not found\. Replace the file\."):
        read_file(written(tmp_path, "x", "my.parquet"))


def test_a_digest_changes_with_contents_and_names(tmp_path: Path) -> None:
    path = written(tmp_path, "a\n1\n")
    first, folder = digest_of(path), digest_of(tmp_path)
    assert digest_of(path) == first != digest_of(written(tmp_path, "a\n2\n"))
    path.write_text("a\n1\n")
    assert digest_of(tmp_path) == folder
    path.rename(tmp_path / "other.csv")
    assert digest_of(tmp_path) != folder and digest_of(tmp_path / "other.csv") == first


def test_iso_dates_of_a_text_file_are_dates(tmp_path: Path) -> None:
    path = tmp_path / "visits.csv"
    path.write_text(
        "day,hour,zone,local,wrong,other\n"
        "2024-05-31,2024-05-31 14:00,2024-05-31T14:00:00Z,2024-05-31 14:00+02:00,2024-02-30,31/05/2024\n"
        "2024-06-01,,2024-05-31T15:00:00Z,2024-05-31 14:00+01:00,2024-01-01,01/06/2024\n"
    )
    frame = read_file(path)
    assert [frame[name].dtype.kind for name in frame][:4] == ["M"] * 4
    assert frame["hour"].isna().tolist() == [False, True]
    assert (frame["local"][1] - frame["local"][0]).total_seconds() == 3600
    assert frame["wrong"].tolist() == ["2024-02-30", "2024-01-01"]
    assert frame["other"].tolist() == ["31/05/2024", "01/06/2024"]  # day or month first is the user's to say
