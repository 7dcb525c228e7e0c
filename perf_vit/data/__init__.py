"""Training data as standardised tiles: windows of labelled sources and of images with objects; unlabelled crops."""

from perf_vit.data.augmenting import AugmentConfig
from perf_vit.data.band_statistics import given_normalizer
from perf_vit.data.build import build_segmentation_datamodule
from perf_vit.data.class_pixels import count_class_pixels
from perf_vit.data.config import BaseDataConfig, SplitConfig, TileDataConfig
from perf_vit.data.crops import UnlabelledCrops, find_images
from perf_vit.data.crops_datamodule import DistillationDataConfig, build_distillation_datamodule
from perf_vit.data.datamodule import SegmentationDataModule
from perf_vit.data.embeddings import EmbeddingStore, SlideFeatures
from perf_vit.data.epochs import collate_tiles
from perf_vit.data.label_folders import is_labelled_folder
from perf_vit.data.labels import ImageRecord, OutlineMasks, objects_in, read_object_labels, write_coco_labels
from perf_vit.data.objects import collate_objects, standardized
from perf_vit.data.objects_datamodule import (
    DetectionDataConfig,
    DetectionDataModule,
    DetectionSplitConfig,
    build_detection_datamodule,
    read_names,
)
from perf_vit.data.objects_seen import SeenObjects
from perf_vit.data.open_labelled import open_pairs, region_window
from perf_vit.data.scenes import ClassificationImages, ClassificationViews, image_tile, middle_window
from perf_vit.data.scenes_datamodule import (
    ClassificationDataConfig,
    ClassificationDataModule,
    ClassificationSplitConfig,
    RegressionDataConfig,
    build_classification_datamodule,
    read_image_targets,
)
from perf_vit.data.slide_bags import SlideTargets, read_slide_table
from perf_vit.data.slide_windows import tissue_windows
from perf_vit.data.slides_datamodule import (
    SlideClassificationDataConfig,
    SlideClassificationDataModule,
    SlideClassificationSplitConfig,
    read_slides,
)
from perf_vit.data.synthetic import make_ship_scene
from perf_vit.data.window_config import SegmentationDataConfig, SegmentationSplitConfig, label_options

__all__ = [
    "AugmentConfig",
    "BaseDataConfig",
    "ClassificationDataConfig",
    "ClassificationDataModule",
    "ClassificationImages",
    "ClassificationSplitConfig",
    "ClassificationViews",
    "DetectionDataConfig",
    "DetectionDataModule",
    "DetectionSplitConfig",
    "DistillationDataConfig",
    "EmbeddingStore",
    "ImageRecord",
    "OutlineMasks",
    "RegressionDataConfig",
    "SeenObjects",
    "SegmentationDataConfig",
    "SegmentationDataModule",
    "SegmentationSplitConfig",
    "SlideClassificationDataConfig",
    "SlideClassificationDataModule",
    "SlideClassificationSplitConfig",
    "SlideFeatures",
    "SlideTargets",
    "SplitConfig",
    "TileDataConfig",
    "UnlabelledCrops",
    "build_classification_datamodule",
    "build_detection_datamodule",
    "build_distillation_datamodule",
    "build_segmentation_datamodule",
    "collate_objects",
    "collate_tiles",
    "count_class_pixels",
    "find_images",
    "given_normalizer",
    "image_tile",
    "is_labelled_folder",
    "label_options",
    "make_ship_scene",
    "middle_window",
    "objects_in",
    "open_pairs",
    "read_image_targets",
    "read_names",
    "read_object_labels",
    "read_slide_table",
    "read_slides",
    "region_window",
    "standardized",
    "tissue_windows",
    "write_coco_labels",
]
