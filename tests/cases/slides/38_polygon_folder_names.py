"""slideflow#292 again, for annotations: QuPath names the export of `slide.ome.tif` and `slide.svs` slide.geojson.

docs/slides.md: "a folder with a file a slide of the slide's name". Right: each file finds its slide; also dots and spaces.
"""

from _kit import *
from perf_vit.labels.objects import read_object_labels
import tifffile

root = work("38")
(root / "s").mkdir(), (root / "l").mkdir()
image = picture(128, 128, [(0, 0, 128, 128)])
names = {"plain.svs": "plain", "T.C.G-A.1234 (2).svs": "T.C.G-A.1234 (2)", "fluo.ome.tif": "fluo"}
bad, good = [], []
for slide, label in names.items():
    for p in [*(root / "s").iterdir(), *(root / "l").iterdir()]:
        p.unlink()
    if slide.endswith(".ome.tif"):
        tifffile.imwrite(
            root / "s" / slide,
            image,
            tile=(64, 64),
            photometric="rgb",
            metadata={"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5},
        )
    else:
        svs(root / "s" / slide, image, num_levels=1)
    save(root / "l" / f"{label}.geojson", collection(feature(box(10, 10, 50, 50), {"name": "T", "color": [1, 2, 3]})))
    try:
        n = len(
            read_object_labels(
                root / "l", root / "s", label_format="polygons", attribute="classification", classes=["T"]
            ).records[0]
        )
        good.append(slide)
    except Exception as error:
        bad.append(f"{slide}: {type(error).__name__}: {str(error).replace(str(root), '')}")
verdict(not bad, f"{len(good)} of 3 paired; " + "; ".join(bad))
