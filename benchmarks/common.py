"""What the benchmarks share: where results go, what machine made them, and how tables look."""

from __future__ import annotations

import json
import os
import platform
import re
from datetime import date
from pathlib import Path
from typing import Any

import torch

from deepprob.storage import versions

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine, in words that mean something elsewhere."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
        "date": date.today().isoformat(),
    }


def card(device: str = "auto") -> str:
    """The GPU that a run uses, as the ending of a file's name: ``_nvidia_h200``; empty on the CPU."""
    if not torch.cuda.is_available() or device == "cpu":
        return ""
    return "_" + re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")


def write_result(name: str, content: Any, device: str = "auto", folder: Path = RESULTS) -> Path:
    """Write a result as JSON, with the machine and the date; figures of a GPU have its name in the file's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{card(device)}.json"
    path.write_text(json.dumps({"machine": machine(), "result": content}, indent=1) + "\n")
    return path


def shown(lines: list[list[str]], markdown: bool) -> str:
    """A table for a terminal, or for a Markdown file."""
    if markdown:
        head, *body = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([head, "|" + "---|" * len(lines[0]), *body])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
