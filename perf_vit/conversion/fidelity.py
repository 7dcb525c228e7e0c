"""Fidelity of a converted model to its softmax model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.conversion.linearize import convertible_layers
from perf_vit.layers import LinearizedAttention
from perf_vit.layers.token_grid import watch_patch_embed

__all__ = ["attention_errors", "eval_mode", "final_errors", "image_batches", "token_cosines"]


@torch.no_grad()
def attention_errors(
    softmax: Any,
    alternatives: Mapping[int, Sequence[LinearizedAttention]],
    images: Iterable[Tensor],
    on_step: Callable[[], None] = lambda: None,
) -> dict[int, list[float]]:
    """Measure the relative error of converted attention layers on their inputs in the softmax model.

    Args:
        softmax: Model that the layers were converted from.
        alternatives: Converted layers to measure, by layer index.
        images: Standardised images, [B, C, H, W] or [C, H, W].
        on_step: Callback after each alternative and image.

    Returns:
        |out - exact| / |exact| by layer index and alternative, Frobenius norms over all tokens of all images.
    """
    wrong = {index: torch.zeros(len(layers), dtype=torch.float64) for index, layers in alternatives.items()}
    total = dict.fromkeys(alternatives, 0.0)

    def compare(index: int, arguments: tuple[Any, ...], options: dict[str, Any], exact: Tensor) -> None:
        total[index] += float(exact.double().square().sum())
        for position, layer in enumerate(alternatives[index]):
            wrong[index][position] += float((layer(*arguments, **options) - exact).double().square().sum())
            on_step()

    found = convertible_layers(softmax)
    with eval_mode(softmax), ExitStack() as hooks:
        for grid in {id(layer.grid): layer.grid for layers in alternatives.values() for layer in layers}.values():
            if hasattr(softmax, "patch_embed"):
                hooks.callback(watch_patch_embed(softmax, grid).remove)
        for index in alternatives:
            hook = found[index][1].register_forward_hook(
                lambda _, arguments, options, exact, index=index: compare(index, arguments, options, exact),
                with_kwargs=True,
            )
            hooks.callback(hook.remove)
        for batch in image_batches(softmax, images):
            softmax.forward_features(batch)
    return {index: [(float(x) / total[index]) ** 0.5 for x in wrong[index]] for index in alternatives}


@torch.no_grad()
def final_errors(
    softmax: Any,
    alone: Mapping[int, Sequence[LinearizedAttention]],
    images: Sequence[Tensor],
    on_step: Callable[[], None] = lambda: None,
) -> dict[int, float]:
    """Measure the change of the final tokens, 1 - mean cosine similarity, with one layer converted at a time.

    Args:
        softmax: Model that the layers were converted from.
        alone: One converted layer in a list, by layer index.
        images: Standardised images, [B, C, H, W] or [C, H, W].
        on_step: Callback after each layer and image.
    """
    found = convertible_layers(softmax)
    moved = dict.fromkeys(alone, 0.0)
    with eval_mode(softmax), ExitStack() as hooks:
        for (layer,) in alone.values():
            if hasattr(softmax, "patch_embed"):
                hooks.callback(watch_patch_embed(softmax, layer.grid).remove)
        for batch in image_batches(softmax, images):
            exact = softmax.forward_features(batch).float()
            for index, (layer,) in alone.items():
                replace = found[index][1].register_forward_hook(
                    lambda _, arguments, options, __, layer=layer: layer(*arguments, **options), with_kwargs=True
                )
                with ExitStack() as single:
                    single.callback(replace.remove)
                    tokens = softmax.forward_features(batch).float()
                moved[index] += 1 - float(F.cosine_similarity(tokens, exact, dim=-1).mean())
                on_step()
    return {index: total / len(images) for index, total in moved.items()}


@torch.no_grad()
def token_cosines(softmax: Any, converted: Any, images: Iterable[Tensor]) -> tuple[list[float], list[float]]:
    """Compute the cosine similarity of the final tokens of two models.

    Args:
        softmax: Softmax model.
        converted: Converted model.
        images: Standardised images, [B, C, H, W] or [C, H, W].

    Returns:
        Mean over the patch tokens of each image, and the class token of each image; the latter is empty for models
        without a class token.
    """
    patches, class_tokens = [], []
    num_prefix_tokens = getattr(softmax, "num_prefix_tokens", 0)
    has_class_token = getattr(softmax, "cls_token", None) is not None
    with eval_mode(softmax), eval_mode(converted):
        for batch in image_batches(softmax, images):
            before, after = (model.forward_features(batch).float() for model in (softmax, converted))
            cosines = F.cosine_similarity(before, after, dim=-1)
            patches += cosines[:, num_prefix_tokens:].mean(dim=1).tolist()
            class_tokens += cosines[:, 0].tolist() if has_class_token else []
    return patches, class_tokens


def image_batches(model: nn.Module, images: Iterable[Tensor]) -> Iterable[Tensor]:
    """Return images as batches, [B, C, H, W], on the model's device."""
    device = next(model.parameters()).device
    return ((image if image.ndim == 4 else image.unsqueeze(0)).to(device) for image in images)


@contextmanager
def eval_mode(model: nn.Module) -> Any:
    """Switch a model to evaluation mode and restore its mode on exit."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
