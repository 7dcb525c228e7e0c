"""Training data: windows of labelled sources as augmented, standardised tiles."""

from perf_vit.data.build import AugmentConfig, DataConfig, RegionConfig, build_datamodule, label_options, region_window
from perf_vit.data.datamodule import WindowDataModule
from perf_vit.data.synthetic import ShipScene, make_ship_scene
from perf_vit.data.windows import GridWindows, LabelledSource, RandomWindows

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "GridWindows",
    "LabelledSource",
    "RandomWindows",
    "RegionConfig",
    "ShipScene",
    "WindowDataModule",
    "build_datamodule",
    "label_options",
    "make_ship_scene",
    "region_window",
]
