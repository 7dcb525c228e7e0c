"""Ground truth: masks, polygons, tables and objects."""

from perf_vit.errors import extra

with extra("geo", __name__):
    from perf_vit.labels.open import LabelSource, is_labelled_folder, open_labels, warn_of_polygons_outside
    from perf_vit.labels.paired import LabelFiles

__all__ = ["LabelFiles", "LabelSource", "is_labelled_folder", "open_labels", "warn_of_polygons_outside"]
