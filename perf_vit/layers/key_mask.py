"""Key masks as timm's attention layers take them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["key_mask_of"]


def key_mask_of(attn_mask: Tensor | None, k: Tensor) -> Tensor | None:
    """The key mask, [B, N], of a mask as timm passes it, [B, N] or [B, 1, 1, N].

    Args:
        attn_mask: the mask, or None for all keys.
        k: keys, or values, [B, H, N, D].

    Raises:
        ValueError: any other mask.
    """
    if attn_mask is None:
        return None
    B, N = k.shape[0], k.shape[2]
    if attn_mask.dtype != torch.bool or tuple(attn_mask.shape) not in {(B, N), (B, 1, 1, N)}:
        raise ValueError(
            f"linear attention can leave keys out and nothing else: attn_mask must be bool, [{B}, {N}] or "
            f"[{B}, 1, 1, {N}], got {attn_mask.dtype} {list(attn_mask.shape)}; use timm's own Attention for others"
        )
    return attn_mask.reshape(B, N)
