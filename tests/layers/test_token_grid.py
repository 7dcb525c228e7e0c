"""The grid belongs to the forward pass that it was told in: in threads, and in blocks that are computed again."""

import copy
import threading

import pytest
import timm
import torch
from timm.layers import set_reentrant_ckpt
from torch import nn
from torch.utils.checkpoint import checkpoint

import perf_vit
from perf_vit.layers.token_grid import TokenGrid

SMALL = {"depth": 2, "embed_dim": 96, "num_heads": 3, "num_classes": 5, "dynamic_img_size": True}
CLUSTERS = {"max_exact_tokens": 0, "num_clusters": 3, "window_size": 2, "num_sinks": 4}
OWN = {
    "performer_vit_tiny_patch16_224": {"num_features": 32, "local_enhancement": True},
    "clustered_vit_tiny_patch16_224": CLUSTERS,
    "performer_vit_rope_small_patch16_224": {"num_features": 32, "local_enhancement": True},
    "clustered_vit_rope_small_patch16_224": {
        "max_exact_tokens": 0,
        "num_clusters": 3,
        "window_size": 2,
        "num_sinks": 4,
    },
}
CONVERTED = [
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "vit_base_patch16_siglip_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_224",
    "vit_base_patch16_rpn_224",
]
# timm checkpoints their blocks with keyword arguments, which the reentrant kind doesn't take.
EVAS = [name for name in (*OWN, *CONVERTED) if "rope" in name or "eva" in name or "dinov3" in name]
# Pixels of two crops each: other numbers of tokens, and as many in another layout.
PAIRS = {"other counts": ((64, 96), (112, 80)), "equal counts": ((32, 128), (64, 64))}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "hct_base":
        model = timm.create_model(name, num_classes=5, depths=(1, 1, 1, 1, 1)).eval()
    elif name in OWN:
        model = timm.create_model(name, **SMALL, attn_kwargs=OWN[name])
    else:
        model = timm.create_model(name, **{**SMALL, "patch_size": 16})
        model = perf_vit.linearize(model, **CLUSTERS)
    with torch.no_grad():
        for parameter in model.parameters() if name != "hct_base" else ():
            # Larger than at first, so that attention matters, convolutions of the values too.
            parameter.copy_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.5))
    return model


def crops(sizes: tuple[tuple[int, int], ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 3, *size, generator=generator) for size in sizes]


def gradients(model: nn.Module, images: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = sum(model(image).square().sum() for image in images)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def reentrant(request):
    set_reentrant_ckpt(request.param)
    yield request.param
    set_reentrant_ckpt(False)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    ("name", "reentrant"),
    [
        pytest.param(name, reentrant, marks=pytest.mark.slow if reentrant and name in CONVERTED[1:] else ())
        for name in (*OWN, *CONVERTED, "hct_base")
        for reentrant in (False, True)
        if not (reentrant and name in EVAS)
    ],
    indirect=["reentrant"],
)
def test_gradients_of_two_checkpointed_crops_are_those_without_checkpoints(name: str, pair: str, reentrant) -> None:
    model, images = build(name), crops(PAIRS[pair])
    expected = gradients(model, images)
    model.set_grad_checkpointing(True)
    if reentrant:
        # Where no input asks for a gradient, the reentrant kind gives none.
        images = [image.requires_grad_() for image in images]
    got = gradients(model, images)
    assert got.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(got[key], expected[key])


@pytest.mark.parametrize("place", ["blocks", "blocks.0", "blocks.0.attn", "two blocks", "the model"])
@pytest.mark.parametrize("reentrant", [False, True], indirect=True)
def test_any_part_may_be_checkpointed(place: str, reentrant) -> None:
    model, images = build("vit_tiny_patch16_224"), crops(PAIRS["equal counts"])
    expected = gradients(model, images)
    images = [image.requires_grad_() for image in images]
    call = model
    if place == "the model":
        call = Checkpointed(model, reentrant)
    elif place == "two blocks":
        model.forward_features = lambda image, **_: features_of_two_blocks(model, image, reentrant)
    else:
        parent, _, child = place.rpartition(".")
        part = Checkpointed(model.get_submodule(place), reentrant)
        setattr(model.get_submodule(parent), child, part)
    got = gradients(call, images)
    for key in expected:
        torch.testing.assert_close(
            {name.replace("part.", ""): value for name, value in got.items()}[key], expected[key]
        )


class Checkpointed(nn.Module):
    """As FSDP's wrapper: a module around the one whose activations are computed again."""

    def __init__(self, part: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.part, self.reentrant = part, reentrant

    def forward(self, x: torch.Tensor, **options) -> torch.Tensor:
        return checkpoint(lambda tokens: self.part(tokens, **options), x, use_reentrant=self.reentrant)


def features_of_two_blocks(model: nn.Module, image: torch.Tensor, reentrant: bool) -> torch.Tensor:
    blocks = model.blocks
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(image)))
    return model.norm(checkpoint(lambda x: blocks[1](blocks[0](x)), tokens, use_reentrant=reentrant))


@pytest.mark.parametrize("reentrant", [False, True], indirect=True)
def test_a_backward_pass_in_another_thread_finds_the_grid(reentrant) -> None:
    model, images = build("vit_tiny_patch16_224"), crops(PAIRS["equal counts"])
    expected = gradients(model, images)
    model.set_grad_checkpointing(True)
    model.zero_grad()
    loss = sum(model(image.requires_grad_()).square().sum() for image in images)
    in_thread(loss.backward)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])


def in_thread(*calls) -> None:
    """Run calls in a thread each; what one of them raises is raised here."""
    raised: list[BaseException] = []

    def run(call) -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if raised:
        raise raised[0]


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", [*OWN, *CONVERTED])
def test_a_model_in_two_threads_sees_the_image_of_each(name: str, pair: str, mode: str) -> None:
    model, images = build(name).eval(), crops(PAIRS[pair])
    with torch.no_grad():
        expected = [model(image) for image in images]
    # Both grids are told before either image goes on.
    barrier = threading.Barrier(2, timeout=60)

    def wait(*_) -> None:
        barrier.wait()

    model.patch_embed.register_forward_hook(wait)
    got: dict[int, torch.Tensor] = {}

    def forward(index: int) -> None:
        with torch.inference_mode(mode == "inference"):
            got[index] = model(images[index]).detach()

    in_thread(lambda: forward(0), lambda: forward(1))
    for index in (0, 1):
        torch.testing.assert_close(got[index], expected[index])


def test_tensors_moved_between_the_passes_are_refused_where_the_grid_is_unclear() -> None:
    model = build("vit_tiny_patch16_224")
    model.set_grad_checkpointing(True)
    # Saved tensors come back as others.
    moved = torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone())
    first, second = crops(PAIRS["equal counts"])
    expected = gradients(model, [first])
    with moved:
        got = gradients(model, [first])
    torch.testing.assert_close(got, expected)
    with moved, pytest.raises(ValueError, match=r"grid that is one of \[\(2, 8\), \(4, 4\)\]; don't move the saved"):
        gradients(model, [first, second])


def test_only_tokens_that_live_are_remembered() -> None:
    model = build("vit_tiny_patch16_224").eval()
    grid = model.blocks[0].attn.grid
    first, second = crops(PAIRS["equal counts"])
    with torch.inference_mode():
        model(first)
        assert not grid._size_by_tokens
    with torch.no_grad():
        for _ in range(5):
            model(second)
    model.patch_embed(first)
    assert not grid._size_by_tokens
    assert grid.size == (2, 8)


def test_a_grid_of_another_thread_is_none() -> None:
    grid = TokenGrid()
    grid.size = (2, 3)
    sizes = []
    in_thread(lambda: sizes.append(grid.size))
    assert sizes == [None]
    assert grid.size_for(6) == (2, 3)
    assert copy.deepcopy(grid).size is None


def test_tensors_without_memory_of_their_own_are_left_alone() -> None:
    grid, tokens = TokenGrid(), torch.zeros(2, 6, 4)
    grid.size = (2, 3)
    torch.func.vmap(lambda each: grid.follow(each) or each)(tokens)
    assert not grid._size_by_tokens
    grid.follow(tokens)
    assert len(grid._size_by_tokens) == 1
