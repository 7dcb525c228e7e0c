"""Run `perf-vit train` from a checkout: python tools/train.py ..."""

import sys

from perf_vit.cli.main import run

run(["train", *sys.argv[1:]])
