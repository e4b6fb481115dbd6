"""Build native code in a process of its own, while the caller goes on.

The process has a low priority and a session of its own: it survives an interrupt and the end of its parent. It gets the
module, and returns a failure, by files without a name in the private folder of the cache.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from deepprob.engine.dynamic_length import DifferentGraphs, Lengths
from deepprob.engine.native.build import build, file_name
from deepprob.engine.native.cache import built_once, writable_cache
from deepprob.engine.native.handover import as_text, from_text

_NICENESS = 10
_STARTED: list[subprocess.Popen[bytes]] = []  # Popen warns if it is dropped while its process runs


@atexit.register
def _leave_running() -> None:
    """Let the processes outlive this one; Popen warns of a process without a return code."""
    for process in _STARTED:
        if process.poll() is None:
            process.returncode = 0


class BuildFailed(RuntimeError):
    """A process that built native code failed; the message is the reason."""


class BackgroundBuild:
    """A build of a module's native code into the cache, by another process.

    Args:
        module: A graph or a `Repeated` graph, without constants, on the CPU.
        inputs: Example inputs, with sequences of the longest length.
        lengths: The inputs that hold sequences, and the range of their lengths.
        folder: The cache.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor], lengths: Lengths, folder: Path) -> None:
        name = file_name(module, inputs, lengths)
        self._report: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        weakref.finalize(self, self._report.close)
        with tempfile.TemporaryFile(dir=folder) as job:
            job.write(as_text(module, inputs, lengths).encode())
            job.seek(0)
            # The child must find the same packages as this process.
            path = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
            command = [
                sys.executable,
                "-c",
                f"import os; os.nice({_NICENESS}); from {__name__} import main; main()",
                name,
            ]
            self._process = subprocess.Popen(
                command, env=path, stdin=job, stdout=self._report, stderr=subprocess.DEVNULL, start_new_session=True
            )  # fmt: skip
        _STARTED[:] = [each for each in _STARTED if each.poll() is None] + [self._process]

    @property
    def is_running(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def wait(self) -> None:
        """Wait for the process.

        Raises:
            BuildFailed: If it failed.
            DifferentGraphs: If native code cannot serve sequences of any length.
        """
        self._process.wait()
        if self._failure is not None:
            kind, text = self._failure
            raise DifferentGraphs(text) if kind == DifferentGraphs.__name__ else BuildFailed(f"{kind}: {text}")

    @cached_property
    def _failure(self) -> tuple[str, str] | None:
        """The type and the text of the process's error."""
        self._report.seek(0)
        written = self._report.read()
        if written:
            kind, text = json.loads(written)
            return kind, text
        code = self._process.returncode
        return None if code == 0 else ("the process that compiled ended early", f"exit code {code}")


def builds_beside(device: torch.device) -> bool:
    """Whether another process can build native code for a device while the caller goes on."""
    return device.type == "cpu" and sys.platform != "win32" and writable_cache() is not None


def start_build(module: nn.Module, inputs: Sequence[Tensor], lengths: Lengths | None = None) -> BackgroundBuild | None:
    """Start to build a module's native code in another process.

    Args:
        module: A graph or a `Repeated` graph.
        inputs: Example inputs, with sequences of the longest length.
        lengths: The inputs that hold sequences, and the range of their lengths.

    Returns:
        The build; None if only this process can build the module: on a GPU, on Windows, without a cache that can be
        written to, or if the system starts no other process.
    """
    folder = writable_cache()
    if folder is None or not builds_beside(inputs[0].device):
        return None
    try:
        return BackgroundBuild(module, inputs, lengths or {}, folder)
    except OSError:  # no memory, no disk, or no executable of Python
        return None


def main() -> None:
    """Build what stdin describes into the cache, under the name in the command line; write a failure to stdout."""
    try:
        module, inputs, lengths = from_text(sys.stdin.read())
        with contextlib.redirect_stdout(sys.stderr):
            built_once(sys.argv[1], lambda path: build(module, inputs, lengths, path), lambda path: path)
    except Exception as error:
        json.dump((type(error).__name__, str(error)), sys.stdout)
