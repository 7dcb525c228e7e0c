"""Evaluations of the tasks, and the report of a training run."""

from perf_vit.workflows.reports.classification import ClassificationEvaluation, RegressionEvaluation
from perf_vit.workflows.reports.detection import DetectionEvaluation
from perf_vit.workflows.reports.segmentation import SegmentationEvaluation

__all__ = ["ClassificationEvaluation", "DetectionEvaluation", "RegressionEvaluation", "SegmentationEvaluation"]
