"""Data: data sets by name, named tensors, and minibatches."""

from __future__ import annotations

from deepprob.data.datasets import DataRow, DataSet, DataTable, list_data, load_data
from deepprob.data.intake import as_split
from deepprob.data.shuffle import Shuffle
from deepprob.data.split import Split

__all__ = [
    "DataRow",
    "DataSet",
    "DataTable",
    "Shuffle",
    "Split",
    "as_split",
    "list_data",
    "load_data",
]
