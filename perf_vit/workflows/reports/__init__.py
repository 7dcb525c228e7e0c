"""Evaluations of the tasks, and the report of a training run."""

from perf_vit.workflows.reports.evaluations import (
    ClassificationEvaluation,
    DetectionEvaluation,
    RegressionEvaluation,
    SegmentationEvaluation,
)

__all__ = ["ClassificationEvaluation", "DetectionEvaluation", "RegressionEvaluation", "SegmentationEvaluation"]
