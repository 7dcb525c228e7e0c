"""Models of random weights whose blocks and attention show in their output."""

import torch
from torch import nn

SCALES = ("gamma", "gamma_1", "gamma_2")


@torch.no_grad()
def sharpened(model: nn.Module, scale: float = 1.0) -> nn.Module:
    """Let errors show: a layer scale of 1e-5 hides a block, and logits that hardly differ hide which keys it looks at.

    Args:
        model: timm's ViT, converted or not; it is changed in place.
        scale: Layer scale of its blocks.
    """
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in SCALES:
            parameter.fill_(scale)
    for block in model.blocks:
        if block.attn.qkv is None:
            block.attn.q_proj.weight.mul_(3.0)
            block.attn.k_proj.weight.mul_(3.0)
        else:
            # Queries and keys come before the values.
            weight = block.attn.qkv.weight
            weight[: len(weight) // 3 * 2] *= 3.0
    return model
