"""The documents name files, folders and registered names that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deepprob.diagnostics import CHECKS
from deepprob.diagnostics.advice import QUESTIONS

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


def test_a_page_has_the_questions_of_all_checks() -> None:
    """One heading for each claim, one row for each check, in the order of a report."""
    sections = (ROOT / "docs" / "what-the-checks-ask.md").read_text().split("\n## ")[1:]
    written = {}
    for section in sections:
        heading, _, body = section.partition("\n")
        rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in body.splitlines() if row[:1] == "|"]
        assert all(len(row) == 5 and all(row) for row in rows[2:]), heading
        written[heading] = [row[:2] for row in rows[2:]]
    asked = {
        heading: [[d.name, d.question] for d in CHECKS.values() if d.about == a] for a, heading in QUESTIONS.items()
    }
    assert written == asked


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
