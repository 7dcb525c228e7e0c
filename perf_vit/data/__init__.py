"""Training data: windows of labelled sources, and crops of images without labels, as standardised tiles."""

from perf_vit.data.build import AugmentConfig, DataConfig, RegionConfig, build_datamodule, label_options, region_window
from perf_vit.data.crops import UnlabelledCrops, find_images
from perf_vit.data.crops_datamodule import CropsConfig, CropsDataModule, build_crops
from perf_vit.data.datamodule import WindowDataModule
from perf_vit.data.synthetic import ShipScene, make_ship_scene
from perf_vit.data.windows import GridWindows, LabelledSource, RandomWindows

__all__ = [
    "AugmentConfig",
    "CropsConfig",
    "CropsDataModule",
    "DataConfig",
    "GridWindows",
    "LabelledSource",
    "RandomWindows",
    "RegionConfig",
    "ShipScene",
    "UnlabelledCrops",
    "WindowDataModule",
    "build_crops",
    "build_datamodule",
    "find_images",
    "label_options",
    "make_ship_scene",
    "region_window",
]
