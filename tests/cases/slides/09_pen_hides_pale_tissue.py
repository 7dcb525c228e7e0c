"""LazySlide#216, squidpy#1073, CLAM#104/#157: pale tissue beside blue ink; the ink raises Otsu's threshold.

docs: "coloured ink stays in" - but the tissue should stay in, too. Right: the pale tissue is found with ink as without.
"""

from _kit import *
from perf_vit.sources import open_source

root = work("09")
shares = {}
for ink in (False, True):
    image = picture(4096, 6144, [(800, 800, 3200, 3600)], colour=(226, 200, 214), nuclei=False)
    if ink:
        rng = np.random.default_rng(3)
        image[600:3400, 4300:4500] = np.array((30, 60, 200)) + rng.integers(-3, 4, (2800, 200, 1))
        image[600:800, 4300:5600] = np.array((30, 60, 200)) + rng.integers(-3, 4, (200, 1300, 1))
    slide = svs(root / f"ink{ink}.svs", image, mpp=0.5, num_levels=4, tile=256)
    source = open_source(slide, mpp=4.0, tissue="otsu")
    shares[ink] = source.read(source.extent).valid[100:400, 100:450].mean()
verdict(
    shares[True] > 0.9,
    f"pale tissue found: {shares[False]:.0%} without ink, {shares[True]:.0%} with an ink stroke beside it",
)
