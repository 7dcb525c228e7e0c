"""perf_vit: vision transformers with linear attention for imagery too large to downsample.

Importing it registers every backbone with timm; rasters, training and inference load when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

import perf_vit.models.backbones  # noqa: F401  (registers with timm)
from perf_vit._version import __version__

if TYPE_CHECKING:
    from perf_vit import ops
    from perf_vit.conversion import choose_layer_options, linearize, load_converted, save_converted
    from perf_vit.models import load_segmenter
    from perf_vit.sources import open_source
    from perf_vit.workflows.predict import predict

__all__ = [
    "__version__",
    "choose_layer_options",
    "linearize",
    "load_converted",
    "load_segmenter",
    "open_source",
    "ops",
    "predict",
    "save_converted",
]

_LAZY = {
    "choose_layer_options": "perf_vit.conversion",
    "linearize": "perf_vit.conversion",
    "load_converted": "perf_vit.conversion",
    "load_segmenter": "perf_vit.models",
    "open_source": "perf_vit.sources",
    "predict": "perf_vit.workflows.predict",
    "save_converted": "perf_vit.conversion",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name == "ops":
        return importlib.import_module("perf_vit.ops")
    raise AttributeError(f"module 'perf_vit' has no attribute {name!r}")
