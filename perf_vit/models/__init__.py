"""Models: backbones registered with timm, necks, heads, and networks of each task with the spec of their input."""

from perf_vit.models.checkpoint import (
    CHECKPOINT_KEY,
    NETWORKS,
    Network,
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
from perf_vit.models.finetune import LoraConfig, backbone_body, backbone_layers
from perf_vit.models.input_spec import InputSpec
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
    "InputSpec",
    "LoraConfig",
    "Network",
    "SegmentationModelConfig",
    "SegmentationSpec",
    "Segmenter",
    "SlideClassificationModelConfig",
    "SlideClassificationSpec",
    "SlideClassifier",
    "backbone_body",
    "backbone_layers",
    "build_classifier",
    "build_detector",
    "build_segmenter",
    "build_slide_classifier",
    "checkpoint_metadata",
    "checkpoint_task",
    "detector_kind",
    "load_classifier",
    "load_detector",
    "load_model",
    "load_segmenter",
    "load_slide_classifier",
    "network_id",
    "pretrained_statistics",
    "register_network",
    "restore_draw",
]
