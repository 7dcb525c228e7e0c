"""What of a backbone is trained: all of it, its last blocks, low-rank additions to its attention, or nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.models import group_parameters
from torch import Tensor, nn

from perf_vit.errors import ConfigError, reason_line
from perf_vit.models.backbone import BackboneConfig

__all__ = [
    "BackboneTuning",
    "LoraConfig",
    "backbone_body",
    "backbone_layers",
    "evaluate_frozen",
    "merge_lora",
    "tune_backbone",
]

_LORA_WEIGHT = re.compile(r"(?P<layer>.+)\.lora_(?P<factor>[AB])\.default\.weight")


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank additions to layers whose own weights stay as they are (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        rank: of the addition to each layer.
        alpha: the addition counts alpha / rank times.
        dropout: of its input, while training.
        targets: names of layers inside the attention.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["qkv", "proj"])


@dataclass(kw_only=True)
class BackboneTuning(BackboneConfig):
    """A backbone and how it is trained; `BackboneConfig` has further keys.

    Attributes:
        freeze_backbone: keep all weights of the backbone, and train what lies on top: quicker, and pretrained features
            stay as general as they are.
        freeze_norms: keep the weights and statistics of the backbone's batch norms, which small batches spoil.
        trainable_blocks: how many of the backbone's last blocks (stages of a convolutional one) are trained, 1 or more;
            all of it if left out.
        lora: train low-rank additions to the backbone's attention instead of its weights; takes the extra `peft`.
        grad_checkpointing: compute the activations of each block again in the backward pass rather than store them.
    """

    freeze_backbone: bool = False
    freeze_norms: bool = False
    trainable_blocks: int | None = None
    lora: LoraConfig | None = None
    grad_checkpointing: bool = False

    def __post_init__(self) -> None:
        # Checkpoints hold plain values.
        lora: Any = self.lora
        if isinstance(lora, Mapping):
            self.lora = LoraConfig(**lora)


def tune_backbone(
    backbone: nn.Module, tuning: BackboneTuning, layers_of: Callable[[nn.Module], Mapping[str, int]] | None = None
) -> None:
    """Freeze what is not to be trained, put low-rank additions in, and set up activation checkpointing.

    Args:
        backbone: a network of which everything is trainable.
        tuning: what of it is to be trained.
        layers_of: gives the layers of its parameters, by name; what isn't named lies on top and is trained anyway.
            `backbone_layers` if None.

    Raises:
        ConfigError: more blocks than there are, options that exclude each other, a backbone that doesn't take them, or
            a missing extra.
    """
    layers_of = backbone_layers if layers_of is None else layers_of
    parameters = dict(backbone.named_parameters())
    exclusive = {
        "freeze_backbone": tuning.freeze_backbone,
        "trainable_blocks": tuning.trainable_blocks is not None,
        "lora": tuning.lora is not None,
    }
    given = [name for name, is_given in exclusive.items() if is_given]
    if len(given) > 1:
        raise ConfigError(f"model.{given[0]} and model.{given[1]} both say what of the backbone is trained; give one")
    layers = layers_of(backbone) if given else {}
    if tuning.freeze_backbone:
        for name in layers:
            parameters[name].requires_grad_(False)
    if tuning.trainable_blocks is not None:
        _freeze_first_layers(backbone, tuning.trainable_blocks, layers)
    if tuning.freeze_norms:
        for module in backbone.modules():
            # timm's norm with an activation is one of torch's batch norms, too.
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)
    if tuning.lora is not None:
        _inject_lora(backbone, tuning.lora)
        for name in parameters.keys() - layers.keys():
            parameters[name].requires_grad_(True)
    if tuning.grad_checkpointing:
        # A wrapper around a ViT, unlike those around convolutions, has no switch of its own.
        body: Any = backbone_body(backbone)
        if not hasattr(body, "set_grad_checkpointing"):
            raise ConfigError(f"model.grad_checkpointing: {type(body).__name__} can't; leave it out")
        body.set_grad_checkpointing(True)


def backbone_body(backbone: nn.Module) -> nn.Module:
    """The model inside a `features_only` wrapper, or the wrapper where it holds the layers themselves."""
    body = getattr(backbone, "model", backbone)
    assert isinstance(body, nn.Module)
    return body


def backbone_layers(backbone: nn.Module) -> dict[str, int]:
    """The layer that each parameter of a `features_only` backbone belongs to, counted from the input.

    The layers of a ViT are the stem with the position embeddings, 0, and its blocks, from 1 on; the last norm is part
    of the last block. Those of a convolutional network are its stem and stages.
    """
    body: Any = backbone_body(backbone)
    names = [name for name, _ in backbone.named_parameters()]
    if hasattr(body, "group_matcher"):
        of_body: dict[str, int] = group_parameters(body, body.group_matcher(coarse=False), reverse=True)
        return {name: of_body[name if body is backbone else name.removeprefix("model.")] for name in names}
    of_child = _stages(body)
    return {name: of_child[name.split(".", 1)[0]] for name in names}


def evaluate_frozen(backbone: nn.Module) -> None:
    """Put every part whose weights are all frozen into evaluation mode, so statistics and dropout stay out of it."""
    for module in backbone.modules():
        parameters = list(module.parameters())
        if parameters and not any(each.requires_grad for each in parameters):
            module.eval()


def merge_lora(state: Mapping[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """The state dict of the same network without additions, each added to the weights of its layer."""
    merged = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    factors = {match.group("layer", "factor"): state[name] for name in state if (match := _LORA_WEIGHT.fullmatch(name))}
    for layer, factor in factors:
        if factor == "A":
            addition = factors[layer, "B"] @ factors[layer, "A"]
            weight = f"{layer}.weight"
            merged[weight] = merged[weight] + lora.alpha / lora.rank * addition
    return merged


def _stages(body: nn.Module) -> dict[str, int]:
    """Layer of each child of a flattened network; one ends with each map that the network could give."""
    info: Any = body.feature_info
    ends = {each["module"].replace(".", "_") for each in info.info}
    layers, layer = {}, 0
    for name, _ in body.named_children():
        layers[name] = layer
        layer += name in ends
    return layers


def _freeze_first_layers(backbone: nn.Module, num_trainable: int, layers: Mapping[str, int]) -> None:
    num_layers = 1 + max(layers.values())
    if not 1 <= num_trainable < num_layers:
        raise ConfigError(
            f"model.trainable_blocks must be 1 to {num_layers - 1}, the blocks of the backbone that are used, got "
            f"{num_trainable}; leave it out to train all of it, or give model.freeze_backbone=true to train none"
        )
    for name, parameter in backbone.named_parameters():
        if layers.get(name, num_layers) < num_layers - num_trainable:
            parameter.requires_grad_(False)


def _inject_lora(backbone: nn.Module, lora: LoraConfig) -> None:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"model.lora needs peft ({error}); pip install perf-vit[peft]") from error
    layers = {name.rpartition(".attn.")[2] for name, _ in backbone.named_modules() if ".attn." in name}
    missing = [name for name in lora.targets if name not in layers]
    if missing or not lora.targets:
        raise ConfigError(f"model.lora.targets must be of the attention's layers, {sorted(layers)}, got {lora.targets}")
    try:
        options = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            # The patch embedding has a layer `proj`, too.
            target_modules=rf".*\battn\.({'|'.join(map(re.escape, lora.targets))})",
        )
        peft.inject_adapter_in_model(options, backbone)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.lora: {reason_line(error)}") from error
    for name, module in backbone.named_modules():
        # EVA adds its biases to the bare weights of the layer, past any addition.
        if isinstance(getattr(module, "q_bias", None), Tensor) and "qkv" in lora.targets:
            raise ConfigError(f"model.lora: {name} takes no additions to qkv; choose model.lora.targets=[proj]")
