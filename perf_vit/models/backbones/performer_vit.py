"""Plain vision transformers whose attention costs O(N) in the number of patches N."""

from collections.abc import Mapping
from typing import Any

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from perf_vit.layers import PerformerAttention

__all__ = [
    "PerformerVisionTransformer",
    "performer_vit_base_patch16_224",
    "performer_vit_small_patch16_224",
    "performer_vit_tiny_patch16_224",
]


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
        options = dict(attn_kwargs or {})
        if "layer_index" in options:
            raise ValueError("attn_kwargs must not hold layer_index, which each block gets by its place; use seed")
        super().__init__(*args, attn_layer=PerformerAttention, **kwargs)
        layers = [module for module in self.modules() if isinstance(module, PerformerAttention)]
        for index, layer in enumerate(layers):
            layer.configure(**options, layer_index=index)


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


default_cfgs = generate_default_cfgs(
    {
        "performer_vit_tiny_patch16_224": _cfg(),
        "performer_vit_small_patch16_224": _cfg(),
        "performer_vit_base_patch16_224": _cfg(),
    }
)


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


@register_model
def performer_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> PerformerVisionTransformer:
    """Performer ViT-Ti/16: 12 blocks of 192 channels, 3 heads."""
    model_args = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create_performer_vit("performer_vit_tiny_patch16_224", pretrained, **{**model_args, **kwargs})


@register_model
def performer_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> PerformerVisionTransformer:
    """Performer ViT-S/16: 12 blocks of 384 channels, 6 heads."""
    model_args = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create_performer_vit("performer_vit_small_patch16_224", pretrained, **{**model_args, **kwargs})


@register_model
def performer_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> PerformerVisionTransformer:
    """Performer ViT-B/16: 12 blocks of 768 channels, 12 heads."""
    model_args = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create_performer_vit("performer_vit_base_patch16_224", pretrained, **{**model_args, **kwargs})
