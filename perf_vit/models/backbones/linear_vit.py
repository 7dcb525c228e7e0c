"""Plain vision transformers whose attention costs O(N) in the number of patches N."""

from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from perf_vit.conversion.config import Conversion
from perf_vit.conversion.linearize import convert_attention
from perf_vit.models.backbones._family import SIZES, entrypoint, vit_cfg, with_own_enhancement

# `register_model` adds the name of every model.
__all__ = ["LinearVisionTransformer"]


class LinearVisionTransformer(VisionTransformer):
    """timm's `VisionTransformer` with a mixer of linear cost in every block.

    Everything else is timm's: the arguments, `forward_intermediates`, `set_input_size`, gradient checkpointing, and
    the names of the parameters, so softmax checkpoints load with `strict=True`; the model is then what `linearize`
    makes of the softmax model. Images are [B, C, H, W].

    Args:
        *args: of `timm.models.VisionTransformer`.
        mixer: name of the mixer, "performer", "clustered", "softmax" or a registered one.
        attn_kwargs: options of the mixer (`PerformerOptions`, `ClusteredOptions`).
        **kwargs: of `timm.models.VisionTransformer`.

    Raises:
        ValueError: an unknown mixer, an option or value that it doesn't take, or `attn_drop_rate` above 0.
    """

    def __init__(
        self, *args: Any, mixer: str = "performer", attn_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        # Chunks round otherwise, and what trained Performer ViTs give stays as it is to the last bit.
        in_chunks = mixer != "performer"
        convert_attention(self, Conversion(mixer=mixer, options=attn_kwargs or {}), in_chunks=in_chunks)


_VARIANTS = {
    f"{mixer}_vit_{size}_patch{patch_size}_224": {"patch_size": patch_size, "mixer": mixer, **size_args}
    for mixer in ("performer", "clustered")
    for size, size_args in SIZES.items()
    for patch_size in (8, 14, 16)
}
default_cfgs = generate_default_cfgs({name: vit_cfg() for name in _VARIANTS})
_filter_fn = with_own_enhancement(checkpoint_filter_fn)
for _name, _args in _VARIANTS.items():
    globals()[_name] = register_model(entrypoint(__name__, _name, LinearVisionTransformer, _args, _filter_fn))
