"""Small valid images of every layout that the readers know."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import tifffile
from affine import Affine
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning

__all__ = ["CRS", "TRANSFORM", "write_images", "write_raster"]

CRS = "EPSG:32637"
TRANSFORM = Affine(2.5, 0, 401_000, 0, -2.5, 4_510_000)
_SIZE = (48, 64)


def write_raster(path: Path, pixels: np.ndarray, **profile: Any) -> Path:
    """A raster of pixels [C, H, W], a GeoTIFF with a place if nothing else is said."""
    count, height, width = pixels.shape
    options = {"driver": "GTiff", "crs": CRS, "transform": TRANSFORM, **profile}
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", count=count, height=height, width=width, dtype=pixels.dtype, **options
        ) as dataset:
            dataset.write(pixels)
    return path


def write_images(folder: Path, rng: np.random.Generator) -> None:
    """One sub-folder a kind: tiff, png, jpeg, slide, vrt, stac."""
    rgb = rng.integers(1, 255, (3, *_SIZE), np.uint8)
    _write_tiffs(folder / "tiff", rgb)
    _write_pngs(folder / "png", rgb)
    _write_jpegs(folder / "jpeg", rgb)
    _write_slides(folder / "slide", rng)
    _write_lists(folder, folder / "tiff" / "tiled.tif")


def _write_tiffs(folder: Path, rgb: np.ndarray) -> None:
    tiles = {"tiled": True, "blockxsize": 16, "blockysize": 16}
    write_raster(folder / "striped.tif", rgb, nodata=0)
    write_raster(folder / "packbits.tif", rgb, compress="packbits", interleave="band")
    write_raster(folder / "tiled.tif", rgb, compress="deflate", predictor=2, **tiles)
    write_raster(folder / "lzw16.tif", rgb.astype(np.uint16) * 100, compress="lzw", nodata=0, **tiles)
    write_raster(folder / "zstd_float.tif", rgb.astype(np.float32), compress="zstd", predictor=3, nodata=np.nan)
    write_raster(folder / "jpeg.tif", rgb, compress="jpeg", photometric="ycbcr", **tiles)
    write_raster(folder / "big.tif", rgb, BIGTIFF="YES", compress="lzma")
    write_raster(folder / "big_endian.tif", rgb, ENDIANNESS="BIG")
    write_raster(folder / "mask.tif", (rgb[:1] > 128).astype(np.uint8), NBITS=1)
    write_raster(folder / "cog.tif", np.repeat(np.repeat(rgb, 12, 1), 12, 2), driver="COG", blocksize=128)
    write_raster(folder / "plain.tif", rgb, crs=None, transform=None)
    with rasterio.open(write_raster(folder / "palette.tif", rgb[:1] % 2), "r+") as dataset:
        dataset.write_colormap(1, {value: (60 * value, 0, 0, 255) for value in range(4)})
    masked = write_raster(folder / "internal_mask.tif", rgb)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(masked, "r+") as dataset:
        dataset.write_mask(rgb[0] > 60)
    with rasterio.open(write_raster(folder / "overviews.tif", rgb, **tiles), "r+") as dataset:
        dataset.build_overviews([2, 4])
    write_raster(folder / "alpha.tif", np.concatenate([rgb, rgb[:1] // 128 * 255]), photometric="rgb", alpha="yes")


def _write_pngs(folder: Path, rgb: np.ndarray) -> None:
    folder.mkdir(parents=True)
    image = Image.fromarray(np.ascontiguousarray(rgb.transpose(1, 2, 0)))
    image.save(folder / "rgb.png")
    image.quantize(16).save(folder / "palette.png", transparency=0)
    image.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(rgb[0] % 2).save(folder / "grey.png")
    image.convert("1").save(folder / "bilevel.png")
    Image.fromarray(rgb[0].astype(np.uint16) % 2).save(folder / "grey16.png")


def _write_jpegs(folder: Path, rgb: np.ndarray) -> None:
    folder.mkdir(parents=True)
    image = Image.fromarray(np.ascontiguousarray(rgb.transpose(1, 2, 0)))
    image.save(folder / "baseline.jpg")
    image.save(folder / "progressive.jpg", progressive=True)
    Image.fromarray(np.repeat([[0], [1]], 24, 0).repeat(64, 1).astype(np.uint8)).save(folder / "grey.jpg", quality=100)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(folder / "turned.jpg", exif=turned)


def _write_slides(folder: Path, rng: np.random.Generator) -> None:
    """OME-TIFF, and pyramids that OpenSlide opens."""
    folder.mkdir(parents=True)
    pixels = rng.integers(1, 255, (128, 160, 3), np.uint8)
    place = {"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}
    with tifffile.TiffWriter(folder / "pyramid.ome.tif") as writer:
        options = {"tile": (64, 64), "photometric": "rgb", "compression": "zlib"}
        writer.write(pixels, subifds=1, metadata={"axes": "YXS", **place}, **options)
        writer.write(pixels[::2, ::2].copy(), subfiletype=1, **options)
    tifffile.imwrite(folder / "bands.ome.tif", np.moveaxis(pixels, -1, 0), metadata={"axes": "CYX", **place})
    description = "Aperio Image Library\r\n|AppMag = 20|MPP = 0.5"
    with tifffile.TiffWriter(folder / "aperio.svs") as writer:
        for level in (pixels, pixels[::2, ::2].copy()):
            writer.write(
                level, tile=(64, 64), photometric="rgb", compression="jpeg", description=description, metadata=None
            )


def _write_lists(folder: Path, raster: Path) -> None:
    """Files that name a raster: VRT and STAC."""
    (folder / "vrt").mkdir()
    (folder / "stac").mkdir()
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}"><SimpleSource><SourceFilename relativeToVRT="0">{raster}'
        f"</SourceFilename><SourceBand>{band}</SourceBand></SimpleSource></VRTRasterBand>"
        for band in (1, 2, 3)
    )
    place = ", ".join(f"{value}" for value in TRANSFORM.to_gdal())
    header = f'<VRTDataset rasterXSize="{_SIZE[1]}" rasterYSize="{_SIZE[0]}"><SRS>{CRS}</SRS>'
    text = f"{header}<GeoTransform>{place}</GeoTransform>{bands}</VRTDataset>"
    (folder / "vrt" / "simple.vrt").write_text(text)
    item = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": "one",
        "properties": {"datetime": "2024-01-01T00:00:00Z", "proj:epsg": 32637, "eo:cloud_cover": 1.5},
        "bbox": [37.8, 40.7, 37.9, 40.8],
        "assets": {
            "data": {"href": str(raster), "type": "image/tiff; application=geotiff", "roles": ["data"]},
            "thumbnail": {"href": "thumbnail.png", "type": "image/png", "roles": ["thumbnail"]},
        },
    }
    (folder / "stac" / "item.json").write_text(json.dumps(item))
    collection = {"type": "FeatureCollection", "features": [item]}
    (folder / "stac" / "items.json").write_text(json.dumps(collection))
