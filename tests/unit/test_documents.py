"""The documents name files, folders and registered names that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", ".github/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # a record of the past
)
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])

LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"\.?[\w./-]+(?:/|\.(?:py|md|ipynb|toml|txt|cpp|jinja|json|svg|yml))")
# Written by commands or by users, not kept in the repository.
MADE = ("runs/", "manifest.json", "report.html", "sampling/", "estimators/")


@every_document
def test_links_point_to_existing_files(path: Path) -> None:
    targets = [target for target in LINK.findall(path.read_text()) if not target.startswith(("http", "mailto:"))]
    assert [target for target in targets if not (path.parent / target).exists()] == []


@every_document
def test_named_files_exist(path: Path) -> None:
    """A file named without its folder is in the folder of the file named before it."""
    assert missing([name for name in CODE.findall(path.read_text()) if FILE.fullmatch(name)]) == []


def test_picture_names_existing_files() -> None:
    names = re.findall(r"[\w/]+\.py", (ROOT / "docs" / "images" / "how-a-fit-flows.svg").read_text())
    assert len(names) > 20
    assert missing(names) == []


def missing(names: list[str]) -> list[str]:
    lost, folder = [], ROOT
    for name in names:
        if name.startswith(MADE):
            continue
        found = next((base / name for base in (ROOT, folder, ROOT / "deepprob") if (base / name).exists()), None)
        if found is None:
            lost.append(name)
        elif found.is_relative_to(ROOT / "deepprob"):
            folder = found if found.is_dir() else found.parent
    return lost
