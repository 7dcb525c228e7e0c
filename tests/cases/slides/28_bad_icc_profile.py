"""Pillow#6666 ("cannot build transform"), psd-tools#484, tiffslide#11: ICC profiles that don't fit the pixels (grey, damaged).

Right: a clear InputError that names the slide (or the slide as it is, with a warning); not a raw PyCMSError.
"""

from _kit import *
from PIL import ImageCms
from perf_vit.errors import PerfVitError
from perf_vit.sources import open_source

root = work("28")
image = picture(256, 256, [(32, 32, 220, 220)])
good = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
outcomes = {}
for name, profile in {"junk": b"not a profile" * 20, "truncated": good[:200], "lab": lab, "srgb": good}.items():
    slide = svs(root / f"{name}.svs", image, mpp=0.5, num_levels=1, iccprofile=profile)
    try:
        source = open_source(slide, mpp=0.5, icc="srgb")
        source.read(source.extent)
        outcomes[name] = "read"
    except PerfVitError as error:
        outcomes[name] = f"refused: {error}"[:90]
    except BaseException as error:
        outcomes[name] = f"CRASH {type(error).__module__}.{type(error).__name__}: {error}"[:90]
verdict(not any(v.startswith("CRASH") for v in outcomes.values()) and outcomes["srgb"] == "read", str(outcomes))
