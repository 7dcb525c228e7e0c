"""openslide#302, #160, ASAP#250, ASAP#143: tiled TIFFs that are not 8-bit colour come out black or wrong.

A 16-bit, one-channel tiled TIFF of 12-bit data, read with mpp. Right: its own numbers, or a refusal.
"""

from _kit import *
import tifffile
from perf_vit.sources import open_source

root = work("11")
rng = np.random.default_rng(0)
image = rng.integers(100, 4096, (512, 512), dtype=np.uint16)
path = root / "dapi.tif"
tifffile.imwrite(
    path,
    image,
    tile=(128, 128),
    photometric="minisblack",
    metadata=None,
    resolution=(2e4, 2e4),
    resolutionunit="CENTIMETER",
)
plain = open_source(path)
first = plain.read(plain.extent)
try:
    source = open_source(path, mpp=0.5, slide_mpp=0.5)
    got = source.read(source.extent)
except Exception as error:
    verdict(
        True,
        f"without options {first.pixels.dtype} {first.pixels.shape[0]} band; with mpp refused: {type(error).__name__}: {error}",
    )
same = got.pixels.shape[0] == 1 and got.pixels.dtype == np.uint16 and (got.pixels[0] == image).all()
verdict(
    same,
    f"without options {plain.num_bands} x {plain.dtype}, values to {first.pixels.max()}; with mpp=0.5 {source.num_bands} x {source.dtype}, "
    f"values {got.pixels.min()} to {got.pixels.max()} (true: {image.min()} to {image.max()})",
)
