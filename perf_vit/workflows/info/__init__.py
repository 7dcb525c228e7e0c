"""Descriptions of files, and the work that a model would have with them."""

from perf_vit.errors import extra

with extra("geo", "info"):
    from perf_vit.workflows.info.describe import Description, describe
    from perf_vit.workflows.info.files import FileDescription, describe_file
    from perf_vit.workflows.info.workload import Workload, estimate_workload

__all__ = ["Description", "FileDescription", "Workload", "describe", "describe_file", "estimate_workload"]
