"""Gradients through the encoder of a slide classifier, of which memory holds a batch of windows at a time."""

import math
import weakref
from collections.abc import Callable, Generator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perf_vit.models import (
    SlideClassificationModelConfig,
    SlideClassificationSpec,
    SlideClassifier,
    build_slide_classifier,
)
from perf_vit.models import batched_pooling as module
from perf_vit.transforms import Normalizer

TILE_PX = 32
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}
PERFORMER = {
    "backbone": "performer_vit_tiny_patch16_224",
    "backbone_kwargs": {**SMALL, "attn_kwargs": {"num_features": 16}},
}
SOFTMAX = {"backbone": "vit_tiny_patch16_224", "backbone_kwargs": SMALL}
CONVOLUTIONS = {"backbone": "resnet10t", "backbone_kwargs": {}}


def classifier(dtype: torch.dtype = torch.float32, drop_rate: float = 0.0, **options) -> SlideClassifier:
    config = {**PERFORMER, "hidden_dim": 16, "attention_dim": 8, "through_encoder": True, **options}
    spec = SlideClassificationSpec(classes=("a", "b"), normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=TILE_PX)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_slide_classifier(SlideClassificationModelConfig(**config, drop_rate=drop_rate), spec)
    return model.to(dtype).train()


def tiles(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 3, TILE_PX, TILE_PX, generator=generator, dtype=dtype)


def reader(windows: Tensor, batch_size: int, valid: Tensor | None = None) -> module.ReadWindows:
    def read() -> Generator[tuple[Tensor, Tensor | None], None, None]:
        for start in range(0, len(windows), batch_size):
            part = slice(start, start + batch_size)
            yield windows[part].clone(), None if valid is None else valid[part]

    return read


def gradients(model: SlideClassifier, logits: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(logits()[None], torch.tensor([1])).backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def plain(model: SlideClassifier, windows: Tensor, valid: Tensor | None = None) -> Callable[[], Tensor]:
    mask = torch.ones(1, len(windows), dtype=torch.bool)
    return lambda: model(model.encode(windows, valid)[None], mask)[0][0]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest gradient of each parameter."""
    assert found.keys() == expected.keys()
    largest = max(float(each.abs().max()) for each in expected.values())
    for name, gradient in expected.items():
        scale = float(gradient.norm())
        # Some gradients are 0 but for rounding, such as that of the attention's last bias.
        if scale > tolerance * largest:
            assert float((found[name] - gradient).norm()) <= tolerance * scale, name
        else:
            assert float(found[name].norm()) <= tolerance * largest, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("batch_size", [16, 200, 256])
def test_gradients_at_200_tiles_equal_those_of_plain_backpropagation(dtype, tolerance, batch_size) -> None:
    model, windows = classifier(dtype), tiles(200, dtype)
    logits = model.classify_windows(reader(windows, batch_size))
    assert torch.allclose(logits, plain(model, windows)(), rtol=tolerance, atol=tolerance)
    found = gradients(model, lambda: model.classify_windows(reader(windows, batch_size)))
    expected = gradients(model, plain(model, windows))
    assert {name.split(".")[0] for name in expected} == {"encoder", "project", "pool", "classifier"}
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize(
    "backbone", [SOFTMAX, CONVOLUTIONS, {**PERFORMER, "pool": "map"}], ids=["softmax", "cnn", "map"]
)
def test_gradients_of_other_encoders_are_equal(backbone) -> None:
    model, windows = classifier(torch.float64, **backbone), tiles(7, torch.float64)
    found = gradients(model, lambda: model.classify_windows(reader(windows, 3)))
    assert_close(found, gradients(model, plain(model, windows)), 1e-9)


def test_patches_without_a_valid_pixel_are_left_out_in_both_passes() -> None:
    model, windows = classifier(torch.float64), tiles(7, torch.float64)
    valid = torch.ones(7, TILE_PX, TILE_PX, dtype=torch.bool)
    valid[2, :16], valid[5, :, 16:] = False, False
    found = gradients(model, lambda: model.classify_windows(reader(windows, 3, valid)))
    assert_close(found, gradients(model, plain(model, windows, valid)), 1e-9)
    other = gradients(model, plain(model, windows))
    assert not torch.allclose(found["encoder.patch_embed.proj.weight"], other["encoder.patch_embed.proj.weight"])


def test_large_scores_dont_overflow() -> None:
    model, windows = classifier(), tiles(20)
    with torch.no_grad():
        model.pool.weight.weight.mul_(1e4)
    found = gradients(model, lambda: model.classify_windows(reader(windows, 3)))
    assert all(torch.isfinite(each).all() for each in found.values())
    assert torch.allclose(model.classify_windows(reader(windows, 3)), plain(model, windows)(), atol=1e-4)


def test_dropout_and_drop_path_of_a_batch_repeat_in_the_second_pass() -> None:
    kwargs = {**PERFORMER["backbone_kwargs"], "drop_path_rate": 0.5, "proj_drop_rate": 0.2}
    model, windows = classifier(torch.float64, 0.5, backbone_kwargs=kwargs), tiles(8, torch.float64)

    def with_seeds() -> Tensor:
        hidden = []
        for index in range(0, 8, 3):
            torch.manual_seed(module._batch_seed(5, index // 3))
            hidden.append(model.project(model.encode(windows[index : index + 3])))
        pooled, _ = model.pool(torch.cat(hidden)[None], torch.ones(1, 8, dtype=torch.bool))
        return model.classifier(pooled)[0]

    before = torch.get_rng_state()
    found = gradients(model, lambda: model.classify_windows(reader(windows, 3), seed=5))
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(found, gradients(model, with_seeds), 1e-9)
    other = gradients(model, lambda: model.classify_windows(reader(windows, 3), seed=6))
    assert not torch.allclose(found["classifier.weight"], other["classifier.weight"])


def test_random_numbers_differ_between_batches() -> None:
    assert len({module._batch_seed(seed, index) for seed in range(5) for index in range(5)}) == 25


def test_autocast_is_the_same_in_both_passes() -> None:
    model, windows = classifier(), tiles(40)
    seen = []
    model.encoder.norm.register_forward_pre_hook(
        lambda *_: seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
    )

    def logits(of: Callable[[], Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return of()

    found = gradients(model, lambda: logits(lambda: model.classify_windows(reader(windows, 16))))
    assert seen == [(False, True)] * 3 + [(True, True)] * 3
    expected = gradients(model, lambda: logits(plain(model, windows)))
    for name, each in expected.items():
        if each.norm() > 1e-3:
            assert F.cosine_similarity(found[name].flatten(), each.flatten(), dim=0) > 0.99, name


def test_a_batch_of_pixels_is_gone_before_the_next_but_one_is_read() -> None:
    model, windows = classifier(), tiles(24)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def read() -> Generator[tuple[Tensor, None], None, None]:
        nonlocal most
        for start in range(0, 24, 3):
            most = max(most, len(alive))
            batch = windows[start : start + 3].clone()
            alive.add(batch)
            yield batch, None
            del batch

    gradients(model, lambda: model.classify_windows(read))
    assert 1 <= most <= 2


def test_weights_that_change_between_the_passes_are_refused() -> None:
    model, windows = classifier(), tiles(4)
    loss = model.classify_windows(reader(windows, 2)).sum()
    with torch.no_grad():
        model.project[1].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_an_encoder_that_is_trained_has_gradients_and_drops() -> None:
    model = classifier(through_encoder=False)
    assert not model.encoder.training
    assert not any(each.requires_grad for each in model.encoder.parameters())
    trained = classifier()
    assert trained.encoder.training
    assert not trained.eval().encoder.training
    norms = [each for each in classifier(**CONVOLUTIONS).modules() if isinstance(each, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(each.training for each in norms)


def test_without_gradients_there_is_one_pass() -> None:
    model, number = classifier().eval(), 0

    def read() -> Generator[tuple[Tensor, None], None, None]:
        nonlocal number
        number += 1
        yield tiles(4), None

    with torch.no_grad():
        assert math.isfinite(float(model.classify_windows(read).sum()))
    assert number == 1
