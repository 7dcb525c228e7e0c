"""One set of attention options for a whole model."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from perf_vit.layers.performer_attention import PerformerAttention

__all__ = ["configure_attention"]


def configure_attention(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Configure every `PerformerAttention` of a model alike, each with its own `layer_index`.

    Args:
        model: holds the layers, which are numbered from 0 in its order.
        options: fields of `PerformerOptions`; those not named stay.

    Raises:
        ValueError: `layer_index` among the options, an unknown option, or a value that it can't take.
    """
    if "layer_index" in options:
        raise ValueError("attn_kwargs must not hold layer_index, which each block gets by its place; use seed")
    layers = [module for module in model.modules() if isinstance(module, PerformerAttention)]
    for index, layer in enumerate(layers):
        layer.configure(**options, layer_index=index)
