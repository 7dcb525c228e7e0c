"""hover_net#291, bioformats#4059: RGBA pictures whose background has alpha 0 (and black colours).

The same RGBA picture as OME-TIFF and as tiled TIFF (which OpenSlide reads). Right: transparent pixels are not valid, in both;
sources.md: "A pixel is valid unless ... alpha or the mask is 0".
"""

from _kit import *
import tifffile
from perf_vit.sources import open_source

root = work("07")
rgb = picture(512, 512, [(100, 100, 400, 400)])
alpha = np.zeros((512, 512, 1), np.uint8)
alpha[64:448, 64:448] = 255
rgba = np.concatenate([rgb * (alpha > 0), alpha], 2)
tifffile.imwrite(
    root / "a.ome.tif",
    rgba,
    tile=(128, 128),
    photometric="rgb",
    extrasamples=("unassalpha",),
    metadata={"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5},
)
source = open_source(root / "a.ome.tif", mpp=0.5)
image = source.read(source.extent)
wrong = image.valid[alpha[..., 0] == 0].mean()
black = (image.pixels.max(0) == 0).mean()
verdict(
    wrong == 0,
    f"{wrong:.0%} of the transparent pixels are valid, {black:.0%} of the picture is black; bands {source.band_names}",
)
