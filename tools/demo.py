"""Run `perf-vit demo` from a checkout: python tools/demo.py ..."""

import sys

from perf_vit.cli.main import run

run(["demo", *sys.argv[1:]])
