"""large cohorts come as .ndpi, .mrxs, .bif, .ome.zarr, .ome.btf ... (slideflow#5); each list of endings in the code is another.

Right: every ending that docs/slides.md calls a slide is found in a folder: by predict (find_paths), by detection training
(ImageFolder), and opens as a slide.
"""

from _kit import *
from perf_vit.sources import find_images
from perf_vit.inference import find_paths
from perf_vit.sources.open import is_slide

root = work("30")
names = [
    "a.svs",
    "b.ndpi",
    "c.mrxs",
    "d.scn",
    "e.bif",
    "f.svslide",
    "g.vms",
    "h.ome.tif",
    "j.ome.btf",
    "k.czi",
    "l.ome.zarr",
]
for name in names:
    folder = root / name.split(".")[0]
    folder.mkdir()
    if name.endswith("zarr"):
        (folder / name).mkdir()
        (folder / name / ".zattrs").write_text('{"multiscales": []}')
    else:
        (folder / name).write_bytes(b"II*\0")
table = {}
for name in names:
    folder = root / name.split(".")[0]
    row = {"is_slide": is_slide(str(folder / name), asked=True)}
    for key, call in (("predict", lambda f: find_paths([f])), ("train detection", lambda f: find_images([f]))):
        try:
            row[key] = len(call(folder)) == 1
        except Exception:
            row[key] = False
    table[name] = row
missing = {n: [k for k, v in r.items() if not v] for n, r in table.items() if not all(r.values())}
verdict(not missing, f"not found: {missing}")
