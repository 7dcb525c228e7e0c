"""Vision transformers for untrained image sizes: rotary positions, linear attention, registers."""

from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.eva import Eva, checkpoint_filter_fn

from perf_vit.backbones.linear_vit import SIZES, entrypoint, keep_own_enhancement, vit_cfg
from perf_vit.conversion.linearize import Conversion, convert_attention

# `register_model` adds the names of the models.
__all__ = ["LinearRopeVisionTransformer"]


class LinearRopeVisionTransformer(Eva):
    """timm's `Eva` with a mixer of linear cost in every block.

    Rotary embeddings are applied to queries and keys before the mixer. Everything else, including the names of
    parameters, is timm's, so checkpoints of an `Eva` with the same arguments load with `strict=True`. Images are [B, C,
    H, W].

    Args:
        *args: Arguments of `timm.models.Eva`.
        mixer: Name of the mixer: "performer", "clustered", "softmax" or a registered one.
        attn_kwargs: Options of the mixer (`PerformerOptions`, `ClusteredOptions`).
        **kwargs: Arguments of `timm.models.Eva`.

    Raises:
        ValueError: The mixer is unknown, has no such option or refuses its value, or `attn_drop_rate` is above 0.
    """

    def __init__(
        self, *args: Any, mixer: str = "performer", attn_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        convert_attention(self, Conversion(mixer=mixer, options=attn_kwargs or {}))


# timm's `vit_*_patch16_rope_224` (axial frequencies, Heo et al. 2024), with registers (Darcet et al. 2024). Positions
# count patches from the corner, so the distance of neighbours is independent of the image size.
_ROPE_ARGS = {
    "attn_type": "rope",
    "init_values": 1e-5,
    "num_reg_tokens": 4,
    "global_pool": "token",
    "use_abs_pos_emb": False,
    "use_rot_pos_emb": True,
    "rope_grid_indexing": "xy",
    "rope_temperature": 100.0,
    "dynamic_img_size": True,
}
_VARIANTS = {
    f"{mixer}_vit_rope_{size}_patch16_224": {"patch_size": 16, "mixer": mixer, **SIZES[size], **_ROPE_ARGS}
    for mixer in ("performer", "clustered")
    for size in ("small", "base")
}
default_cfgs = generate_default_cfgs({name: vit_cfg(fixed_input_size=False) for name in _VARIANTS})
_filter_fn = keep_own_enhancement(checkpoint_filter_fn)
for _name, _args in _VARIANTS.items():
    globals()[_name] = register_model(entrypoint(__name__, _name, LinearRopeVisionTransformer, _args, _filter_fn))
