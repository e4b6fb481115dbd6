"""The documents name files, folders and registered names that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob import Program, check
from deepprob.diagnostics import CHECKS
from deepprob.diagnostics.advice import QUESTIONS
from deepprob.diagnostics.checks import EXTRA
from deepprob.inference import svi
from deepprob.models import VAE

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


def rows_of_checks() -> dict[str, list[list[str]]]:
    """The rows of the page about checks, by heading: name, question, method, limit, remedy."""
    found = {}
    for section in (ROOT / "docs" / "what-the-checks-ask.md").read_text().split("\n## ")[1:]:
        heading, _, body = section.partition("\n")
        lines = [line for line in body.splitlines() if line.startswith("|")]
        found[heading] = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    return found


def test_a_page_has_the_questions_of_all_checks() -> None:
    """One heading for each claim, one row for each check, in the order of a report."""
    written = rows_of_checks()
    assert all(len(row) == 5 and all(row) for rows in written.values() for row in rows)
    assert {heading: [row[:2] for row in rows] for heading, rows in written.items()} == {
        heading: [[d.name, d.question] for d in CHECKS.values() if d.about == about]
        for about, heading in QUESTIONS.items()
    } | {"On request": [[d.name, d.question] for d in EXTRA.values()]}


def test_a_page_has_the_limits_of_checks() -> None:
    """A limit is in the page as a report prints it, or its good side alone where it depends on the data."""
    limits = {row[0]: row[3] for rows in rows_of_checks().values() for row in rows}

    def line(x: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)

    x = torch.linspace(-1.0, 1.0, 40)
    regression, images = (x, x + torch.linspace(0.0, 20.0, 40).sin()), VAE.example()
    fits = (Program.of(line, "normal"), regression), (images.program, images.data)
    found = [check(svi(p, data, steps=120, compile=False, progress=False), data) for p, data in fits]
    seen = {each.name: each for report in found for each in report.checks if each.limit}
    assert len(seen) > 12
    for name, each in seen.items():
        side, number = re.findall(r"`([<>]=)(?: ([\d.]+))?`", limits[name])[0]
        limit = each.limit.partition(";")[0]  # "not surely beyond" depends on the data
        assert limit == f"{side} {number}" if number else each.good == side, name


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
