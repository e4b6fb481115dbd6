"""The cache of compiled code, and the C++ compiler."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from deepprob.engine.native.cache import NoCompiler, built_once, cache_folder, compiler, is_being_built


class Builder:
    """Build a file of one line, and count how often."""

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
    builder = Builder()
    assert [builder.load() for _ in range(3)] == [b"a line of code"] * 3
    assert builder.times == 1


@pytest.mark.parametrize("damage", [b"", b"a line of c", b"a line of cofe", b"a line of code, and more"])
def test_a_damaged_file_is_rebuilt(folder: Path, damage: bytes) -> None:
    builder = Builder()
    builder.load()
    (folder / "code").write_bytes(damage)
    assert builder.load() == b"a line of code"
    assert builder.times == 2
    builder.load()
    assert builder.times == 2


def test_a_file_without_digest_is_rebuilt(folder: Path) -> None:
    (folder / "code").write_bytes(b"another file")
    assert Builder().load() == b"a line of code"


def test_a_read_only_cache_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = Builder()
    builder.load()
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(Path, "touch", lambda self: (_ for _ in ()).throw(PermissionError(self)))
    assert builder.load() == b"a line of code"
    assert builder.times == 1
    (folder / "code").unlink()
    assert builder.load() == b"a line of code"
    assert builder.times == 2
    assert not (folder / "code").exists()


def test_of_two_that_need_a_file_one_builds_it(folder: Path) -> None:
    builder, begun, go_on = Builder(), threading.Event(), threading.Event()

    def build(path: Path) -> None:
        begun.set()
        go_on.wait(10)
        builder(path)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(built_once, "code", build, Path.read_bytes)
        begun.wait(10)
        second = pool.submit(builder.load)
        assert wait([second], timeout=0.2).not_done
        go_on.set()
        assert first.result() == second.result() == b"a line of code"
    assert builder.times == 1


def test_a_build_is_seen_while_it_runs(folder: Path) -> None:
    seen: list[bool] = []

    def build(path: Path) -> None:
        seen.append(is_being_built("file"))
        path.write_text("code")

    assert not is_being_built("file")
    built_once("file", build, lambda path: path.read_text())
    assert seen == [True]
    assert not is_being_built("file")


def test_old_files_of_killed_processes_are_removed(folder: Path) -> None:
    for name, age in {"tmpold": 2 * 24 * 3600.0, "tmpnew": 60.0}.items():
        (folder / name).mkdir()
        os.utime(folder / name, 2 * (time.time() - age,))
    Builder().load()
    assert [path.name for path in folder.glob("tmp*")] == ["tmpnew"]


def test_without_a_home_folder_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert cache_folder() is None
    assert Builder().load() == b"a line of code"


@pytest.mark.parametrize("mode", [0o750, 0o777])
def test_a_folder_open_to_others_is_not_used_and_warns_once(folder: Path, mode: int) -> None:
    Builder().load()
    folder.chmod(mode)
    builder = Builder()
    with pytest.warns(UserWarning, match=rf"compiled code is not cached: {folder} belongs to another user.*mode 700"):
        builder.load()
    builder.load()
    assert builder.times == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, r"no C\+\+ compiler was found \(on Debian: apt-get install g\+\+\)"),
        ("ccache g++", "CXX is 'ccache g\\+\\+'"),
    ],
)
def test_refuses_a_missing_compiler(
    name: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if name:
        monkeypatch.setenv("CXX", name)
    with pytest.raises(NoCompiler, match=message):
        compiler()
