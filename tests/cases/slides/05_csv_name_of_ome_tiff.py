"""slideflow#292 again, with OME-TIFF: QuPath and OMERO call slide.ome.tif "slide".

Right: `slide` finds slide.ome.tif / slide.ome.zarr, as other endings may be left out; dots and spaces in names work.
"""

from _kit import *
from perf_vit.data import read_slide_table

root = work("05")
for name in (
    "plain.svs",
    "TCGA-AA-0001-01Z-00-DX1.1234-AB.svs",
    "with space (1).svs",
    "fluo.ome.tif",
    "brackets [2].svs",
):
    (root / name).write_bytes(b"x")
found, missed = [], []
for name in ("plain", "TCGA-AA-0001-01Z-00-DX1.1234-AB", "with space (1)", "fluo", "brackets [2]"):
    (root / "t.csv").write_text(f'slide,label\n"{name}",a\n')
    try:
        found.append(Path(read_slide_table(root / "t.csv", root).paths[0]).name)
    except Exception as error:
        missed.append(f"{name}: {error}")
verdict(not missed, f"{len(found)} of 5 names found; " + " | ".join(missed))
