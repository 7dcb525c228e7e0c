"""Checkpoints of untrained networks for rasters of three bands, one a task, and a raster with missing pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from affine import Affine
from command_line import save_detector

from perf_vit.models import (
    CHECKPOINT_KEY,
    ClassificationModelConfig,
    ClassificationSpec,
    DetectionSpec,
    SegmentationModelConfig,
    SegmentationSpec,
    SlideClassificationModelConfig,
    SlideClassificationSpec,
    build_classifier,
    build_segmenter,
    build_slide_classifier,
    checkpoint_metadata,
)
from perf_vit.transforms import Normalizer

BACKBONE = {
    "backbone": "performer_vit_tiny_patch16_224",
    "backbone_kwargs": {"depth": 1, "embed_dim": 64, "num_heads": 2, "attn_kwargs": {"num_features": 16}},
}
NORMALIZER = Normalizer((100.0,) * 3, (50.0,) * 3)
DETECTOR_SPEC = DetectionSpec(
    classes=("car",), normalizer=NORMALIZER, tile_px=64, label_options={"label_format": "csv"}
)


def _save(path: Path, config: Any, model: torch.nn.Module) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, CHECKPOINT_KEY: checkpoint_metadata(config, model)}, path)
    return path


def save_segmenter(
    path: Path,
    target: str = "thing",
    num_bands: int = 3,
    tile_px: int = 32,
    *,
    depth: int = 1,
    out_indices: Sequence[int] = (0,),
    head: str = "linear",
    **backbone_kwargs: Any,
) -> Path:
    """Of two classes."""
    normalizer = Normalizer((100.0,) * num_bands, (50.0,) * num_bands)
    options = {
        "backbone_kwargs": {**BACKBONE["backbone_kwargs"], "depth": depth, **backbone_kwargs},
        "out_indices": list(out_indices),
    }
    config = SegmentationModelConfig(**{**BACKBONE, **options}, head=head)
    labels = {"background": "rest"}
    spec = SegmentationSpec(classes=("rest", target), normalizer=normalizer, tile_px=tile_px, label_options=labels)
    return _save(path, config, build_segmenter(config, spec))


def save_classifier(path: Path, kind: str) -> Path:
    """Of two classes, or of one number."""
    config = ClassificationModelConfig(**BACKBONE, pool="avg")
    named: dict[str, Any] = {"classes": ("a", "b")}
    if kind == "regression":
        named = {"classes": ("height",), "target_mean": (0.0,), "target_std": (1.0,)}
    columns = {"image_column": "image", **({} if kind == "regression" else {"label_column": "label"})}
    spec = ClassificationSpec(kind=kind, normalizer=NORMALIZER, tile_px=32, label_options=columns, **named)
    return _save(path, config, build_classifier(config, spec))


def save_slide_classifier(path: Path) -> Path:
    """Of two classes."""
    config = SlideClassificationModelConfig(**BACKBONE, pool="avg", hidden_dim=16, attention_dim=8)
    columns = {"image_column": "slide", "label_column": "label"}
    spec = SlideClassificationSpec(
        classes=("large", "small"), normalizer=NORMALIZER, tile_px=32, mpp=1.0, tissue="otsu", min_tissue=0.2,
        slide_mpp=0.5, label_options=columns,
    )  # fmt: skip
    return _save(path, config, build_slide_classifier(config, spec))


def save_small_detector(path: Path) -> Path:
    """Of one class."""
    return save_detector(path, DETECTOR_SPEC, head="fcos", head_kwargs={"num_convs": 1})


def write_half_empty(path, nodata: float | None = 0) -> None:
    """A raster of 96 x 160 px whose columns from 70 on are nodata."""
    pixels = np.random.default_rng(0).integers(1, 255, (3, 96, 160)).astype(np.uint8)
    pixels[:, :, 70:] = 0
    profile = {"driver": "GTiff", "height": 96, "width": 160, "count": 3, "dtype": "uint8", "crs": "EPSG:32636"}
    with rasterio.open(
        path, "w", transform=Affine(0.5, 0, 500_000, 0, -0.5, 4_000_000), nodata=nodata, **profile
    ) as file:
        file.write(pixels)
