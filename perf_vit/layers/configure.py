"""One set of attention options for a whole model."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from perf_vit.layers.performer_attention import PerformerAttention
from perf_vit.layers.token_grid import TokenGrid, follow_tokens, watch_patch_embed

__all__ = ["check_model_options", "configure_attention"]


def configure_attention(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Configure every `PerformerAttention` of a model alike, each with its own `layer_index`.

    Args:
        model: holds the layers, which are numbered from 0 in its order.
        options: fields of `PerformerOptions`; those not named stay.

    Raises:
        ValueError: `layer_index` or `num_prefix_tokens` among the options, an unknown option, a value that it can't
            take, or local enhancement in a model without a patch embedding.
    """
    check_model_options(options)
    layers = [module for module in model.modules() if isinstance(module, PerformerAttention)]
    num_prefix_tokens, grid = getattr(model, "num_prefix_tokens", 0), TokenGrid()
    for index, layer in enumerate(layers):
        layer.on_grid(grid).configure(**options, num_prefix_tokens=num_prefix_tokens, layer_index=index)
    if any(layer.local_enhancement is not None for layer in layers):
        watch_patch_embed(model, grid)
        follow_tokens(model, grid)


def check_model_options(options: Mapping[str, Any]) -> None:
    """Refuse options that differ from layer to layer or that the model decides.

    Raises:
        ValueError: `layer_index` or `num_prefix_tokens` among them.
    """
    if "layer_index" in options:
        raise ValueError("attn_kwargs must not hold layer_index, which each block gets by its place; use seed")
    if "num_prefix_tokens" in options:
        raise ValueError(
            "attn_kwargs must not hold num_prefix_tokens, which the model has; use class_token, reg_tokens or "
            "num_reg_tokens of the model"
        )
