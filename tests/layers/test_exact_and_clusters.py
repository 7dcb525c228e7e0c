"""Softmax attention in small images and clusters in large ones, by `max_exact_tokens`."""

from collections import Counter

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import perf_vit
from perf_vit.conversion import load_converted, save_converted
from perf_vit.layers import ClusteredMixer, ClusteredOptions, SoftmaxOptions
from perf_vit.ops import clustered_attention

NAMES = ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"]
CLUSTERS = {"window_size": 2, "num_sinks": 3, "num_clusters": 4}
GRID = (4, 5)


def build(name: str = NAMES[0], **kwargs) -> nn.Module:
    torch.manual_seed(0)
    options = {"depth": 2, "embed_dim": 96, "num_heads": 3, "num_classes": 5, "patch_size": 16, "img_size": 64}
    model = timm.create_model(name, **{**options, "dynamic_img_size": True, **kwargs}).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "gamma" in key:
                parameter.fill_(0.5)
            elif parameter.ndim == 2:
                parameter.mul_(3)
    return model


def images(height: int = 64, width: int = 80) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def tokens(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of one prefix token and a grid of 4 x 5."""
    return torch.randn(3, 2, 3, 21, 32, generator=torch.Generator().manual_seed(0)).to(dtype).unbind(0)


@pytest.mark.parametrize("name", NAMES)
def test_up_to_the_limit_a_model_equals_the_softmax_model_with_its_gradients(name: str) -> None:
    softmax = build(name)
    converted = perf_vit.linearize(softmax, max_exact_tokens=20, **CLUSTERS)
    for size in ((64, 80), (32, 160), (80, 64), (48, 48)):
        expected, actual = softmax(images(*size)), converted(images(*size))
        assert torch.equal(actual, expected)
        models = (softmax, converted)
        gradients = [torch.autograd.grad(model(images(*size)).square().sum(), model.parameters()) for model in models]
        assert all(torch.equal(*each) for each in zip(*gradients, strict=True))


@pytest.mark.parametrize("grad", [False, True])
def test_above_the_limit_clusters_run_in_evaluation_and_training(grad: bool) -> None:
    softmax = build()
    limited = perf_vit.linearize(softmax, max_exact_tokens=19, **CLUSTERS)
    forced = perf_vit.linearize(softmax, max_exact_tokens=0, **CLUSTERS)
    with torch.set_grad_enabled(grad):
        assert torch.equal(limited(images()), forced(images()))
        assert not torch.allclose(limited(images()), softmax(images()), atol=1e-4)
        assert not torch.allclose(forced(images(48, 48)), softmax(images(48, 48)), atol=1e-4)
        assert torch.equal(limited(images(48, 48)), softmax(images(48, 48)))


def test_a_mixer_is_softmax_up_to_the_limit_and_clustered_attention_above() -> None:
    q, k, v = tokens(torch.float64)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    clusters = clustered_attention(q, k, v, GRID, **CLUSTERS, num_prefix_tokens=1)
    assert not torch.allclose(clusters, exact, atol=1e-3)
    for limit, expected in ((20, exact), (19, clusters), (0, clusters)):
        options = ClusteredOptions(**CLUSTERS, num_prefix_tokens=1, max_exact_tokens=limit)
        torch.testing.assert_close(ClusteredMixer(options, 32)(q, k, v, GRID), expected)


@pytest.mark.parametrize(
    ("options", "grid", "is_exact"),
    [
        ({}, (48, 48), True),
        ({}, (36, 64), True),
        ({}, (48, 49), False),
        ({"max_exact_tokens": 0}, (2, 2), False),
        # Windows of 16 or 256 sinks hold all tokens.
        ({"max_exact_tokens": 1}, (16, 16), True),
        ({"max_exact_tokens": 1}, (8, 32), True),
        ({"max_exact_tokens": 1, "num_sinks": 0}, (8, 32), False),
        ({"max_exact_tokens": 1}, (17, 16), False),
        ({"max_exact_tokens": 1, "window_size": 0, "num_sinks": 64}, (8, 8), True),
        ({"max_exact_tokens": 1, "window_size": 64}, (50, 64), True),
    ],
)
def test_the_rule_depends_on_the_grid_alone(options: dict, grid: tuple[int, int], is_exact: bool) -> None:
    assert ClusteredOptions(**options).is_exact(grid) == is_exact


def test_the_largest_square_image_with_softmax_attention_is_known() -> None:
    limits = [({}, 48), ({"max_exact_tokens": 0}, 0), ({"max_exact_tokens": 99}, 16), ({"window_size": 60}, 60)]
    assert [ClusteredOptions(**options).max_exact_side() for options, _ in limits] == [side for _, side in limits]
    assert SoftmaxOptions().max_exact_side() == 4096


def test_masked_keys_are_ignored_as_by_clusters() -> None:
    q, k, v = tokens()
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[0, 7:15], mask[1] = False, False
    poisoned = [x.masked_fill(~mask[:, None, :, None], float("nan")).requires_grad_() for x in (k, v)]
    options = {"window_size": 8, "num_sinks": 0, "num_clusters": 4, "num_prefix_tokens": 1}
    exact, forced = (ClusteredMixer(ClusteredOptions(max_exact_tokens=n, **options), 32) for n in (20, 0))
    out = exact(q, *poisoned, GRID, mask)
    torch.testing.assert_close(out, forced(q, k, v, GRID, mask), rtol=1e-4, atol=1e-5)
    assert not out[1].any()
    gradients = torch.autograd.grad(out.square().sum(), poisoned)
    assert all(each.isfinite().all() and not each[0, :, 7:15].any() and not each[1].any() for each in gradients)


@torch.no_grad()
def test_layers_have_limits_of_their_own_which_are_saved(tmp_path) -> None:
    per_layer = {0: {"max_exact_tokens": 20}, 1: {"mixer": "performer", "num_features": 16}}
    model = perf_vit.linearize(build(depth=3), per_layer=per_layer, max_exact_tokens=9, **CLUSTERS)
    loaded = load_converted(save_converted(model, tmp_path / "saved"))
    assert [getattr(block.attn.options, "max_exact_tokens", None) for block in loaded.blocks] == [20, None, 9]
    for size in ((48, 48), (64, 80), (80, 80)):
        assert torch.equal(loaded(images(*size)), model(images(*size)))


@pytest.mark.parametrize("value", [-1, 2.5, "auto"])
def test_a_limit_that_is_no_number_of_tokens_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="max_exact_tokens must be"):
        perf_vit.linearize(build(), max_exact_tokens=value)


@torch.no_grad()
def test_softmax_attention_compiles_and_exports() -> None:
    model = perf_vit.linearize(build(dynamic_img_size=False, depth=1))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    exported = torch.export.export(model, (images(64, 64),)).module()
    for each in (compiled, exported):
        torch.testing.assert_close(each(images(64, 64)), model(images(64, 64)), rtol=1e-4, atol=1e-5)


class CountOperations(TorchDispatchMode):
    """Count of tensor operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("side", [37, 64, 200])
@pytest.mark.parametrize("name", NAMES)
def test_exact_models_run_the_operations_of_timms_model_at_any_size(name: str, side: int, grad: bool) -> None:
    with torch.device("meta"):
        softmax = timm.create_model(name, depth=2, img_size=16 * side, patch_size=16, num_classes=0).eval()
        x = torch.empty(1, 3, 16 * side, 16 * side)
    counts = []
    for model in (softmax, perf_vit.linearize(softmax, max_exact_tokens=10**6)):
        with torch.set_grad_enabled(grad), CountOperations() as operations:
            model.forward_features(x)
        counts.append(operations.counts)
    assert counts[1] == counts[0]
