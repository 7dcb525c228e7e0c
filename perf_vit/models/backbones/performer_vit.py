"""Plain vision transformers whose attention costs O(N) in the number of patches N."""

from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from perf_vit.layers import PerformerAttention, configure_attention

# `register_model` adds the name of every model.
__all__ = ["PerformerVisionTransformer"]


class PerformerVisionTransformer(VisionTransformer):
    """timm's `VisionTransformer` with Performer attention (Choromanski et al. 2020) in every block.

    Everything else is timm's: the arguments, `forward_intermediates`, `set_input_size`, gradient checkpointing, and
    the names of the parameters, so softmax checkpoints load with `strict=True`. Images are [B, C, H, W].

    Args:
        *args: of `timm.models.VisionTransformer`.
        attn_kwargs: options of the attention: kernel, num_features, orthogonal, norms, seed (`PerformerOptions`).
        **kwargs: of `timm.models.VisionTransformer`.

    Raises:
        ValueError: an unknown option or value in `attn_kwargs`, or `attn_drop_rate` above 0.
    """

    def __init__(self, *args: Any, attn_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, attn_layer=PerformerAttention, **kwargs)
        configure_attention(self, attn_kwargs or {})


# The widths, depths and heads of timm's `vit_*`, whose heads have 64 channels at every size.
_SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
_VARIANTS = {
    f"performer_vit_{size}_patch{patch_size}_224": {"patch_size": patch_size, **size_args}
    for size, size_args in _SIZES.items()
    for patch_size in (8, 14, 16)
}


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({name: _cfg() for name in _VARIANTS})


def _create_performer_vit(variant: str, pretrained: bool, **kwargs: Any) -> PerformerVisionTransformer:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        PerformerVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


def _entrypoint(name: str, model_args: dict[str, int]) -> Callable[..., PerformerVisionTransformer]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> PerformerVisionTransformer:
        return _create_performer_vit(name, pretrained, **{**model_args, **kwargs})

    # timm registers a model under its function's name, in its function's module; pickle looks for it there.
    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = (
        f"{model_args['depth']} blocks of {model_args['embed_dim']} channels, {model_args['num_heads']} heads, on "
        f"patches of {model_args['patch_size']} px."
    )
    return entrypoint


for _name, _model_args in _VARIANTS.items():
    globals()[_name] = register_model(_entrypoint(_name, _model_args))
