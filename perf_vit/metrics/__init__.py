"""Metrics of each task, and their plots."""

from perf_vit.errors import extra

with extra("train", __name__):
    from perf_vit.metrics.classification import ClassificationMetrics, ClassificationScores, RegressionScores
    from perf_vit.metrics.detection import DetectionMetrics, DetectionScores
    from perf_vit.metrics.froc import FROC_RATES, Froc
    from perf_vit.metrics.matching import DetectionConfusion
    from perf_vit.metrics.oriented import OrientedAveragePrecision
    from perf_vit.metrics.panoptic import PanopticQuality
    from perf_vit.metrics.plots import plot_precision_recall, save_confusion_matrix, save_precision_recall
    from perf_vit.metrics.registry import METRICS, RegisteredMetrics, register_metric
    from perf_vit.metrics.segmentation import ClassScores, SegmentationCurves, class_scores, segmentation_metrics

__all__ = [
    "FROC_RATES",
    "METRICS",
    "ClassScores",
    "ClassificationMetrics",
    "ClassificationScores",
    "DetectionConfusion",
    "DetectionMetrics",
    "DetectionScores",
    "Froc",
    "OrientedAveragePrecision",
    "PanopticQuality",
    "RegisteredMetrics",
    "RegressionScores",
    "SegmentationCurves",
    "class_scores",
    "plot_precision_recall",
    "register_metric",
    "save_confusion_matrix",
    "save_precision_recall",
    "segmentation_metrics",
]
