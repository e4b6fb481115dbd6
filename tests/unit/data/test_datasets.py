"""load_data and list_data: bundled sets, the local layout, errors."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from deepprob.data import list_data, load_data
from deepprob.data.bundled import stratified
from deepprob.data.sources import SOURCES
from deepprob.errors import StorageError

BUNDLED = [name for name, source in SOURCES.items() if not source.files]
# Dense and padded, Nottingham alone takes 650 MB.
LOCAL = [name for name, source in SOURCES.items() if source.files and name != "nottingham"]


@pytest.fixture(autouse=True)
def _nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def check_description(name: str, folder: Path | None = None) -> None:
    """The loaded set matches its entry in the registry, and every part has valid values."""
    data = load_data(name, folder=folder)
    source, parts = SOURCES[name], (data.parts.train, data.valid, data.test)
    assert tuple(len(part) if part else 0 for part in parts) == source.rows
    assert len(data.shape) == len(source.shape)
    assert all(n in (size, None) for n, size in zip(source.shape, data.shape, strict=True))
    for part in filter(None, parts):
        assert part.names == data.test.names
        assert {field.dtype for field in part} <= {torch.float32, torch.int64}
        assert all(torch.isfinite(field.sum()) for field in part)
        if data.task == "images":
            assert part["images"].min() >= 0 and 0.9 < part["images"].max() <= 1
        if data.num_classes:
            classes = part["y" if "y" in part else "labels"]
            assert classes.dtype == torch.int64
            assert classes.min() >= 0 and classes.max() < data.num_classes
        if data.task == "sequences":
            first, lengths = part.tensors[0], part["lengths"]
            beyond = torch.arange(first.shape[1]) >= lengths[:, None]
            assert lengths.max() == first.shape[1] and first[beyond].abs().sum() == 0
        if data.task == "binary":
            assert set(part["x"].unique().tolist()) == {0, 1}
    assert repr(data).startswith(f"DataSet {name!r} ({data.task}")


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_sets_match_their_description(name: str) -> None:
    check_description(name)
    first, second = load_data(name), load_data(name)
    assert all(map(torch.equal, first.train, second.train))


@pytest.mark.parametrize("name", LOCAL)
def test_local_sets_match_their_description(name: str, data_folder: Path) -> None:
    source = SOURCES[name]
    if not all((data_folder / source.folder / file).is_file() for file in source.files):
        pytest.skip(f"{name} is not in the folder of data sets")
    check_description(name, data_folder)


def test_parts_are_stratified_and_disjoint() -> None:
    strata = np.repeat([0, 1, 2], [50, 30, 20])
    parts = stratified(strata)
    assert [np.bincount(strata[rows]).tolist() for rows in parts] == [
        [30, 18, 12],
        [10, 6, 4],
        [10, 6, 4],
    ]
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    # These are the parts of every figure ever reported; they must never change.
    assert stratified(np.zeros(10))[2].tolist() == [0, 5]


def test_mnist_pixels_and_frozen_bits(data_folder: Path) -> None:
    mnist = load_data("mnist", folder=data_folder)
    train = torch.cat([mnist.train["images"], mnist.valid["images"]])  # type: ignore[index]
    assert train.mean().item() == pytest.approx(0.13066, abs=1e-5)
    assert mnist.test["labels"].bincount()[0] == 980
    with np.load(data_folder / "mnist" / "mnist_binarized_eval.npz") as frozen:
        for name in ("test_bits", "valid_bits"):
            bits = np.unpackbits(frozen[name], axis=1)
            assert np.array_equal(mnist.extras[name].flatten(1).numpy(), bits)


def test_uci_splits_differ_and_share_the_rows(data_folder: Path) -> None:
    first, last = (load_data("uci/yacht", split=i, folder=data_folder) for i in (0, 19))
    assert not torch.equal(first.test["x"], last.test["x"])
    sums = [torch.cat([d.train["y"], d.test["y"]]).double().sum().item() for d in (first, last)]
    assert sums[0] == pytest.approx(sums[1])
    assert first.train["y"].shape == (277, 1)


def test_set_without_training_rows(data_folder: Path) -> None:
    letters = load_data("notmnist", folder=data_folder)
    assert letters.valid is None and len(letters.test) == 10_000
    with pytest.raises(ValueError, match=r"'notmnist' has test rows only, no training rows.*\.test\.split"):
        letters.train  # noqa: B018


def test_document_completion_halves_make_the_test_documents(data_folder: Path) -> None:
    news = load_data("text/20ng_etm", folder=data_folder)
    assert torch.equal(news.extras["test_infer"] + news.extras["test_score"], news.test["counts"])
    assert news.train["counts"].sum() == 919_850 and len(news.extras["vocabulary"]) == 3072


def test_music_counts(data_folder: Path) -> None:
    chorales = load_data("jsb_chorales", folder=data_folder)
    assert chorales.train["lengths"].sum() == 13_807 and chorales.shape == (129, 88)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("mnits",), ValueError, r"unknown data set 'mnits'\. Did you mean 'mnist'\? Choose from"),
        (("uci/yatch",), ValueError, "Did you mean 'uci/yacht'"),
        ((3,), TypeError, "name must be text, such as 'digits'; got 3"),
        (("digits", 1), ValueError, "'digits' has 1 standard split, .* got split=1. Choose split=0"),
        (("uci/yacht", 20), ValueError, "has 20 standard splits, .* got split=20. Choose 0 to 19"),
        (("uci/yacht", -1), ValueError, r"split must be a whole number of at least 0; got -1\."),
        (("uci/yacht", 1.0), ValueError, r"split must be a whole number of at least 0; got 1\.0\."),
        (("uci/yacht", True), ValueError, r"split must be a whole number of at least 0; got True\."),
    ],
)
def test_unknown_names_and_splits(arguments: tuple[str, int], error: type, message: str) -> None:
    name, split = (*arguments, 0)[:2]
    with pytest.raises(error, match=message):
        load_data(name, split=split)


def test_error_says_where_to_put_a_set_without_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPPROB_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"Put freyfaces/freyfaces\.npz .* DEEPPROB_DATA"):
        load_data("freyfaces")


def test_missing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="folder must name a folder of data sets"):
        load_data("mnist", folder=tmp_path / "none")
    monkeypatch.setenv("DEEPPROB_DATA", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="DEEPPROB_DATA must name a folder"):
        list_data()


def write_letters(folder: Path, images: bytes, labels: bytes) -> None:
    home = folder / "notmnist"
    home.mkdir(exist_ok=True)
    for file, content in zip(SOURCES["notmnist"].files, (images, labels), strict=True):
        (home / file).write_bytes(content)


IMAGES = gzip.compress(b"\0\0\x08\x03" + b"".join(n.to_bytes(4) for n in (2, 1, 2)) + b"\0\xff" * 2)
LABELS = gzip.compress(b"\0\0\x08\x01" + (2).to_bytes(4) + b"\x03\x09")


def test_idx_files_are_read(tmp_path: Path) -> None:
    write_letters(tmp_path, IMAGES, LABELS)
    letters = load_data("notmnist", folder=tmp_path).test
    assert letters["images"].tolist() == [[[0.0, 1.0]], [[0.0, 1.0]]]
    assert letters["labels"].tolist() == [3, 9]


@pytest.mark.parametrize(
    "images",
    [
        IMAGES[:-9],
        b"not gzip",
        b"",
        gzip.compress(b"\0\0\x0d\x01"),
        gzip.compress(b"\0\0\x08\x03\0"),
        gzip.compress(gzip.decompress(IMAGES)[:-1]),
    ],
    # The bytes contain the time of compression, so they cannot identify a test.
    ids=["cut", "not gzip", "empty", "other magic", "short header", "short content"],
)
def test_error_names_the_set_of_a_damaged_file(tmp_path: Path, images: bytes) -> None:
    write_letters(tmp_path, images, LABELS)
    with pytest.raises(StorageError, match=r"'notmnist' in .*notmnist cannot be read: .* replace"):
        load_data("notmnist", folder=tmp_path)


def test_error_names_the_set_of_a_damaged_archive(tmp_path: Path) -> None:
    for content in (b"PK\x03\x04 no archive", b"\x80\x04N."):  # the second is a pickle
        (tmp_path / "usps").mkdir(exist_ok=True)
        (tmp_path / "usps" / "usps.npz").write_bytes(content)
        with pytest.raises(StorageError, match=r"'usps' in .* cannot be read"):
            load_data("usps", folder=tmp_path)


def test_list_says_where_each_set_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPPROB_DATA", raising=False)
    write_letters(tmp_path, IMAGES, LABELS)
    where = {row.name: row.where for row in list_data(folder=tmp_path)}
    assert where["digits"] == "bundled" and where["notmnist"] == "local"
    assert where["mnist"] == "download" and where["freyfaces"] == "not here"


def test_list_prints_as_an_aligned_table() -> None:
    lines = repr(list_data()).splitlines()
    assert len(lines) == len(SOURCES) + 1
    column = lines[0].index("where")
    assert all(line[column - 1] == " " != line[column] for line in lines)
    page = list_data()._repr_html_()
    assert page.count("<tr>") == len(lines) and "<td>digits</td>" in page
