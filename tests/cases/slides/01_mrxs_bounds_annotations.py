"""qupath#820, qupath#1278, dlup#160, FAST-Pathology#76: QuPath counts from openslide.bounds-x/y on MRXS.

QuPath opens a MIRAX slide cropped to its bounds, so the coordinates that it exports are less by bounds-x and bounds-y.
docs/slides.md takes annotations "in pixels of level 0, as QuPath exports annotations".
Right: the annotation that QuPath drew around the tissue labels the tissue, or a refusal/warning names the bounds.
"""

from _kit import *
import openslide
from perf_vit.labels import open_labels
from perf_vit.sources import open_source

root = work("01")
image = picture(1024, 1280, [(512, 640, 896, 1152)], nuclei=False)
present = np.zeros((8, 10), bool)
present[3:8, 4:10] = True
slide = mrxs(root / "case.mrxs", image, present)
x, y = (int(openslide.OpenSlide(str(slide)).properties[f"openslide.bounds-{a}"]) for a in "xy")
# What QuPath exports for an outline around the tissue at level-0 (640..1152, 512..896).
labels = save(
    root / "case.geojson",
    collection(feature(box(640 - x, 512 - y, 1152 - x, 896 - y), {"name": "Tumor", "color": [200, 0, 0]})),
)
told = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    source = open_source(slide, mpp=0.5)
    try:
        burnt = open_labels(labels, source, attribute="classification", classes=["other", "Tumor"]).read(source.extent)
    except Exception as error:
        verdict(True, f"refused: {error}")
    told = [str(w.message) for w in caught]
tissue = np.zeros((1024, 1280), bool)
tissue[512:896, 640:1152] = True
share = (burnt == 1)[tissue].mean()
on_nothing = (~source.read(source.extent).valid)[burnt == 1].mean()
verdict(
    share > 0.99 or any("bounds" in t for t in told),
    f"bounds ({x}, {y}): {share:.1%} of the annotated tissue is labelled Tumor, "
    f"{on_nothing:.1%} of the Tumor pixels lie where the scanner saw nothing; warnings: {told or 'none'}",
)
