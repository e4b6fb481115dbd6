"""The user's folder of compiled code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deepprob.engine.native.cache import NoCompiler, built_once, cache_folder, compiler


class Built:
    """A file of one line, and how often it was written."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, path: Path) -> None:
        self.times += 1
        path.write_bytes(b"a line of code")

    def load(self) -> bytes:
        return built_once("code", self, Path.read_bytes)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = cache_folder()
    assert found is not None
    return found


def test_a_file_is_built_once(folder: Path) -> None:
    built = Built()
    assert [built.load() for _ in range(3)] == [b"a line of code"] * 3
    assert built.times == 1


@pytest.mark.parametrize("damage", [b"", b"a line of c", b"a line of cofe", b"a line of code, and more"])
def test_a_damaged_file_is_built_again(folder: Path, damage: bytes) -> None:
    built = Built()
    built.load()
    (folder / "code").write_bytes(damage)
    assert built.load() == b"a line of code"
    assert built.times == 2
    built.load()
    assert built.times == 2


def test_a_file_without_its_digest_is_built_again(folder: Path) -> None:
    (folder / "code").write_bytes(b"of somebody else")
    assert Built().load() == b"a line of code"


def test_where_nothing_can_be_written_what_is_there_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = Built()
    built.load()
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(Path, "touch", lambda self: (_ for _ in ()).throw(PermissionError(self)))
    assert built.load() == b"a line of code"
    assert built.times == 1
    (folder / "code").unlink()
    assert built.load() == b"a line of code"
    assert built.times == 2
    assert not (folder / "code").exists()


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert cache_folder() is None
    assert Built().load() == b"a line of code"


@pytest.mark.parametrize("mode", [0o750, 0o777])
def test_a_folder_that_others_can_read_is_not_used_which_is_said_once(folder: Path, mode: int) -> None:
    Built().load()
    folder.chmod(mode)
    built = Built()
    with pytest.warns(UserWarning, match=rf"not kept for the next process: {folder} is not yours alone.*mode 700"):
        built.load()
    built.load()
    assert built.times == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (None, r"no C\+\+ compiler was found \(on Debian: apt-get install g\+\+\)"),
        ("ccache g++", "CXX is 'ccache g\\+\\+'"),
    ],
)
def test_a_compiler_that_is_not_there(
    name: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if name:
        monkeypatch.setenv("CXX", name)
    with pytest.raises(NoCompiler, match=said):
        compiler()
