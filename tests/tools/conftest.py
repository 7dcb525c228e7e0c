"""Modules of tools/benchmarks/attention_sweep, imported by their names."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "benchmarks" / "attention_sweep"))
