"""The code of the guide runs as it stands, block after block, in one session for each page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
TESTED = "the-loop-by-hand.md"  # by test_loop_by_hand.py
PAGES = sorted(path.name for path in DOCS.glob("*.md") if "```python" in path.read_text(encoding="utf-8"))
PAGES.remove(TESTED)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, code in enumerate(
        re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S), 1
    ):
        exec(compile(code, f"{page}, block {number}", "exec"), names)
