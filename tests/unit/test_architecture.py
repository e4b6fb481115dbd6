"""The walls of the house, read off the source: who imports whom, and what nobody does.

Nothing here imports what it checks, so a cycle is found even where the order of imports hides it.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOMES = {"models": "deepprob.models", "inference": "deepprob.inference"}


@dataclass(frozen=True)
class Import:
    """One imported name: where, what, and whether it runs when the module is loaded."""

    line: int
    module: str
    name: str | None  # None for `import module`
    at_load: bool
    in_function: bool


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module

    @property
    def home(self) -> str:
        """The part of the house: core, models or inference."""
        for part, package in HOMES.items():
            if within(self.name, package):
                return part
        return "core"

    def where(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}"

    def imports(self) -> Iterator[Import]:
        yield from _imports(self.tree, at_load=True, in_function=False)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _imports(node: ast.AST, *, at_load: bool, in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(child.lineno, alias.name, None, at_load, in_function)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            for alias in child.names:
                yield Import(child.lineno, module, alias.name, at_load, in_function)
        elif isinstance(child, ast.Call) and _imported_by_call(child):
            name = _imported_by_call(child)
            yield Import(child.lineno, name, None, at_load, in_function)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports(child, at_load=False, in_function=in_function)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _imports(child, at_load=False, in_function=True)
        else:
            yield from _imports(child, at_load=at_load, in_function=in_function)


def _imported_by_call(call: ast.Call) -> str:
    """The module that import_module("...") or __import__("...") names, else nothing."""
    function = ast.unparse(call.func).rpartition(".")[2]
    if function in ("import_module", "__import__") and call.args:
        argument = call.args[0]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            return argument.value
        # A name put together at run time is judged by its fixed beginning.
        if isinstance(argument, ast.JoinedStr) and isinstance(argument.values[0], ast.Constant):
            return str(argument.values[0].value).rstrip(".")
    return ""


@cache
def modules() -> tuple[Module, ...]:
    """Every file of the package under its installed name, each once (links left out)."""
    found = []
    for folder, package in {"deepprob": "deepprob", **HOMES}.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder)
            if folder == "deepprob" and inside.parts[0] in HOMES:
                continue
            parts = [package, *inside.with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Module(name, path, ast.parse(path.read_text(encoding="utf-8"))))
    return tuple(found)


def report(broken: list[str], rule: str) -> None:
    assert not broken, rule + "\n" + "\n".join(broken)


def test_every_part_of_the_house_is_read() -> None:
    assert {module.home for module in modules()} == {"core", "models", "inference"}


def test_core_imports_no_model_and_no_routine() -> None:
    def allowed(module: Module, imported: Import) -> bool:
        if within(module.name, "deepprob.cli"):
            return True
        return (
            module.name == "deepprob.posteriors.saving"
            and imported.in_function
            and within(imported.module, "deepprob.models")
        )

    broken, late = [], []
    for module in modules():
        if module.home != "core":
            continue
        for imported in module.imports():
            if not any(within(imported.module, package) for package in HOMES.values()):
                continue
            if not allowed(module, imported):
                broken.append(f"{module.where(imported.line)} imports {imported.module}")
            elif module.name == "deepprob.posteriors.saving":
                late.append(module.where(imported.line))
    report(broken, "the core imports neither models nor routines:")
    report(late[1:], "one late import in saving.py is enough; also:")


def test_models_and_routines_never_import_each_other() -> None:
    other = {"models": "deepprob.inference", "inference": "deepprob.models"}
    broken = [
        f"{module.where(imported.line)} imports {imported.module}"
        for module in modules()
        if module.home in other
        for imported in module.imports()
        if within(imported.module, other[module.home])
    ]
    report(broken, "models and routines know only the core:")


def test_imports_are_absolute_and_never_of_the_root() -> None:
    broken = [
        f"{module.where(imported.line)} imports {imported.module}"
        for module in modules()
        for imported in module.imports()
        if imported.module == "deepprob" or imported.module.startswith(".") or imported.module.split(".")[0] in HOMES
    ]
    report(broken, "write `from deepprob.x import y`:")


def test_no_import_cycles() -> None:
    names = {module.name for module in modules()}
    graph: dict[str, set[str]] = {name: set() for name in names}
    for module in modules():
        for imported in module.imports():
            if not imported.at_load:
                continue
            # `from package import module` needs the module; any other name needs the package.
            target = f"{imported.module}.{imported.name}"
            graph[module.name].add(target if target in names else imported.module)
    known = {name: targets & names for name, targets in graph.items()}
    try:
        TopologicalSorter(known).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


UNSAFE_MODULES = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")


def test_nothing_is_pickled() -> None:
    broken = []
    for module in modules():
        for imported in module.imports():
            if imported.module.split(".")[0] in UNSAFE_MODULES:
                broken.append(f"{module.where(imported.line)} imports {imported.module}")
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Call):
                continue
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            function = ast.unparse(node.func)
            unsafe = (
                given.get("weights_only", "True") != "True"
                or given.get("allow_pickle", "False") != "False"
                or function == "torch.save"
                or (function == "torch.load" and "weights_only" not in given)
            )
            if unsafe:
                broken.append(f"{module.where(node.lineno)}: {ast.unparse(node)}")
    report(broken, "no file of ours can run code; storage.py writes safetensors:")


def test_no_assert_stands_for_an_error() -> None:
    broken = [
        module.where(node.lineno)
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Assert)
    ]
    report(broken, "an assert vanishes under python -O; raise an error that says what to do:")


def test_packaging_lists_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {m.name for m in modules() if m.path.name == "__init__.py"}
    assert sorted(settings["packages"]) == sorted(folders)
    holding_code = {path.parent for path in (m.path for m in modules())}
    bare = [str(f.relative_to(ROOT)) for f in holding_code if not (f / "__init__.py").is_file()]
    report(bare, "these folders hold code but no __init__.py, so no wheel would carry them:")


@pytest.mark.parametrize("folder", sorted(HOMES))
def test_links_show_the_top_level_folders(folder: str) -> None:
    link = ROOT / "deepprob" / folder
    if link.is_file():
        pytest.skip("a checkout without symbolic links")
    assert link.readlink() == Path("..", folder)


SETTINGS_BEFORE_AND_AFTER = """
import json, random, warnings
import arviz, matplotlib, numpy, pyro, torch

def settings():
    return {
        "pyro settings": repr(pyro.settings.get()),
        "pyro store": sorted(pyro.get_param_store().keys()),
        "pyro handlers": len(pyro.poutine.runtime._PYRO_STACK),
        "torch random state": torch.get_rng_state().sum().item(),
        "numpy random state": repr(numpy.random.get_state()),
        "python random state": repr(random.getstate()),
        "default dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "warning filters": repr(warnings.filters),
        "plot settings": repr({k: v for k, v in matplotlib.rcParams.items() if k != "backend"}),
    }

before = settings()
import deepprob, deepprob.models, deepprob.inference
after = settings()
print(json.dumps({k: [before[k], after[k]] for k in before if before[k] != after[k]}))
"""


def test_importing_changes_no_setting() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SETTINGS_BEFORE_AND_AFTER],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {}
