"""Models: necks, heads, networks of each task with the spec of their input, and the tiles that they take."""

from perf_vit.errors import extra

with extra("geo", __name__):
    from perf_vit.models.checkpoint import (
        CHECKPOINT_KEY,
        NETWORKS,
        Network,
        checkpoint_facts,
        checkpoint_metadata,
        checkpoint_task,
        load_classifier,
        load_detector,
        load_model,
        load_segmenter,
        load_slide_classifier,
        register_network,
        restore_draw,
    )
    from perf_vit.models.classification import (
        ClassificationModelConfig,
        ClassificationSpec,
        Classifier,
        ImageLabelKind,
        build_classifier,
        pretrained_statistics,
    )
    from perf_vit.models.detection import DetectionModelConfig, DetectionSpec, Detector, build_detector, detector_kind
    from perf_vit.models.finetune import LoraConfig, backbone_body, backbone_layers, check_not_random
    from perf_vit.models.input_spec import (
        InputBands,
        InputCheck,
        InputSpec,
        accepts_bands,
        common_names,
        repeat_grey_band,
    )
    from perf_vit.models.segmentation import (
        SegmentationModelConfig,
        SegmentationSpec,
        Segmenter,
        build_segmenter,
        network_id,
    )
    from perf_vit.models.slide_classification import (
        SlideClassificationModelConfig,
        SlideClassificationSpec,
        SlideClassifier,
        build_slide_classifier,
    )
    from perf_vit.models.tiles import (
        SlideFeatures,
        UnlabelledCrops,
        image_tile,
        middle_window,
        standardized,
        tissue_windows,
    )
    from perf_vit.models.valid_tokens import collate_tiles

__all__ = [
    "CHECKPOINT_KEY",
    "NETWORKS",
    "ClassificationModelConfig",
    "ClassificationSpec",
    "Classifier",
    "DetectionModelConfig",
    "DetectionSpec",
    "Detector",
    "ImageLabelKind",
    "InputBands",
    "InputCheck",
    "InputSpec",
    "LoraConfig",
    "Network",
    "SegmentationModelConfig",
    "SegmentationSpec",
    "Segmenter",
    "SlideClassificationModelConfig",
    "SlideClassificationSpec",
    "SlideClassifier",
    "SlideFeatures",
    "UnlabelledCrops",
    "accepts_bands",
    "backbone_body",
    "backbone_layers",
    "build_classifier",
    "build_detector",
    "build_segmenter",
    "build_slide_classifier",
    "check_not_random",
    "checkpoint_facts",
    "checkpoint_metadata",
    "checkpoint_task",
    "collate_tiles",
    "common_names",
    "detector_kind",
    "image_tile",
    "load_classifier",
    "load_detector",
    "load_model",
    "load_segmenter",
    "load_slide_classifier",
    "middle_window",
    "network_id",
    "pretrained_statistics",
    "register_network",
    "repeat_grey_band",
    "restore_draw",
    "standardized",
    "tissue_windows",
]
