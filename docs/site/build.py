"""Build the site: ``python docs/site/build.py FOLDER``.

The pages are copied to an empty folder, laid out as in the repository, with one page more for each public name. Sphinx
turns them into HTML. Every warning is an error: a dead link, a name that cannot be documented, a formula that cannot be
shown. Nothing is downloaded: a notebook whose data are not in the folder that ``DEEPPROB_DATA`` names is shown without
outputs.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from sphinx.cmd.build import main as sphinx

from deepprob.data.sources import SOURCES

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent

# One page for each of these names; the names of a module are those of its ``__all__`` unless they are listed.
MODULES: dict[str, tuple[str, list[str]]] = {
    "deepprob": ("What ``import deepprob as dp`` offers.", []),
    "deepprob.models": ("Programs that are ready to fit.", []),
    "deepprob.inference": ("Routines: a program and data in, a posterior out.", []),
    "deepprob.inference.svi": ("The parts of ``svi``, for a loop of your own.", ["init", "step"]),
    "deepprob.diagnostics.plots": ("Pictures of arrays, as ``dp.plots``.", []),
    "deepprob.diagnostics.compare": ("What ``dp.compare`` returns.", ["Comparison"]),
    "deepprob.posteriors.loo": ("What ``posterior.loo`` returns.", ["LOO"]),
    "deepprob.posteriors": ("What ``posterior.encode`` returns, and what a fit records.", ["Encoding", "History"]),
}
# The navigation. New pages in these folders need no line here.
SECTIONS = {
    "Guide": ["docs/*.md"],
    "Tutorials": ["tutorials/*.ipynb"],
    "Reference": ["docs/glossary.md", *(f"api/{face}/index.rst" for face in MODULES)],
    "Project": ["CHANGELOG.md", "docs/decisions/README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"],
}
COPIED = ["*.md", "docs/*.md", "docs/decisions/*.md", "docs/images/*", "docs/skeletons/*.py", "tutorials/*"]
COPIED += ["benchmarks/README.md"]
LOADED = re.compile(r'load_data\(\\"([^"\\]+)\\"')  # in the JSON of a notebook
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")


def main(arguments: list[str]) -> int:
    """Build the site into the folder that the argument names; return Sphinx's exit code."""
    if len(arguments) != 1:
        print("usage: python docs/site/build.py FOLDER", file=sys.stderr)
        return 2
    target = Path(arguments[0]).resolve()
    if target.exists() and any(target.iterdir()) and not (target / "objects.inv").is_file():
        print(f"{target} holds files that are no site. Name a new folder, or empty it.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder, "pages")
        stage(pages)
        write_reference(pages / "api")
        write_home(pages)
        os.environ.pop("MPLBACKEND", None)  # a notebook shows its figures inline
        os.environ["JUPYTER_PATH"] = str(kernel_of_this_python(Path(folder, "jupyter")))
        built = Path(folder, "site")
        settings = ["-c", str(SITE), "-d", str(Path(folder, "doctrees"))]
        failed = sphinx(["-W", "--keep-going", "-q", "-j", "auto", "-b", "html", *settings, str(pages), str(built)])
        if not failed:
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(built, target)
    return failed


def stage(pages: Path) -> None:
    """Copy the documents, with links that lead to pages: a folder's to its index, the documents' index to the home."""
    for pattern in COPIED:
        for path in filter(Path.is_file, sorted(ROOT.glob(pattern))):
            copy = pages / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    for path in pages.rglob("*.md"):
        text = path.read_text(encoding="utf-8")
        path.write_text(LINK.sub(partial(page_of, path, pages), text), encoding="utf-8")
    index_of_decisions = "# Decisions\n\nWhy things are as they are: context, choice, consequence.\n\n"
    (pages / "docs/decisions/README.md").write_text(index_of_decisions + toctree(["0*"]))


def page_of(page: Path, pages: Path, link: re.Match[str]) -> str:
    """The target of a link of a page on the site."""
    target = (page.parent / link[1]).resolve()
    if target in (pages / "README.md", pages / "docs/README.md"):
        target = pages / "index.md"
    elif target.is_dir():
        target /= "README.md"
    return os.path.relpath(target, page.parent)


def write_reference(folder: Path) -> None:
    """Write one page for each public name, and one that lists the names of each module."""
    for face, (what, _) in MODULES.items():
        module = importlib.import_module(face)
        here = folder / face
        here.mkdir(parents=True)
        listed = names_of(face)
        for name in listed:
            page = "\n".join(entry(face, name, getattr(module, name))) + "\n"
            (here / f"{file_of(name, listed)}.rst").write_text(page)
        table = [".. autosummary::", "   :nosignatures:", "", *(f"   {name}" for name in listed), ""]
        pages = [".. toctree::", "   :hidden:", "", *(f"   {name} <{file_of(name, listed)}>" for name in listed)]
        lines = [*title(face), what, "", f".. currentmodule:: {face}", "", *table, *pages]
        (here / "index.rst").write_text("\n".join(lines) + "\n")


def file_of(name: str, names: list[str]) -> str:
    """The file of a name, which differs from those of other names where case does not count: ``check``, ``Check``."""
    alike = [other for other in names if other.lower() == name.lower()]
    return f"{name}-function" if len(alike) > 1 and name.islower() else name


def names_of(face: str) -> list[str]:
    """The names of a module that have pages: those listed above, else what it exports or the functions it defines."""
    module = importlib.import_module(face)
    defined = [name for name, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == face]
    public = [name for name in defined if not name.startswith("_")]
    return MODULES[face][1] or sorted(getattr(module, "__all__", public), key=str.lower)


def entry(face: str, name: str, value: object) -> Iterator[str]:
    """The page of one name."""
    yield from title(name)
    yield from (f".. currentmodule:: {face}", "")
    if inspect.isclass(value):
        # Members of torch, Pyro and Python have documents of their own.
        foreign = {base.__name__ for base in value.__mro__ if not base.__module__.startswith("deepprob")}
        yield from (f".. autoclass:: {name}", "   :members:", f"   :inherited-members: {', '.join(sorted(foreign))}")
    else:
        yield f".. auto{'function' if inspect.isfunction(value) else 'data'}:: {name}"


def title(text: str) -> list[str]:
    """A heading of reStructuredText."""
    return [text, "=" * len(text), ""]


def write_home(pages: Path) -> None:
    """Make the README the first page, with the navigation below it."""
    named = {path for patterns in SECTIONS.values() for path in patterns if "*" not in path}
    left_out = named | {"docs/README.md"}
    home = (pages / "README.md").read_text()
    for caption, patterns in SECTIONS.items():
        found = [str(path.relative_to(pages)) for pattern in patterns for path in sorted(pages.glob(pattern))]
        home += "\n" + toctree([path for path in found if path in patterns or path not in left_out], caption)
    (pages / "index.md").write_text(home)
    for unused in ("README.md", "docs/README.md", "tutorials/README.md"):
        (pages / unused).unlink()


def toctree(entries: Iterable[str], caption: str = "") -> str:
    """A part of the navigation: hidden if it has a caption, which the side bar shows."""
    options = [":hidden:", f":caption: {caption}"] if caption else [":glob:", ":maxdepth: 1"]
    lines = [re.sub(r"\.(md|rst|ipynb)$", "", each) for each in entries]
    return "\n".join(["```{toctree}", *options, "", *lines, "```", ""])


def notebooks_without_data(root: Path = ROOT) -> list[str]:
    """Notebooks whose data are not in the folder of data sets. They are not run: a build downloads nothing."""
    folder = os.environ.get("DEEPPROB_DATA")
    found = []
    for path in sorted(root.glob("tutorials/*.ipynb")):
        needed = [SOURCES[name] for name in LOADED.findall(path.read_text(encoding="utf-8"))]
        files = [Path(folder or "", source.folder, file) for source in needed for file in source.files]
        if files and not (folder and all(file.is_file() for file in files)):
            found.append(path.relative_to(root).as_posix())
            print(
                f"{found[-1]} is shown without outputs. Name a folder with its data in DEEPPROB_DATA.", file=sys.stderr
            )
    return found


def kernel_of_this_python(folder: Path) -> Path:
    """A folder of Jupyter kernels whose ``python3`` is this interpreter, whatever the machine has registered."""
    kernel = folder / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "--log-level=ERROR", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
