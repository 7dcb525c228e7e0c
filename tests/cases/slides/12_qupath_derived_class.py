"""QuPath >= 0.4 (GsonTools.PathClassTypeAdapter) writes derived classes as {"names": ["Tumor", "Positive"], "color": ...};
reports of parsers tripping over classification variants: InSituPy#419, wholeslidedata#41, TissUUmaps#49.

Right: the class is "Tumor: Positive", QuPath's own name for it; before 0.4 the same class came as {"name": ..., "colorRGB": n}.
"""

from _kit import *
from perf_vit.labels import open_labels
from perf_vit.sources import open_source

root = work("12")
slide = svs(root / "a.svs", picture(256, 256, [(32, 32, 220, 220)]), mpp=0.5, num_levels=1)
source = open_source(slide, mpp=0.5)
results = {}
for kind, classification in {
    "names": {"names": ["Tumor", "Positive"], "color": [200, 0, 0]},
    "name+color": {"name": "Tumor: Positive", "color": [200, 0, 0]},
    "name+colorRGB": {"name": "Tumor: Positive", "colorRGB": -3670016},
    "string": "Tumor: Positive",
}.items():
    labels = save(root / "a.geojson", collection(feature(box(32, 32, 96, 96), classification)))
    try:
        read = open_labels(labels, source, attribute="classification", classes=["other", "Tumor: Positive"]).read(
            source.extent
        )
        results[kind] = "ok" if (read == 1).sum() == 64 * 64 else f"{(read == 1).sum()} px"
    except Exception as error:
        results[kind] = f"{type(error).__name__}: {str(error)[:150]}"
verdict(all(v == "ok" for v in results.values()), str(results))
