"""Batches of a loader, several in a message of its workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from deepprob.data.grouped_loader import GroupedLoader
from deepprob.data.streams import LoaderBatches, ReadingError


class Rows(Dataset[Any]):
    """Rows with their numbers, with random augmentation; it may fail."""

    def __init__(self, count: int = 103, bad: int = -1) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Any:
        if row == self.bad:
            raise KeyError("a broken file")
        info: Any = get_worker_info()
        assert info.dataset.count == self.count, "the data set of a worker is the user's"
        return {"x": torch.tensor([float(row)]), "drawn": torch.rand(2)}


def ragged(rows: list[Any]) -> list[Tensor]:
    """A collate function whose batches have the shape of their longest row."""
    longest = max(int(row["x"]) % 3 for row in rows) + 1
    return [torch.stack([row["x"].expand(longest) for row in rows])]


def batches_of(loader: Any) -> list[Any]:
    torch.manual_seed(0)
    return list(loader)


@pytest.mark.parametrize("options", [{}, {"drop_last": True}, {"persistent_workers": True}], ids=str)
def test_the_batches_are_those_of_the_loader(options: dict[str, Any]) -> None:
    loader = DataLoader(Rows(), batch_size=10, shuffle=True, num_workers=1, **options)
    grouped = GroupedLoader(loader)
    grouped.most = 4
    for _ in range(2):
        expected, found = batches_of(loader), batches_of(grouped)
        assert [len(batch["x"]) for batch in found] == [len(batch["x"]) for batch in expected]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert grouped.size > 1, "fast rows come in groups"


def test_two_workers_keep_the_order() -> None:
    loader = DataLoader(Rows(), batch_size=10, num_workers=2)
    grouped = GroupedLoader(loader)
    grouped.most = 3
    for _ in range(2):
        torch.testing.assert_close(torch.cat([batch["x"] for batch in grouped])[:, 0], torch.arange(103.0))


def test_batches_of_several_shapes_come_as_they_are() -> None:
    loader = DataLoader(Rows(), batch_size=2, num_workers=1, collate_fn=ragged)
    grouped = GroupedLoader(loader)
    grouped.most = 16
    for _ in range(2):
        for a, b in zip(grouped, loader, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_slow_rows_come_one_batch_at_a_time() -> None:
    grouped = GroupedLoader(DataLoader(Rows(), batch_size=10, num_workers=1))
    grouped.most, grouped._waited, grouped._received = 16, 10.0, 100
    assert grouped.size == 1


def test_an_error_names_the_batches_of_its_message() -> None:
    source = LoaderBatches(DataLoader(Rows(40, bad=37), batch_size=5, num_workers=1))
    source.group(8)
    source._grouped._waited, source._grouped._received = 0.0, 100  # type: ignore[union-attr]
    source.begin()
    with pytest.raises(ReadingError, match="batches 1 to 8, with KeyError: 'a broken file'"):
        source.read(8)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([torch.zeros(1)])


class Own(DataLoader[Any]):
    """A loader with an order of its own."""


def test_other_loaders_are_read_as_they_are() -> None:
    rows = Rows()
    assert GroupedLoader.applies(DataLoader(rows, batch_size=4, num_workers=1))
    others = [
        DataLoader(rows, batch_size=4),
        DataLoader(rows, batch_size=None, num_workers=1),
        DataLoader(rows, batch_sampler=[[0, 1], [2]], num_workers=1),
        DataLoader(Stream(), batch_size=4, num_workers=1),
        DataLoader(rows, batch_size=4, num_workers=1, in_order=False),
        Own(rows, batch_size=4, num_workers=1),
    ]
    assert not any(map(GroupedLoader.applies, others))
