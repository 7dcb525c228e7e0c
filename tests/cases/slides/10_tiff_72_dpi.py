"""MONAI#7574 (TIFFs read at "mpp 1000"), openslide#349/#516 (resolution tags of TIFFs may be nonsense), Patho-Bench#30
("super big MPP" crashed the pipeline), tiatoolbox#53 (asks for a sanity check).

A tiled TIFF with the 72 dpi that photo tools write by default. Right at mpp=0.5: refuse or warn (353 um/px is no microscope).
"""

from _kit import *
import tifffile
from perf_vit.sources import open_source

root = work("10")
path = root / "a.tif"
tifffile.imwrite(
    path,
    picture(512, 512, [(100, 100, 400, 400)]),
    tile=(128, 128),
    photometric="rgb",
    metadata=None,
    resolution=(72, 72),
    resolutionunit="INCH",
)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        source = open_source(path, mpp=0.5)
    except Exception as error:
        verdict(True, f"refused: {error}")
verdict(
    bool(caught),
    f"read without a word at slide_mpp {source.slide_mpp[0]:.1f} um/px: {source.size[0]:,} x {source.size[1]:,} px instead of 512 x 512",
)
