"""Qupath_to_LMD#1: a GeoJSON with annotations that have no class raises a bare error; QuPath leaves the key out then.

Right: refused with a remedy that works, or such objects are skipped with a warning. The message's own remedies are tried.
"""

from _kit import *
from perf_vit.labels import open_labels
from perf_vit.sources import open_source

root = work("13")
slide = svs(root / "a.svs", picture(256, 256, [(32, 32, 220, 220)]), mpp=0.5, num_levels=1)
source = open_source(slide, mpp=0.5)
labels = save(
    root / "a.geojson",
    collection(
        feature(box(0, 0, 32, 32)),
        feature(box(32, 32, 96, 96), {"name": "Tumor", "color": [1, 2, 3]}),
        feature(box(96, 96, 128, 128), None),
    ),
)
tried = {}
for name, options in {
    "plain": {},
    "ignore_values=['null']": {"ignore_values": ["null"]},
    "ignore_values=[None]": {"ignore_values": [None]},
    "classes+null": {"classes": ["other", "Tumor", "null"]},
}.items():
    try:
        read = open_labels(
            labels, source, **{"attribute": "classification", "classes": ["other", "Tumor"], **options}
        ).read(source.extent)
        tried[name] = f"ok, {(read == 1).sum()} px Tumor, {(read == 255).sum()} px ignored"
    except Exception as error:
        tried[name] = f"{type(error).__name__}: {str(error)[-140:]}"
ok = any(v.startswith("ok") for v in tried.values())
verdict(ok, json.dumps(tried, indent=1))
