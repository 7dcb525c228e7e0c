"""Fine-tuning of backbones: full, last blocks, LoRA, or frozen."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.models import group_parameters
from torch import Tensor, nn

from perf_vit.errors import ConfigError, extra, reason_line
from perf_vit.models.backbone import BackboneConfig, is_random

__all__ = [
    "BackboneTuning",
    "LoraConfig",
    "backbone_body",
    "backbone_layers",
    "batch_norms",
    "check_not_random",
    "evaluate_frozen",
    "merge_lora",
    "tune_backbone",
]

_LORA_WEIGHT = re.compile(r"(?P<layer>.+)\.lora_(?P<factor>[AB])\.default\.weight")


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adaptation (LoRA) of frozen layers (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        rank: Rank of the update of each layer.
        alpha: Scale of the update, which is multiplied by alpha / rank.
        dropout: Dropout of the update's input during training.
        targets: Names of layers of the attention.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["qkv", "proj"])

    @staticmethod
    def from_short(value: Any, key: str) -> dict[str, Any] | None:
        """Return the keys that true in place of a mapping stands for: all defaults."""
        return {} if str(value).lower() in ("true", "yes", "on") else None

    @staticmethod
    def short_schema() -> dict[str, Any]:
        """Return the JSON schema of what `from_short` takes."""
        return {"const": True}


@dataclass(kw_only=True)
class BackboneTuning(BackboneConfig):
    """Backbone and how it is trained; `BackboneConfig` has further keys.

    Attributes:
        freeze_backbone: Whether to freeze all weights of the backbone, which is faster and keeps pretrained features
            general.
        freeze_norms: Whether to freeze weights and statistics of the backbone's batch norms, which suffer from small
            batches.
        trainable_blocks: Number of the backbone's last blocks (stages of a CNN) to train, at least 1; None for all.
        lora: Low-rank adaptation of the backbone's attention, with frozen weights; needs the extra `peft`.
        grad_checkpointing: Whether to recompute activations in the backward pass to save memory.
    """

    freeze_backbone: bool = False
    freeze_norms: bool = False
    trainable_blocks: int | None = None
    lora: LoraConfig | None = None
    grad_checkpointing: bool = False

    def __post_init__(self) -> None:
        # Checkpoints store plain values.
        lora: Any = self.lora
        if isinstance(lora, Mapping):
            self.lora = LoraConfig(**lora)


def tune_backbone(
    backbone: nn.Module, tuning: BackboneTuning, layers_of: Callable[[nn.Module], Mapping[str, int]] | None = None
) -> None:
    """Freeze weights, inject LoRA and set up gradient checkpointing.

    Args:
        backbone: Network with all weights trainable.
        tuning: Configuration of the fine-tuning.
        layers_of: Function that returns the layer index of parameters by name; parameters that it omits are always
            trained. None for `backbone_layers`.

    Raises:
        ConfigError: There are fewer blocks than requested, options exclude each other, the backbone doesn't support
            them, or the extra is missing.
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
        raise ConfigError(f"model.{given[0]} and model.{given[1]} both select the trained weights; give only one")
    layers = layers_of(backbone) if given else {}
    if tuning.freeze_backbone:
        for name in layers:
            parameters[name].requires_grad_(False)
    if tuning.trainable_blocks is not None:
        _freeze_first_layers(backbone, tuning.trainable_blocks, layers)
    if tuning.freeze_norms:
        _freeze_batch_norms(backbone)
    if tuning.lora is not None:
        _inject_lora(backbone, tuning.lora)
        for name in parameters.keys() - layers.keys():
            parameters[name].requires_grad_(True)
    if tuning.grad_checkpointing:
        # The wrapper of a ViT, unlike that of a CNN, has no `set_grad_checkpointing`.
        body: Any = backbone_body(backbone)
        if not hasattr(body, "set_grad_checkpointing"):
            raise ConfigError(f"model.grad_checkpointing: {type(body).__name__} doesn't support it; leave it out")
        body.set_grad_checkpointing(True)


def check_not_random(config: BackboneConfig) -> None:
    """Refuse to freeze random weights of a backbone, which would never learn anything.

    Raises:
        ConfigError: The backbone, or a part of it, is random and frozen.
    """
    frozen = [
        name
        for name in ("freeze_backbone", "trainable_blocks", "lora")
        if getattr(config, name, None) not in (None, False)
    ]
    is_encoder = not isinstance(config, BackboneTuning)
    if is_random(config) and (frozen or is_encoder):
        what = "the encoder, which is not trained," if is_encoder else f"model.{frozen[0]} freezes weights that"
        raise ConfigError(
            f"{what} would be random: give model.pretrained=true, model.weights=FILE, or as model.backbone the folder "
            "of a trained model"
        )


def backbone_body(backbone: nn.Module) -> nn.Module:
    """Return the model inside a `features_only` wrapper, or the wrapper if it holds the layers itself."""
    body = getattr(backbone, "model", backbone)
    assert isinstance(body, nn.Module)
    return body


def backbone_layers(backbone: nn.Module) -> dict[str, int]:
    """Return the layer index, from the input, of each parameter of a `features_only` backbone, by name.

    Layers of a ViT are the stem with the position embeddings, 0, and the blocks, from 1; the final norm belongs to the
    last block. Layers of a CNN are its stem and stages.
    """
    body: Any = backbone_body(backbone)
    names = [name for name, _ in backbone.named_parameters()]
    if hasattr(body, "group_matcher"):
        of_body: dict[str, int] = group_parameters(body, body.group_matcher(coarse=False), reverse=True)
        return {name: of_body[name if body is backbone else name.removeprefix("model.")] for name in names}
    of_child = _stages(body)
    return {name: of_child[name.split(".", 1)[0]] for name in names}


def evaluate_frozen(backbone: nn.Module) -> None:
    """Set every module whose weights are all frozen to evaluation mode, to keep its statistics and disable dropout."""
    for module in backbone.modules():
        parameters = list(module.parameters())
        if parameters and not any(each.requires_grad for each in parameters):
            module.eval()


def merge_lora(state: Mapping[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """Return the state dict of the network without LoRA, with the updates merged into the weights."""
    merged = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    factors = {match.group("layer", "factor"): state[name] for name in state if (match := _LORA_WEIGHT.fullmatch(name))}
    for layer, factor in factors:
        if factor == "A":
            addition = factors[layer, "B"] @ factors[layer, "A"]
            weight = f"{layer}.weight"
            merged[weight] = merged[weight] + lora.alpha / lora.rank * addition
    return merged


def _stages(body: nn.Module) -> dict[str, int]:
    """Return the stage index of each child of a flattened network; a stage ends with each available feature map."""
    info: Any = body.feature_info
    ends = {each["module"].replace(".", "_") for each in info.info}
    layers, layer = {}, 0
    for name, _ in body.named_children():
        layers[name] = layer
        layer += name in ends
    return layers


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Return the batch norms of a model."""
    # timm's norms with an activation are subclasses, too.
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _freeze_batch_norms(backbone: nn.Module) -> None:
    norms = batch_norms(backbone)
    if not norms:
        name = type(backbone_body(backbone)).__name__
        raise ConfigError(f"model.freeze_norms: {name} has no batch norms; leave it out")
    for norm in norms:
        norm.requires_grad_(False)


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
    with extra("peft", "model.lora"):
        import peft
    layers = {name.rpartition(".attn.")[2] for name, _ in backbone.named_modules() if ".attn." in name}
    missing = [name for name in lora.targets if name not in layers]
    if missing or not lora.targets:
        raise ConfigError(f"model.lora.targets must be layers of the attention, {sorted(layers)}, got {lora.targets}")
    try:
        options = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            # The patch embedding also has a layer `proj`.
            target_modules=rf".*\battn\.({'|'.join(map(re.escape, lora.targets))})",
        )
        peft.inject_adapter_in_model(options, backbone)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.lora: {reason_line(error)}") from error
    for name, module in backbone.named_modules():
        # EVA uses the weights of the layer directly, bypassing LoRA.
        if isinstance(getattr(module, "q_bias", None), Tensor) and "qkv" in lora.targets:
            raise ConfigError(f"model.lora: {name} doesn't support LoRA of qkv; choose model.lora.targets=[proj]")
