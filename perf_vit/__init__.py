"""perf_vit: vision transformers with linear attention for imagery too large to downsample.

Importing it registers every backbone with timm; rasters, training and inference load when they are first used.
"""

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from perf_vit._version import __version__
from perf_vit.threads import wait_passively

if TYPE_CHECKING:
    from perf_vit import ops
    from perf_vit.conversion import linearize, save_converted
    from perf_vit.models import InputSpec
    from perf_vit.sources import open_source as open  # noqa: A004
    from perf_vit.workflows.convert import convert
    from perf_vit.workflows.distill import distill
    from perf_vit.workflows.evaluate import evaluate
    from perf_vit.workflows.first_config import init
    from perf_vit.workflows.load import load
    from perf_vit.workflows.predict import predict
    from perf_vit.workflows.stream import stream
    from perf_vit.workflows.train import train

__all__ = [
    "InputSpec",
    "__version__",
    "convert",
    "distill",
    "evaluate",
    "init",
    "linearize",
    "load",
    "open",
    "ops",
    "predict",
    "save_converted",
    "stream",
    "train",
    "wait_passively",
]

_LAZY = {
    "InputSpec": ("perf_vit.models", "InputSpec"),
    "convert": ("perf_vit.workflows.convert", "convert"),
    "distill": ("perf_vit.workflows.distill", "distill"),
    "evaluate": ("perf_vit.workflows.evaluate", "evaluate"),
    "init": ("perf_vit.workflows.first_config", "init"),
    "linearize": ("perf_vit.conversion", "linearize"),
    "load": ("perf_vit.workflows.load", "load"),
    "open": ("perf_vit.sources", "open_source"),
    "predict": ("perf_vit.workflows.predict", "predict"),
    "save_converted": ("perf_vit.conversion", "save_converted"),
    "stream": ("perf_vit.workflows.stream", "stream"),
    "train": ("perf_vit.workflows.train", "train"),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(importlib.import_module(module), attribute)
    if name == "ops":
        return importlib.import_module("perf_vit.ops")
    raise AttributeError(f"module 'perf_vit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _is_command() -> bool:
    """Whether this process is the command line, whose help waits for neither torch nor timm."""
    script = PurePath(sys.argv[0]).name if getattr(sys, "argv", None) else ""
    return script in {"perf-vit", "perf-vit.exe"} or sys.orig_argv[1:3] == ["-m", "perf_vit"]


if not _is_command():
    importlib.import_module("perf_vit.backbones")
