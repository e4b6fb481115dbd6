"""The code in the README runs and prints what the README shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import palmerpenguins
import pytest
from PIL import Image
from sklearn.datasets import load_digits

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(code: str, folder: Path) -> str:
    """Run a program in a folder, with warnings as errors, and return its output."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TABLE, IMAGES, PROGRAM, TEN_LINES = BLOCKS


def write_own_data(folder: Path) -> None:
    """The table and the images that the README names."""
    penguins = Path(palmerpenguins.__file__).parent / "data" / "penguins.csv"
    (folder / "penguins.csv").write_bytes(penguins.read_bytes())
    for i, (pixels, label) in enumerate(zip(*load_digits(return_X_y=True), strict=True)):
        if i < 300:
            (folder / "photos" / str(label)).mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((pixels.reshape(8, 8) * 15.9).astype(np.uint8))
            picture.save(folder / "photos" / str(label) / f"{i}.png")


@pytest.mark.parametrize("block", BLOCKS, ids=["a table", "images", "a Pyro program", "ten lines"])
def test_code_runs(block: str, tmp_path: Path) -> None:
    write_own_data(tmp_path)
    block = block.replace("svi(program, train, seed=0)", "svi(program, train, epochs=40, seed=0)")
    printed = run(re.sub(r"epochs=\d+", "epochs=40", block), tmp_path)
    assert re.search(r"^(PASS|CAUTION|FAIL) · ", printed, flags=re.MULTILINE)


def test_the_ten_lines_write_their_files(tmp_path: Path) -> None:
    run(re.sub(r"epochs=\d+", "epochs=20", TEN_LINES), tmp_path)
    assert (tmp_path / "digits.html").stat().st_size > 50_000
    assert (tmp_path / "runs" / "digits" / "manifest.json").exists()


@pytest.mark.slow
def test_prints_what_the_readme_shows(tmp_path: Path) -> None:
    shown = re.search(r"prints\n\n```\n(.*?)```", README, flags=re.DOTALL)
    assert shown is not None
    names = re.compile(r"^(PASS|CAUTION|FAIL|pass|caution|fail) +(?:· )?(\w[\w ,-]*?)(?: +-?\d|$)", flags=re.MULTILINE)
    expected = names.findall(shown.group(1))
    assert len(expected) == 14, "the title and 13 checks"
    # Verdicts and names only: digits depend on the processor.
    assert names.findall(run(TEN_LINES, tmp_path)) == expected
