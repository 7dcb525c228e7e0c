"""A slide with bounds from prediction to labels: all that leaves lies where QuPath shows it."""

import json
from pathlib import Path

import numpy as np
import pytest
import shapely
import tifffile
import torch
from bounded import BOUNDS, bounded_slide, with_bounds
from torch import nn

from perf_vit.inference import SegmentationPredictor
from perf_vit.inference.options import SegmentationPredictOptions
from perf_vit.labels import open_labels
from perf_vit.models import SegmentationSpec
from perf_vit.sources import open_source
from perf_vit.sources.slides.ome_xml import parse_ome_tags
from perf_vit.transforms import Normalizer
from perf_vit.types import IGNORE_INDEX, Window
from perf_vit.writers import CogWriter, RasterLayout

# In pixels of level 0: left, top, right, bottom.
TISSUE = (160, 120, 320, 240)


class PinkSegmenter(nn.Module):
    """Finds what has little green."""

    task = "segmentation"
    size_multiple = 1

    def __init__(self, mpp: float) -> None:
        super().__init__()
        normalizer = Normalizer((0.0,) * 3, (1.0,) * 3)
        self.spec = SegmentationSpec(
            classes=("other", "Tumor"), normalizer=normalizer, tile_px=64, mpp=mpp, background="other"
        )

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        return torch.stack([tiles[:, 1] - 200, 200 - tiles[:, 1]], 1)


@pytest.fixture
def slide(tmp_path: Path, monkeypatch) -> Path:
    with_bounds(monkeypatch, **BOUNDS)
    return bounded_slide(tmp_path / "case.svs", TISSUE)


def inside(left: float, top: float, right: float, bottom: float) -> tuple[float, ...]:
    """A box of level 0 in QuPath's coordinates."""
    return left - BOUNDS["x"], top - BOUNDS["y"], right - BOUNDS["x"], bottom - BOUNDS["y"]


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_maps_and_polygons_lie_over_the_picture_of_qupath(slide, tmp_path, scale) -> None:
    options = SegmentationPredictOptions(polygons="geojson", window_size=64)
    predictor = SegmentationPredictor(PinkSegmenter(0.5 * scale), options)
    out = tmp_path / "map.ome.tif"
    predictor.run(slide, out)
    with tifffile.TiffFile(out) as tiff:
        found = tiff.asarray()
        tags = parse_ome_tags(tiff.ome_metadata)
    assert found.shape == (BOUNDS["height"] // scale, BOUNDS["width"] // scale)
    expected = np.zeros(found.shape, bool)
    left, top, right, bottom = (int(side) // scale for side in inside(*TISSUE))
    expected[top:bottom, left:right] = True
    assert np.array_equal(found == 1, expected)
    assert tags["PERF_VIT_FRAME"] == (
        f"QuPath: x = {scale} * column + 0, y = {scale} * row + 0, in pixels of level 0 from (96, 64)"
    )
    content = json.loads((tmp_path / "map.ome.geojson").read_text())
    (feature,) = content["features"]
    assert shapely.geometry.shape(feature["geometry"]).bounds == inside(*TISSUE)
    # Drawn in QuPath they are labels of the same pixels.
    source = open_source(slide, mpp=0.5)
    labels = open_labels(
        tmp_path / "map.ome.geojson", source, attribute="classification", classes=["other", "Tumor"]
    ).read(source.extent)
    green = source.read(source.extent).pixels[1]
    assert np.array_equal(labels == 1, green < 200)


@pytest.mark.parametrize("options", [{"level": 0}, {"level": 1}, {"level": 2}, {"mpp": 1.3}, {"mpp": 0.4}])
def test_the_part_inside_the_bounds_is_a_part_of_the_slide(slide, options) -> None:
    whole = open_source(slide, **options)
    part = whole.within_bounds()
    assert part.whole is whole
    assert part.within_bounds() is part
    place = ~whole.frame.to_level0 @ part.frame.to_level0
    assert part.frame.to_qupath @ (0, 0) == pytest.approx((0, 0), abs=max(whole.downsample_xy) / 2)
    assert np.allclose(part.size[::-1], np.divide([BOUNDS["width"], BOUNDS["height"]], part.downsample_xy), atol=0.5)
    if "level" in options:
        row, col = round(place.f), round(place.c)
        image = whole.read(Window(row, col, *part.size))
        assert np.array_equal(part.read(part.extent).pixels, image.pixels)
        assert np.array_equal(part.read(part.extent).valid, image.valid)
    else:
        # Resampled from the corner of the bounds: all of it is valid.
        assert part.read(Window(1, 1, part.height - 2, part.width - 2)).valid.all()
    reduced = part.read_reduced(40)
    assert max(reduced.pixels.shape[1:]) == 40
    assert reduced.valid.mean() > 0.9


def test_slides_without_bounds_are_their_own_part(tmp_path) -> None:
    source = open_source(bounded_slide(tmp_path / "plain.svs", TISSUE))
    assert source.within_bounds() is source


@pytest.mark.parametrize("is_whole", [True, False], ids=["level0", "bounds"])
def test_masks_label_all_of_level_0_or_the_picture_of_qupath_by_their_size(slide, tmp_path, is_whole) -> None:
    corner = (0, 0) if is_whole else (BOUNDS["x"], BOUNDS["y"])
    size = (400, 480) if is_whole else (BOUNDS["height"], BOUNDS["width"])
    mask = np.zeros(size, np.uint8)
    mask[TISSUE[1] - corner[1] : TISSUE[3] - corner[1], TISSUE[0] - corner[0] : TISSUE[2] - corner[0]] = 1
    layout = RasterLayout(height=size[0], width=size[1], num_bands=1, dtype=np.dtype("uint8"))
    with CogWriter(tmp_path / "mask.tif", layout) as writer:
        writer.write(0, mask[None])
    whole = open_source(slide)
    for source in (whole, whole.within_bounds()):
        labels = open_labels(tmp_path / "mask.tif", source, classes=["other", "Tumor"], paired=True)
        read = labels.read(source.extent)
        green = source.read(source.extent).pixels[1]
        assert np.array_equal(read == 1, green < 200)
        outside = Window(0, 0, 1, 1) if source is whole and not is_whole else None
        assert outside is None or (labels.read(outside) == IGNORE_INDEX).all()
        labels.close()
