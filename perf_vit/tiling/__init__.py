"""Where windows lie and how much each of their pixels counts: the same in training and prediction."""

from perf_vit.tiling.blend import hann_weights
from perf_vit.tiling.grid import grid_windows, random_window

__all__ = ["grid_windows", "hann_weights", "random_window"]
