"""Run `perf-vit predict` from a checkout: python tools/predict.py ..."""

import sys

from perf_vit.cli.main import run

run(["predict", *sys.argv[1:]])
