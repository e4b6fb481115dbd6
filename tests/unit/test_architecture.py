"""The architecture of the package, checked on its source: imports, sizes and forbidden calls.

The tests parse the modules without importing them, so they find a cycle even if the order of imports hides it.
"""

from __future__ import annotations

import ast
import difflib
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
    """One imported name."""

    line: int
    module: str
    name: str | None = None  # None for `import module`

    @property
    def target(self) -> str:
        """The whole dotted name."""
        return f"{self.module}.{self.name}" if self.name else self.module


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        """The folder, or the top-level module; empty for the package's ``__init__``."""
        return room_of(self.name)

    def where(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}"

    def imports(self) -> Iterator[Import]:
        yield from _imports(self.tree)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def room_of(name: str) -> str:
    """The second part of a dotted name of the package."""
    return name.split(".")[1] if within(name, "deepprob") and "." in name else ""


def _imports(tree: ast.AST) -> Iterator[Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (Import(node.lineno, module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and (name := _imported_by_call(node)):
            yield Import(node.lineno, name)


def _imported_by_call(call: ast.Call) -> str:
    """The module that ``import_module("...")`` or ``__import__("...")`` names; empty for other calls."""
    function = ast.unparse(call.func).rpartition(".")[2]
    if function in ("import_module", "__import__") and call.args:
        argument = call.args[0]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            return argument.value
        # Of a name that is built at run time only the constant beginning is checked.
        if isinstance(argument, ast.JoinedStr) and isinstance(argument.values[0], ast.Constant):
            return str(argument.values[0].value).rstrip(".")
    return ""


@cache
def modules() -> tuple[Module, ...]:
    """Every module of the package by its installed name; links are left out, so each module is listed once."""
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


# A module may import from a lower floor or from its own folder; this includes imports inside functions and for types.
# Folders on one floor never import each other. docs/decisions/0005-rooms-and-floors.md has the same table.
FLOORS = {
    **{"errors": 0},
    **{"engine": 1, "storage": 1},
    **{"distributions": 2, "data": 2},
    **{"networks": 3},
    **{"programs": 4},
    **{"posteriors": 5},
    **{"models": 6, "fitting": 6, "sampling": 6, "diagnostics": 6},
    **{"inference": 7},
    **{"cli": 8, "estimators": 8},
    **{"__main__": 9},
}

MOST_LINES = 400  # of a file
MOST_LINES_OF_A_FUNCTION = 60  # without its docstring
MOST_PUBLIC_NAMES = 10
MANY_NAMES = {  # registries; every __init__.py is exempt too
    "deepprob.data.parsers",
    "deepprob.data.sources",
}


def test_every_folder_has_a_floor() -> None:
    rooms = {module.room for module in modules()} - {""}
    assert rooms <= FLOORS.keys(), rooms - FLOORS.keys()
    assert {"engine", "programs", "models", "inference"} <= rooms


def test_imports_go_to_a_lower_floor_or_stay_in_their_folder() -> None:
    broken = []
    for module in modules():
        for imported in module.imports():
            there = room_of(imported.target)
            if not there or not module.room or there == module.room:
                continue
            if FLOORS[there] >= FLOORS[module.room]:
                broken.append(f"{module.where(imported.line)} ({module.room}) imports {imported.target}")
    report(broken, "import from a lower floor, or from your own folder:")


def test_routines_import_neither_models_nor_each_other() -> None:
    broken = [
        f"{module.where(imported.line)} imports {imported.target}"
        for module in modules()
        if module.room == "inference" and module.path.name != "__init__.py"
        for imported in module.imports()
        if room_of(imported.target) in ("inference", "models") and not within(imported.target, module.name)
    ]
    report(broken, "routines import neither models nor each other:")


def test_engine_does_not_import_pyro() -> None:
    broken = [
        f"{module.where(imported.line)} imports {imported.module}"
        for module in modules()
        if module.room == "engine"
        for imported in module.imports()
        if imported.module.split(".")[0] == "pyro"
    ]
    report(broken, "the engine does not import Pyro:")


def test_no_pyro_statement_below_programs() -> None:
    broken = []
    for module in modules():
        if not module.room or FLOORS[module.room] >= FLOORS["programs"]:
            continue
        broken += [
            f"{module.where(imported.line)} imports {imported.target}"
            for imported in module.imports()
            if within(imported.target, "pyro.poutine") or imported.target in ("pyro.sample", "pyro.plate")
        ]
        broken += [
            f"{module.where(node.lineno)}: {ast.unparse(node)}"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("pyro.sample", "pyro.plate", "pyro.poutine")
        ]
    report(broken, "only programs and higher floors use sample, plate and poutine:")


def test_files_are_short() -> None:
    lengths = {module.path: len(module.path.read_text(encoding="utf-8").splitlines()) for module in modules()}
    broken = [f"{path.relative_to(ROOT)}: {length} lines" for path, length in lengths.items() if length > MOST_LINES]
    report(broken, f"a file has at most {MOST_LINES} lines; split it along ideas:")
    code = sorted(length for path, length in lengths.items() if path.name != "__init__.py")
    print(f"{len(code)} files, median {code[len(code) // 2]} lines, longest {code[-1]}")


def test_functions_are_short() -> None:
    broken = [
        f"{module.where(node.lineno)}: {node.name} has {length} lines"
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (length := length_without_docstring(node)) > MOST_LINES_OF_A_FUNCTION
    ]
    report(broken, f"a function has at most {MOST_LINES_OF_A_FUNCTION} lines without its docstring:")


def test_modules_have_few_public_names() -> None:
    broken = [
        f"{module.path.relative_to(ROOT)}: {len(names)} public names ({', '.join(sorted(names))})"
        for module in modules()
        if module.path.name != "__init__.py" and module.name not in MANY_NAMES
        if len(names := public_names(module.tree)) > MOST_PUBLIC_NAMES
    ]
    report(broken, f"a module has at most {MOST_PUBLIC_NAMES} public names:")


def length_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    docstring = node.body[0] if ast.get_docstring(node) is not None else None
    described = 0 if docstring is None else (docstring.end_lineno or 0) - docstring.lineno + 1
    return (node.end_lineno or 0) - node.lineno + 1 - described


def public_names(tree: ast.Module) -> set[str]:
    """Functions, classes and constants that a module defines, without those that begin with an underscore."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if not name.startswith("_")}


def test_imports_are_absolute_and_never_from_the_root() -> None:
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
        for imported in module.imports():  # includes imports inside functions and for types
            # `from package import module` needs the module; any other name needs the package.
            graph[module.name].add(imported.target if imported.target in names else imported.module)
    try:
        TopologicalSorter({name: targets & names for name, targets in graph.items()}).prepare()
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
    report(broken, "do not pickle, a pickle can run code; use deepprob.storage:")


def test_no_assert_in_package() -> None:
    broken = [
        module.where(node.lineno)
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Assert)
    ]
    report(broken, "python -O removes asserts; raise an error with a remedy:")


def test_packaging_lists_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {m.name for m in modules() if m.path.name == "__init__.py"}
    assert sorted(settings["packages"]) == sorted(folders)
    holding_code = {path.parent for path in (m.path for m in modules())}
    bare = [str(f.relative_to(ROOT)) for f in holding_code if not (f / "__init__.py").is_file()]
    report(bare, "these folders hold code but no __init__.py, so no wheel would carry them:")


def test_packaging_lists_every_file_that_is_not_code() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = {f"{name}/{file}" for name, files in settings["package-data"].items() for file in files}
    found = {
        f"{folder.name.removesuffix('.__init__')}/{file.name}"
        for folder in modules()
        if folder.path.name == "__init__.py"
        for file in folder.path.parent.iterdir()
        if file.is_file() and file.suffix != ".py" and not file.is_symlink()
    }
    assert found == listed, "no wheel would carry the others"


@pytest.mark.parametrize("folder", sorted(HOMES))
def test_links_point_to_the_top_level_folders(folder: str) -> None:
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


def test_public_api_matches_the_frozen_file() -> None:
    """After an intended change run: python tests/unit/public_api.py > tests/unit/public_api.txt."""
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(folder / "public_api.py")],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    frozen = (folder / "public_api.txt").read_text()
    changed = difflib.unified_diff(frozen.splitlines(), done.stdout.splitlines(), "public_api.txt", "now", lineterm="")
    report(list(changed), "the public API changed; if that is intended, regenerate public_api.txt:")


def test_root_import_is_lazy_and_complete() -> None:
    code = (
        "import sys, deepprob as dp; heavy = {'torch', 'pyro', 'numpy', 'sklearn'} & sys.modules.keys();"
        "assert not heavy, heavy; assert 25 <= len(dp.__all__) <= 35, len(dp.__all__);"
        "assert all(getattr(dp, name) is not None for name in dp.__all__)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
