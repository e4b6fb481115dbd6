"""The code of docs/the-loop-by-hand.md runs, and its posterior is the exact one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

PAGE = (Path(__file__).parents[2] / "docs" / "the-loop-by-hand.md").read_text(encoding="utf-8")


def exact() -> tuple[torch.Tensor, torch.Tensor]:
    """Means and sds of offset and slope, by the normal equations."""
    x = torch.linspace(-1.0, 1.0, 200)
    y = 1.0 + 2.0 * x + 0.5 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    design = torch.stack([torch.ones(200), x], 1)
    covariance = torch.linalg.inv(design.T @ design / 0.25 + torch.eye(2) / 100)
    return covariance @ design.T @ y / 0.25, covariance.diagonal().sqrt()


def test_page_fits_a_regression_in_twenty_lines() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 20
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", block], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^step (\d+): elbo -\d\.\d\d, skipped 0$", done.stdout, re.M) == ["0", "500", "1000", "1500"]
    table = re.findall(r"^(?:offset|slope) +([\d.]+) +([\d.]+) ", done.stdout, re.M)
    means, sds = torch.tensor([[float(x) for x in row] for row in table]).T
    true_means, true_sds = exact()
    assert bool(((means - true_means).abs() < 0.3 * true_sds).all()), (means, true_means)
    assert bool(((sds / true_sds - 1).abs() < 0.15).all()), (sds, true_sds)
    predicted = re.search(r"tensor\(\[([\d.]+), ([\d.]+)\]\)", done.stdout)
    assert predicted is not None
    assert abs(float(predicted[2]) - float(true_means.sum())) < 0.1
