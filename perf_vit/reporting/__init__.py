"""Reports: self-contained HTML pages with pictures, tables, curves and zoomable maps."""

from perf_vit.errors import extra

with extra("geo", __name__):
    from perf_vit.reporting.page import Figure, Page, Row, Section, Settings, TextTable, figure_of, hex_color
    from perf_vit.reporting.preview import Preview, picture_layer, read_picture, shape_layer
    from perf_vit.reporting.samples import (
        MATCH_LEGEND,
        Extremes,
        ImageSamples,
        MapSamples,
        Sample,
        object_sample,
        sample_rows,
        text_sample,
    )

__all__ = [
    "MATCH_LEGEND",
    "Extremes",
    "Figure",
    "ImageSamples",
    "MapSamples",
    "Page",
    "Preview",
    "Row",
    "Sample",
    "Section",
    "Settings",
    "TextTable",
    "figure_of",
    "hex_color",
    "object_sample",
    "picture_layer",
    "read_picture",
    "sample_rows",
    "shape_layer",
    "text_sample",
]
