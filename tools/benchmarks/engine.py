"""What the dense engine costs: memory, time beside bare reads and writes and beside the model alone, many small files.

python tools/benchmarks/engine.py scene big.tif --height 20000 --width 20000
python tools/benchmarks/engine.py memory big.tif small.tif
python tools/benchmarks/engine.py overhead big.tif
python tools/benchmarks/engine.py model small.tif --name FOLDER --window-size 1022
python tools/benchmarks/engine.py files folder --count 2000 --before CHECKOUT
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rasterio
import rasterio.shutil
import timm
import torch
import typer
from rasterio.windows import Window as RasterioWindow
from torch import nn

import perf_vit
from perf_vit.conversion import load_converted
from perf_vit.inference import DenseOutput, SegmentationPredictOptions, SegmentationPredictor, Strip
from perf_vit.models import SegmentationSpec
from perf_vit.sources import open_source
from perf_vit.tiling import grid_windows
from perf_vit.transforms import Normalizer
from perf_vit.types import GeoImage, Source
from perf_vit.writers import CogWriter, RasterLayout

app = typer.Typer(add_completion=False, help=__doc__)

# Deflate as maps of measurements have it; rasterio's defaults are level 6 and no predictor.
_FAST = {"zlevel": 1, "predictor": 2}

_MODEL = "performer_vit_small_patch16_224"

Runs = Annotated[int, typer.Option(help="Repetitions; the median counts.")]
WindowSize = Annotated[int, typer.Option(help="Side of a window, in pixels.")]


@app.command()
def scene(path: Path, height: int = 20_000, width: int = 20_000, bands: int = 3, seed: int = 0) -> None:
    """Write a Cloud-Optimised GeoTIFF of smooth fields with noise, which compresses about as imagery does."""
    rng = np.random.default_rng(seed)
    place = rasterio.Affine(0.1, 0, 400_000, 0, -0.1, 4_500_000)
    layout = {"height": height, "width": width, "num_bands": bands, "crs": "EPSG:32637", "transform": place}
    with CogWriter(path, RasterLayout(dtype="uint8", **layout)) as writer:
        for row in range(0, height, 500):
            rows = min(500, height - row)
            waves = 90 + 60 * np.sin(np.arange(row, row + rows) / 97)[:, None] * np.cos(np.arange(width) / 131)
            noise = rng.integers(0, 12, (bands, rows, width), dtype=np.uint8)
            writer.write(row, (waves.astype(np.uint8) + noise).astype(np.uint8))


@app.command()
def memory(scenes: list[Path], window_size: WindowSize = 1024, overlap: int = 256) -> None:
    """Peak memory of mapping each scene with a stub model, above the process before it."""
    for path in scenes:
        command = [sys.executable, __file__, "map", str(path), "--window-size", str(window_size)]
        done = subprocess.run([*command, "--overlap", str(overlap)], capture_output=True, text=True, check=True)
        typer.echo(f"{path.name}: {done.stdout.strip()}")


@app.command("map", hidden=True)
def map_once(path: Path, window_size: WindowSize = 1024, overlap: int = 256) -> None:
    """Map one scene with a stub and print the peak of this process."""
    source = open_source(path)
    source.read(grid_windows(source.extent, 16, 0)[0])
    before, started = _status_mib("VmRSS"), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        _map_with_stub(path, Path(folder, "map.tif"), window_size, overlap)
    peak = _status_mib("VmHWM")
    size = f"{source.height} x {source.width} x {source.num_bands}"
    typer.echo(
        f"{size}, window {window_size}, overlap {overlap}: {before:.0f} MiB before, {peak:.0f} MiB at most, "
        f"{peak - before:.0f} MiB above; {time.perf_counter() - started:.0f} s"
    )


@app.command()
def overhead(path: Path, runs: Runs = 3, window_size: WindowSize = 1024) -> None:
    """Throughput with a stub model beside bare loops of reads and writes of the same windows."""
    source = open_source(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        bare, fast, cog, engine = (Path(folder, name) for name in ("bare.tif", "fast.tif", "cog.tif", "map.tif"))
        times = _alternate(
            {
                "bare reads and writes": lambda: _copy_bare(path, bare, window_size),
                "the same with the engine's compression": lambda: _copy_bare(path, fast, window_size, **_FAST),
                "the same, copied to a COG": lambda: _copy_to_cog(path, cog, window_size),
                "engine": lambda: _map_with_stub(path, engine, window_size, 0),
            },
            runs,
        )
        sizes = ", ".join(f"{each.stat().st_size / 1e6:.0f}" for each in (bare, fast, cog, engine))
        typer.echo(f"files of {sizes} MB")
        with rasterio.open(bare) as a, rasterio.open(engine) as b:
            for row in range(0, source.height, window_size):
                rows = RasterioWindow(0, row, source.width, min(window_size, source.height - row))
                assert np.array_equal(a.read(window=rows), b.read(window=rows)), "both must write the same pixels"
    _print(times, source.height * source.width, "bare reads and writes")


@app.command()
def model(
    path: Path,
    runs: Runs = 3,
    window_size: WindowSize = 512,
    name: Annotated[str, typer.Option(help="timm's name, or the folder of a converted model.")] = _MODEL,
) -> None:
    """Time of a real backbone in the engine beside its forwards alone, on the same tiles."""
    source = open_source(path)
    windows = grid_windows(source.extent, window_size, 0)
    make = load_converted if Path(name).is_dir() else timm.create_model
    network: Any = make(name, img_size=window_size, in_chans=source.num_bands, num_classes=0).eval()
    prefix, patch_px = network.num_prefix_tokens, network.patch_embed.patch_size[0]
    tiles = [torch.from_numpy(_as_float(source.read(window)))[None] for window in windows]

    class Scores(_Stub):
        def forward(self, tiles: torch.Tensor) -> torch.Tensor:
            return scores(tiles)

    def scores(tiles: torch.Tensor) -> torch.Tensor:
        tokens = network.forward_features(tiles)[:, prefix:, :3].transpose(1, 2)
        side = window_size // patch_px
        return torch.nn.functional.interpolate(tokens.reshape(-1, 3, side, side), scale_factor=float(patch_px))

    def alone() -> None:
        with torch.inference_mode():
            for tile in tiles:
                scores(tile)

    def engine() -> None:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            _map(Scores(source, 3), source, Path(folder, "map.tif"), window_size, 0)

    alone()
    _print(_alternate({"model alone": alone, "engine": engine}, runs), source.height * source.width, "model alone")


@app.command()
def files(
    folder: Path,
    count: Annotated[int, typer.Option(help="Number of files, each of 256 px.")] = 2000,
    before: Annotated[Path | None, typer.Option(help="Checkout of other code to compare with.")] = None,
    runs: Runs = 3,
) -> None:
    """Throughput of class maps of many small files with a stub model; of other code too, in turns."""
    _make_files(folder, count)
    checkouts = {"this code": Path(__file__).parents[2], **({} if before is None else {"code before": before})}
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in checkouts}
    maps: dict[str, list[bytes]] = {}
    for _ in range(runs):
        for name, checkout in checkouts.items():
            with tempfile.TemporaryDirectory(dir=folder.parent) as out:
                times[name].append(_timed_files(folder, Path(out), checkout))
                maps[name] = [_pixels_of(path) for path in sorted(Path(out).glob("*.tif"))]
                assert len(maps[name]) == count, "every file must have its map"
    assert all(each == maps["this code"] for each in maps.values()), "all must write the same pixels"
    for name, found in times.items():
        made, cpu, again = np.median(found, axis=0) / count
        first = np.median(times["code before" if before else "this code"], axis=0) / count
        typer.echo(
            f"{name}: {1e3 * made:.1f} ms a file ({first[0] / made:.2f} times the rate), {1e3 * cpu:.1f} ms of "
            f"processors ({first[1] / cpu:.2f}); {1e3 * again:.1f} ms where the maps are there ({first[2] / again:.2f})"
        )


@app.command("map-files", hidden=True)
def map_files(folder: Path, out: Path) -> None:
    """Map a folder with a stub, again, and print seconds, seconds of processors, and seconds of the second time."""
    first = sorted(folder.iterdir())[0]
    model = _Stub(open_source(first), 3)
    with tempfile.TemporaryDirectory(dir=out) as warm:
        perf_vit.predict(model, first, Path(warm, "map.tif"), progress=False, device="cpu")
    started, cpu = time.perf_counter(), time.process_time()
    perf_vit.predict(model, folder, out, progress=False, device="cpu")
    made, cpu = time.perf_counter() - started, time.process_time() - cpu
    started = time.perf_counter()
    perf_vit.predict(model, folder, out, progress=False, device="cpu")
    typer.echo(f"{made} {cpu} {time.perf_counter() - started}")


def _timed_files(folder: Path, out: Path, checkout: Path) -> tuple[float, ...]:
    command = [sys.executable, __file__, "map-files", str(folder), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return tuple(map(float, done.stdout.split()[-3:]))


def _make_files(folder: Path, count: int) -> None:
    """Write georeferenced files of smooth fields, whose largest band makes a map of areas."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    size = {"height": 256, "width": 256, "count": 3, "dtype": "uint8", "crs": "EPSG:32637"}
    for index in range(count):
        if (path := folder / f"{index:05d}.tif").exists():
            continue
        coarse = torch.from_numpy(rng.random((1, 3, 9, 9), np.float32) * 255)
        pixels = torch.nn.functional.interpolate(coarse, (256, 256), mode="bicubic").clamp(0, 255)[0].byte().numpy()
        place = rasterio.Affine(0.1, 0, 400_000 + 25.6 * index, 0, -0.1, 4_500_000)
        with rasterio.open(path, "w", driver="GTiff", transform=place, compress="deflate", **size) as file:
            file.write(pixels)


def _pixels_of(path: Path) -> bytes:
    with rasterio.open(path) as file:
        return bytes(file.read().tobytes())


def _map_with_stub(path: Path, out: Path, window_size: int, overlap: int) -> None:
    source = open_source(path)
    _map(_Stub(source, source.num_bands), source, out, window_size, overlap)


class _Stub(nn.Module):
    """A model that gives its input as scores."""

    size_multiple = 1
    task = "segmentation"

    def __init__(self, source: Source, num_channels: int) -> None:
        super().__init__()
        same = Normalizer((0.0,) * source.num_bands, (1.0,) * source.num_bands)
        classes = tuple(f"band {index}" for index in range(num_channels))
        self.spec = SegmentationSpec(classes=classes, normalizer=same, tile_px=min(512, source.width))

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Scores that are the pixels."""
        return tiles


class _Bytes(SegmentationPredictor):
    """Writes scores as bytes."""

    def output(self) -> DenseOutput:
        """One band a channel."""
        names = self.model.spec.classes
        return DenseOutput(encode=_as_bytes, band_names=names, dtype="uint8", nodata=None, overviews="average")


def _map(model: Any, source: Source, out: Path, window_size: int, overlap: int) -> None:
    options = SegmentationPredictOptions(window_size=window_size, overlap=overlap, device="cpu", overwrite=True)
    _Bytes(model, options).run(source, out)


def _copy_bare(path: Path, out: Path, window_size: int, **options: Any) -> None:
    with rasterio.open(path) as source:
        profile = {"driver": "GTiff", "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"}
        profile |= options
        layout = {key: source.profile[key] for key in ("height", "width", "count", "dtype", "crs", "transform")}
        with rasterio.open(out, "w", **layout, **profile) as target:
            for row in range(0, source.height, window_size):
                for col in range(0, source.width, window_size):
                    size = min(window_size, source.width - col), min(window_size, source.height - row)
                    window = RasterioWindow(col, row, *size)
                    target.write(source.read(window=window), window=window)


def _copy_to_cog(path: Path, out: Path, window_size: int) -> None:
    """Write the kind of file that the engine writes: a loop, and GDAL's driver with all processors."""
    tiles = out.with_suffix(".tiles.tif")
    _copy_bare(path, tiles, window_size, compress="none")
    options = {"compress": "deflate", "predictor": "yes", "level": 1, "blocksize": 512, "num_threads": "all_cpus"}
    rasterio.shutil.copy(tiles, out, driver="COG", overview_resampling="average", **options)
    tiles.unlink()


def _as_float(image: GeoImage) -> Any:
    return image.pixels.astype(np.float32)


def _as_bytes(strip: Strip) -> Any:
    return strip.scores.astype(np.uint8)


def _alternate(contenders: dict[str, Callable[[], None]], runs: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds, and seconds of processors, of each run."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(runs):
        for name, run in contenders.items():
            started, cpu = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - started, time.process_time() - cpu))
    return times


def _print(times: dict[str, list[tuple[float, float]]], num_pixels: int, baseline: str) -> None:
    medians = {name: np.median(values, axis=0).tolist() for name, values in times.items()}
    for name, (median, cpu) in medians.items():
        each = ", ".join(f"{value:.1f}" for value, _ in times[name])
        typer.echo(
            f"{name}: {median:.2f} s ({each}), {cpu:.2f} s of processors, {num_pixels / median / 1e6:.1f} Mpx/s, "
            f"{medians[baseline][0] / median:.2f} of the throughput of {baseline}"
        )


def _status_mib(key: str) -> float:
    """A figure of this process from Linux, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    app()
