"""The site: its pages, links and search, in a headless Chromium, as files and without the internet."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from browser import CHROMIUM, Browser

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "docs" / "site" / "build.py"
MISSING = [name for name in ("sphinx", "furo", "myst_nb", "ziamath") if importlib.util.find_spec(name) is None]
# The notebooks of the site are run: minutes.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs the extra docs (make docs): no {', '.join(MISSING)}"),
]
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")

PAGES = ["index.html", "api/deepprob/Posterior.html", "tutorials/08-can-i-trust-this-posterior.html"]
PHONE = 390


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"DEEPPROB_SMOKE": "1"}
    command = [sys.executable, str(BUILD), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, env=env, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site that DEEPPROB_SITE names, or one built for the tests."""
    if named := os.environ.get("DEEPPROB_SITE"):
        return Path(named)
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


class Page(HTMLParser):
    """The anchors of a page, its links and formulas, and what it loads by itself."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.formulas: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "svg" and "aria-label" in given:
            self.formulas.append(given["aria-label"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(given["href"])
        elif "src" in given:
            self.loads.append(given["src"])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def wait(browser: Browser, script: str) -> Any:
    """The first true value of a JavaScript expression; the test fails after ten seconds."""
    for _ in range(200):
        if value := browser.ask(script):
            return value
        time.sleep(0.05)
    pytest.fail(f"never true in {browser.ask('location.href')}: {script}")


@pytest.mark.parametrize("face", ["deepprob", "deepprob.models", "deepprob.inference"])
def test_every_public_name_has_a_page(face: str, pages: dict[Path, Page]) -> None:
    anchors = {anchor: path for path, page in pages.items() for anchor in page.anchors}
    names = [f"{face}.{name}" for name in importlib.import_module(face).__all__]
    assert [name for name in names if name not in anchors] == []
    homes = {anchors[name] for name in names}
    assert len({str(home).lower() for home in homes}) == len(names), "one page each, also where case does not count"


def test_every_document_has_a_page(site: Path) -> None:
    documents = [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/decisions/*.md"), *ROOT.glob("tutorials/*.ipynb")]
    expected = [path.relative_to(ROOT).with_suffix(".html") for path in documents if path.name != "README.md"]
    assert [path for path in [Path("CHANGELOG.html"), *expected] if not (site / path).is_file()] == []


def test_links_resolve_and_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        assert [url for url in page.loads if urlsplit(url).scheme not in ("", "data")] == [], path
        for url in page.links + page.loads:
            parts = urlsplit(url)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else {""}
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in anchors):
                broken.append(f"{path.relative_to(site)}: {url}")
    assert broken == []


def test_formulas_are_drawn(site: Path, pages: dict[Path, Page]) -> None:
    assert any(
        latex.startswith(r"\frac1N \log p(x_{1:N}) \ge") for latex in pages[site / "api/deepprob/ELBO.html"].formulas
    )
    assert len(pages[site / "tutorials/07-variational-autoencoder.html"].formulas) > 10


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [PHONE, 1300])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole(name: str, width: int, dark: bool, site: Path, browser: Browser) -> None:
    browser.open(site / name, width=width, dark=dark)
    assert browser.complaints == []
    assert browser.ask("document.documentElement.scrollWidth") <= width
    browser.ask("[...document.images].forEach(image => image.loading = 'eager')")
    wait(browser, "[...document.images].every(image => image.complete)")
    sizes = browser.ask("[...document.images].map(image => Math.min(image.naturalWidth, image.clientHeight))")
    assert all(size > 20 for size in sizes)
    assert len(sizes) >= {"index.html": 1, PAGES[-1]: 5}.get(name, 0)
    background = re.findall(r"\d+", browser.ask("getComputedStyle(document.body).backgroundColor"))
    assert (sum(map(int, background[:3])) < 3 * 60) == dark


@needs_chromium
@pytest.mark.parametrize(
    ("words", "page"),
    [("posterior predictive check", "docs/what-the-checks-ask.html"), ("PSIS-LOO", "docs/glossary.html")],
)
def test_search_finds_pages(words: str, page: str, site: Path, browser: Browser) -> None:
    browser.open(site / "index.html", width=1300, dark=False)
    browser.ask(f"document.querySelector('input[name=q]').value = {words!r}")
    browser.ask("document.querySelector('input[name=q]').form.submit()")
    wait(browser, "/found|matching/.test(document.querySelector('.search-summary')?.innerText)")
    found = browser.ask("[...document.querySelectorAll('ul.search a')].map(a => a.href)")
    assert any(urlsplit(url).path == str((site / page).resolve()) for url in found), found


def test_a_notebook_without_its_data_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BUILD.parent)
    notebooks_without_data = importlib.import_module("build").notebooks_without_data
    monkeypatch.setenv("DEEPPROB_DATA", str(tmp_path))
    for name, needed in (("one", "digits"), ("two", "usps")):
        path = tmp_path / "tutorials" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([f'data = dp.load_data("{needed}")\n']))
    assert notebooks_without_data(tmp_path) == ["tutorials/two.ipynb"]
    assert "Name a folder with its data in DEEPPROB_DATA." in capsys.readouterr().err
    (tmp_path / "usps").mkdir()
    (tmp_path / "usps" / "usps.npz").touch()
    assert notebooks_without_data(tmp_path) == []


def test_a_folder_that_is_no_site_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("words")
    done = build(tmp_path)
    assert done.returncode == 2 and "holds files that are no site. Name a new folder, or empty it." in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "words"
