"""`perf-vit benchmark attention` from a checkout: python tools/benchmarks/attention.py --help."""

import sys

from perf_vit.cli.main import run

if __name__ == "__main__":
    run(["benchmark", "attention", *sys.argv[1:]])
