"""Geometry of objects: boxes, oriented boxes, masks, overlaps and non-maximum suppression."""

from perf_vit.errors import extra

with extra("geo", __name__):
    from perf_vit.geometry.objects import Objects

__all__ = ["Objects"]
