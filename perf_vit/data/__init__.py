"""Training data of each task: configs, data modules, tile datasets and samplers."""

from perf_vit.errors import extra

with extra("train", __name__):
    from perf_vit.data.augmentation import AugmentConfig
    from perf_vit.data.bags import EmbeddingStore, SlideTargets, read_slide_table
    from perf_vit.data.base import given_normalizer, warn_of_mixed_mpp
    from perf_vit.data.class_pixels import count_class_pixels
    from perf_vit.data.classification import (
        ClassificationDataConfig,
        ClassificationDataModule,
        ClassificationSplitConfig,
        RegressionDataConfig,
        build_classification_datamodule,
        read_image_targets,
    )
    from perf_vit.data.classification_tiles import ClassificationImages, ClassificationViews
    from perf_vit.data.config import (
        BaseDataConfig,
        SegmentationDataConfig,
        SegmentationSplitConfig,
        SplitConfig,
        TileDataConfig,
        label_options,
    )
    from perf_vit.data.detection import (
        DetectionDataConfig,
        DetectionDataModule,
        DetectionSplitConfig,
        build_detection_datamodule,
        read_names,
    )
    from perf_vit.data.detection_tiles import ObjectValidity, collate_objects
    from perf_vit.data.segmentation import (
        SegmentationDataModule,
        build_segmentation_datamodule,
        open_pairs,
        region_window,
    )
    from perf_vit.data.slide_classification import (
        SlideClassificationDataConfig,
        SlideClassificationDataModule,
        SlideClassificationSplitConfig,
        read_slides,
    )
    from perf_vit.data.synthetic import make_ship_scene
    from perf_vit.data.unlabelled import DistillationDataConfig, build_distillation_datamodule
    from perf_vit.models import (
        SlideFeatures,
        UnlabelledCrops,
        collate_tiles,
        image_tile,
        middle_window,
        standardized,
        tissue_windows,
    )

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
    "ObjectValidity",
    "RegressionDataConfig",
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
    "given_normalizer",
    "image_tile",
    "label_options",
    "make_ship_scene",
    "middle_window",
    "open_pairs",
    "read_image_targets",
    "read_names",
    "read_slide_table",
    "read_slides",
    "region_window",
    "standardized",
    "tissue_windows",
    "warn_of_mixed_mpp",
]
