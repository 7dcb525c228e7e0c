import numpy as np
import pytest
import torch

from perf_vit.errors import InputError
from perf_vit.inference import predict_strips
from perf_vit.io import CogWriter, open_source
from perf_vit.types import GeoImage, Window


def as_float(image: GeoImage) -> np.ndarray:
    return image.pixels.astype(np.float32)


class Recorder:
    """An identity model that counts the tiles it sees."""

    def __init__(self) -> None:
        self.num_tiles = 0

    def __call__(self, tiles: torch.Tensor) -> torch.Tensor:
        self.num_tiles += len(tiles)
        return tiles


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("num_bands", [1, 7])
@pytest.mark.parametrize(
    ("height", "width", "window", "overlap"), [(97, 131, 32, 8), (33, 20, 64, 16), (65, 64, 64, 0)]
)
def test_an_identity_model_returns_the_raster_bit_for_bit(
    make_scene, tmp_path, dtype, num_bands, height, width, window, overlap
) -> None:
    nodata = -9999.0 if dtype == "float32" else 0
    path = make_scene(height=height, width=width, num_bands=num_bands, dtype=dtype, nodata=nodata)
    source = open_source(path)
    out = tmp_path / "out.tif"
    writer = CogWriter(
        out,
        height=source.height,
        width=source.width,
        num_bands=num_bands,
        dtype=dtype,
        crs=source.crs,
        transform=source.transform,
        nodata=source.nodata,
    )
    strips = predict_strips(
        Recorder(),
        source,
        as_float,
        extent=source.extent,
        num_channels=num_bands,
        window_size=window,
        overlap=overlap,
        batch_size=3,
    )
    with writer:
        for strip in strips:
            writer.write(strip.window.row, np.where(strip.valid, strip.scores, nodata).astype(dtype))

    expected, got = open_source(path), open_source(out)
    before, after = expected.read(expected.extent), got.read(got.extent)
    assert after.pixels.dtype == np.dtype(dtype)
    assert np.array_equal(before.pixels, after.pixels)
    assert np.array_equal(before.valid, after.valid)
    assert not before.valid.all()
    assert (got.crs, got.nodata) == (expected.crs, expected.nodata)
    assert got.transform.almost_equals(expected.transform, precision=1e-9)


class Plane:
    """A source in memory, valid in a part of it."""

    def __init__(self, pixels: np.ndarray, valid: np.ndarray) -> None:
        self.pixels, self.valid = pixels, valid

    def read(self, window: Window) -> GeoImage:
        rows, cols = slice(window.row, window.row_stop), slice(window.col, window.col_stop)
        return GeoImage(self.pixels[:, rows, cols], self.valid[rows, cols])


def test_windows_without_a_valid_pixel_skip_the_model() -> None:
    valid = np.zeros((64, 64), bool)
    valid[:16, :16] = True
    plane, model = Plane(np.ones((1, 64, 64), np.float32), valid), Recorder()
    strips = list(
        predict_strips(model, plane, as_float, extent=Window(0, 0, 64, 64), num_channels=1, window_size=16, overlap=0)
    )
    assert model.num_tiles == 1
    assert np.array_equal(np.concatenate([s.valid for s in strips]), valid)


def test_strips_cover_the_extent_once_in_order_and_report_progress() -> None:
    plane = Plane(np.ones((1, 70, 50), np.float32), np.ones((70, 50), bool))
    seen = []
    extent = Window(3, 5, 61, 40)
    strips = list(
        predict_strips(
            Recorder(),
            plane,
            as_float,
            extent=extent,
            num_channels=1,
            window_size=16,
            overlap=6,
            batch_size=2,
            on_window=lambda done, total: seen.append((done, total)),
        )
    )
    rows = [row for s in strips for row in range(s.window.row, s.window.row_stop)]
    assert rows == list(range(3, 64))
    assert all((s.window.col, s.window.width) == (5, 40) for s in strips)
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_model_of_another_output_shape_is_refused() -> None:
    plane = Plane(np.ones((1, 16, 16), np.float32), np.ones((16, 16), bool))
    strips = predict_strips(
        lambda tiles: tiles[..., ::2, ::2],
        plane,
        as_float,
        extent=Window(0, 0, 16, 16),
        num_channels=1,
        window_size=16,
        overlap=0,
    )
    with pytest.raises(InputError, match="expected scores of shape"):
        next(strips)


def test_bfloat16_autocast_stays_close_to_float32() -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 2, 3, padding=1)
    rng = np.random.default_rng(0)
    plane = Plane(rng.standard_normal((3, 40, 40)).astype(np.float32), np.ones((40, 40), bool))
    options = {"extent": Window(0, 0, 40, 40), "num_channels": 2, "window_size": 16, "overlap": 4}
    exact, half = (
        np.concatenate([s.scores for s in predict_strips(conv, plane, as_float, precision=p, **options)], axis=1)
        for p in (torch.float32, torch.bfloat16)
    )
    assert 0 < np.abs(exact - half).max() < 0.05
