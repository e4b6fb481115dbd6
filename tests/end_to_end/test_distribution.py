"""The built archives, as a package index would show and serve them."""

from __future__ import annotations

import email
import os
import re
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def dist() -> Path:
    """The folder that DEEPPROB_DIST names, in which ``python -m build`` left its archives."""
    named = os.environ.get("DEEPPROB_DIST")
    if not named:
        pytest.skip("DEEPPROB_DIST is not set to a folder of built archives (python -m build --outdir FOLDER)")
    return Path(named)


@pytest.fixture(scope="module")
def raw(dist: Path) -> bytes:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return archive.read(name)


@pytest.fixture(scope="module")
def metadata(raw: bytes) -> Message:
    return email.message_from_bytes(raw)


def test_metadata_is_valid(raw: bytes) -> None:
    assert Metadata.from_email(raw, validate=True).name == "deepprob"


def test_metadata_says_who_and_what(metadata: Message) -> None:
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Summary"] == PROJECT["description"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == metadata["Maintainer"] == "The deepprob developers"
    assert f"name: {metadata['Author']}" in (ROOT / "CITATION.cff").read_text()
    classifiers = metadata.get_all("Classifier") or []
    for minor in (11, 12):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers


def test_every_requirement_has_an_upper_bound(metadata: Message) -> None:
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    assert len(requirements) > 10
    assert [str(r) for r in requirements if not any(s.operator == "<" for s in r.specifier)] == []


def test_the_long_description_stands_alone(metadata: Message) -> None:
    """A package index shows it without the files of the repository."""
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload(decode=True).decode()  # type: ignore[union-attr]
    assert text.lstrip().startswith("# deepprob")
    assert re.findall(r"\]\((?!https?://)[^)]*\)", text) == []
    assert "![" not in text and "[pyro](https://pyro.ai)" in text.lower()
    readme = (ROOT / "README.md").read_text()
    assert len(text) > 0.8 * len(readme) and text.count("```") == readme.count("```")


def test_the_source_archive_has_documents_and_tests(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("deepprob", "models", "inference", "docs", "tests", "tutorials")
    expected = {
        str(path.relative_to(ROOT))
        for folder in folders
        for pattern in ("*.py", "*.md", "*.ipynb", "*.jinja", "*.css")
        for path in (ROOT / folder).rglob(pattern)
        if "__pycache__" not in path.parts and not path.is_symlink()
    }
    at_the_top = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "constraints.txt", "pyproject.toml"}
    assert sorted((expected | at_the_top) - names) == []
    assert [name for name in names if name.endswith(".pyc") or name.startswith(("runs/", ".git", ".venv"))] == []
