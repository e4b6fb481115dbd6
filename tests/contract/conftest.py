"""Put shared scenarios and a stand-in for the compiler on the path, because tests are not a package."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "unit")]
