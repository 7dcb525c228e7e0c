"""Mammo-CLIP#15 and many like it ("the loss is always nan"): an encoder overflows in half precision and gives NaN.

Right: embed_windows / the store / prediction refuse NaN features, or say so; never a class with confidence out of NaN, and
never a NaN kept in the cache.
"""

from _kit import *
import torch
from perf_vit.data import EmbeddingStore, SlideFeatures
from perf_vit.inference import SlideClassificationPredictOptions, SlideClassificationPredictor, embed_windows
from perf_vit.sources import open_source
from perf_vit.models import SlideClassificationModelConfig, SlideClassificationSpec, build_slide_classifier
from perf_vit.transforms import Normalizer
from perf_vit.types import Window

root = work("19")
slide = svs(root / "a.svs", picture(256, 256, [(0, 0, 256, 256)]), mpp=1.0, num_levels=1)
spec = SlideClassificationSpec(
    classes=("benign", "tumour"), normalizer=Normalizer((128.0,) * 3, (64.0,) * 3), tile_px=64
)
torch.manual_seed(0)
model = build_slide_classifier(
    SlideClassificationModelConfig(backbone="resnet10t", hidden_dim=16, attention_dim=8), spec
).eval()


def encode(x):
    features = model.embed(x)
    features[1] = float("nan")  # one window of many overflows
    return features


windows = [Window(r, c, 64, 64) for r in (0, 64) for c in (0, 64)]
said = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        features = embed_windows(encode, open_source(slide), spec.normalizer, windows, batch_size=4)
        store = EmbeddingStore(root / "f", "e", {})
        store.write(str(slide), features, windows)
        probabilities, attention = SlideClassificationPredictor(model, SlideClassificationPredictOptions()).classify(
            SlideFeatures(store.read(str(slide)).features, tuple(windows))
        )
    except Exception as error:
        verdict(True, f"refused: {type(error).__name__}: {error}")
    said = [str(w.message)[:80] for w in caught if "nan" in str(w.message).lower()]
name = spec.classes[int(probabilities.argmax())]
verdict(
    bool(said),
    f"1 of 4 windows NaN: kept in the cache, probabilities {probabilities.tolist()}, predicted class {name!r}, attention {attention.tolist()}; said: {said or 'nothing'}",
)
