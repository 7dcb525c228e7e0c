import threading
import time
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import perf_vit  # noqa: F401  (registers the backbones)
from perf_vit.errors import DamagedDataError, InputError, UnreachableError
from perf_vit.inference import Strip, StripMaker, TileModel, predict_strips
from perf_vit.inference.dense_output import class_map
from perf_vit.inference.prefetch import Reads, SalvagingReader
from perf_vit.sources import open_source
from perf_vit.types import GeoImage, Window
from perf_vit.writers import CogWriter, RasterLayout


def as_float(image: GeoImage) -> np.ndarray:
    return image.pixels.astype(np.float32)


class Recorder:
    """An identity model that counts the tiles it sees."""

    def __init__(self) -> None:
        self.num_tiles = 0

    def __call__(self, tiles: torch.Tensor) -> torch.Tensor:
        self.num_tiles += len(tiles)
        return tiles


def strips_of(
    model: TileModel,
    source: Reads,
    *,
    extent: Window,
    num_channels: int,
    window_size: int,
    overlap: int,
    rows: tuple[int | None, int | None] = (None, None),
    blend: str = "hann",
    **options: Any,
) -> Generator[Any, None, None]:
    """Strips of unnormalised pixels."""
    maker = StripMaker(
        extent=extent,
        num_channels=num_channels,
        window_size=window_size,
        overlap=overlap,
        start_row=rows[0],
        stop_row=rows[1],
        blend=blend,
    )
    return predict_strips(model, source, as_float, maker, **options)


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
        RasterLayout(
            height=source.height,
            width=source.width,
            num_bands=num_bands,
            dtype=dtype,
            crs=source.crs,
            transform=source.transform,
            nodata=source.nodata,
        ),
    )
    strips = strips_of(
        Recorder(),
        source,
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
    strips = list(strips_of(model, plane, extent=Window(0, 0, 64, 64), num_channels=1, window_size=16, overlap=0))
    assert model.num_tiles == 1
    assert np.array_equal(np.concatenate([s.valid for s in strips]), valid)


def test_strips_cover_the_extent_once_in_order_and_report_progress() -> None:
    plane = Plane(np.ones((1, 70, 50), np.float32), np.ones((70, 50), bool))
    seen = []
    extent = Window(3, 5, 61, 40)
    strips = list(
        strips_of(
            Recorder(),
            plane,
            extent=extent,
            num_channels=1,
            window_size=16,
            overlap=6,
            batch_size=2,
            on_progress=lambda done, total: seen.append((done, total)),
        )
    )
    rows = [row for s in strips for row in range(s.window.row, s.window.row_stop)]
    assert rows == list(range(3, 64))
    assert all((s.window.col, s.window.width) == (5, 40) for s in strips)
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_batches_run_across_rows_of_windows_and_leave_out_windows_without_data() -> None:
    valid = np.ones((70, 50), bool)
    valid[16:32, :32] = False
    plane, sizes = Plane(np.ones((1, 70, 50), np.float32), valid), []

    def model(tiles: torch.Tensor) -> torch.Tensor:
        sizes.append(len(tiles))
        return tiles

    options = {"extent": Window(0, 0, 64, 48), "num_channels": 1, "window_size": 16, "overlap": 0}
    strips = list(strips_of(model, plane, batch_size=4, **options))
    # Rows of windows hold 3, 1, 3 and 3 windows with data.
    assert sizes == [4, 4, 2]
    assert np.array_equal(np.concatenate([strip.valid for strip in strips]), valid[:64, :48])


def test_a_long_gap_without_data_holds_no_batch_of_it() -> None:
    valid = np.zeros((16, 16 * 200), bool)
    valid[:, :16] = valid[:, -16:] = True
    plane, done = Plane(np.ones((1, *valid.shape), np.float32), valid), []
    options = {"extent": Window(0, 0, *valid.shape), "num_channels": 1, "window_size": 16, "overlap": 0}
    model = Recorder()
    [strip] = strips_of(model, plane, batch_size=8, on_progress=lambda count, total: done.append(count), **options)
    assert model.num_tiles == 2
    assert np.array_equal(strip.valid, valid)
    assert max(np.diff([0, *done])) <= 40
    assert done[-1] == 200


def test_strips_are_finished_in_another_thread_while_the_model_computes() -> None:
    plane = Plane(np.ones((1, 64, 16), np.float32), np.ones((64, 16), bool))
    finished, threads = threading.Event(), set()

    def model(tiles: torch.Tensor) -> torch.Tensor:
        threads.add(threading.current_thread())
        if len(threads) == 1 and model.calls == 3:
            # The first rows are finished although this call hasn't returned.
            assert finished.wait(10)
        model.calls += 1
        return tiles

    model.calls = 0

    def finish(strip: Strip) -> int:
        threads.add(threading.current_thread())
        finished.set()
        return strip.window.row

    options = {"extent": Window(0, 0, 64, 16), "num_channels": 1, "window_size": 16, "overlap": 0}
    rows = list(strips_of(model, plane, finish=finish, **options))
    assert rows == [0, 16, 32, 48]
    assert len(threads) == 2


def _num_threads_after(run) -> int:
    """Threads that a run which fails leaves behind."""
    before = threading.active_count()
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        run()
    return threading.active_count() - before


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()])
def test_errors_of_finishing_and_of_the_model_reach_the_caller_and_leave_no_thread(error: BaseException) -> None:
    plane = _random_plane(1, 64, 64)
    options = {"extent": Window(0, 0, 64, 64), "num_channels": 1, "window_size": 16, "overlap": 0}

    def fail(_: object) -> None:
        raise error

    assert _num_threads_after(lambda: list(strips_of(Recorder(), plane, finish=fail, **options))) == 0
    assert _num_threads_after(lambda: list(strips_of(fail, plane, **options))) == 0


def test_rows_before_an_error_are_finished() -> None:
    class Broken(Plane):
        def read(self, window: Window) -> GeoImage:
            if window.row >= 48:
                raise DamagedDataError("rows 48 to 64 can't be read")
            return super().read(window)

    plane, rows = Broken(np.ones((1, 64, 16), np.float32), np.ones((64, 16), bool)), []
    options = {"extent": Window(0, 0, 64, 16), "num_channels": 1, "window_size": 16, "overlap": 0}
    with pytest.raises(DamagedDataError):
        list(strips_of(Recorder(), plane, finish=lambda strip: rows.append(strip.window.row), **options))
    assert rows == [0, 16]


def test_closing_early_stops_all_threads_and_asks_the_model_for_nothing_more() -> None:
    plane, model, before = _random_plane(1, 640, 64), Recorder(), threading.active_count()
    options = {"extent": Window(0, 0, 640, 64), "num_channels": 1, "window_size": 16, "overlap": 0}
    strips = strips_of(model, plane, **options)
    next(strips)
    num_tiles = model.num_tiles
    strips.close()
    assert threading.active_count() == before
    assert model.num_tiles == num_tiles < 40


def test_a_model_of_another_output_shape_is_refused() -> None:
    plane = Plane(np.ones((1, 16, 16), np.float32), np.ones((16, 16), bool))
    strips = strips_of(
        lambda tiles: tiles[..., ::2, ::2],
        plane,
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
        np.concatenate([s.scores for s in strips_of(conv, plane, dtype=p, **options)], axis=1)
        for p in (torch.float32, torch.bfloat16)
    )
    assert 0 < np.abs(exact - half).max() < 0.05


class Slow:
    """A plane whose windows come in another order than they were asked for."""

    def __init__(self, plane: Plane, seed: int) -> None:
        self.plane, self.rng = plane, np.random.default_rng(seed)

    def read(self, window: Window) -> GeoImage:
        time.sleep(float(self.rng.random()) * 0.004)
        return self.plane.read(window)


def _scores(model, plane, **options) -> np.ndarray:
    strips = strips_of(model, plane, **options)
    return np.concatenate([strip.scores for strip in strips], axis=1)


def _random_plane(num_bands: int, height: int, width: int) -> Plane:
    rng = np.random.default_rng(3)
    valid = rng.random((height, width)) > 0.1
    valid[:20, :20] = False
    return Plane(rng.standard_normal((num_bands, height, width)).astype(np.float32), valid)


def _tile_sum(tiles: torch.Tensor) -> torch.Tensor:
    """A model whose scores at a pixel depend on all of its tile, computed tile by tile."""
    return torch.stack([tile + torch.cumsum(tile.flatten(), 0).reshape(tile.shape) / tile.numel() for tile in tiles])


def test_strips_do_not_depend_on_batches_readers_or_the_order_of_reading() -> None:
    plane = _random_plane(2, 75, 93)
    options = {"extent": Window(0, 0, 75, 93), "num_channels": 2, "window_size": 16, "overlap": 7}
    expected = _scores(_tile_sum, plane, **options)
    for batch_size, num_readers, seed in [(3, 1, 0), (1, 5, 1), (8, 4, 2), (50, 2, 3), (1000, None, 4)]:
        got = _scores(_tile_sum, Slow(plane, seed), batch_size=batch_size, num_readers=num_readers, **options)
        assert np.array_equal(got, expected)


def test_a_window_as_large_as_the_scene_gives_the_models_own_forward() -> None:
    backbone = timm.create_model("performer_vit_tiny_patch16_224", img_size=64, num_classes=0).eval()

    def model(tiles: torch.Tensor) -> torch.Tensor:
        tokens = backbone.forward_features(tiles)[:, 1:, :3]
        return torch.nn.functional.interpolate(tokens.transpose(1, 2).reshape(-1, 3, 4, 4), scale_factor=16)

    plane = Plane(np.random.default_rng(0).standard_normal((3, 64, 64)).astype(np.float32), np.ones((64, 64), bool))
    with torch.inference_mode():
        expected = model(torch.from_numpy(plane.pixels)[None])[0].numpy()
    for blend in ("hann", "gaussian"):
        options = {"extent": Window(0, 0, 64, 64), "num_channels": 3, "window_size": 64, "overlap": 0, "blend": blend}
        assert np.array_equal(_scores(model, plane, **options), expected)


@pytest.mark.parametrize(("height", "width"), [(70, 101), (32, 33), (20, 60)])
@pytest.mark.parametrize("overlap", [8, 16, 25])
def test_gaussian_blending_equals_monais(height: int, width: int, overlap: int) -> None:
    sliding_window_inference = pytest.importorskip("monai.inferers").sliding_window_inference
    plane = _random_plane(2, height, width)
    plane.valid[:] = True
    size = 32
    padded = Padded(plane)
    got = _scores(_tile_sum, padded, extent=Window(0, 0, height, width), num_channels=2, window_size=size,
                  overlap=overlap, blend="gaussian")  # fmt: skip
    image = torch.from_numpy(padded.read(Window(0, 0, max(height, size), max(width, size))).pixels)[None]
    expected = sliding_window_inference(image, size, 1, _tile_sum, overlap=overlap / size, mode="gaussian")
    np.testing.assert_allclose(got, expected[0, :, :height, :width], rtol=0, atol=1e-5)


class Padded(Plane):
    """A plane that pads below and on the right with zeros."""

    def __init__(self, plane: Plane) -> None:
        _, self.height, self.width = plane.pixels.shape
        super().__init__(np.pad(plane.pixels, ((0, 0), (0, 64), (0, 64))), np.pad(plane.valid, ((0, 64), (0, 64))))


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 90),
    size=st.sampled_from([8, 16, 24]),
    share=st.floats(0, 0.95),
    rows=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_strips_of_some_rows_are_the_same_bits(height: int, size: int, share: float, rows: list[float]) -> None:
    plane = Padded(_random_plane(2, height, 40))
    options = {"extent": Window(0, 0, height, 40), "num_channels": 2, "window_size": size, "overlap": int(size * share)}
    start_row, stop_row = (round(row * height) for row in rows)
    whole = list(strips_of(_tile_sum, plane, **options))
    some = list(strips_of(_tile_sum, plane, rows=(start_row, stop_row), **options))
    expected = [strip for strip in whole if strip.window.row_stop > start_row and strip.window.row < stop_row]
    assert [strip.window for strip in some] == [strip.window for strip in expected]
    for got, strip in zip(some, expected, strict=True):
        assert np.array_equal(got.scores, strip.scores)
        assert np.array_equal(got.valid, strip.valid)


@pytest.mark.parametrize("num_classes", [1, 2, 3, 255])
def test_the_class_of_a_pixel_is_the_first_of_largest_score(num_classes: int) -> None:
    # Small integers, so that there are ties.
    scores = np.random.default_rng(0).integers(0, 4, (num_classes, 33, 20)).astype(np.float32)
    valid = np.random.default_rng(1).random((33, 20)) > 0.1
    found = class_map(Strip(Window(0, 0, 33, 20), scores, valid))
    assert np.array_equal(found, np.where(valid, scores.argmax(0), 255))


def test_mirror_images_are_averaged() -> None:
    plane = _random_plane(1, 16, 16)
    plane.valid[:] = True
    options = {"extent": Window(0, 0, 16, 16), "num_channels": 1, "window_size": 16, "overlap": 0}
    got = _scores(_tile_sum, plane, flips=True, **options)
    mirrored = [np.flip(_scores(_tile_sum, Plane(np.flip(plane.pixels, axes), plane.valid), **options), axes)
                for axes in ((), (-1,), (-2,), (-2, -1))]  # fmt: skip
    np.testing.assert_allclose(got, np.mean(mirrored, axis=0), atol=1e-6)
    assert not np.allclose(got, mirrored[0], atol=1e-3)


def test_an_error_of_reading_reaches_the_caller_and_stops_the_readers() -> None:
    class Broken(Plane):
        def read(self, window: Window) -> GeoImage:
            if window.row >= 32:
                raise DamagedDataError("rows 32 to 48 can't be read")
            return super().read(window)

    plane = Broken(np.ones((1, 64, 64), np.float32), np.ones((64, 64), bool))
    before = threading.active_count()
    strips = strips_of(Recorder(), plane, extent=Window(0, 0, 64, 64), num_channels=1, window_size=16, overlap=0)
    with pytest.raises(InputError, match="can't be read"):
        list(strips)
    assert threading.active_count() == before


def test_of_a_damaged_window_only_what_is_damaged_is_lost() -> None:
    class Damaged(Plane):
        num_bands, dtype = 1, np.dtype(np.float32)

        def read(self, window: Window) -> GeoImage:
            if window.intersect(Window(128, 192, 64, 128)):
                raise DamagedDataError(f"can't read {window}")
            return super().read(window)

    rng = np.random.default_rng(0)
    plane = Damaged(rng.random((1, 512, 512), np.float32), np.ones((512, 512), bool))
    lost = []
    source = SalvagingReader(plane, lambda window, reason: lost.append((window, reason)))
    strips = list(
        strips_of(Recorder(), source, extent=Window(0, 0, 512, 512), num_channels=1, window_size=192, overlap=64)
    )
    valid = np.concatenate([strip.valid for strip in strips])
    scores = np.concatenate([strip.scores for strip in strips], axis=1)
    expected = np.ones((512, 512), bool)
    expected[128:192, 192:320] = False
    assert np.array_equal(valid, expected)
    assert np.array_equal(scores[0][valid], plane.pixels[0][valid])
    assert all(reason.startswith("can't read Window") for _, reason in lost)


@pytest.mark.parametrize("error", [UnreachableError("HTTP response code: 503"), InputError("can't open a.tif")])
def test_salvaging_takes_nothing_but_damage_for_damage(error) -> None:
    class Gone(Plane):
        num_bands, dtype = 1, np.dtype(np.float32)

        def read(self, window: Window) -> GeoImage:
            raise error

    lost: list[Window] = []
    with pytest.raises(type(error)):
        SalvagingReader(
            Gone(np.ones((1, 200, 200), np.float32), np.ones((200, 200), bool)), lambda window, _: lost.append(window)
        ).read(Window(0, 0, 200, 200))
    assert lost == []


def test_a_damaged_window_that_is_long_is_cut_into_squares() -> None:
    class Damaged(Plane):
        num_bands, dtype = 1, np.dtype(np.float32)

        def read(self, window: Window) -> GeoImage:
            raise DamagedDataError(f"can't read {window}")

    plane = Damaged(np.ones((1, 64, 1024), np.float32), np.ones((64, 1024), bool))
    lost: list[Window] = []
    SalvagingReader(plane, lambda window, _: lost.append(window)).read(Window(0, 0, 64, 1024))
    assert lost == [Window(0, col, 64, 64) for col in range(0, 1024, 64)]
