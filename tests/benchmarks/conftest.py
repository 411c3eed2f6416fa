"""The benchmarks are programs, not packages: their folder goes where Python looks for modules."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
