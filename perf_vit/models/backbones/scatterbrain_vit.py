"""Plain vision transformers whose attention is exact where it matters and linear everywhere else."""

from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from perf_vit.layers.configure import check_model_options
from perf_vit.models.backbones._family import SIZES, entrypoint, vit_cfg, with_own_enhancement
from perf_vit.models.conversion import Conversion
from perf_vit.models.convert import convert_attention

# `register_model` adds the name of every model.
__all__ = ["ScatterbrainVisionTransformer"]


class ScatterbrainVisionTransformer(VisionTransformer):
    """timm's `VisionTransformer` with the "scatterbrain" of `performerize`: windows, sinks, and FAVOR+ for the rest.

    Everything else is timm's, the names of the parameters too, so softmax checkpoints load with `strict=True`; the
    model is then what `performerize(softmax, "scatterbrain")` gives. Images are [B, C, H, W].

    Args:
        *args: of `timm.models.VisionTransformer`.
        attn_kwargs: options of the attention: window_size, num_sinks, num_features, kernel, norms, center, balance,
            local_enhancement, seed (`ScatterbrainOptions`).
        **kwargs: of `timm.models.VisionTransformer`.

    Raises:
        ValueError: an unknown option or value in `attn_kwargs`, or `attn_drop_rate` above 0.
    """

    def __init__(self, *args: Any, attn_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_model_options(attn_kwargs or {})
        convert_attention(self, Conversion(attention="scatterbrain", options=attn_kwargs or {}))


_VARIANTS = {
    f"scatterbrain_vit_{size}_patch{patch_size}_224": {"patch_size": patch_size, **size_args}
    for size, size_args in SIZES.items()
    for patch_size in (8, 14, 16)
}
default_cfgs = generate_default_cfgs({name: vit_cfg() for name in _VARIANTS})
_filter_fn = with_own_enhancement(checkpoint_filter_fn)
for _name, _args in _VARIANTS.items():
    globals()[_name] = register_model(entrypoint(__name__, _name, ScatterbrainVisionTransformer, _args, _filter_fn))
