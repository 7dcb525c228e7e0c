"""Networks: backbones registered with timm, heads, and both together with what prediction needs to know."""

from perf_vit.models.build import SegmentationModelConfig, build_segmenter
from perf_vit.models.build_detector import DetectionModelConfig, build_detector, detector_kind
from perf_vit.models.checkpoint import (
    CHECKPOINT_KEY,
    NETWORKS,
    checkpoint_metadata,
    checkpoint_task,
    load_classifier,
    load_detector,
    load_segmenter,
    load_slide_classifier,
    restore_draw,
)
from perf_vit.models.classifier import (
    ClassificationModelConfig,
    ClassificationSpec,
    Classifier,
    ImageLabelKind,
    build_classifier,
)
from perf_vit.models.convert import linearize
from perf_vit.models.detector import DetectionSpec, Detector
from perf_vit.models.fidelity import attention_errors, token_cosines
from perf_vit.models.finetune import LoraConfig, backbone_body, backbone_layers
from perf_vit.models.input_spec import InputSpec
from perf_vit.models.layer_options import choose_layer_options
from perf_vit.models.pooled import pretrained_statistics
from perf_vit.models.saved_model import load_converted, load_softmax, save_converted
from perf_vit.models.segmenter import SegmentationSpec, Segmenter, network_id
from perf_vit.models.slide_classifier import (
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
    "SegmentationModelConfig",
    "SegmentationSpec",
    "Segmenter",
    "SlideClassificationModelConfig",
    "SlideClassificationSpec",
    "SlideClassifier",
    "attention_errors",
    "backbone_body",
    "backbone_layers",
    "build_classifier",
    "build_detector",
    "build_segmenter",
    "build_slide_classifier",
    "checkpoint_metadata",
    "checkpoint_task",
    "choose_layer_options",
    "detector_kind",
    "linearize",
    "load_classifier",
    "load_converted",
    "load_detector",
    "load_segmenter",
    "load_slide_classifier",
    "load_softmax",
    "network_id",
    "pretrained_statistics",
    "restore_draw",
    "save_converted",
    "token_cosines",
]
