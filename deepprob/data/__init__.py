"""Data: data sets by name, named tensors, and minibatches."""

from __future__ import annotations

from deepprob.data.datasets import DataRow, DataSet, DataTable, list_data, load_data
from deepprob.data.image_folder import images
from deepprob.data.intake import as_split
from deepprob.data.shuffle import Shuffle
from deepprob.data.split import Split
from deepprob.data.streams import ReadingError
from deepprob.data.table import table
from deepprob.data.table_encoding import Table, TableEncoding
from deepprob.data.table_rows import column_kinds, decode_rows
from deepprob.data.time_series import Sequences, sequences

__all__ = [
    "DataRow",
    "DataSet",
    "DataTable",
    "ReadingError",
    "Sequences",
    "Shuffle",
    "Split",
    "Table",
    "TableEncoding",
    "as_split",
    "column_kinds",
    "decode_rows",
    "images",
    "list_data",
    "load_data",
    "sequences",
    "table",
]
