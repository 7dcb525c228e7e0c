"""Plain vision transformers with attention of linear cost, and helpers shared with other ViT families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from perf_vit.conversion.linearize import Conversion, convert_attention

__all__ = ["SIZES", "LinearVisionTransformer", "entrypoint", "keep_own_enhancement", "vit_cfg"]

StateDict = dict[str, Tensor]

# Widths, depths and heads of timm's `vit_*`; heads have 64 channels at every size.
SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


def vit_cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    """Return timm's default config of a ViT without published weights, updated by `kwargs`."""
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


def entrypoint(
    module: str,
    name: str,
    model_cls: type[nn.Module],
    model_args: Mapping[str, Any],
    filter_fn: Callable[[StateDict, nn.Module], StateDict],
) -> Callable[..., nn.Module]:
    """Make the function that timm's registry calls to build a model.

    Args:
        module: Name of the module that holds the function, for timm's list of models and for pickle.
        name: Name of the model.
        model_cls: Class of the model.
        model_args: Arguments of the class, overridden by those of the call.
        filter_fn: Function that converts a checkpoint's state dict for the model.
    """

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        out_indices = kwargs.pop("out_indices", 3)
        model: nn.Module = build_model_with_cfg(
            model_cls,
            name,
            pretrained,
            pretrained_filter_fn=filter_fn,
            feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
            **{**model_args, **kwargs},
        )
        return model

    build.__name__ = build.__qualname__ = name
    build.__module__ = module
    build.__doc__ = (
        f"{model_args['depth']} blocks of {model_args['embed_dim']} channels, {model_args['num_heads']} heads, on "
        f"patches of {model_args['patch_size']} px."
    )
    return build


def keep_own_enhancement(
    filter_fn: Callable[[StateDict, nn.Module], StateDict],
) -> Callable[[StateDict, nn.Module], StateDict]:
    """Extend a filter: keep the model's initial local enhancement where a checkpoint lacks it."""

    def filter_and_complete(state_dict: StateDict, model: nn.Module) -> StateDict:
        own = {key: value for key, value in model.state_dict().items() if ".local_enhancement." in key}
        return {**own, **filter_fn(state_dict, model)}

    return filter_and_complete


# `register_model` adds the names of the models.


class LinearVisionTransformer(VisionTransformer):
    """timm's `VisionTransformer` with a mixer of linear cost in every block.

    Arguments, `forward_intermediates`, `set_input_size`, gradient checkpointing and names of parameters are timm's, so
    softmax checkpoints load with `strict=True`; the result equals that of `linearize` on the softmax model. Images are
    [B, C, H, W].

    Args:
        *args: Arguments of `timm.models.VisionTransformer`.
        mixer: Name of the mixer: "performer", "clustered", "softmax" or a registered one.
        attn_kwargs: Options of the mixer (`PerformerOptions`, `ClusteredOptions`).
        **kwargs: Arguments of `timm.models.VisionTransformer`.

    Raises:
        ValueError: The mixer is unknown, has no such option or refuses its value, or `attn_drop_rate` is above 0.
    """

    def __init__(
        self, *args: Any, mixer: str = "performer", attn_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        # Chunks change the rounding; outputs of trained Performer ViTs must stay bitwise equal.
        in_chunks = mixer != "performer"
        convert_attention(self, Conversion(mixer=mixer, options=attn_kwargs or {}), in_chunks=in_chunks)


_VARIANTS = {
    f"{mixer}_vit_{size}_patch{patch_size}_224": {"patch_size": patch_size, "mixer": mixer, **size_args}
    for mixer in ("performer", "clustered")
    for size, size_args in SIZES.items()
    for patch_size in (8, 14, 16)
}

default_cfgs = generate_default_cfgs({name: vit_cfg() for name in _VARIANTS})

_filter_fn = keep_own_enhancement(checkpoint_filter_fn)

for _name, _args in _VARIANTS.items():
    globals()[_name] = register_model(entrypoint(__name__, _name, LinearVisionTransformer, _args, _filter_fn))
