"""Reports in a headless Chromium: light and dark, on a desktop and on a phone, and in a notebook."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.image
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import deepprob as dp
from deepprob.diagnostics import Report
from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork, DeepMarkovModel
from deepprob.programs import Program

sys.path.insert(0, str(Path(__file__).parent))
from browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
SIZES = {"phone": 390, "desktop": 1100}


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def vae() -> Report:
    images = (torch.sigmoid(_noise(60, 4, 4)) > 0.7).float()
    return dp.check(svi(VAE((4, 4), 2, (8,)), images, epochs=5, progress=False), images[:30], draws=40)


def regression() -> Report:
    x = _noise(60, 2)
    y = x[:, :1] + 0.3 * _noise(60, 1)
    posterior = svi(BayesianNeuralNetwork(dp.MLP(2, 1, (4,))), (x[:40], y[:40]), epochs=20, progress=False)
    return dp.check(posterior, (x[40:], y[40:]), title="prices <script>alert('x')</script>")


def classifier() -> Report:
    x = _noise(90, 2)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 1).long()
    network = BayesianNeuralNetwork(dp.MLP(2, 3, (4,)), "categorical", num_classes=3)
    return dp.check(svi(network, (x[:60], y[:60]), epochs=20, progress=False), (x[60:], y[60:]))


def schools() -> Report:
    def model(y: torch.Tensor, sd: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            pyro.sample("y", dist.Normal(pyro.sample("theta", dist.Normal(mu, tau)), sd), obs=y)

    data = (torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]), torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]))
    return dp.check(svi(Program.of(model, "normal"), data, steps=200, progress=False), data)


def sequences() -> Report:
    example = DeepMarkovModel.example()
    return dp.check(svi(example.program, example.data, epochs=3, progress=False), example.data)


def without_arguments() -> Report:
    y = 2 + _noise(40)

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", 40):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return dp.check(svi(Program.of(model, "normal"), steps=100, progress=False), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


def pixels(png: bytes) -> np.ndarray:
    """Grey values between 0 and 1, shape ``(height, width)``."""
    return np.asarray(matplotlib.image.imread(io.BytesIO(png)))[..., :3].mean(-1)


@pytest.mark.parametrize("make", [vae, regression, classifier, schools, sequences, without_arguments])
def test_a_page_is_whole_in_every_mode(make: Callable[[], Report], browser: Browser, tmp_path: Path) -> None:
    report = make()
    page = report.save(tmp_path / "report.html")
    pictures = report.draw()
    assert pictures
    for width in SIZES.values():
        brightness = {}
        for dark in (False, True):
            browser.open(page, width=width, dark=dark)
            assert browser.complaints == []
            assert browser.ask("document.documentElement.scrollWidth") <= width
            assert browser.ask("document.querySelector('.decision').innerText") == report.decision
            assert browser.ask("[...document.images].map(i => i.alt)") == [picture.alt for picture in pictures]
            assert all(browser.ask("[...document.images].map(i => i.complete && i.naturalWidth > 0)"))
            inverted = [
                value != "none" for value in browser.ask("[...document.images].map(i => getComputedStyle(i).filter)")
            ]
            assert inverted == [dark and not picture.photos for picture in pictures]
            shot = pixels(browser.shot())
            assert shot.shape == (browser.ask("document.documentElement.scrollHeight"), width)
            brightness[dark] = float(np.median(shot))
            for left, top, right, bottom in browser.ask(
                "[...document.images].map(i => i.getBoundingClientRect()).map(b => [b.left, b.top, b.right, b.bottom])"
            ):
                assert shot[int(top) : int(bottom), int(left) : int(right)].std() > 0.02  # something is drawn
        assert brightness[False] > 0.9 and brightness[True] < 0.2


def test_labels_are_legible_on_a_phone(browser: Browser, tmp_path: Path) -> None:
    browser.open(schools().save(tmp_path / "report.html"), width=SIZES["phone"], dark=False)
    shown, drawn = browser.ask("[document.images[0].clientWidth, document.images[0].naturalWidth]")
    assert 9 / 72 * 200 * shown / drawn >= 9.5  # labels of 9 points, drawn at 200 dots per inch


def test_settings_are_folded_away(browser: Browser, tmp_path: Path) -> None:
    browser.open(regression().save(tmp_path / "report.html"), width=SIZES["desktop"], dark=False)
    assert browser.ask("[...document.querySelectorAll('details')].filter(d => d.open).length") == 0
    assert "learning_rate" not in browser.ask("document.body.innerText")
    assert browser.ask("document.scripts.length") == 0
    assert browser.ask("document.querySelector('h1').innerText") == "prices <script>alert('x')</script>"


def test_a_notebook_frame_is_as_high_as_its_page(browser: Browser, tmp_path: Path) -> None:
    report = without_arguments()
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><meta charset='utf-8'><body>{report._repr_html_()}</body>")
    browser.open(notebook, width=900, dark=False)
    assert browser.complaints == []
    assert browser.ask("document.querySelector('iframe').clientHeight") == pytest.approx(0.85 * 900, abs=2)
    assert float(pixels(browser.shot()).std()) > 0.05  # the frame shows the page
