"""Storage: saves are read back exactly, and damaged or foreign files are refused."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepprob import storage
from deepprob.errors import StorageError

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor(0.5)}
MANIFEST = {"name": "vae", "config": {"latent_dim": 8, "dims": [4, 2]}, "seed": 0}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "digits"
    storage.write(folder, TENSORS, MANIFEST, kind="posterior")
    return folder


def tensor_file(folder: Path) -> Path:
    (file,) = folder.glob("tensors-*.safetensors")
    return file


def edit(folder: Path, change: Callable[[dict[str, Any]], object], sign: bool = True) -> None:
    """Alter the manifest; ``sign`` updates its sha256, as a forger would."""
    file = folder / "manifest.json"
    header = json.loads(file.read_text())
    change(header)
    if sign:
        header.pop("sha256")
        header["sha256"] = storage._fingerprint(header)
    file.write_text(json.dumps(header))


def assert_good(folder: Path, tensors: dict[str, Tensor] = TENSORS) -> None:
    found, manifest = storage.read(folder, kind="posterior")
    assert manifest == MANIFEST
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_save_consists_of_two_files(saved: Path) -> None:
    assert_good(saved)
    assert sorted(file.name for file in saved.iterdir()) == [
        "manifest.json",
        tensor_file(saved).name,
    ]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([True, False]),
        torch.tensor([2**62, -(2**62)]),
        torch.tensor([1, 255], dtype=torch.uint8),
        torch.tensor([0.1, math.nan, math.inf, -0.0]),
        torch.tensor([0.1, 1e-300], dtype=torch.float64),
        torch.tensor([0.1, 3e38], dtype=torch.bfloat16),
        torch.tensor([0.1], dtype=torch.float16),
        torch.tensor([0.1 + 2j]),
        torch.tensor(3.0),
        torch.tensor(7),
        torch.empty(0),
        torch.empty(2, 0, 3, dtype=torch.int64),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)
def test_every_dtype_and_shape_is_restored_bit_for_bit(tmp_path: Path, tensor: Tensor) -> None:
    storage.write(tmp_path / "s", {"x": tensor}, {}, kind="checkpoint")
    found = storage.read(tmp_path / "s", kind="checkpoint")[0]["x"]
    assert found.dtype == tensor.dtype
    assert found.shape == tensor.shape
    assert bytes(found.untyped_storage()) == bytes(tensor.untyped_storage())
    found.zero_()  # would fail on memory of the file


def test_save_without_tensors(tmp_path: Path) -> None:
    storage.write(tmp_path / "s", {}, {}, kind="checkpoint")
    assert storage.read(tmp_path / "s", kind="checkpoint") == ({}, {})


def test_tied_strided_and_differentiable_tensors(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        **net.state_dict(keep_vars=True),
        "t": base.t(),
        "step": base[:, ::2],
        "row": base[1],
    }
    tensors["conjugate"] = torch.tensor([1.0 + 2.0j]).conj()
    tensors["negative"] = tensors["conjugate"].imag
    tensors["wide"] = torch.ones(1).expand(5)
    storage.write(tmp_path / "s", tensors, {}, kind="posterior")
    found, _ = storage.read(tmp_path / "s", kind="posterior")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    net.load_state_dict({name: found[name] for name in net.state_dict()})
    assert net[0].weight is net[1].weight


def test_non_finite_numbers_are_restored(tmp_path: Path) -> None:
    manifest = {
        "a": math.inf,
        "b": [-math.inf, {"c": math.nan}],
        "d": (0.1, 1e-320, 2**70),
        "é": "✓",
    }
    storage.write(tmp_path / "s", {}, manifest, kind="posterior")
    text = (tmp_path / "s" / "manifest.json").read_text()
    json.loads(text, parse_constant=pytest.fail)
    found = storage.read(tmp_path / "s", kind="posterior")[1]
    assert math.isnan(found["b"][1].pop("c"))
    assert found == {"a": math.inf, "b": [-math.inf, {}], "d": [0.1, 1e-320, 2**70], "é": "✓"}


def test_header_names_format_and_versions(saved: Path) -> None:
    header = json.loads((saved / "manifest.json").read_text())
    assert (header["format"], header["kind"], header["schema"]) == ("deepprob", "posterior", 1)
    assert header["versions"]["torch"] == torch.__version__
    assert tensor_file(saved).name == f"tensors-{header['tensors']['sha256'][:12]}.safetensors"


def test_uninstalled_package_has_an_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert storage.versions()["deepprob"] == "unknown"


# Refused files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["manifest.json", "tensors"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_error_names_a_truncated_file(saved: Path, name: str, fraction: float) -> None:
    file = saved / name if name == "manifest.json" else tensor_file(saved)
    data = file.read_bytes().rstrip()
    file.write_bytes(data[: min(int(len(data) * fraction), len(data) - 1)])
    with pytest.raises(StorageError, match=rf"{file.name}.*truncated"):
        storage.read(saved, kind="posterior")


@pytest.mark.parametrize("name", ["manifest.json", "tensors"])
def test_refuses_every_flipped_bit(saved: Path, name: str) -> None:
    file = saved / name if name == "manifest.json" else tensor_file(saved)
    data = file.read_bytes()
    source = random.Random(0)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << source.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(StorageError):
            storage.read(saved, kind="posterior")
    file.write_bytes(data)
    assert_good(saved)


def test_refuses_appended_bytes(saved: Path) -> None:
    with tensor_file(saved).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(StorageError, match="truncated or altered"):
        storage.read(saved, kind="posterior")


def test_refuses_an_edited_manifest(saved: Path) -> None:
    edit(saved, lambda header: header["manifest"].update(seed=1), sign=False)
    with pytest.raises(StorageError, match=r"manifest\.json.*its sha256 differs from the stated one"):
        storage.read(saved, kind="posterior")


def test_refuses_altered_tensors_of_equal_size(saved: Path) -> None:
    data = tensor_file(saved).read_bytes()
    tensor_file(saved).write_bytes(data[:-1] + b"\1")
    with pytest.raises(StorageError, match="its sha256 differs from the one in the manifest"):
        storage.read(saved, kind="posterior")


def test_refuses_a_newer_schema(saved: Path) -> None:
    edit(saved, lambda header: header.update(schema=2, novelty=True))
    with pytest.raises(StorageError, match=r"has schema 2, .* reads up to 1\. Upgrade deepprob"):
        storage.read(saved, kind="posterior")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "tensors-a/../b", 3, None])
def test_refuses_a_tensor_file_outside_the_folder(saved: Path, name: object) -> None:
    edit(saved, lambda header: header["tensors"].update(file=name))
    with pytest.raises(StorageError, match="is not the name of a tensor file"):
        storage.read(saved, kind="posterior")


def test_refuses_missing_entries(saved: Path) -> None:
    edit(saved, lambda header: header.pop("tensors"))
    with pytest.raises(StorageError, match="entries are missing or changed"):
        storage.read(saved, kind="posterior")


def test_refuses_a_missing_tensor_file(saved: Path) -> None:
    tensor_file(saved).unlink()
    with pytest.raises(StorageError, match=r"tensors-.*cannot be read"):
        storage.read(saved, kind="posterior")


def test_refuses_the_wrong_kind(saved: Path) -> None:
    with pytest.raises(StorageError, match="holds a posterior, not a checkpoint"):
        storage.read(saved, kind="checkpoint")
    with pytest.raises(ValueError, match=r"unknown kind of save 'postrior'\. Did you mean 'posterior'"):
        storage.read(saved, kind="postrior")  # type: ignore[arg-type]


def test_refuses_a_missing_folder_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no such folder"):
        storage.read(tmp_path / "nowhere", kind="posterior")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="is a file"):
        storage.read(tmp_path / "file", kind="posterior")
    with pytest.raises(StorageError, match="is a file"):
        storage.write(tmp_path / "file", {}, {}, kind="posterior")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"name": "my web app", "icons": []}', "was not written by deepprob"),
        (b"[1, 2]", "was not written by deepprob"),
        (b'{"format": NaN}', "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"\xff\xfe\x00", "it is not text"),
        (pickle.dumps({"format": "deepprob"}), "it is not"),
    ],
    ids=["json", "list", "nan", "deep", "binary", "pickle"],
)
def test_foreign_folder_is_neither_read_nor_overwritten(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "manifest.json"
    file.write_bytes(content)
    with pytest.raises(StorageError, match=message):
        storage.read(tmp_path, kind="posterior")
    with pytest.raises(StorageError, match=f"cannot replace the files in .*: .*{message}"):
        storage.write(tmp_path, TENSORS, MANIFEST, kind="posterior")
    assert file.read_bytes() == content


def test_folder_without_manifest(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"has no readable manifest\.json"):
        storage.read(tmp_path, kind="posterior")
    storage.write(tmp_path, TENSORS, MANIFEST, kind="posterior")
    assert_good(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_refuses_bytes_that_are_not_safetensors(saved: Path) -> None:
    tensor_file(saved).write_bytes(b"\x80\x04junk" * 9)
    data = tensor_file(saved).read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(saved, lambda header: header["tensors"].update(entry))
    with pytest.raises(StorageError, match="it is not safetensors"):
        storage.read(saved, kind="posterior")


def test_one_kind_never_replaces_another(saved: Path) -> None:
    with pytest.raises(StorageError, match="a checkpoint cannot replace the posterior in"):
        storage.write(saved, TENSORS, MANIFEST, kind="checkpoint")
    assert_good(saved)


@pytest.mark.parametrize(
    ("tensors", "manifest", "message"),
    [
        ({"w": [1.0]}, {}, "must be torch tensors under string names; got 'w': list"),
        ({3: torch.ones(1)}, {}, "must be torch tensors under string names; got 3: Tensor"),
        ({"w": torch.eye(2).to_sparse()}, {}, "'w' .torch.sparse_coo.*an ordinary dense dtype"),
        ({"w": torch.ones(1, dtype=torch.complex128)}, {}, "torch.complex128. cannot be stored"),
        ({"__metadata__": torch.ones(1)}, {}, "got '__metadata__'"),
        ({}, {"a": [torch.ones(1)]}, r"manifest\['a'\]\[0\] must be JSON .*; got Tensor"),
        ({}, {"a": {1: 2}}, r"manifest\['a'\] must be JSON .*; got a mapping with keys \[1\]"),
        ({}, {"$float": "nan"}, r"got a mapping with keys \['\$float'\]"),
    ],
)
def test_error_names_the_value_that_cannot_be_saved(saved: Path, tensors: Any, manifest: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        storage.write(saved, tensors, manifest, kind="posterior")
    assert_good(saved)


# Interrupted saves --------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("nth", [1, 2])
def test_full_disk_keeps_the_old_save(saved: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int) -> None:
    original, calls = getattr(os, call), []

    def fail(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    before = sorted(saved.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match=r"No space left on device\. The last save there is unchanged\."):
            storage.write(saved, {"new": torch.zeros(3)}, {}, kind="posterior")
    assert_good(saved)
    assert sorted(saved.iterdir()) == before


def test_killed_process_leaves_the_old_or_the_new_save(saved: Path) -> None:
    """Die before the n-th file operation: 1 to 3 write the tensors, 4 to 6 the manifest; 5 commits."""
    script = textwrap.dedent("""
        import os, sys, torch
        from deepprob import storage

        def dying(original, deaths, calls):
            def call(*args):
                calls.append(args)
                if len(calls) == deaths:
                    os._exit(9)
                return original(*args)
            return call

        fsync, replace = os.fsync, os.replace
        for deaths in range(1, 7):
            child = os.fork()
            if child == 0:
                calls = []
                os.fsync, os.replace = dying(fsync, deaths, calls), dying(replace, deaths, calls)
                storage.write(sys.argv[1], {"new": torch.full((3,), deaths)}, {}, kind="posterior")
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
            tensors, _ = storage.read(sys.argv[1], kind="posterior")
            print(deaths, "new" in tensors)
    """)
    command = [sys.executable, "-W", "ignore", "-c", script, str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = "1 False 2 False 3 False 4 False 5 False 6 True"  # dies before the call it counts
    assert " ".join(done.stdout.split()) == expected
    assert len(list(saved.iterdir())) > 2
    storage.write(saved, TENSORS, MANIFEST, kind="posterior")
    assert_good(saved)
    assert len(list(saved.iterdir())) == 2


def test_stale_files_are_removed_and_other_files_kept(saved: Path) -> None:
    stale = [".deepprob-0123456789abcdef.tmp", "tensors-000000000000.safetensors"]
    foreign = ["tensors-mine.safetensors", ".deepprob-notes.tmp", "report.html"]
    for name in stale + foreign:
        (saved / name).touch()
    storage.write(saved, TENSORS, MANIFEST, kind="posterior")
    names = {file.name for file in saved.iterdir()}
    assert names == {*foreign, "manifest.json", tensor_file_of(saved)}


def tensor_file_of(folder: Path) -> str:
    return str(json.loads((folder / "manifest.json").read_text())["tensors"]["file"])


def test_reader_follows_a_replaced_save(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = storage._read_header
    moved: list[bool] = []

    def move(folder: Path, kind: storage.Kind) -> dict[str, Any]:
        header = original(folder, kind)
        if not moved:
            moved.append(True)
            storage.write(folder, {"new": torch.zeros(1)}, {}, kind=kind)
        return header

    monkeypatch.setattr(storage, "_read_header", move)
    assert "new" in storage.read(saved, kind="posterior")[0]


def test_saving_again_repairs_a_damaged_tensor_file(saved: Path) -> None:
    tensor_file(saved).write_bytes(b"")
    storage.write(saved, TENSORS, MANIFEST, kind="posterior")
    assert_good(saved)
