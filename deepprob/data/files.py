"""Files of rows: tables as pandas reads them, and NumPy arrays."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from deepprob.data.parsers import open_npz
from deepprob.errors import StorageError

TEXTS = (".csv", ".tsv", ".txt")
_ZIPPED = (".gz", ".bz2", ".xz", ".zip")
FILES = (*TEXTS, ".parquet", ".npy", ".npz")
_SEPARATORS = ",;\t|"
_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?( ?Z|[+-]\d\d:?\d\d)?)?")
_COMMA_DECIMAL = re.compile(r"\s*[-+]?\d+,\d+\s*")


def read_file(path: Path) -> Any:
    r"""Read the rows of a file.

    The separator of a text file is the one of ``, ; | tab`` that its first line has most often; decimals may have a
    comma if the separator is another. Text becomes dates if all of a column are ISO dates, such as 2024-05-31 or
    2024-05-31 14:00. A first column without a name holds the names of the rows.

    Args:
        path: A ``.csv``, ``.tsv``, ``.txt`` (also compressed), ``.parquet``, ``.npy`` or ``.npz`` file.

    Returns:
        A frame of pandas; for ``.npy`` and ``.npz``, arrays by name.

    Raises:
        ValueError: If the type of the file is unknown.
        StorageError: If the file is empty, damaged, or not text in UTF-8.
        ImportError: If a library is missing that reads it.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "ages.csv")
        >>> _ = path.write_text("name;age;height\nAnn;31;1,70\nBob;45;1,82\n")
        >>> read_file(path).dtypes["height"], [*read_file(path)]
        (dtype('float64'), ['name', 'age', 'height'])
    """
    kind = next((s for s in reversed(path.suffixes) if s.lower() not in _ZIPPED), "").lower()
    if kind not in FILES:
        raise ValueError(f"'{path}' has the ending {kind!r}, which is not read. Save it as one of: {', '.join(FILES)}.")
    if path.stat().st_size == 0:
        raise StorageError(f"'{path}' is empty. Check how it was written.")
    if kind in (".npy", ".npz"):
        return _arrays(path, kind)
    frame = _parquet(path) if kind == ".parquet" else _text(path)
    if not len(frame):
        raise StorageError(f"'{path}' has names of columns but no rows. Check how it was written.")
    if str(frame.columns[0]) in ("Unnamed: 0", "__index_level_0__"):  # as to_csv writes the index of a frame
        frame = frame.set_index(frame.columns[0]).rename_axis(None)
    return frame


def _text(path: Path) -> Any:
    import pandas as pd

    settings: dict[str, Any] = {"encoding": "utf-8-sig", "skipinitialspace": True}
    try:
        names = pd.read_csv(path, header=None, nrows=1, sep="\0", engine="python", quoting=csv.QUOTE_NONE, **settings)
        first = str(names.iat[0, 0])
        settings["sep"] = max(_SEPARATORS, key=first.count)
        _check_names(path, first, settings["sep"])
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # pandas would leave values out
            frame = pd.read_csv(path, index_col=False, **settings)
            if settings["sep"] != "," and any(_has_comma_decimals(frame[name]) for name in frame):
                frame = pd.read_csv(path, index_col=False, decimal=",", **settings)
    except UnicodeDecodeError as error:
        raise StorageError(
            f"'{path}' is not text in UTF-8 (byte {error.object[error.start]:#04x} at position {error.start}). Save it "
            "as UTF-8, or convert it: iconv -f latin1 -t utf-8."
        ) from None
    except pd.errors.EmptyDataError:
        raise StorageError(f"'{path}' is empty. Check how it was written.") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning, OSError, EOFError) as error:
        reason = str(error).strip().rstrip(".").removeprefix("Error tokenizing data. C error: ")
        raise StorageError(f"'{path}' cannot be read as a table: {reason}. Correct the file.") from None
    return frame.assign(**{name: _dates(frame[name]) for name in frame if _holds_dates(frame[name])})


def _holds_dates(column: Any) -> bool:
    """Whether all values are dates in the one form that every reader takes alike."""
    known = column.dropna()
    return known.dtype.kind not in "biufM" and len(known) > 0 and all(_DATE.fullmatch(str(x)) for x in known)


def _dates(column: Any) -> Any:
    import pandas as pd

    try:
        return pd.to_datetime(
            column, format="ISO8601", utc=bool(column.dropna().str.contains(r"Z|\d[+-]\d\d:?\d\d$").any())
        )
    except ValueError:  # such as 2024-02-30
        return column


def _check_names(path: Path, first: str, separator: str) -> None:
    """Refuse a first line of numbers, which would be lost as names of columns."""
    (names,) = csv.reader(io.StringIO(first), delimiter=separator)
    if all(_is_number(name) for name in names):
        raise StorageError(
            f"the first line of '{path}' holds numbers ({', '.join(names[:3])}{', ...' * (len(names) > 3)}) where "
            "names of columns are expected. Add a first line with names."
        )


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True


def _has_comma_decimals(column: Any) -> bool:
    known = column.dropna()
    return known.dtype.kind not in "biufM" and len(known) > 0 and all(_COMMA_DECIMAL.fullmatch(str(x)) for x in known)


def _parquet(path: Path) -> Any:
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except ImportError:
        raise ImportError(
            f"'{path}' is a Parquet file, which the package pyarrow reads; it is not installed. Install it: pip "
            "install pyarrow; or save the table as CSV."
        ) from None
    except (OSError, ValueError) as error:
        raise StorageError(f"'{path}' cannot be read as Parquet: {error}. Replace the file.") from None


def _arrays(path: Path, kind: str) -> dict[str, np.ndarray]:
    try:
        if kind == ".npy":
            return {"x": np.load(path, allow_pickle=False)}
        with open_npz(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile):
        raise StorageError(
            f"'{path}' does not hold arrays of numbers, or is damaged. Save arrays of numbers by np.save or np.savez."
        ) from None


def digest_of(path: Path) -> str:
    """The sha256 of a file, or of the names and contents of all files in a folder.

    Args:
        path: The file or folder.
    """
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            total.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()
