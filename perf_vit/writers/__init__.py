"""Outputs: Cloud-Optimised GeoTIFF, OME-TIFF, vector files, quicklooks."""

from perf_vit.errors import extra

with extra("geo", __name__):
    from perf_vit.writers._objects import tidy_polygons
    from perf_vit.writers.coco import write_coco_labels
    from perf_vit.writers.cog import CogWriter, write_cog
    from perf_vit.writers.layout import HeldRows, RasterLayout, holds_layout, is_ome_tiff_name, is_one_block
    from perf_vit.writers.ome_tiff import write_ome_tiff
    from perf_vit.writers.outputs import (
        category_names_path,
        check_map_name,
        check_outputs,
        existing_error,
        existing_outputs,
        input_files,
    )
    from perf_vit.writers.polygonize import polygonize_classes
    from perf_vit.writers.qgis import is_own_style, write_category_names, write_qgis_style
    from perf_vit.writers.quicklook import write_map_quicklook, write_object_quicklook
    from perf_vit.writers.strips import StripStore
    from perf_vit.writers.vector import check_vector_output, write_objects

__all__ = [
    "CogWriter",
    "HeldRows",
    "RasterLayout",
    "StripStore",
    "category_names_path",
    "check_map_name",
    "check_outputs",
    "check_vector_output",
    "existing_error",
    "existing_outputs",
    "holds_layout",
    "input_files",
    "is_ome_tiff_name",
    "is_one_block",
    "is_own_style",
    "polygonize_classes",
    "tidy_polygons",
    "write_category_names",
    "write_coco_labels",
    "write_cog",
    "write_map_quicklook",
    "write_object_quicklook",
    "write_objects",
    "write_ome_tiff",
    "write_qgis_style",
]
