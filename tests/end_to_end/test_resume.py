"""A fit that is killed at random moments and resumed ends with the parameters of an uninterrupted fit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deepprob.models import VAE
from deepprob.posteriors.posterior import Posterior

FIT = """
import sys
import torch
from deepprob.fitting import tiers
from deepprob.fitting.callbacks import Checkpoint, EarlyStopping
from deepprob.fitting.kl_schedules import KLWarmUp
from deepprob.fitting.plan import Plan
from deepprob.inference import svi
from deepprob.models import VAE
from deepprob.fitting.optimizers import Optimizer

x = torch.rand(70, 12, generator=torch.Generator().manual_seed(0))
folder, out = sys.argv[1:]
if PLAN:
    tiers.planned = lambda *arguments, **options: Plan(PLAN, "a test", build=True)
    tiers.pays_to_trace = tiers.pays_to_trace_score = lambda *arguments: True
posterior = svi(
    VAE((12,), latent_dim=2, hidden_dims=(16,)),
    x,
    held_out=x[:20],
    epochs=EPOCHS,
    batch_size=16,
    optimizer=Optimizer(average=0.9, clip_norm=5.0),
    callbacks=[KLWarmUp(10), EarlyStopping(1000), Checkpoint(folder, every=0.6)],
    seed=5,
    progress=False,
)
posterior.save(out)
"""


Tiers = tuple[tuple[str, int], ...]


def start(folder: Path, out: Path, epochs: int, plan: Tiers) -> subprocess.Popen[bytes]:
    """Start a fit with a cache of its own, in which another process may put native code while the fit runs."""
    code = FIT.replace("EPOCHS", str(epochs)).replace("PLAN", str(plan))
    cache = os.environ | {"XDG_CACHE_HOME": f"{folder}-cache"}
    return subprocess.Popen([sys.executable, "-c", code, str(folder), str(out)], stderr=subprocess.PIPE, env=cache)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error.decode()


def killed_and_resumed(tmp_path: Path, kills: int, epochs: int, plan: Tiers = ()) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    finish(start(tmp_path / "a", whole, epochs, plan))
    moments = random.Random(1)
    done = 0
    while done < kills:
        process = start(tmp_path / "b", pieces, epochs, plan)
        # Kills fall into the imports, between two checkpoints, or into a write.
        began = time.monotonic()
        while process.poll() is None and not (tmp_path / "b" / "manifest.json").exists():
            if time.monotonic() - began > 120:
                pytest.fail("no checkpoint after two minutes")
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 1.0))
        if process.poll() is not None:
            _, error = process.communicate()
            assert process.returncode == 0, error.decode()
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done += 1
    assert done == kills, f"the fit ended after {done} kills: make it longer"
    finish(start(tmp_path / "b", pieces, epochs, plan))
    one, other = (Posterior.load(path, program=VAE((12,), latent_dim=2, hidden_dims=(16,))) for path in (whole, pieces))
    for name, value in one.instance.tensors().items():
        assert torch.equal(value, other.instance.tensors()[name]), name
    assert one.config["plan"] == other.config["plan"]
    assert one.history.steps == other.history.steps
    assert one.history.epochs["held_out_elbo"] == other.history.epochs["held_out_elbo"]


def test_fit_killed_twice_resumes(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, kills=2, epochs=200)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", [(("eager", 0),), (("traced", 0),), (("traced", 0), ("compiled", 700)), (("compiled", 0),)], ids=str
)
def test_fit_resumes_under_every_plan(plan: Tiers, tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, kills=2, epochs=400, plan=plan)


@pytest.mark.slow
def test_fit_killed_at_twenty_random_moments_resumes(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, kills=20, epochs=2000)
