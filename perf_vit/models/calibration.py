"""Constants that a converted model centres and balances with, learned from a few images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from perf_vit.layers.converted_attention import ConvertedAttention
from perf_vit.models.convert import converted_layers
from perf_vit.models.fidelity import evaluating, image_batches
from perf_vit.ops import fit_balancing

__all__ = ["calibrate"]

# So many tokens of all images together tell means and variances to about 2 percent.
_TOKENS_PER_LAYER = 4096


@torch.no_grad()
def calibrate(model: nn.Module, images: Iterable[Tensor]) -> nn.Module:
    """Fix the statistics that a converted model centres and balances with, in place.

    Each layer and head gets the means and channel factors of its queries and keys over all images
    (`fit_balancing(per_sample=False)` of up to 4,096 tokens spread evenly over them), and uses these constants instead
    of each call's own. They are part of the state dict from then on.

    Args:
        model: from `performerize`, with layers that centre or balance.
        images: standardised images, [B, C, H, W] or [C, H, W], of sizes that the model takes.

    Returns:
        The model.

    Raises:
        ValueError: no image, or no such layer.
    """
    batches = list(image_batches(model, images))
    layers = [x for x in converted_layers(model).values() if x.options.center or x.options.balance]
    if not batches or not layers:
        lacking = "images" if layers else "a model whose converted layers centre or balance"
        raise ValueError(
            f"calibration needs {lacking}, got none; use performerize(model, 'scatterbrain') and a few images"
        )
    tokens_per_image = math.ceil(_TOKENS_PER_LAYER / sum(len(batch) for batch in batches))
    seen: dict[ConvertedAttention, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def keep(layer: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        rope = options.get("rope", arguments[1] if len(arguments) > 1 else None)
        q, k, _ = layer.queries_keys_values(arguments[0], rope)
        seen[layer].append((_spread(q, tokens_per_image), _spread(k, tokens_per_image)))

    with evaluating(model), ExitStack() as hooks:
        for layer in layers:
            layer.set_balancing(None)
            hooks.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        for batch in batches:
            model(batch)
    for layer, parts in seen.items():
        q, k = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
        options = layer.options
        layer.set_balancing(fit_balancing(q, k, center=options.center, balance=options.balance, per_sample=False))
    return model


def _spread(x: Tensor, count: int) -> Tensor:
    """Tokens of [B, H, N, D] spread evenly, at most `count` a sample, as [1, H, B n, D]."""
    places = torch.linspace(0, x.shape[2] - 1, min(count, x.shape[2]), device=x.device).long()
    return x[:, :, places].float().transpose(0, 1).flatten(1, 2).unsqueeze(0)
