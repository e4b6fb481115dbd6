"""Downloads from a local server are complete and checked."""

from __future__ import annotations

import bz2
import hashlib
import io
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import scipy.io
from PIL import Image

from deepprob.data import list_data, load_data
from deepprob.data.download import digest
from deepprob.data.sources import SOURCES, Remote, Source
from deepprob.errors import StorageError


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; of a file with "cut" in its name it sends half of the announced bytes."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def copyfile(self, source: object, outputfile: object) -> None:
        content = source.read()  # type: ignore[attr-defined]
        cut = len(content) // 2 if "cut" in self.path else len(content)
        outputfile.write(content[:cut])  # type: ignore[attr-defined]


@pytest.fixture
def public(tmp_path: Path) -> Path:
    (tmp_path / "public").mkdir()
    return tmp_path / "public"


@pytest.fixture
def server(public: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=public)) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DEEPPROB_DATA", raising=False)
    return tmp_path / "cache" / "deepprob" / "data"


def serve(monkeypatch: pytest.MonkeyPatch, server: str, name: str, **changes: object) -> Source:
    """Point a set at the server; its checks stay as they are."""
    source = SOURCES[name]
    remotes = tuple(replace(r, url=f"{server}/{Path(r.url).name}") for r in source.remotes)
    source = replace(source, remotes=remotes, **changes)  # type: ignore[arg-type]
    monkeypatch.setitem(SOURCES, name, source)
    return source


@pytest.fixture
def sprite(public: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small set with one file at the server and a known checksum."""
    file = public / "fashion_sprite.npz"
    np.savez(file, images=np.full((900, 28, 28), 255, np.uint8), label=np.zeros(900, np.uint8))
    checksum = f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    remote = Remote(file.name, f"{server}/{file.name}", checksum)
    monkeypatch.setitem(SOURCES, "fashion_sprite", replace(SOURCES["fashion_sprite"], remotes=(remote,)))
    return file


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) if folder.exists() else []


def where(name: str) -> str:
    return next(row.where for row in list_data() if row.name == name)


def test_download_is_kept_and_reused(cache: Path, sprite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert where("fashion_sprite") == "download"
    assert load_data("fashion_sprite").test["images"].min() == 1
    assert "Downloading fashion_sprite from github.com" in capsys.readouterr().err
    assert files(cache) == ["fashion_sprite", "fashion_sprite/fashion_sprite.npz"]
    sprite.unlink()
    assert len(load_data("fashion_sprite").test) == 900 and where("fashion_sprite") == "local"


def test_refuses_a_wrong_checksum_and_keeps_nothing(cache: Path, sprite: Path) -> None:
    sprite.write_bytes(sprite.read_bytes() + b"!")
    with pytest.raises(
        StorageError, match=r"is not the published file: expected sha256 \w+, got \w+\. Nothing was kept"
    ):
        load_data("fashion_sprite")
    assert files(cache) == []


def test_incomplete_download_leaves_nothing(
    cache: Path, public: Path, server: str, sprite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(sprite, public / "cut.npz")
    source = SOURCES["fashion_sprite"]
    for checksum in (source.remotes[0].checksum, ""):  # also detected without a checksum
        remote = Remote("fashion_sprite.npz", f"{server}/cut.npz", checksum)
        monkeypatch.setitem(SOURCES, source.name, replace(source, remotes=(remote,)))
        with pytest.raises(ConnectionError, match=r"could not download http.*: the connection ended after \d+"):
            load_data("fashion_sprite")
        assert files(cache) == [] and where("fashion_sprite") == "download"


def test_remains_of_a_killed_download_are_never_read(cache: Path, sprite: Path) -> None:
    left = cache / "fashion_sprite.abc.part"
    left.mkdir(parents=True)
    (left / "fashion_sprite.npz").write_bytes(b"half")
    assert where("fashion_sprite") == "download"
    assert len(load_data("fashion_sprite").test) == 900


def test_cached_set_without_its_file_is_downloaded_again(cache: Path, sprite: Path) -> None:
    load_data("fashion_sprite")
    (cache / "fashion_sprite" / "fashion_sprite.npz").unlink()
    assert len(load_data("fashion_sprite").test) == 900


def test_missing_file_and_missing_server(cache: Path, sprite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sprite.unlink()
    with pytest.raises(ConnectionError, match=r"could not download .*404.* put the data set into .* DEEPPROB_DATA"):
        load_data("fashion_sprite")
    serve(monkeypatch, "http://127.0.0.1:9", "fashion_sprite")
    with pytest.raises(ConnectionError, match=r"could not download .*[Rr]efused"):
        load_data("fashion_sprite")


def test_content_is_checked_if_no_file_checksum_is_known(
    cache: Path, public: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("train", "valid", "test"):
        (public / f"nltcs.{part}.data").write_text("0,1,1\n1,0,0\n")
    source = serve(monkeypatch, server, "debd/nltcs")
    with pytest.raises(StorageError, match=r"'debd/nltcs' from github.com.* sha256 differs"):
        load_data("debd/nltcs")
    assert files(cache) == ["debd"]
    serve(monkeypatch, server, "debd/nltcs", digest="")
    assert load_data("debd/nltcs").valid["x"].tolist() == [[0, 1, 1], [1, 0, 0]]  # type: ignore[index]
    assert files(cache / source.name) == ["nltcs.npz"]


def test_every_download_has_a_checksum() -> None:
    for source in SOURCES.values():
        known = all(remote.checksum for remote in source.remotes)
        assert known or len(source.digest) == 64, source.name
        lengths = {"sha256": 64, "md5": 32}
        for kind, _, value in (r.checksum.partition(":") for r in source.remotes if r.checksum):
            assert len(value) == lengths[kind], source.name


def test_digest_of_arrays_does_not_depend_on_compression(tmp_path: Path) -> None:
    arrays = {"a": np.arange(5), "b": np.eye(2)}
    np.savez(tmp_path / "plain.npz", **arrays)  # type: ignore[arg-type]
    np.savez_compressed(tmp_path / "small.npz", **dict(reversed(arrays.items())))  # type: ignore[arg-type]
    np.savez(tmp_path / "other.npz", a=np.arange(5), b=np.ones((2, 2)))
    plain, small, other = (digest(tmp_path, [f"{n}.npz"]) for n in ("plain", "small", "other"))
    assert plain == small != other


def test_omniglot_archives_are_converted(
    cache: Path, public: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ink = np.ones((105, 105), bool)
    ink[:15, :15] = False  # black ink on white paper: four of the 28 x 28 squares on a side
    paper = io.BytesIO()
    Image.fromarray(ink).save(paper, "png")
    for stem, alphabets in (("background", ("B", "A")), ("evaluation", ("C",))):
        with zipfile.ZipFile(public / f"images_{stem}.zip", "w") as archive:
            for path in (f"{a}/character{c:02}/{c:04}_{d:02}.png" for a in alphabets
                         for c in (1, 2) for d in range(1, 21)):  # fmt: skip
                archive.writestr(f"images_{stem}/{path}", paper.getvalue())
    source = serve(monkeypatch, server, "omniglot")
    remotes = tuple(replace(remote, checksum="") for remote in source.remotes)
    monkeypatch.setitem(SOURCES, "omniglot", replace(source, remotes=remotes, parse=_raw_omniglot))
    load_data("omniglot")
    z = np.load(cache / "omniglot" / "omniglot28.npz")
    assert z["images"].shape == (120, 28, 28) and z["images"][7, :4, :4].min() == 255
    assert z["images"][7].sum() == 16 * 255
    assert z["alphabet_names"].tolist() == ["A", "B", "C"]
    assert np.bincount(z["alphabet"]).tolist() == [40, 40, 40]
    assert np.bincount(z["character"]).tolist() == [20] * 6
    assert z["background"].sum() == 80 and z["test"].sum() == 30


def _raw_omniglot(folder: Path, split: int) -> None:
    """Replaces the reader, which needs all 24,345 training drawings."""


def test_usps_lines_are_converted(cache: Path, public: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.linspace(-1, 1, 256).round(3)
    line = "10 " + " ".join(f"{i}:{v}" for i, v in enumerate(values, 1)) + " \n"
    for file in ("usps.bz2", "usps.t.bz2"):
        (public / file).write_bytes(bz2.compress(2 * line.encode()))
    source = serve(monkeypatch, server, "usps")
    remotes = tuple(replace(remote, checksum="") for remote in source.remotes)
    monkeypatch.setitem(SOURCES, "usps", replace(source, remotes=remotes))
    digits = load_data("usps").train
    assert digits["labels"].tolist() == [9, 9]
    assert digits["images"].shape == (2, 16, 16)
    assert np.allclose(digits["images"][1].flatten(), (values + 1) / 2, atol=1e-6)


def test_published_files_give_the_known_content(
    cache: Path, public: Path, server: str, monkeypatch: pytest.MonkeyPatch, data_folder: Path
) -> None:
    """Files in their published forms, made from the local layout, pass the registry's checks."""
    shutil.copytree(data_folder / "uci" / "yacht", public, dirs_exist_ok=True)
    shutil.copytree(data_folder / "notmnist", public, dirs_exist_ok=True)
    with np.load(data_folder / "debd" / "nltcs.npz") as z:
        for part in ("train", "valid", "test"):
            rows = np.unpackbits(z[part], axis=1)
            np.savetxt(public / f"nltcs.{part}.data", rows, fmt="%d", delimiter=",")
    with np.load(data_folder / "polyphonic" / "jsb_chorales.npz") as z:
        cells = {}
        for part in ("train", "valid", "test"):
            roll = np.unpackbits(z[part], axis=1, count=88).astype(float)
            cell = np.empty((1, len(z[f"{part}_len"])), object)
            cell[0, :] = np.split(roll, np.cumsum(z[f"{part}_len"])[:-1])
            cells[f"{part}data"] = cell
        scipy.io.savemat(public / "JSB_Chorales.mat", cells)
    for name in ("uci/yacht", "notmnist", "debd/nltcs", "jsb_chorales"):
        source = serve(monkeypatch, server, name)
        fetched, local = load_data(name), load_data(name, folder=data_folder)
        assert (cache / name / source.files[0]).is_file()
        for mine, theirs in zip(fetched.test, local.test, strict=True):
            assert np.array_equal(mine, theirs)
