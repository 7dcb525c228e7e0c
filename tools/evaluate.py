"""Run `perf-vit evaluate` from a checkout: python tools/evaluate.py ..."""

import sys

from perf_vit.cli.main import run

run(["evaluate", *sys.argv[1:]])
