"""slideflow#292, slideflow#5: slides named without ending in a CSV, MIRAX slides with their folder beside them.

docs/slide_classification.md: names "may lack their ending". Right: `case` means case.mrxs, not the folder case/.
"""

from _kit import *
from perf_vit.data import read_slide_table
from perf_vit.sources import open_source

root = work("04")
present = np.ones((2, 2), bool)
for name in ("s1", "s2"):
    mrxs(root / f"{name}.mrxs", picture(256, 256, [(32, 32, 220, 220)]), present)
(root / "t.csv").write_text("slide,label\ns1,a\ns2,b\n")
try:
    paths = read_slide_table(root / "t.csv", root).paths
except Exception as error:
    verdict(False, f"refused: {error}")
ok = [Path(p).suffix for p in paths] == [".mrxs", ".mrxs"]
try:
    open_source(paths[0], mpp=1.0, tissue="otsu")
    opened = "opens"
except Exception as error:
    opened = f"{type(error).__name__}: {error}"
verdict(ok, f"s1 became {Path(paths[0]).name!r}; opening it: {opened}")
