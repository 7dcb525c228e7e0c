"""Where windows lie and how much each of their pixels counts: the same in training and prediction."""

from perf_vit.tiling.blend import Blend, blend_weights
from perf_vit.tiling.grid import grid_windows, random_window, random_window_holding

__all__ = ["Blend", "blend_weights", "grid_windows", "random_window", "random_window_holding"]
