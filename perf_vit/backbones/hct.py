"""HCT: convolutions at high resolution, then alternating convolutions and linear attention."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, BatchNormAct2d, ClassifierHead, register_notrace_module
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from perf_vit.layers import LinearizedAttention, MixerOptions
from perf_vit.layers.mixer import MIXERS, check_option_names
from perf_vit.layers.token_grid import TokenGrid

# `register_model` adds the names of the models.
__all__ = ["HighResolutionConvTransformer"]


class HighResolutionConvTransformer(nn.Module):
    """High-resolution Convolutional Transformer (HCT), for images such as whole mammograms at full resolution.

    The stem, a convolution and a max-pool, halves the image twice; each stage halves it in its first block. The blocks
    of the last `num_attn_stages` stages attend to all positions, at the resolution of their input, before they
    convolve. There are no position embeddings, so images, [B, C, H, W], may have any size.

    The default attention is the ReLU Performer with M = int(D ln D) features and rows of norm sqrt(D), for heads of D
    channels.

    Args:
        in_chans: Number of input channels.
        num_classes: Number of classes, 0 for no classifier.
        global_pool: Pooling before the classifier, see `timm.layers.SelectAdaptivePool2d`.
        channels: Number of channels of each stage; the stem has those of the first.
        depths: Number of blocks of each stage.
        num_heads: Number of heads of every attention.
        num_attn_stages: Number of stages with attention, counted from the last.
        drop_rate: Dropout before the classifier.
        mixer: Name of the mixer: "performer", "clustered", "softmax" or a registered one.
        attn_kwargs: Options of the mixer, which override the defaults above.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: The mixer is unknown, has no such option or refuses its value, or `channels` and `depths` differ
            in length.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        channels: Sequence[int] = (16, 32, 64, 128, 256),
        depths: Sequence[int] = (2, 2, 2, 2, 2),
        num_heads: int = 8,
        num_attn_stages: int = 2,
        drop_rate: float = 0.0,
        mixer: str = "performer",
        attn_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_option_names(mixer, attn_kwargs or {})
        if len(channels) != len(depths):
            raise ValueError(f"channels and depths must have one entry per stage, got {channels} and {depths}")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = channels[-1]
        self.grad_checkpointing = False

        # The published number of parameters, 1,737,010 with 1 channel and 2 classes, requires biases in the four
        # projections of every attention, none in the convolutions, and no norm in the stem: 1,320,976 (convolutions) +
        # 409,600 (projections) + 2,304 (their biases) + 3,616 (norms) + 514 (classifier).
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stem = _stem(in_chans, channels[0], dd)
        residual_block = partial(ResidualBlock, **dd)
        attention_block = partial(AttentionConvBlock, num_heads=num_heads, mixer=mixer, options=attn_kwargs, **dd)
        self.stages = _stages(channels, depths, num_attn_stages, residual_block, attention_block)
        self.feature_info = _feature_info(channels)
        self.norm: nn.Module = BatchNormAct2d(channels[-1], **dd)
        self.head = ClassifierHead(channels[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, in addition to biases and norms: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns that group parameters by block, or by stage if `coarse`."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable recomputation of activations in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; `num_classes=0` removes it, `global_pool=""` removes the pooling."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        # A head without parameters doesn't know the device, and some supported versions of timm change the mode.
        weight = next(self.parameters())
        self.head.to(device=weight.device, dtype=weight.dtype).train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of the stem (index 0) and the stages (1, 2, ...), with or without the final features.

        Args:
            x: Images, [B, C, H, W].
            indices: Indices of the maps; an int selects the last ones, None all.
            norm: Whether to normalise the map of the last stage.
            stop_early: Whether to skip the stages after the last selected map.
            output_fmt: "NCHW".
            intermediates_only: Whether to omit the final features.

        Raises:
            ValueError: `output_fmt` is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}; permute the maps afterwards")
        take_indices, max_index = feature_take_indices(len(self.stages) + 1, indices)
        maps = [self.stem(x)]
        for stage in self.stages[:max_index] if stop_early else self.stages:
            maps.append(self._forward_stage(stage, maps[-1]))
        final = self.norm(maps[-1]) if len(maps) == len(self.stages) + 1 else maps[-1]
        if norm:
            maps[-1] = final
        intermediates = [each for index, each in enumerate(maps) if index in take_indices]
        return intermediates if intermediates_only else (final, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that the maps of `indices` don't need, and return the indices as non-negative integers."""
        take_indices, max_index = feature_take_indices(len(self.stages) + 1, indices)
        ends_early = max_index < len(self.stages)
        self.stages = self.stages[:max_index]
        if prune_norm or ends_early:
            self.norm = nn.Identity()
        if ends_early:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or ends_early:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised map of the last stage, [B, C, ceil(H / 128), ceil(W / 128)] with five stages."""
        x = self.stem(x)
        for stage in self.stages:
            x = self._forward_stage(stage, x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits, [B, num_classes], of a map, or the input of the classifier if `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, [B, num_classes], of images, [B, C, H, W]."""
        return self.forward_head(self.forward_features(x))

    def _forward_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        return checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)


class ResidualBlock(nn.Module):
    """Pre-activation residual block of two 3 x 3 convolutions (He et al. 2016b), the first of them strided.

    Args:
        in_chans: Number of input channels.
        out_chans: Number of output channels.
        stride: Stride of the first convolution.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1, **dd: Any) -> None:
        super().__init__()
        self.norm1 = BatchNormAct2d(in_chans, **dd)
        self.shortcut = _shortcut(in_chans, out_chans, stride, dd)
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1, bias=False, **dd)
        self.norm2 = BatchNormAct2d(out_chans, **dd)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_chans, H, W] to [B, out_chans, ceil(H / stride), ceil(W / stride)]."""
        y = self.norm1(x)
        residual = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(self.norm2(self.conv1(y))) + residual


# A leaf for tracers: a graph can't hold the grid.
@register_notrace_module
class _MapAttention(LinearizedAttention):
    """Attention over the positions of a map, [B, C, H, W]."""

    def __init__(self, attention: nn.Module, options: MixerOptions) -> None:
        super().__init__(attention, options, TokenGrid())

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        rows, columns = x.shape[-2:]
        self.grid.size = (rows, columns)
        return super().forward(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class AttentionConvBlock(nn.Module):
    """Pre-activation block of linear attention over all positions, followed by a strided 3 x 3 convolution.

    Args:
        in_chans: Number of input channels, a multiple of `num_heads`.
        out_chans: Number of output channels.
        stride: Stride of the convolution.
        num_heads: Number of heads of the attention.
        mixer: Name of the mixer.
        options: Options of the mixer, which override the published ones.
        layer_index: Index of the attention in the network.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        stride: int = 1,
        num_heads: int = 8,
        mixer: str = "performer",
        options: Mapping[str, Any] | None = None,
        layer_index: int = 0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = BatchNormAct2d(in_chans, **dd)
        self.shortcut = _shortcut(in_chans, out_chans, stride, dd)
        published = _published_options(in_chans // num_heads) if mixer == "performer" else {}
        mixing = MIXERS[mixer].options_type(**{**published, **(options or {}), "layer_index": layer_index})
        self.attn = _MapAttention(Attention(in_chans, num_heads=num_heads, qkv_bias=True, **dd), mixing)
        self.norm2 = BatchNormAct2d(in_chans, **dd)
        self.conv = nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_chans, H, W] to [B, out_chans, ceil(H / stride), ceil(W / stride)]."""
        y = self.norm1(x)
        residual = x if self.shortcut is None else self.shortcut(y)
        x = x + self.attn(y)
        return self.conv(self.norm2(x)) + residual


def _published_options(head_dim: int) -> dict[str, Any]:
    return {"kernel": "relu", "num_features": int(head_dim * math.log(head_dim)), "norms": "sqrt"}


def _shortcut(in_chans: int, out_chans: int, stride: int, dd: Mapping[str, Any]) -> nn.Module | None:
    if stride == 1 and in_chans == out_chans:
        return None
    return nn.Conv2d(in_chans, out_chans, 1, stride=stride, bias=False, **dd)


def _stem(in_chans: int, out_chans: int, dd: Mapping[str, Any]) -> nn.Sequential:
    conv = nn.Conv2d(in_chans, out_chans, 7, stride=2, padding=3, bias=False, **dd)
    return nn.Sequential(OrderedDict(conv=conv, pool=nn.MaxPool2d(3, stride=2, padding=1)))


def _stages(
    channels: Sequence[int],
    depths: Sequence[int],
    num_attn_stages: int,
    residual_block: Callable[..., nn.Module],
    attention_block: Callable[..., nn.Module],
) -> nn.Sequential:
    """Build the stages, of which the last `num_attn_stages` have attention."""
    stages, first_layer = nn.Sequential(), 0
    for index, depth in enumerate(depths):
        shapes = _shapes(channels[max(index - 1, 0)], channels[index], depth)
        if index < len(channels) - num_attn_stages:
            blocks = [residual_block(*shape) for shape in shapes]
        else:
            blocks = [attention_block(*shape, layer_index=layer) for layer, shape in enumerate(shapes, first_layer)]
            first_layer += depth
        stages.append(nn.Sequential(*blocks))
    return stages


def _shapes(in_chans: int, out_chans: int, depth: int) -> list[tuple[int, int, int]]:
    """Return (input channels, output channels, stride) of each block of a stage; the first block is strided."""
    return [(in_chans, out_chans, 2), *[(out_chans, out_chans, 1)] * (depth - 1)]


def _feature_info(channels: Sequence[int]) -> list[dict[str, Any]]:
    stem = {"num_chs": channels[0], "reduction": 4, "module": "stem"}
    return [
        stem,
        *({"num_chs": each, "reduction": 8 << i, "module": f"stages.{i}"} for i, each in enumerate(channels)),
    ]


def _init_weights(module: nn.Module) -> None:
    # Local enhancement, a subclass, is initialised to 0.
    if type(module) is nn.Conv2d:
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        # Size of the mammograms of the paper.
        "input_size": (3, 3328, 2560),
        "pool_size": (26, 20),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({"hct_base": _cfg()})


@register_model
def hct_base(pretrained: bool = False, **kwargs: Any) -> HighResolutionConvTransformer:
    """HCT of the published size: 16 to 256 channels, two blocks per stage, 8 heads in the last two stages."""
    feature_cfg = {"out_indices": (0, 1, 2, 3, 4, 5), "feature_cls": "getter"}
    return build_model_with_cfg(
        HighResolutionConvTransformer, "hct_base", pretrained, feature_cfg=feature_cfg, **kwargs
    )
