"""Report of a conversion: fidelity to the softmax model, and times."""

from perf_vit.errors import extra

with extra("geo", "convert"):
    from perf_vit.workflows.conversion_report.measure import MeasuredConversion, measure_conversion
    from perf_vit.workflows.conversion_report.report import ConversionReport, write_conversion
    from perf_vit.workflows.conversion_report.timing import Call, alternating_medians, machine_name

__all__ = [
    "Call",
    "ConversionReport",
    "MeasuredConversion",
    "alternating_medians",
    "machine_name",
    "measure_conversion",
    "write_conversion",
]
