"""Plain vision transformers whose attention costs O(N) in the number of patches N."""

from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from perf_vit.layers import PerformerAttention, configure_attention
from perf_vit.models.backbones._family import SIZES, entrypoint, vit_cfg, with_own_enhancement

# `register_model` adds the name of every model.
__all__ = ["PerformerVisionTransformer"]


class PerformerVisionTransformer(VisionTransformer):
    """timm's `VisionTransformer` with Performer attention (Choromanski et al. 2020) in every block.

    Everything else is timm's: the arguments, `forward_intermediates`, `set_input_size`, gradient checkpointing, and
    the names of the parameters, so softmax checkpoints load with `strict=True`. Images are [B, C, H, W].

    Args:
        *args: of `timm.models.VisionTransformer`.
        attn_kwargs: options of the attention: kernel, num_features, orthogonal, norms, local_enhancement, seed
            (`PerformerOptions`).
        **kwargs: of `timm.models.VisionTransformer`.

    Raises:
        ValueError: an unknown option or value in `attn_kwargs`, or `attn_drop_rate` above 0.
    """

    def __init__(self, *args: Any, attn_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, attn_layer=PerformerAttention, **kwargs)
        configure_attention(self, attn_kwargs or {})


_VARIANTS = {
    f"performer_vit_{size}_patch{patch_size}_224": {"patch_size": patch_size, **size_args}
    for size, size_args in SIZES.items()
    for patch_size in (8, 14, 16)
}
default_cfgs = generate_default_cfgs({name: vit_cfg() for name in _VARIANTS})
_filter_fn = with_own_enhancement(checkpoint_filter_fn)
for _name, _args in _VARIANTS.items():
    globals()[_name] = register_model(entrypoint(__name__, _name, PerformerVisionTransformer, _args, _filter_fn))
