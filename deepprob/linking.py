"""From C++ of torch's compiler to a shared library: parts at the same time, and what all have in common only once."""

from __future__ import annotations

import contextvars
import hashlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from deepprob.toolchain import built_once

_T = TypeVar("_T")

_STEP = "#include <torch/csrc/inductor/aoti_include/cpu.h>"
_KERNELS = "#include <torch/csrc/inductor/cpp_prefix.h>"
_MODEL = "#include <torch/csrc/inductor/aoti_runtime/model.h>"
_NAMESPACE = "namespace torch::aot_inductor {"
# Of each step it would take two seconds: it reads the name of a device with a regular expression.
_CONSTRUCTOR = (
    "AOTInductorModelBase<AOTInductorModel>::AOTInductorModelBase("
    "size_t, size_t, size_t, const std::string&, std::optional<std::string>, bool);"
)
# Checks of every input that nobody but torch's own developers turns on, a fifth of the code.
_CHECKS = re.compile(r"^ *check_(in|out)put_\d+\(\w+\);\n", re.MULTILINE)
_LONG = 100_000  # characters of a step: from here on what calls the kernels is not worth optimising for seconds


class Linker:
    """Compiles C++ of torch's compiler for the CPU, and links it.

    Torch writes one file. Half of the time that a compiler spends on it goes into the functions through which a
    library is called, which are the same in all of them: here they are compiled once and kept in the user's cache. The
    rest is two parts, which are compiled at the same time: the step, and the kernels that it calls.

    Args:
        pool: Has threads for four compilers. What all steps share is begun at once, while there is no step yet.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._context = contextvars.copy_context()  # torch's settings are the thread's own
        self._processor = self._submit(self._ask)
        self._options = self._submit(self._prepare)

    def _submit(self, function: Callable[..., _T], *args: Any, **options: Any) -> Future[_T]:
        return self._pool.submit(self._context.copy().run, function, *args, **options)

    def processor(self) -> Any:
        """Which instructions of the processor the compiler knows; torch does not let two threads ask at a time."""
        return self._processor.result()

    def _ask(self) -> Any:
        """Let torch test the instructions one beside the other, which takes it two seconds each on a new machine."""
        from torch._inductor.cpu_vec_isa import pick_vec_isa, supported_vec_isa_list, x86_isa_checker

        known = x86_isa_checker()
        sets = [isa for isa in supported_vec_isa_list if all(name in known for name in str(isa).split())]
        for test in [self._submit(bool, isa) for isa in sets]:
            test.result()
        return pick_vec_isa()

    def _prepare(self) -> dict[str, Any]:
        """How each part is compiled, and the object file that all libraries share."""
        from torch._inductor.codecache import _precompile_header
        from torch._inductor.cpp_builder import CppTorchDeviceOptions

        common: dict[str, Any] = {"vec_isa": self.processor(), "device_type": "cpu", "aot_mode": True}
        step = CppTorchDeviceOptions(compile_only=True, min_optimize=True, **common)
        kernels = CppTorchDeviceOptions(compile_only=True, **common)
        library = CppTorchDeviceOptions(**common)
        command = _command(library)
        headers = [
            self._submit(_precompile_header, _name(_STEP), command, min_optimize=True, **common),
            self._submit(_precompile_header, _name(_KERNELS), command, **common),
        ]
        step.precompiled_header, kernels.precompiled_header = (header.result() for header in headers)
        return {"step": step, "kernels": kernels, "library": library, "interface": self._interface(step)}

    @staticmethod
    def _interface(options: Any) -> bytes:
        """The object file of the functions through which a library is called."""
        code = f"{_STEP}\n{_interface_code()}\n{_NAMESPACE} template {_CONSTRUCTOR} }}\n"
        key = hashlib.sha256(repr((code, _command(options), torch.__version__)).encode()).hexdigest()[:32]

        def build(path: Path) -> None:
            source = path.with_suffix(".cpp")
            source.write_text(code)
            _build(path.stem, [source], path.parent, options)

        return built_once(f"{key}.o", build, Path.read_bytes)

    def link(self, source: Path, others: Sequence[Path]) -> Path:
        """A shared library, beside the source.

        Args:
            source: C++ of torch's compiler, for one model.
            others: Object files that belong to it.
        """
        folder = source.parent
        before, _, after = source.read_text().partition(_interface_code())
        step, mark, kernels = after.partition(_KERNELS)
        parts = {"step": before + _apart(_CHECKS.sub("", step)), "kernels": mark + kernels}
        options = self._options.result()
        objects = [folder / "interface.o", *others]
        objects[0].write_bytes(options["interface"])
        for name, code in parts.items():
            (folder / f"{name}.cpp").write_text(code)
        build = [self._submit(_build, part, [folder / f"{part}.cpp"], folder, options[part]) for part in parts]
        objects += [each.result() for each in build]
        return _build(source.stem, objects, folder, options["library"])


def _apart(step: str) -> str:
    """A step that takes from elsewhere what all steps have in common."""
    head = f"{_MODEL}\n{_NAMESPACE} template <> {_CONSTRUCTOR} }}\n"
    before, mark, run = step.rpartition(_NAMESPACE)
    how = '#pragma GCC optimize("O0")\n' if len(run) > _LONG else ""
    return head + before + how + mark + run


def _build(name: str, sources: Sequence[Path], folder: Path, options: Any) -> Path:
    from torch._inductor.cpp_builder import CppBuilder

    builder = CppBuilder(name=name, sources=[str(x) for x in sources], output_dir=str(folder), BuildOption=options)
    builder.build()
    return Path(builder.get_target_file_path())


def _command(options: Any) -> str:
    from torch._inductor.cpp_builder import CppBuilder

    return str(CppBuilder(name="o", sources="i", BuildOption=options).get_command_line())


def _interface_code() -> str:
    return (Path(torch.__file__).parent / "_inductor/codegen/aoti_runtime/interface.cpp").read_text()


def _name(include: str) -> str:
    return include.split("<")[1].rstrip(">")
