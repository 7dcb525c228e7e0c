"""What `perf-vit benchmark` measures: contenders, checks, clocks and pictures.

A benchmark never reports a speed for an output that it has not compared with a reference in the same run.
"""
