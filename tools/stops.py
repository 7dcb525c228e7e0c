"""Count the stops of a prediction and of a training on their way through the package: python tools/stops.py.

Prints the package's frames above the network's first forward pass, and the modules in which a function has run until
then and in all.
"""

import inspect
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from torch import nn

import perf_vit
from perf_vit.models import SegmentationModelConfig, SegmentationSpec, Segmenter, build_segmenter
from perf_vit.transforms import Normalizer

ROOT = Path(perf_vit.__file__).parent
SMALL = {"backbone": "performer_vit_tiny_patch16_224", "out_indices": [0, 1]}


@dataclass
class Stops:
    """What a call passed through.

    Attributes:
        frames: "module:function" of the package's frames above the first forward pass of the network.
        modules: Modules in which a function has run.
        modules_before: Those of them until the first forward pass.
    """

    frames: list[str] = field(default_factory=list)
    modules: set[str] = field(default_factory=set)
    modules_before: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        """Frames and modules, a few lines."""
        after = sorted(self.modules - self.modules_before)
        return "\n".join(
            [
                f"{len(self.frames)} frames: {' > '.join(self.frames)}",
                f"{len(self.modules_before)} modules until the network: {' '.join(sorted(self.modules_before))}",
                f"{len(after)} further modules: {' '.join(after)}",
            ]
        )


@contextmanager
def watched() -> Iterator[Stops]:
    """Watch the calls of all threads that begin in the block."""
    stops, imports = Stops(), threading.local()

    def on_call(frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if code.co_name == "<module>" and event in ("call", "return"):
            imports.depth = getattr(imports, "depth", 0) + (1 if event == "call" else -1)
        # Bodies of modules and classes, and what these call, run when they are imported: in the first call only.
        is_passed = event == "call" and code.co_flags & inspect.CO_OPTIMIZED and not getattr(imports, "depth", 0)
        if is_passed and _is_ours(code.co_filename):
            stops.modules.add(_name(code.co_filename))

    def on_forward(module: nn.Module, args: Any) -> None:
        if isinstance(module, Segmenter) and not stops.frames:
            stack = traceback.extract_stack()
            stops.frames = [f"{_name(each.filename)}:{each.name}" for each in stack if _is_ours(each.filename)]
            stops.modules_before = set(stops.modules)

    hook = nn.modules.module.register_module_forward_pre_hook(on_forward)
    threading.setprofile(on_call)
    sys.setprofile(on_call)
    try:
        yield stops
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        hook.remove()


def predict_stops(folder: Path, predict: Callable[..., Any] = perf_vit.predict) -> Stops:
    """The stops of the prediction of a small raster."""
    spec = SegmentationSpec(classes=("a", "b"), normalizer=Normalizer((1.0,) * 3, (1.0,) * 3), tile_px=32)
    model = build_segmenter(SegmentationModelConfig(**SMALL, backbone_kwargs={"depth": 2}), spec).eval()
    image = _write(folder / "image.tif", num_bands=3, stop=256)
    with watched() as stops:
        predict(model, image, folder / "map.tif", progress=False)
    return stops


def train_stops(folder: Path, train: Callable[..., Any] = perf_vit.train) -> Stops:
    """The stops of a training on two small rasters, without the report that is written afterwards."""
    files = {
        part: {
            "image": str(_write(folder / f"{part}.tif", num_bands=3, stop=256, left=left)),
            "labels": str(_write(folder / f"{part}_labels.tif", num_bands=1, stop=2, left=left)),
        }
        for part, left in (("train", 4e5), ("val", 5e5))
    }
    config = {
        "model": {**SMALL, "backbone_kwargs": {"depth": 2}},
        "data": {
            "classes": ["a", "b"],
            **files,
            "tile_px": 32,
            "tiles_per_epoch": 4,
            "batch_size": 2,
            "num_workers": 0,
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "precision": "32-true", "report": False},
    }
    with watched() as stops:
        train(config, out=folder / "run", progress=False)
    return stops


def _write(path: Path, num_bands: int, stop: int, left: float = 4e5) -> Path:
    pixels = np.random.default_rng(0).integers(0, stop, (num_bands, 96, 96), dtype=np.uint8)
    place = {"crs": "EPSG:32637", "transform": Affine(1, 0, left, 0, -1, 4.5e6)}
    with rasterio.open(path, "w", "GTiff", 96, 96, num_bands, dtype="uint8", **place) as file:
        file.write(pixels)
    return path


def _is_ours(file: str) -> bool:
    return file.startswith(f"{ROOT}{os.sep}")


def _name(file: str) -> str:
    return Path(file).relative_to(ROOT).as_posix()


if __name__ == "__main__":
    for title, trace in (("predict", predict_stops), ("train", train_stops)):
        with tempfile.TemporaryDirectory() as scratch:
            print(title, trace(Path(scratch)), "", sep="\n")
