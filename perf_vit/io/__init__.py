"""Sources, labels and outputs: rasters read and written window by window."""

from perf_vit.io._gdal import bounded_cache
from perf_vit.io._input_files import input_files
from perf_vit.io._label_vector import warn_of_polygons_beside
from perf_vit.io._staging import beside, replaced, staged
from perf_vit.io._vector_file import is_vector_name, split_layer
from perf_vit.io.coco_images import CocoImages, category_ids_by_name, default_category_ids, ids_of_classes
from perf_vit.io.cog import write_cog
from perf_vit.io.describe import SourceInfo, describe_source
from perf_vit.io.existing import holds_layout
from perf_vit.io.fingerprint import file_stats, fingerprint
from perf_vit.io.image_files import (
    FOLDER_SUFFIXES,
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    PICTURE_SUFFIXES,
    SLIDE_SUFFIXES,
    files_below,
    is_by_product,
    is_image_name,
    previews_among,
    without_repeats,
)
from perf_vit.io.input_options import merged_options, open_input
from perf_vit.io.label_files import LabelFiles
from perf_vit.io.labels import LabelSource, open_labels
from perf_vit.io.layout import RasterLayout
from perf_vit.io.lettering import lettered, lettering_font
from perf_vit.io.mosaic import MosaicSource
from perf_vit.io.ome_tiff import is_ome_tiff_name, write_ome_tiff
from perf_vit.io.outputs import check_outputs, existing_error, existing_outputs
from perf_vit.io.pixel_size import PixelSize, common_unit, unit_of
from perf_vit.io.polygons import polygonize_classes
from perf_vit.io.quicklook import (
    colorize,
    default_colormap,
    natural_bands,
    rgb_from,
    save_figure,
    save_png,
    write_map_quicklook,
)
from perf_vit.io.raster import RasterSource
from perf_vit.io.slide import SlideSource
from perf_vit.io.sources import open_raster, open_source
from perf_vit.io.strips import StripStore
from perf_vit.io.text_files import write_json, write_text
from perf_vit.io.vector_objects import PolygonFile
from perf_vit.io.vector_writers import check_vector_output, write_objects
from perf_vit.io.writers import CogWriter

__all__ = [
    "FOLDER_SUFFIXES",
    "IMAGE_SUFFIXES",
    "MASK_SUFFIXES",
    "PICTURE_SUFFIXES",
    "SLIDE_SUFFIXES",
    "CocoImages",
    "CogWriter",
    "LabelFiles",
    "LabelSource",
    "MosaicSource",
    "PixelSize",
    "PolygonFile",
    "RasterLayout",
    "RasterSource",
    "SlideSource",
    "SourceInfo",
    "StripStore",
    "beside",
    "bounded_cache",
    "category_ids_by_name",
    "check_outputs",
    "check_vector_output",
    "colorize",
    "common_unit",
    "default_category_ids",
    "default_colormap",
    "describe_source",
    "existing_error",
    "existing_outputs",
    "file_stats",
    "files_below",
    "fingerprint",
    "holds_layout",
    "ids_of_classes",
    "input_files",
    "is_by_product",
    "is_image_name",
    "is_ome_tiff_name",
    "is_vector_name",
    "lettered",
    "lettering_font",
    "merged_options",
    "natural_bands",
    "open_input",
    "open_labels",
    "open_raster",
    "open_source",
    "polygonize_classes",
    "previews_among",
    "replaced",
    "rgb_from",
    "save_figure",
    "save_png",
    "split_layer",
    "staged",
    "unit_of",
    "warn_of_polygons_beside",
    "without_repeats",
    "write_cog",
    "write_json",
    "write_map_quicklook",
    "write_objects",
    "write_ome_tiff",
    "write_text",
]
