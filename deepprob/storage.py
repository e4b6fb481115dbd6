"""Saved things on disk: a folder with a JSON manifest and one safetensors file, written atomically.

```
runs/digits/manifest.json                     what it is, and the name and sha256 of the tensor file
runs/digits/tensors-<12 hex>.safetensors      the numbers, named by their own sha256
```
Replacing the manifest is the one moment at which a save comes to be; whatever fails before it
leaves the last good save as it was. Nothing here is code, and nothing read here is ever run. One
writer at a time; readers may come at any moment.
"""

from __future__ import annotations

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

    A good save that is already there stays readable until the new one is complete, whatever
    happens. Tensors that share memory are stored once each; gradients and devices are not stored.

    Args:
        path: The folder, made if need be.
        tensors: Tensors by name; any strides, device and dtype that safetensors knows.
        manifest: JSON values by name, nested as you like. Tuples come back as lists; ``nan`` and
            ``inf``, which JSON lacks, are kept as ``{"$float": "nan"}``.
        kind: What is saved, "posterior" or "checkpoint"; one is never written over the other.

    Raises:
        TypeError: If a value is not a tensor, or a manifest entry is not JSON.
        ValueError: If ``kind`` is unknown.
        StorageError: If the folder already holds something that is not ours or of another kind.
        OSError: If the disk refuses (no space, no permission). The last good save is kept.

    Examples:
        What was written is what is read, also where JSON has no word for it:

        >>> import tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> write(folder, {"w": torch.ones(2)}, {"elbo": [-3.5, math.nan]}, kind="posterior")
        >>> read(folder, kind="posterior")
        ({'w': tensor([1., 1.])}, {'elbo': [-3.5, nan]})
    """
    folder = Path(path)
    _check_kind(kind)
    content = _encode(manifest, "manifest")
    data = _serialise(tensors)
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
            f"cannot save the {kind} to {str(folder)!r}: {error.strerror or error}. What was saved "
            "there before is untouched. Make room, or choose another folder.",
        ) from error
    finally:
        _sweep(folder)


def read(path: str | os.PathLike[str], *, kind: Kind) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read back what :func:`write` saved, after checking every byte of it.

    Args:
        path: The folder.
        kind: What is expected there, "posterior" or "checkpoint".

    Returns:
        The tensors by name, on the CPU, and the manifest as it was given to :func:`write`.

    Raises:
        StorageError: If anything is missing, truncated, altered, of another kind, written by a
            newer deepprob, or not ours.
        ValueError: If ``kind`` is unknown.

    Examples:
        Something else is refused by name:

        >>> import tempfile
        >>> read("nowhere", kind="posterior")
        Traceback (most recent call last):
        deepprob.errors.StorageError: no posterior at 'nowhere': there is no such folder...
    """
    folder = Path(path)
    _check_kind(kind)
    header = _read_header(folder, kind)
    if not (folder / header["tensors"]["file"]).exists():
        # A writer may have replaced the save between our two looks: see what it names now.
        header = _read_header(folder, kind)
    return _read_tensors(folder, header["tensors"]), _decode(header["manifest"])


def versions() -> dict[str, str]:
    """Versions of what a saved number depends on.

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
        kind: What is to be saved, "posterior" or "checkpoint".

    Raises:
        StorageError: If the folder already holds something that is not ours or of another kind.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"a {kind} is saved as a folder, but {str(folder)!r} is a file. Choose another path.")
    if not (folder / _MANIFEST).exists():
        return
    try:
        found = _parse(folder)["kind"]
    except StorageError as error:
        raise StorageError(f"will not write over what is there: {error}") from error
    if found != kind:
        raise StorageError(f"will not write a {kind} over a {found} at {str(folder)!r}. Choose another folder.")


def _serialise(tensors: Mapping[str, Tensor]) -> bytes:
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
        # safetensors refuses strides and shared memory: each tensor gets bytes of its own
        plain[name] = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().clone()
    return safetensors.torch.save(plain)


def _replace(target: Path, data: bytes) -> None:
    """Put ``data`` at ``target`` so that a reader sees old bytes or new, never a mixture."""
    temporary = target.with_name(f".deepprob-{secrets.token_hex(8)}.tmp")
    with temporary.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)
    if os.name == "posix":  # the new name itself must reach the disk before the next step relies on it
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove our own left-overs: temporary files, and tensor files that no manifest names."""
    kept = None
    with suppress(OSError, StorageError):  # unsure what is still needed: better to remove nothing
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
        raise StorageError(f"no {kind} at {str(folder)!r}: there is no such folder. Check the path.")
    if not folder.is_dir():
        raise StorageError(f"a {kind} is saved as a folder, but {str(folder)!r} is a file. Give the folder's path.")
    header = _parse(folder)
    stated = header.pop("sha256")
    if stated != _fingerprint(header):
        raise _altered(folder / _MANIFEST, "its sha256 is not the one it states")
    if header["kind"] != kind:
        raise StorageError(f"{str(folder)!r} holds a {header['kind']}, not a {kind}. Open it as a {header['kind']}.")
    return header


def _parse(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of ours, its form checked but not yet its sha256."""
    file = folder / _MANIFEST
    try:
        text = file.read_bytes().decode()
    except OSError as error:
        raise StorageError(
            f"{str(folder)!r} has no readable {_MANIFEST}: it was not saved by deepprob, or not "
            "completely. Check the path."
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
        # a name with a folder in it would reach outside of the save
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
        raise _altered(file, "its sha256 is not the one in the manifest")
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _altered(file, f"it is not safetensors: {error}") from error


def _altered(file: Path, what: str) -> StorageError:
    return StorageError(f"{str(file)!r} cannot be trusted: {what}. Restore it from a copy.")


# JSON ---------------------------------------------------------------------------------------------


def _fingerprint(header: Mapping[str, Any]) -> str:
    canonical = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _encode(value: object, where: str) -> Any:
    """``value`` as strict JSON; ``where`` names it in an error."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: str(float(value))}
    if isinstance(value, list | tuple):
        return [_encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) and key != _FLOAT for key in value):
        return {key: _encode(item, f"{where}[{key!r}]") for key, item in value.items()}
    what = f"a mapping with keys {list(value)!r}" if isinstance(value, Mapping) else type(value).__name__
    raise TypeError(
        f"{where} must be JSON (None, bool, int, float, str, list, or dict with string keys); got "
        f"{what}. Convert it first, e.g. with .item() or .tolist()."
    )


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, dict):
        if set(value) == {_FLOAT}:
            return _NON_FINITE[value[_FLOAT]]
        return {key: _decode(item) for key, item in value.items()}
    return value
