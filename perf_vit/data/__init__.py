"""Training data as standardised tiles: windows of labelled sources and of images with objects; unlabelled crops."""

from perf_vit.data.augmenting import AugmentConfig
from perf_vit.data.build import build_datamodule
from perf_vit.data.class_pixels import count_class_pixels
from perf_vit.data.class_places import find_class_pixels
from perf_vit.data.crops import UnlabelledCrops, find_images
from perf_vit.data.crops_datamodule import CropsConfig, CropsDataModule, build_crops
from perf_vit.data.datamodule import WindowDataModule
from perf_vit.data.embeddings import EmbeddingStore, SlideFeatures
from perf_vit.data.image_targets import ImageTargets
from perf_vit.data.label_folders import find_label_pairs, is_labelled_folder
from perf_vit.data.labels import (
    LABEL_FORMATS,
    ImageRecord,
    ObjectIndex,
    OutlineMasks,
    objects_in,
    read_object_labels,
    write_coco_labels,
)
from perf_vit.data.object_places import ObjectPlaces, RandomPlaces, make_places
from perf_vit.data.objects import (
    ObjectGrid,
    ObjectImages,
    ObjectWindows,
    bands_fit,
    collate_objects,
    standardized,
)
from perf_vit.data.objects_datamodule import (
    ObjectDataConfig,
    ObjectDataModule,
    ObjectSplitConfig,
    build_object_datamodule,
    read_names,
)
from perf_vit.data.objects_seen import SeenObjects
from perf_vit.data.open_labelled import region_window
from perf_vit.data.scenes import SceneImages, SceneTiles, SceneViews, middle_window, scene_tile
from perf_vit.data.scenes_datamodule import (
    ClassificationDataConfig,
    ImageSplitConfig,
    RegressionDataConfig,
    SceneDataConfig,
    SceneDataModule,
    build_scene_datamodule,
    read_image_targets,
)
from perf_vit.data.slide_bags import SlideBags, SlideTargets, collate_bags, read_slide_table
from perf_vit.data.slide_windows import tissue_windows
from perf_vit.data.slides_datamodule import SlideBagModule, SlideDataConfig, read_slides
from perf_vit.data.synthetic import ShipScene, make_ship_scene
from perf_vit.data.window_config import DataConfig, RegionConfig, label_options
from perf_vit.data.window_places import ClassPlaces, GridPlaces
from perf_vit.data.windows import GridWindows, LabelledSource, RandomWindows

__all__ = [
    "LABEL_FORMATS",
    "AugmentConfig",
    "ClassPlaces",
    "ClassificationDataConfig",
    "CropsConfig",
    "CropsDataModule",
    "DataConfig",
    "EmbeddingStore",
    "GridPlaces",
    "GridWindows",
    "ImageRecord",
    "ImageSplitConfig",
    "ImageTargets",
    "LabelledSource",
    "ObjectDataConfig",
    "ObjectDataModule",
    "ObjectGrid",
    "ObjectImages",
    "ObjectIndex",
    "ObjectPlaces",
    "ObjectSplitConfig",
    "ObjectWindows",
    "OutlineMasks",
    "RandomPlaces",
    "RandomWindows",
    "RegionConfig",
    "RegressionDataConfig",
    "SceneDataConfig",
    "SceneDataModule",
    "SceneImages",
    "SceneTiles",
    "SceneViews",
    "SeenObjects",
    "ShipScene",
    "SlideBagModule",
    "SlideBags",
    "SlideDataConfig",
    "SlideFeatures",
    "SlideTargets",
    "UnlabelledCrops",
    "WindowDataModule",
    "bands_fit",
    "build_crops",
    "build_datamodule",
    "build_object_datamodule",
    "build_scene_datamodule",
    "collate_bags",
    "collate_objects",
    "count_class_pixels",
    "find_class_pixels",
    "find_images",
    "find_label_pairs",
    "is_labelled_folder",
    "label_options",
    "make_places",
    "make_ship_scene",
    "middle_window",
    "objects_in",
    "read_image_targets",
    "read_names",
    "read_object_labels",
    "read_slide_table",
    "read_slides",
    "region_window",
    "scene_tile",
    "standardized",
    "tissue_windows",
    "write_coco_labels",
]
