"""Jobs: resumable work on one output, with journal, identity and skipping of what is done."""

from perf_vit.inference.jobs.job import JobResult, MapJob
from perf_vit.inference.jobs.journal import DamagedPiece

__all__ = ["DamagedPiece", "JobResult", "MapJob"]
