"""Estimators that pickle, and so run in other processes: the posterior travels as the files of `Posterior.save`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

_FILES = "posterior_files"


class PosteriorInPickle:
    """A part of an estimator's base that replaces ``posterior_`` by its files in a pickle."""

    def _program_to_load(self) -> Program | None:
        """The program of the posterior, if files cannot rebuild it."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[assignment]
        if isinstance(posterior := state.get("posterior_"), Posterior):
            with tempfile.TemporaryDirectory() as folder:
                posterior.save(Path(folder) / "posterior")
                files = {x.name: x.read_bytes() for x in (Path(folder) / "posterior").iterdir()}
            state = {name: value for name, value in state.items() if name != "posterior_"} | {_FILES: files}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        files = state.get(_FILES)
        super().__setstate__({name: x for name, x in state.items() if name != _FILES})  # type: ignore[misc]
        if files is not None:
            with tempfile.TemporaryDirectory() as folder:
                for name, content in files.items():
                    (Path(folder) / name).write_bytes(content)
                self.posterior_ = Posterior.load(folder, self._program_to_load())
