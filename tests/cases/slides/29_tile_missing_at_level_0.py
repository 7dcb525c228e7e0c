"""openslide#546, ASAP users: pyramids whose level 0 lacks a tile that the lower levels still show.

Tissue is looked for on a lower level, the window is read on level 0, where nothing is. Right: prediction of the slide goes on
(the window is dropped, or is glass) or a clear error; not an AssertionError.
"""

from _kit import *
import openslide, tifffile
from perf_vit.data import tissue_windows
from perf_vit.inference import embed_windows
from perf_vit.sources import open_source

root = work("29")
image = picture(1024, 1024, [(0, 0, 256, 256)], nuclei=False)
slide = svs(root / "a.tif", image, mpp=None, num_levels=3, tile=256, resolution=(2e4, 2e4), resolutionunit="CENTIMETER")
with tifffile.TiffFile(slide, mode="r+b") as tiff:
    page = tiff.pages[0]
    offsets, counts = list(page.dataoffsets), list(page.databytecounts)
    offsets[0] = counts[0] = 0
    page.tags["TileOffsets"].overwrite(offsets)
    page.tags["TileByteCounts"].overwrite(counts)
source = open_source(slide, mpp=0.5, tissue="otsu")
windows = tissue_windows(source, 128, 0.25)
import torch

try:
    found = embed_windows(
        lambda x: x.mean((2, 3)),
        open_source(slide, mpp=0.5),
        lambda i: i.pixels.astype(np.float32),
        windows,
        batch_size=2,
    )
except Exception as error:
    verdict(type(error).__name__ == "InputError", f"{len(windows)} windows of tissue; {type(error).__name__}: {error}")
verdict(True, f"{len(windows)} windows, features {found.shape}")
