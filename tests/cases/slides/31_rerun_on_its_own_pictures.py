"""TRIDENT#151 / #14 (a bad file ends the run): results beside the slides are taken for slides at the next run.

predict --input slides --output slides/found.csv writes slides/found_attention/*.png. Right: the second run sees the slides alone
(find_inputs leaves out what lies in the output's folder; find_paths doesn't).
"""

from _kit import *
from perf_vit.inference import find_paths

root = work("31")
svs(root / "a.svs", picture(128, 128, [(0, 0, 128, 128)]), num_levels=1)
(root / "found_attention").mkdir()
from PIL import Image

Image.new("RGB", (64, 64)).save(root / "found_attention" / "a.png")
found = [str(Path(p).relative_to(root)) for p in find_paths([root])]
verdict(found == ["a.svs"], f"inputs of the second run: {found}")
