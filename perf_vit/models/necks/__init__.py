"""Necks: from a backbone's maps to the levels that detection heads look at."""

from collections.abc import Sequence

from perf_vit.models.necks.simple_fpn import SimpleFPN
from perf_vit.models.necks.top_down_fpn import TopDownFPN
from perf_vit.types import FeatureSpec

__all__ = ["SimpleFPN", "TopDownFPN", "build_neck"]


def build_neck(feature_specs: Sequence[FeatureSpec], strides: Sequence[int], channels: int) -> SimpleFPN | TopDownFPN:
    """`SimpleFPN` for maps of one stride, `TopDownFPN` for a pyramid.

    Raises:
        ValueError: strides that don't grow or are no powers of two.
    """
    if not strides or list(strides) != sorted(set(strides)) or any(s < 1 or s & (s - 1) for s in strides):
        raise ValueError(f"expected growing strides that are powers of two, as [4, 8, 16, 32, 64], got {list(strides)}")
    one_stride = len({spec.stride for spec in feature_specs}) == 1
    return (SimpleFPN if one_stride else TopDownFPN)(feature_specs, strides, channels)
