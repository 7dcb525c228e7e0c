"""Valid pixels of batches, and the masks of valid tokens that timm's ViTs derive from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import Format
from timm.models import checkpoint
from timm.models._features import FeatureGetterNet
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

__all__ = [
    "MaskedFeatures",
    "collate_tiles",
    "forward_head",
    "forward_maps",
    "forward_tokens",
    "key_mask",
    "with_key_mask",
]


def collate_tiles(samples: Sequence[tuple[Tensor, ...]]) -> Any:
    """Collate samples that end with valid pixels [H, W] bool; these become None if all pixels are valid."""
    *parts, valid = zip(*samples, strict=True)
    all_valid = all(each.all() for each in valid)
    return *(default_collate(list(part)) for part in parts), None if all_valid else default_collate(list(valid))


class MaskedFeatures(FeatureGetterNet):
    """timm's `features_only` wrapper of a ViT, with an attention mask."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> list[Tensor]:
        """Compute the feature maps of images.

        Args:
            x: Images, [B, C, H, W].
            attn_mask: Keys to attend to, bool [B, 1, 1, P + N], None for all.
        """
        maps: list[Tensor]
        if attn_mask is None:
            maps = super().forward(x)
            return maps
        model: Any = self.model
        with _checkpointed_blocks(model):
            maps = model.forward_intermediates(
                x,
                indices=self.out_indices,
                norm=self.norm,
                output_fmt=self.output_fmt,
                intermediates_only=True,
                attn_mask=attn_mask,
            )
        return maps


def with_key_mask(backbone: nn.Module) -> nn.Module:
    """Wrap a `features_only` ViT to accept a mask; return other backbones unchanged."""
    if type(backbone) is not FeatureGetterNet or not _takes_mask(backbone.model):
        return backbone
    options = {"output_fmt": backbone.output_fmt, "norm": backbone.norm, "prune": False}
    wrapped = MaskedFeatures(backbone.model, backbone.out_indices, **options)
    wrapped.feature_info = backbone.feature_info
    return wrapped.train(backbone.training)


def key_mask(model: nn.Module, valid: Tensor | None, pixel_px: int = 1) -> Tensor | None:
    """Return the key mask of a ViT's attention: prefix tokens, and patches with at least one valid pixel.

    Args:
        model: timm model, or its `features_only` wrapper.
        valid: Valid pixels of the images, bool [B, H, W], None if all are.
        pixel_px: Size of a pixel of the model's input, in pixels of `valid`.

    Returns:
        bool [B, 1, 1, P + N]; None if all keys are used, or the model doesn't accept a mask: it isn't a ViT, or drops
        patches in training. For an image without a valid pixel, all keys are used.
    """
    body: Any = model.model if isinstance(model, MaskedFeatures) else model
    if valid is None or not _takes_mask(body) or _drops_patches(body):
        return None
    height, width = (side * pixel_px for side in body.patch_embed.feat_ratio(as_scalar=False))
    rows, cols = -(-valid.shape[1] // height), -(-valid.shape[2] // width)
    padded = F.pad(valid, (0, cols * width - valid.shape[2], 0, rows * height - valid.shape[1]))
    kept = padded.reshape(len(valid), rows, height, cols, width).any(4).any(2).flatten(1)
    kept = kept | ~kept.any(1, keepdim=True)
    if not torch.compiler.is_compiling() and bool(kept.all()):
        return None
    prefix = kept.new_ones(len(kept), body.num_prefix_tokens)
    return torch.cat([prefix, kept], dim=1)[:, None, None]


def forward_maps(
    backbone: nn.Module,
    image: Tensor,
    valid: Tensor | None,
    pixel_px: int = 1,
    attn_mask: Tensor | None = None,
) -> list[Tensor]:
    """Compute the feature maps of a `features_only` backbone, [B, C, h, w], also of one that gives [B, h, w, C].

    Args:
        backbone: Result of `with_key_mask`.
        image: Images, [B, C, H, W].
        valid: Valid pixels, as in `key_mask`.
        pixel_px: Pixel size, as in `key_mask`.
        attn_mask: Result of `key_mask`, in place of `valid`.
    """
    mask = key_mask(backbone, valid, pixel_px) if attn_mask is None else attn_mask
    maps: list[Tensor] = backbone(image) if mask is None else backbone(image, attn_mask=mask)
    if getattr(backbone, "output_fmt", None) == Format.NHWC:
        return [each.permute(0, 3, 1, 2).contiguous() for each in maps]
    return maps


def forward_tokens(model: Any, image: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Call `model.forward_features` with an attention mask.

    Args:
        model: timm model.
        image: Images, [B, C, H, W].
        attn_mask: Result of `key_mask`.
    """
    tokens: Tensor
    if attn_mask is None:
        tokens = model.forward_features(image)
        return tokens
    with _checkpointed_blocks(model):
        tokens = model.forward_features(image, attn_mask=attn_mask)
    return tokens


def forward_head(model: Any, tokens: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Call `model.forward_head`, pooling unmasked tokens only.

    Args:
        model: timm model.
        tokens: Result of `forward_tokens`, [B, P + N, C]; any features of a model that isn't a ViT.
        attn_mask: Result of `key_mask`.

    Returns:
        Outputs, [B, K].
    """
    out: Tensor
    if attn_mask is None:
        out = model.forward_head(tokens)
        return out
    # The number of unmasked tokens differs between images.
    images = zip(tokens, attn_mask[:, 0, 0], strict=True)
    return torch.cat([model.forward_head(each[keys][None]) for each, keys in images])


def _takes_mask(model: Any) -> bool:
    return isinstance(model, VisionTransformer | Eva)


def _drops_patches(model: Any) -> bool:
    return bool(model.training and getattr(model.patch_drop, "prob", 0) > 0)


class _Checkpointed(nn.Module):
    """Block that recomputes its activations in the backward pass, with the same mask."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        out: Tensor = checkpoint(self.block, x, **options)
        return out


@contextmanager
def _checkpointed_blocks(model: Any) -> Iterator[None]:
    """Wrap the blocks of a `VisionTransformer` if it uses gradient checkpointing, which timm skips with a mask."""
    if not (isinstance(model, VisionTransformer) and model.grad_checkpointing and torch.is_grad_enabled()):
        yield
        return
    blocks = model.blocks
    model.blocks = nn.Sequential(*(_Checkpointed(block) for block in blocks))
    try:
        yield
    finally:
        model.blocks = blocks
