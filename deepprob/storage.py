"""Saves on disk: a folder with a JSON manifest and one safetensors file, written atomically.

```
runs/digits/manifest.json                     kind, versions, and the name and sha256 of the tensor file
runs/digits/tensors-<12 hex>.safetensors      the tensors, named by the sha256 of the file
```
Replacing the manifest commits a save; a failure before that leaves the last good save unchanged. A save holds no code,
and reading it runs none. A folder may have one writer at a time and any number of readers.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import platform
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from deepprob.errors import StorageError, unknown

Kind = Literal["posterior", "checkpoint"]

SCHEMA = 1
_MANIFEST = "manifest.json"
_TENSORS = re.compile(r"tensors-[0-9a-f]{12}\.safetensors")
_TEMPORARY = re.compile(r"\.deepprob-[0-9a-f]{16}\.tmp")
_DTYPES = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64),
}
_FLOAT = "$float"
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    manifest: Mapping[str, Any],
    *,
    kind: Kind,
) -> None:
    """Save named tensors and a JSON manifest to a folder, atomically.

    An earlier save in the folder stays readable until the new one is complete. Tensors that share memory are stored
    separately; gradients and devices are not stored.

    Args:
        path: The folder; it is created if needed.
        tensors: Tensors by name, dense and of a dtype that safetensors supports.
        manifest: JSON values by name, nested to any depth. Tuples are read back as lists; ``nan`` and
            ``inf``, which JSON lacks, are stored as ``{"$float": "nan"}``.
        kind: The kind of save, "posterior" or "checkpoint"; one is never written over the other.

    Raises:
        TypeError: If a value is not a tensor, or a manifest entry is not JSON.
        ValueError: If ``kind`` is unknown.
        StorageError: If the folder already holds a save of another kind, or a manifest that deepprob did not write.
        OSError: If the write fails (no space, no permission). The last good save is kept.

    Examples:
        Non-finite numbers are restored too:

        >>> import tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> write(folder, {"w": torch.ones(2)}, {"elbo": [-3.5, math.nan]}, kind="posterior")
        >>> read(folder, kind="posterior")
        ({'w': tensor([1., 1.])}, {'elbo': [-3.5, nan]})
    """
    folder = Path(path)
    _check_kind(kind)
    content = _encode(manifest, "manifest")
    data = _serialize(tensors)
    check_free(folder, kind=kind)
    digest = hashlib.sha256(data).hexdigest()
    name = f"tensors-{digest[:12]}.safetensors"
    header = {
        "format": "deepprob",
        "kind": kind,
        "schema": SCHEMA,
        "versions": versions(),
        "tensors": {"file": name, "bytes": len(data), "sha256": digest},
        "manifest": content,
    }
    header["sha256"] = _fingerprint(header)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / name, data)
        _replace(folder / _MANIFEST, (json.dumps(header, indent=1) + "\n").encode())
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot save the {kind} to {str(folder)!r}: {error.strerror or error}. The last save there is unchanged. "
            "Make room, or choose another folder.",
        ) from error
    finally:
        _sweep(folder)


def read(path: str | os.PathLike[str], *, kind: Kind) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a save of :func:`write` and check its checksums.

    Args:
        path: The folder.
        kind: The expected kind of save, "posterior" or "checkpoint".

    Returns:
        The tensors by name, on the CPU, and the manifest that was given to :func:`write`.

    Raises:
        StorageError: If a part is missing, truncated or altered, or the save is of another kind, of a newer version or
            not of deepprob.
        ValueError: If ``kind`` is unknown.

    Examples:
        The error names the folder:

        >>> import tempfile
        >>> read("nowhere", kind="posterior")
        Traceback (most recent call last):
        deepprob.errors.StorageError: no posterior at 'nowhere': there is no such folder...
    """
    folder = Path(path)
    _check_kind(kind)
    header = _read_header(folder, kind)
    if not (folder / header["tensors"]["file"]).exists():
        # A writer may have replaced the save in the meantime, so read the new manifest.
        header = _read_header(folder, kind)
    return _read_tensors(folder, header["tensors"]), _decode(header["manifest"])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that saved numbers depend on.

    Returns:
        Version by name: python, deepprob, torch, pyro-ppl.

    Examples:
        >>> sorted(versions())
        ['deepprob', 'pyro-ppl', 'python', 'torch']
    """
    found = {"python": platform.python_version()}
    for package in ("deepprob", "torch", "pyro-ppl"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


# Writing ------------------------------------------------------------------------------------------


def _check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise unknown("kind of save", kind, get_args(Kind))


def check_free(path: str | os.PathLike[str], *, kind: Kind) -> None:
    """Refuse a folder in which :func:`write` would refuse to save, before the work to be saved is done.

    Args:
        path: The folder; it need not exist.
        kind: The kind of save, "posterior" or "checkpoint".

    Raises:
        StorageError: If the folder already holds a save of another kind, or a manifest that deepprob did not write.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"a {kind} is saved as a folder, but {str(folder)!r} is a file. Choose another path.")
    if not (folder / _MANIFEST).exists():
        return
    try:
        found = _parse(folder)["kind"]
    except StorageError as error:
        raise StorageError(f"cannot replace the files in {str(folder)!r}: {error}") from error
    if found != kind:
        raise StorageError(f"a {kind} cannot replace the {found} in {str(folder)!r}. Choose another folder.")


def _serialize(tensors: Mapping[str, Tensor]) -> bytes:
    plain = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__" or not isinstance(tensor, Tensor):
            raise TypeError(
                f"tensors to save must be torch tensors under string names; got "
                f"{name!r}: {type(tensor).__name__}. Put other values into the manifest."
            )
        if tensor.layout is not torch.strided or tensor.dtype not in _DTYPES:
            raise TypeError(
                f"tensor {name!r} ({tensor.layout}, {tensor.dtype}) cannot be stored. "
                "Convert it to an ordinary dense dtype."
            )
        # safetensors accepts neither strides nor shared memory, so every tensor is copied
        plain[name] = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().clone()
    return safetensors.torch.save(plain)


def _replace(target: Path, data: bytes) -> None:
    """Replace the file ``target`` so that a reader sees the old bytes or the new ones, never a mixture."""
    temporary = target.with_name(f".deepprob-{secrets.token_hex(8)}.tmp")
    with temporary.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)
    if os.name == "posix":  # the rename must reach the disk before the next step relies on it
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove temporary files, and tensor files that the manifest does not name."""
    kept = None
    with suppress(OSError, StorageError):  # if the manifest is unreadable, remove nothing
        if (folder / _MANIFEST).exists():
            kept = _parse(folder)["tensors"]["file"]
        for file in folder.iterdir():
            stale = _TENSORS.fullmatch(file.name) and file.name != kept
            if stale or _TEMPORARY.fullmatch(file.name):
                with suppress(OSError):
                    file.unlink()


# Reading ------------------------------------------------------------------------------------------


def _read_header(folder: Path, kind: Kind) -> dict[str, Any]:
    if not folder.exists():
        near = nearest(folder)
        hint = f"Did you mean {str(near)!r}?" if near else "Check the path."
        raise StorageError(f"no {kind} at {str(folder)!r}: there is no such folder. {hint}")
    if not folder.is_dir():
        raise StorageError(f"a {kind} is saved as a folder, but {str(folder)!r} is a file. Give the folder's path.")
    header = _parse(folder)
    stated = header.pop("sha256")
    if stated != _fingerprint(header):
        raise _altered(folder / _MANIFEST, "its sha256 differs from the stated one")
    if header["kind"] != kind:
        raise StorageError(f"{str(folder)!r} holds a {header['kind']}, not a {kind}. Open it as a {header['kind']}.")
    return header


def _parse(folder: Path) -> dict[str, Any]:
    """The manifest of a save, with its form checked but not its sha256."""
    file = folder / _MANIFEST
    try:
        text = file.read_bytes().decode()
    except OSError as error:
        raise StorageError(
            f"{str(folder)!r} has no readable {_MANIFEST}: it is not a save of deepprob, or an incomplete one. "
            "Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise _altered(file, "it is not text") from error
    try:
        header = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _altered(file, "it is not JSON; truncated or altered") from error
    if not isinstance(header, dict) or header.get("format") != "deepprob":
        raise StorageError(f"{str(file)!r} was not written by deepprob. Check the path.")
    schema = header.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise StorageError(
            f"{str(folder)!r} has schema {schema}, and this deepprob reads up to {SCHEMA}. Upgrade deepprob to read it."
        )
    _check_form(file, header)
    return header


def _check_form(file: Path, header: dict[str, Any]) -> None:
    entry = header.get("tensors")
    if (
        set(header) != {"format", "kind", "schema", "versions", "tensors", "manifest", "sha256"}
        or header["schema"] != SCHEMA
        or not isinstance(entry, dict)
        or set(entry) != {"file", "bytes", "sha256"}
    ):
        raise _altered(file, "entries are missing or changed")
    if not isinstance(entry["file"], str) or not _TENSORS.fullmatch(entry["file"]):
        # a path in place of a name could point outside the folder
        raise _altered(file, f"{entry['file']!r} is not the name of a tensor file")


def _read_tensors(folder: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    file = folder / entry["file"]
    try:
        size = file.stat().st_size
        data = file.read_bytes() if size == entry["bytes"] else b""
    except OSError as error:
        raise _altered(file, f"it cannot be read: {error.strerror}") from error
    if size != entry["bytes"]:
        raise _altered(file, f"it is truncated or altered: {size} bytes, not {entry['bytes']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise _altered(file, "its sha256 differs from the one in the manifest")
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _altered(file, f"it is not safetensors: {error}") from error


def _altered(file: Path, reason: str) -> StorageError:
    return StorageError(f"{str(file)!r} cannot be trusted: {reason}. Restore it from a copy.")


# JSON ---------------------------------------------------------------------------------------------


def _fingerprint(header: Mapping[str, Any]) -> str:
    canonical = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _encode(value: object, where: str) -> Any:
    """Convert ``value`` to strict JSON; ``where`` names it in an error."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: str(float(value))}
    if isinstance(value, list | tuple):
        return [_encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) and key != _FLOAT for key in value):
        return {key: _encode(item, f"{where}[{key!r}]") for key, item in value.items()}
    got = f"a mapping with keys {list(value)!r}" if isinstance(value, Mapping) else type(value).__name__
    raise TypeError(
        f"{where} must be JSON (None, bool, int, float, str, list, or dict with string keys); got {got}. "
        "Convert it first, e.g. with .item() or .tolist()."
    )


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, dict):
        if set(value) == {_FLOAT}:
            return _NON_FINITE[value[_FLOAT]]
        return {key: _decode(item) for key, item in value.items()}
    return value


def nearest(path: Path) -> Path | None:
    """The file or folder next to a missing one whose name is most similar; None if there is none.

    Args:
        path: The missing path.
    """
    parent = path.parent
    if not parent.is_dir():
        return nearest(parent)
    names = {entry.name.lower(): entry.name for entry in parent.iterdir()}
    near = difflib.get_close_matches(path.name.lower(), names, n=1)
    return parent / names[near[0]] if near else None
