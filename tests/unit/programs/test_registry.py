"""A saved posterior finds the class of its program by name, whichever package defines it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deepprob as dp
from deepprob.errors import StorageError
from deepprob.inference import svi
from deepprob.models import VAE
from deepprob.programs import registry
from deepprob.programs.program import Program


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_PROGRAMS", dict(registry._PROGRAMS))


def test_third_party_program_registers_itself_and_loads(tmp_path: Path) -> None:
    class Tiny(VAE):
        registry_name = "tiny"

    posterior = svi(Tiny((4,), latent_dim=1, hidden_dims=(3,)), torch.rand(6, 4), epochs=1, progress=False)
    posterior.save(tmp_path / "p")
    assert type(dp.Posterior.load(tmp_path / "p").program) is Tiny


def test_redefined_class_replaces_the_first() -> None:
    def define() -> type[Program]:
        class Again(Program):
            registry_name = "again"

        return Again

    define()
    second = define()
    assert registry.program_named("again") is second


def test_refuses_a_name_of_another_module() -> None:
    with pytest.raises(ValueError, match=r"registry_name 'vae' of .*Mine belongs to deepprob\.models\.vae\.VAE"):
        type("Mine", (Program,), {"registry_name": "vae", "__module__": __name__})


def test_class_of_a_notebook_may_move_into_a_module() -> None:
    type("Cell", (Program,), {"registry_name": "cell", "__module__": "__main__"})
    moved = type("Cell", (Program,), {"registry_name": "cell", "__module__": "mylib"})
    assert registry.program_named("cell") is moved


def test_refuses_another_class_of_the_same_module() -> None:
    type("One", (Program,), {"registry_name": "one", "__module__": __name__})
    with pytest.raises(ValueError, match=r"registry_name 'one' of .*Two belongs to .*One\. Choose another name"):
        type("Two", (Program,), {"registry_name": "one", "__module__": __name__})


def test_name_must_be_a_string() -> None:
    with pytest.raises(TypeError, match=r"registry_name of Three must be a string; got 3\."):
        type("Three", (Program,), {"registry_name": 3, "__module__": __name__})


def test_changed_constructor_is_explained(tmp_path: Path) -> None:
    def define(argument: str) -> type[Program]:
        class Sized(VAE):
            registry_name = "sized"

            def __init__(self, **options: int) -> None:
                super().__init__((options[argument],), latent_dim=1, hidden_dims=(3,))
                self.config = options

        return Sized

    svi(define("width")(width=4), torch.rand(6, 4), epochs=1, progress=False).save(tmp_path / "p")

    class Sized(VAE):
        registry_name = "sized"

        def __init__(self, size: int) -> None:
            super().__init__((size,), latent_dim=1, hidden_dims=(3,))

    with pytest.raises(StorageError, match=r"cannot rebuild its program 'sized': .*'width'.*program=\.\.\."):
        dp.Posterior.load(tmp_path / "p")


def test_unknown_name_suggests_a_registered_one() -> None:
    with pytest.raises(ValueError, match=r"unknown program 'vea'\. Did you mean 'vae'\?"):
        registry.program_named("vea")


def test_importing_deepprob_is_enough_to_load_a_model(tmp_path: Path) -> None:
    svi(VAE((4,), latent_dim=1, hidden_dims=(3,)), torch.rand(6, 4), epochs=1, progress=False).save(tmp_path / "p")
    code = f"import deepprob as dp; print(type(dp.Posterior.load({str(tmp_path / 'p')!r}).program).__name__)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "VAE", done.stderr
