"""Pixel sources: rasters, mosaics and whole slides, read by window."""

from perf_vit.errors import extra

with extra("geo", __name__):
    from perf_vit.sources._gdal import bounded_cache
    from perf_vit.sources.describe import SourceInfo, describe_source
    from perf_vit.sources.files import (
        FOLDER_SUFFIXES,
        GEOTIFF_SUFFIXES,
        MASK_SUFFIXES,
        PARQUET_SUFFIXES,
        PICTURE_SUFFIXES,
        READERS,
        file_stats,
        fingerprint,
        image_name,
        image_names,
        image_suffixes,
        is_by_product,
        is_image_name,
        is_vector_name,
        names_of,
        register_source,
        split_layer,
    )
    from perf_vit.sources.image_search import (
        NamedImages,
        files_below,
        find_images,
        images_at,
        is_image_folder,
        previews_among,
        without_repeats,
    )
    from perf_vit.sources.mosaic import MosaicSource
    from perf_vit.sources.open import find_reader, merged_options, open_input, open_map, open_raster, open_source
    from perf_vit.sources.pixel_size import PixelSize, common_unit, unit_of
    from perf_vit.sources.raster import RasterSource
    from perf_vit.sources.slide_files import slide_members
    from perf_vit.sources.slides import Level, PyramidReader, SlideSource

__all__ = [
    "FOLDER_SUFFIXES",
    "GEOTIFF_SUFFIXES",
    "MASK_SUFFIXES",
    "PARQUET_SUFFIXES",
    "PICTURE_SUFFIXES",
    "READERS",
    "Level",
    "MosaicSource",
    "NamedImages",
    "PixelSize",
    "PyramidReader",
    "RasterSource",
    "SlideSource",
    "SourceInfo",
    "bounded_cache",
    "common_unit",
    "describe_source",
    "file_stats",
    "files_below",
    "find_images",
    "find_reader",
    "fingerprint",
    "image_name",
    "image_names",
    "image_suffixes",
    "images_at",
    "is_by_product",
    "is_image_folder",
    "is_image_name",
    "is_vector_name",
    "merged_options",
    "names_of",
    "open_input",
    "open_map",
    "open_raster",
    "open_source",
    "previews_among",
    "register_source",
    "slide_members",
    "split_layer",
    "unit_of",
    "without_repeats",
]
