"""What the benchmarks share: where results go, and what machine made them."""

from __future__ import annotations

import json
import os
import platform
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


def write_result(name: str, content: Any) -> Path:
    """Write a result as JSON, with the machine and the date."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "result": content}, indent=1) + "\n")
    return path
