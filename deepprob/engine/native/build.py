"""Compile a module of tensor operations to native code, and keep it in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepprob.engine.dynamic_length import DifferentGraphs, Lengths
from deepprob.engine.machine import without_collector
from deepprob.engine.native.cache import built_once, cache_folder, compiler
from deepprob.engine.native.lower import lower

_MODEL = "model"

Run = Callable[[list[Tensor]], list[Tensor]]
_TRIED = ("2.13.0",)  # releases of torch whose inner functions are known to work here


def compile_module(module: nn.Module, inputs: Sequence[Tensor], lengths: Lengths | None = None) -> Run:
    """Compile a module of tensor operations, or load its native code from the user's cache.

    Args:
        module: A graph or a `Repeated` graph, whose shapes are fixed except for the lengths of sequences.
        inputs: Example inputs, with sequences of the longest length.
        lengths: The inputs that hold sequences, and the range of their lengths.

    Returns:
        A function from a list of inputs to a list of outputs.

    Raises:
        NoCompiler: If there is no C++ compiler.
        DifferentGraphs: If native code cannot serve sequences of any length.
    """
    loader = built_once(
        file_name(module, inputs, lengths),
        lambda path: build(module, inputs, lengths or {}, path),
        lambda path: _load(path, inputs[0].device),
    )
    run: Run = loader.boxed_run
    return run


def _load(path: Path, device: torch.device) -> Any:
    if not path.exists():
        raise FileNotFoundError(path)
    on_gpu = device.type == "cuda"
    # On a GPU it runs single-threaded; otherwise it could not be recorded in a CUDA graph.
    return torch._C._aoti.AOTIModelPackageLoader(str(path), _MODEL, on_gpu, 1, (device.index or 0) if on_gpu else -1)


def is_cached(module: nn.Module, inputs: Sequence[Tensor], lengths: Lengths | None = None) -> bool:
    """Whether the cache holds native code for a module."""
    folder = cache_folder()
    return folder is not None and (folder / file_name(module, inputs, lengths)).exists()


def build(module: nn.Module, inputs: Sequence[Tensor], lengths: Lengths, path: Path) -> None:
    """Compile a module to native code, and write it to a file.

    Args:
        module: A graph or a `Repeated` graph.
        inputs: Example inputs, with sequences of the longest length.
        lengths: The inputs that hold sequences, and the range of their lengths.
        path: The file.

    Raises:
        NoCompiler: If there is no C++ compiler.
        DifferentGraphs: If native code cannot serve sequences of any length.
    """
    compiler()  # raises early if there is none
    tried = sys.platform == "linux" and torch.__version__.split("+")[0] in _TRIED
    short = tried and inputs[0].device.type == "cpu"
    with _quiet(), without_collector():
        try:
            (_build_the_short_way if short else _build_as_documented)(module, inputs, lengths, path)
        except Exception as error:
            if lengths:  # torch has no specific error for a length that it had to fix
                raise DifferentGraphs(str(error)) from error
            raise


def _build_the_short_way(module: nn.Module, inputs: Sequence[Tensor], lengths: Lengths, path: Path) -> None:
    """Without the traces that torch makes of what was traced already."""
    from torch._inductor.package.package import package_aoti

    files = [Path(file) for file in lower(module, inputs, lengths, path.parent, _SETTINGS)]
    kept = [file for file in files if file.name.endswith((".so", ".wrapper.json", "_metadata.json"))]
    package_aoti(str(path), [str(file) for file in kept])


def _build_as_documented(module: nn.Module, inputs: Sequence[Tensor], lengths: Lengths, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    exported = _export(module, inputs, lengths)
    aoti_compile_and_package(exported, package_path=str(path), inductor_configs=_SETTINGS)


def _export(module: nn.Module, inputs: Sequence[Tensor], lengths: Lengths) -> Any:
    if not lengths:
        return torch.export.export(module, tuple(inputs))
    shortest, longest = next(iter(lengths.values()))
    length = torch.export.Dim("length", min=shortest, max=longest)
    shapes = tuple({1: length} if i in lengths else None for i in range(len(inputs)))
    # At an end of the range torch may treat the length as a constant.
    example = tuple(x[:, : (shortest + longest) // 2] if i in lengths else x for i, x in enumerate(inputs))
    return torch.export.export(module, example, dynamic_shapes=(shapes,))


_SETTINGS: dict[str, Any] = {
    "aot_inductor.package": True,
    # The calls of a step's kernels compile in three quarters of the time of O1 and run as fast; at O0 they do not.
    "aot_inductor.compile_wrapper_opt_level": "Og",
    "aot_inductor.enable_line_tables": False,
    # Torch asks the processor for its instructions anyway; it need not compile code of theirs as a test.
    "cpp.vec_isa_ok": True,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings and logs of torch's compiler about its own code."""
    loggers = [logging.getLogger(name) for name in ("torch._inductor", "torch._dynamo", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def file_name(module: nn.Module, inputs: Sequence[Tensor], lengths: Lengths | None) -> str:
    """The name of a module's native code in the cache: a digest of all that determines the code.

    These are the operations, the shapes, the versions of torch and of this package's engine, the processor and the
    number of threads.
    """
    shapes = [(tuple(x.shape), x.stride(), str(x.dtype), str(x.device)) for x in inputs]
    where = (
        torch.cuda.get_device_name() if inputs[0].is_cuda else _processor(),
        torch.get_num_threads(),
    )
    settings = sorted(_SETTINGS.items())
    versions = torch.__version__, _engine_digest()
    text = repr((type(module).__name__, str(module.code), shapes, lengths or {}, versions, where, settings))
    return f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.pt2"


@cache
def _engine_digest() -> str:
    """A digest of the engine's source, so that code compiled by an older version is not reused."""
    engine = Path(__file__).parents[1]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(engine.rglob("*.py")))).hexdigest()


@cache
def _processor() -> str:
    """The processor's instruction sets: native code uses them all, and machines may share a cache."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{torch.backends.cpu.get_cpu_capability()} {flags}"
