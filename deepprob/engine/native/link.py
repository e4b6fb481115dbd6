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

from deepprob.engine.native.cache import built_once

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
        self._options = self._submit(self._ask)
        self._interface = self._submit(self._compile_interface)

    def _submit(self, function: Callable[..., _T], *args: Any) -> Future[_T]:
        return self._pool.submit(self._context.copy().run, function, *args)

    def wait(self) -> None:
        """Until it is known which instructions the processor has; torch does not let two threads ask at a time."""
        self._options.result()

    def _ask(self) -> dict[str, Any]:
        """How each part is compiled; tests of the processor's instructions run one beside the other."""
        from torch._inductor.cpp_builder import CppTorchDeviceOptions
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        for test in [self._submit(bool, isa) for isa in processor_isas()]:
            test.result()
        common: dict[str, Any] = {"vec_isa": pick_vec_isa(), "device_type": "cpu", "aot_mode": True}
        return {
            "step": CppTorchDeviceOptions(compile_only=True, min_optimize=True, **common),
            "kernels": CppTorchDeviceOptions(compile_only=True, **common),
            "library": CppTorchDeviceOptions(**common),
        }

    def _compile_interface(self) -> bytes:
        """The object file of the functions through which a library is called."""
        options = self._options.result()["step"]
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
        folder, options = source.parent, self._options.result()
        before, _, after = source.read_text().partition(_interface_code())
        step, mark, kernels = after.partition(_KERNELS)
        parts = {"step": before + _apart(_CHECKS.sub("", step)), "kernels": mark + kernels}
        builds = []
        for name, code in parts.items():
            part = folder / f"{name}.cpp"
            part.write_text(code)
            builds.append(self._submit(_build, name, [part], folder, options[name]))
        objects = [folder / "interface.o", *others, *(build.result() for build in builds)]
        objects[0].write_bytes(self._interface.result())
        return _build(source.stem, objects, folder, options["library"])


def processor_isas() -> list[Any]:
    """The sets of vector instructions, as torch's compiler knows them, that the processor says it has."""
    from torch._inductor.cpu_vec_isa import supported_vec_isa_list, x86_isa_checker

    has = x86_isa_checker()
    return [isa for isa in supported_vec_isa_list if all(name in has for name in str(isa).split())]


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
