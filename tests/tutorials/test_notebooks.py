"""Every tutorial notebook runs as stored, in this interpreter, and its asserts hold."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from deepprob.data.sources import SOURCES

FOLDER = Path(__file__).parents[2] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
ALLOWED_IMPORTS = {"deepprob", "deepprob.models", "deepprob.inference"}
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


class ThisPython(AsyncKernelManager):
    """A kernel of the interpreter that runs the tests, independent of the kernels registered on the machine."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="the interpreter of the tests",
            language="python",
        )


def execute(notebook: NotebookNode, folder: Path, *, smoke: bool = True) -> NotebookNode:
    """Run a notebook in an empty folder and raise its first error."""
    work, state = folder / "work", folder / "jupyter"
    work.mkdir()
    own = {"JUPYTER_RUNTIME_DIR": state, "JUPYTER_CONFIG_DIR": state, "IPYTHONDIR": state, "MPLCONFIGDIR": state}
    env = os.environ | {name: str(path) for name, path in own.items()} | {"DEEPPROB_SMOKE": str(int(smoke))}
    client = NotebookClient(
        notebook, kernel_manager_class=ThisPython, timeout=600, resources={"metadata": {"path": str(work)}}
    )
    done: NotebookNode = client.execute(env=env)
    assert not list(work.iterdir()), "a notebook must not leave files behind"
    return done


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: NotebookNode, stream: str) -> str:
    outputs = [out for cell in code_cells(notebook) for out in cell.outputs]
    return "".join(out.text for out in outputs if out.output_type == "stream" and out.name == stream)


def parsed(notebook: NotebookNode) -> ast.Module:
    """The syntax tree of all code cells, without IPython magics."""
    lines = [line for cell in code_cells(notebook) for line in cell.source.splitlines() if line[:1] != "%"]
    return ast.parse("\n".join(lines))


def deepprob_imports(tree: ast.Module) -> set[str]:
    """The modules of deepprob that a program imports."""
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            # "from deepprob import models" imports deepprob.models; a lower-case name is a module.
            inside = [alias.name for alias in node.names if node.module == "deepprob" and alias.name.islower()]
            names += [f"deepprob.{name}" for name in inside] or [str(node.module)]
    return {name for name in names if name.partition(".")[0] == "deepprob"}


def data_sets(tree: ast.Module) -> set[str]:
    """The data sets that a program loads by name."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    named = [arg for node in calls if ast.unparse(node.func).endswith("load_data") for arg in node.args[:1]]
    return {arg.value for arg in named if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}


def loaded(path: Path, request: pytest.FixtureRequest) -> NotebookNode:
    """A notebook to run; the test is skipped if it needs data that no package holds and no folder of data is named."""
    notebook = nbformat.read(path, as_version=4)
    if any(SOURCES[name].files for name in data_sets(parsed(notebook))):
        request.getfixturevalue("data_folder")
    return notebook


def test_readme_lists_every_notebook() -> None:
    assert NOTEBOOKS
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in NOTEBOOKS if path.name not in text] == []


@every_notebook
def test_imports_only_the_public_modules(path: Path) -> None:
    assert deepprob_imports(parsed(nbformat.read(path, as_version=4))) <= ALLOWED_IMPORTS


@pytest.mark.parametrize(
    "source",
    [
        "import deepprob.networks.dense",
        "from deepprob.fitting.optimizers import Optimizer",
        "from deepprob import diagnostics",
    ],
)
def test_an_internal_import_is_found(source: str) -> None:
    assert deepprob_imports(ast.parse(source)) - ALLOWED_IMPORTS


def test_the_data_sets_of_a_notebook_are_found() -> None:
    source = "digits, other = dp.load_data('digits'), dp.load_data(name)\nletters = dp.load_data('notmnist').test"
    found = data_sets(ast.parse(source))
    assert found == {"digits", "notmnist"}
    assert {name for name in found if SOURCES[name].files} == {"notmnist"}


@every_notebook
def test_is_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None, f"clear the outputs of cell {cell.id!r}"
    assert path.read_text(encoding="utf-8") == nbformat.writes(notebook) + "\n", "store it as nbformat writes it"


@every_notebook
def test_contains_asserts(path: Path) -> None:
    tree = parsed(nbformat.read(path, as_version=4))
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert len(asserts) >= 5


@every_notebook
def test_runs_with_short_fits(path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    done = execute(loaded(path, request), tmp_path)
    assert "Warning" not in printed(done, "stderr"), printed(done, "stderr")


@pytest.mark.slow
@every_notebook
def test_runs_in_full(path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    done = execute(loaded(path, request), tmp_path, smoke=False)
    assert "Warning" not in printed(done, "stderr"), printed(done, "stderr")


def test_a_failing_assert_fails_the_run(tmp_path: Path) -> None:
    """Without this the tests above would prove nothing."""
    cells = [nbformat.v4.new_code_cell("import os, sys; print(sys.executable, os.environ['DEEPPROB_SMOKE'])")]
    cells.append(nbformat.v4.new_code_cell("assert 1 == 2, 'numbers differ'"))
    notebook = nbformat.v4.new_notebook(cells=cells)
    with pytest.raises(CellExecutionError, match="numbers differ"):
        execute(notebook, tmp_path)
    assert printed(notebook, "stdout") == f"{sys.executable} 1\n"
